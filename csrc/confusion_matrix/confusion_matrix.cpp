// Confusion matrix on the CPU. The smallest op of the project, commented as a template for others:
// schema and registration at the end, argument checks and allocation before them, the hot loops on
// top, under PYSEG_MULTIVERSION.
#include "confusion_matrix.h"

#include <algorithm>
#include <mutex>
#include <set>
#include <vector>

#include "../common/common.h"

namespace {

using namespace pyseg;

constexpr int64_t kBlock = 512;        // pixels coded at a time: these stay in the L1 cache
constexpr int64_t kRun = 32;           // pixels that are counted at once where they are all alike
constexpr int kCopies = 8;             // of a small table of counts
constexpr int64_t kMaxClasses = 4096;  // its table of counts has 64 MiB per thread

// Label holds the code of a label: as wide as T where it can be, because changing the width between
// comparing and selecting costs more than both.
template <class T, class Label, class Cell>
PYSEG_MULTIVERSION void encode(const T* __restrict prediction, const T* __restrict target,
                               int64_t n, LabelCoder<T> coder, Cell* __restrict cells) {
  const Cell width = Cell(coder.num_classes + 2);
  for (int64_t i = 0; i < n; ++i) {
    const Label row = coder.template code<Label>(target[i]);
    const Label column = coder.template code<Label>(prediction[i]);
    cells[i] = Cell(Cell(Cell(row) * width) + Cell(column));
  }
}

// Adjacent pixels go to different copies of the table: an increment that follows another of the
// same cell would wait for its store. Meanwhile the labels that `encode` reads next are fetched,
// or counting and reading memory would take turns.
template <class T, class Cell, int Copies>
PYSEG_MULTIVERSION void count(const Cell* cells, int64_t n, uint32_t* table, int64_t table_size,
                              const T* next_prediction, const T* next_target) {
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

template <class T, class Cell>
void count_range(const T* prediction, const T* target, int64_t n, const LabelCoder<T>& coder,
                 uint32_t* table, int64_t table_size, int copies) {
  Cell cells[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    const T *p = prediction + begin, *t = target + begin;
    if (sizeof(T) > 1 || coder.num_classes <= 254)
      encode<T, std::make_unsigned_t<T>>(p, t, size, coder, cells);
    else
      encode<T, Cell>(p, t, size, coder, cells);
    if (copies == kCopies)
      count<T, Cell, kCopies>(cells, size, table, table_size, p + kBlock, t + kBlock);
    else
      count<T, Cell, 1>(cells, size, table, table_size, p + kBlock, t + kBlock);
  }
}

// Adds the counts of images [N, pixels] to `tables` [N, cells].
template <class T>
void count_images(const T* prediction, const T* target, int64_t images, int64_t pixels,
                  const LabelCoder<T>& coder, int64_t* tables) {
  const int64_t width = coder.num_classes + 2, cells = width * width;
  const bool narrow = cells <= (int64_t(1) << 16);
  const int copies = cells <= 4096 ? kCopies : 1;
  // 32-bit counts of a range cannot overflow; the grain keeps a small image on one thread.
  const int64_t grain = std::max<int64_t>(int64_t(1) << 16, 4 * cells);
  std::mutex mutex;
  torch::stable::parallel_for(0, images * pixels, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> local(cells * copies);
    while (begin < end) {
      const int64_t image = begin / pixels;
      const int64_t stop = std::min({end, (image + 1) * pixels, begin + (int64_t(1) << 31)});
      std::fill(local.begin(), local.end(), 0u);
      if (narrow)
        count_range<T, uint16_t>(prediction + begin, target + begin, stop - begin, coder,
                                 local.data(), cells, copies);
      else
        count_range<T, uint32_t>(prediction + begin, target + begin, stop - begin, coder,
                                 local.data(), cells, copies);
      const std::lock_guard<std::mutex> lock(mutex);  // sums of integers: any order, same bits
      for (int copy = 0; copy < copies; ++copy)
        for (int64_t cell = 0; cell < cells; ++cell)
          tables[image * cells + cell] += local[copy * cells + cell];
      begin = stop;
    }
  });
}

std::string likely_cause(const std::set<int64_t>& values, int64_t classes, int64_t ignore) {
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

template <class T>
void confusion_matrix_typed(const Tensor& prediction, const Tensor& target, int64_t classes,
                            int64_t ignore, int64_t* matrix, int64_t* missed) {
  const int64_t images = target.size(0), pixels = target.size(1) * target.size(2);
  const int64_t width = classes + 2, cells = width * width;
  const LabelCoder<T> coder(classes, ignore);
  const T* p = static_cast<const T*>(prediction.const_data_ptr());
  const T* t = static_cast<const T*>(target.const_data_ptr());
  std::vector<int64_t> tables(images * cells);
  count_images<T>(p, t, images, pixels, coder, tables.data());
  int64_t bad_targets = 0, bad_predictions = 0;
  for (int64_t image = 0; image < images; ++image) {
    const int64_t* table = tables.data() + image * cells;
    for (int64_t row = 0; row < classes; ++row) {
      std::copy_n(table + row * width, classes, matrix + (image * classes + row) * classes);
      missed[image * classes + row] = table[row * width + classes];
      bad_predictions += table[row * width + classes + 1];
    }
    for (int64_t column = 0; column < width; ++column)
      bad_targets += table[(classes + 1) * width + column];
  }
  const int64_t n = images * pixels, row_length = target.size(2);
  if (bad_targets) report<T>("target", t, t, n, pixels, row_length, coder, ignore);
  if (bad_predictions) report<T>("prediction", p, t, n, pixels, row_length, coder, ignore);
}

std::tuple<Tensor, Tensor, Tensor> confusion_matrix_cpu(
    const Tensor& prediction,  // [N, H, W] integer
    const Tensor& target,      // [N, H, W], same dtype
    int64_t num_classes, int64_t ignore_index) {
  PYSEG_CHECK(num_classes >= 1 && num_classes <= kMaxClasses, "num_classes must be 1 to ",
              kMaxClasses, ", got ", num_classes);
  const int64_t images = target.size(0);
  Tensor matrix =
      torch::stable::new_zeros(target, {images, num_classes, num_classes}, ScalarType::Long);
  Tensor missed = torch::stable::new_zeros(target, {images, num_classes}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(target, {images, 2}, ScalarType::Long);
  if (target.numel() == 0) return {matrix, missed, invalid};
  const Tensor p = torch::stable::contiguous(prediction), t = torch::stable::contiguous(target);
  int64_t* m = matrix.mutable_data_ptr<int64_t>();
  int64_t* s = missed.mutable_data_ptr<int64_t>();
  switch (target.scalar_type()) {
    case ScalarType::Byte:
      confusion_matrix_typed<uint8_t>(p, t, num_classes, ignore_index, m, s);
      break;
    case ScalarType::Char:
      confusion_matrix_typed<int8_t>(p, t, num_classes, ignore_index, m, s);
      break;
    case ScalarType::Short:
      confusion_matrix_typed<int16_t>(p, t, num_classes, ignore_index, m, s);
      break;
    case ScalarType::Int:
      confusion_matrix_typed<int32_t>(p, t, num_classes, ignore_index, m, s);
      break;
    case ScalarType::Long:
      confusion_matrix_typed<int64_t>(p, t, num_classes, ignore_index, m, s);
      break;
    default: PYSEG_CHECK(false, "prediction and target must be uint8, int8, int16, int32 or int64");
  }
  return {matrix, missed, invalid};
}

}  // namespace

// (counts [N, C, C], missed [N, C], invalid [N, 2]: predictions and targets that are no label)
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "confusion_matrix(Tensor prediction, Tensor target, int num_classes, int ignore_index)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix_cpu));
}
