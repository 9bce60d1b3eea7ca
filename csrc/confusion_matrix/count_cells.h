// Counting pairs of labels on the CPU, and saying what is wrong with labels out of range: shared by
// the ops that end in a confusion matrix.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../common/common.h"
#include "confusion_matrix_simd.h"

namespace {

using namespace pyseg;

constexpr int64_t kMaxConfusionClasses = 4096;  // its table of counts has 64 MiB per thread

// Counts of pairs of labels, [images, (C + 2)^2]. Every worker has tables of its own, of one image
// at a time: sums of integers, so it makes no difference who counts what.
class PairCounts {
 public:
  PairCounts(int64_t images, int64_t classes)
      : cells_((classes + 2) * (classes + 2)),
        copies_(cells_ <= 4096 ? counting::kTableCopies : 1),
        tables_(images * cells_),
        workers_(torch::stable::get_num_threads()) {}

  // Pixels that are worth handing to a worker at once.
  int64_t piece() const { return std::max<int64_t>(int64_t(1) << 15, 4 * cells_); }

  template <class T>
  void add(int64_t worker, int64_t image, const T* prediction, const T* target, int64_t n,
           const LabelCoder<T>& coder) {
    constexpr int64_t kMost = int64_t(1) << 31;  // which 32 bits can count
    Worker& own = workers_[worker];
    if (own.image != image || own.pixels + n > kMost) {
      flush(own);
      own.image = image, own.pixels = 0;
      own.table.assign(cells_ * copies_, 0);
    }
    own.pixels += n;
    counting::count_at(level_, prediction, target, n, coder, own.table.data(), cells_, copies_);
  }

  // After all were added: the counts of an image.
  const int64_t* table(int64_t image) {
    for (Worker& worker : workers_) flush(worker);
    return tables_.data() + image * cells_;
  }

 private:
  struct Worker {
    int64_t image = -1, pixels = 0;
    std::vector<uint32_t> table;
  };

  void flush(Worker& worker) {
    if (worker.image < 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t* const table = tables_.data() + worker.image * cells_;
    for (size_t i = 0; i < worker.table.size(); ++i) table[i / copies_] += worker.table[i];
    worker.image = -1;
  }

  const SimdLevel level_ = simd_level();  // here, as no thread may throw
  const int64_t cells_;
  const int copies_;
  std::vector<int64_t> tables_;
  std::vector<Worker> workers_;
  std::mutex mutex_;
};

// Splits a table of (C + 2)^2 counts. Returns how many targets and predictions are out of range.
inline std::pair<int64_t, int64_t> split_table(const int64_t* table, int64_t classes,
                                               int64_t* matrix,    // [C, C]
                                               int64_t* missed) {  // [C]
  const int64_t width = classes + 2;
  int64_t bad_targets = 0, bad_predictions = 0;
  for (int64_t row = 0; row < classes; ++row) {
    std::copy_n(table + row * width, classes, matrix + row * classes);
    missed[row] = table[row * width + classes];
    bad_predictions += table[row * width + classes + 1];
  }
  for (int64_t column = 0; column < width; ++column)
    bad_targets += table[(classes + 1) * width + column];
  return {bad_targets, bad_predictions};
}

inline std::string likely_cause(const std::set<int64_t>& values, int64_t classes, int64_t ignore) {
  const int64_t low = *values.begin(), high = *values.rbegin();
  if (low == 255 && high == 255 && ignore != 255 && classes > 2)
    return "255 is the usual void label: pass ignore_index=255";
  if (low == 255 && high == 255) return "0/255 masks hold class 1 as 255: divide them by 255";
  if (low == classes && high == classes)
    return "labels seem to be 1-based: subtract 1 (reduce_zero_label), or raise num_classes";
  if (classes == 19 && low >= -1 && high <= 33)
    return "these look like Cityscapes ids, not train ids: use the *_labelTrainIds.png files";
  if (low < 0) return "negative labels are only allowed as ignore_index";
  return "wrong num_classes, or a colour image read as labels";
}

// The slow path: only called when there is something to complain about.
template <class T>
[[noreturn]] void report(const char* name, const T* labels, const T* target, int64_t n,
                         int64_t pixels, int64_t row_length, const LabelCoder<T>& coder,
                         int64_t ignore) {
  const uint32_t bad = coder.num_classes + 1;
  std::set<int64_t> values;
  int64_t first = -1, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (coder(labels[i]) != bad || (labels != target && coder(target[i]) >= coder.num_classes))
      continue;
    if (first < 0) first = i;
    ++total;
    if (values.size() < 64) values.insert(int64_t(labels[i]));
  }
  std::ostringstream list;
  int shown = 0;
  for (const int64_t value : values) {
    if (shown == 5) {
      list << ", ...";
      break;
    }
    list << (shown++ ? ", " : "") << value;
  }
  throw std::invalid_argument(text(
      name, " holds labels outside [0, ", coder.num_classes, ") that are not ignore_index=", ignore,
      ": ", list.str(), " (", total, " pixels, the first at image ", first / pixels, ", row ",
      first % pixels / row_length, ", column ", first % row_length,
      "); likely cause: ", likely_cause(values, coder.num_classes, ignore)));
}

}  // namespace
