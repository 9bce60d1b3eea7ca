// Counting pairs of labels on the CPU, and saying what is wrong with labels out of range: shared by
// the ops that end in a confusion matrix.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../common/common.h"
#include "confusion_matrix.h"

namespace {

using namespace pyseg;

constexpr int64_t kBlock = 512;  // pixels coded at a time: these stay in the L1 cache
constexpr int64_t kRun = 32;     // pixels that are counted at once where they are all alike
constexpr int kCopies = 8;       // of a small table of counts
constexpr int64_t kMaxConfusionClasses = 4096;  // its table of counts has 64 MiB per thread

// A code of a label is as wide as the label where it can be, because changing the width between
// comparing and selecting costs more than both.
template <class P, class T, class PCode, class TCode, class Cell>
PYSEG_MULTIVERSION void encode(const P* __restrict prediction, const T* __restrict target,
                               int64_t n, LabelCoder<P> columns, LabelCoder<T> rows,
                               Cell* __restrict cells) {
  const Cell width = Cell(rows.num_classes + 2);
  for (int64_t i = 0; i < n; ++i) {
    const TCode row = rows.template code<TCode>(target[i]);
    const PCode column = columns.template code<PCode>(prediction[i]);
    cells[i] = Cell(Cell(Cell(row) * width) + Cell(column));
  }
}

// Adjacent pixels go to different copies of the table: an increment that follows another of the
// same cell would wait for its store. Meanwhile the labels that `encode` reads next are fetched,
// or counting and reading memory would take turns.
template <class P, class T, class Cell, int Copies>
PYSEG_MULTIVERSION void count(const Cell* cells, int64_t n, uint32_t* table, int64_t table_size,
                              const P* next_prediction, const T* next_target) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int64_t k = i; k < i + kRun; k += kLine) {
      __builtin_prefetch(next_prediction + k);
      __builtin_prefetch(next_target + k);
    }
    const Cell first = cells[i];
    Cell different = 0;
    for (int64_t k = 0; k < kRun; ++k) different |= Cell(cells[i + k] ^ first);
    if (different == 0) {  // label maps are mostly flat
      table[first] += uint32_t(kRun);
      continue;
    }
    for (int64_t k = 0; k < kRun; k += Copies)
      for (int copy = 0; copy < Copies; ++copy) ++table[copy * table_size + cells[i + k + copy]];
  }
  for (; i < n; ++i) ++table[cells[i]];
}

// How many copies of a table of (C + 2)^2 counts `count_range` uses.
inline int table_copies(int64_t cells) { return cells <= 4096 ? kCopies : 1; }

// Adds up n pixels; `table` holds `copies` tables.
template <class P, class T, class Cell>
void count_range(const P* prediction, const T* target, int64_t n, const LabelCoder<P>& columns,
                 const LabelCoder<T>& rows, uint32_t* table, int64_t table_size, int copies) {
  using PCode = std::make_unsigned_t<P>;
  using TCode = std::make_unsigned_t<T>;
  Cell cells[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    const P* p = prediction + begin;
    const T* t = target + begin;
    if ((sizeof(P) > 1 && sizeof(T) > 1) || rows.num_classes <= 254)
      encode<P, T, PCode, TCode, Cell>(p, t, size, columns, rows, cells);
    else
      encode<P, T, Cell, Cell, Cell>(p, t, size, columns, rows, cells);
    if (copies == kCopies)
      count<P, T, Cell, kCopies>(cells, size, table, table_size, p + kBlock, t + kBlock);
    else
      count<P, T, Cell, 1>(cells, size, table, table_size, p + kBlock, t + kBlock);
  }
}

// Adds a thread's tables of one image to the image's: sums of integers, so in any order.
inline void add_tables(const std::vector<uint32_t>& local, int64_t cells, std::mutex& mutex,
                       int64_t* table) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < local.size(); ++i) table[i % cells] += local[i];
}

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
