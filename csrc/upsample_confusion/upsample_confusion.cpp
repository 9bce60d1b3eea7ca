// Bilinear upsampling fused with argmax and counting, on the CPU. The labels of up to 8 output rows
// are counted while they are in the cache; no label map exists.
#include "upsample_confusion.h"

#include <mutex>

#include "../confusion_matrix/count_cells.h"
#include "../upsample_argmax/row_groups.h"

namespace {

struct Counting {
  const void* target;  // [N, H, W]
  int64_t classes, ignore, height, width;
  std::vector<int64_t>& tables;  // [N, (C + 2)^2]
};

// Adds n pixels from `offset` on.
template <class P, class T>
void count_typed(const P* labels, const Counting& counting, int64_t offset, int64_t n,
                 uint32_t* table, int64_t cells, int copies) {
  const LabelCoder<P> columns(counting.classes, counting.ignore);
  const LabelCoder<T> rows(counting.classes, counting.ignore);
  const T* target = static_cast<const T*>(counting.target) + offset;
  if (cells <= int64_t(1) << 16)
    count_range<P, T, uint16_t>(labels, target, n, columns, rows, table, cells, copies);
  else
    count_range<P, T, uint32_t>(labels, target, n, columns, rows, table, cells, copies);
}

template <class P>
decltype(&count_typed<P, uint8_t>) counter(ScalarType target) {
  switch (target) {
    case ScalarType::Byte: return &count_typed<P, uint8_t>;
    case ScalarType::Char: return &count_typed<P, int8_t>;
    case ScalarType::Short: return &count_typed<P, int16_t>;
    case ScalarType::Int: return &count_typed<P, int32_t>;
    case ScalarType::Long: return &count_typed<P, int64_t>;
    default: PYSEG_CHECK(false, "target must be uint8, int8, int16, int32 or int64");
  }
}

template <class In, class T, class Out>
void count_images(const Tensor& logits, ScalarType target, const Counting& counting) {
  const RowGroups<In, T, Out> groups(logits, counting.height, counting.width);
  const auto count = counter<Out>(target);
  const int64_t cells = (counting.classes + 2) * (counting.classes + 2);
  const int copies = table_copies(cells);
  const int64_t per_image = groups.count();
  std::mutex mutex;
  torch::stable::parallel_for(
      0, logits.size(0) * per_image, groups.grain(), [&](int64_t begin, int64_t end) {
        typename RowGroups<In, T, Out>::Worker worker(groups);
        std::vector<Out> labels(kRows * counting.width);
        std::vector<uint32_t> local(cells * copies);
        while (begin < end) {
          const int64_t image = begin / per_image, stop = std::min(end, (image + 1) * per_image);
          std::fill(local.begin(), local.end(), 0u);
          for (; begin < stop; ++begin) {
            const int64_t group = begin % per_image;
            worker.classify(image, group, labels.data());
            const int64_t y = image * counting.height + groups.first_row(group);
            count(labels.data(), counting, y * counting.width, groups.rows(group) * counting.width,
                  local.data(), cells, copies);
          }
          add_tables(local, cells, mutex, counting.tables.data() + image * cells);
        }
      });
}

template <class In, class T>
void count_images_as(const Tensor& logits, ScalarType target, const Counting& counting) {
  if (counting.classes <= 255)  // as in upsample_argmax
    count_images<In, T, uint8_t>(logits, target, counting);
  else
    count_images<In, T, int16_t>(logits, target, counting);
}

template <class T>
[[noreturn]] void report_target(const Tensor& target, int64_t classes, int64_t ignore) {
  const T* t = static_cast<const T*>(target.const_data_ptr());
  report<T>("target", t, t, target.numel(), target.size(1) * target.size(2), target.size(2),
            LabelCoder<T>(classes, ignore), ignore);
}

std::tuple<Tensor, Tensor, Tensor> upsample_confusion_cpu(
    const Tensor& logits,         // [N, C, h, w] floating point
    const Tensor& target_labels,  // [N, H, W] integer
    int64_t ignore_index) {
  const int64_t images = logits.size(0), classes = logits.size(1);
  PYSEG_CHECK(classes >= 1 && classes <= kMaxConfusionClasses, "logits must have 1 to ",
              kMaxConfusionClasses, " classes, got ", shape(logits));
  Tensor matrix = torch::stable::new_zeros(logits, {images, classes, classes}, ScalarType::Long);
  Tensor missed = torch::stable::new_zeros(logits, {images, classes}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(logits, {images, 2}, ScalarType::Long);
  if (target_labels.numel() == 0) return {matrix, missed, invalid};
  const Tensor target = torch::stable::contiguous(target_labels);
  const int64_t cells = (classes + 2) * (classes + 2);
  std::vector<int64_t> tables(images * cells);
  const Counting counting{target.const_data_ptr(), classes,        ignore_index,
                          target.size(1),          target.size(2), tables};
  const ScalarType type = target.scalar_type();
  switch (logits.scalar_type()) {
    case ScalarType::Float: count_images_as<float, float>(logits, type, counting); break;
    case ScalarType::Double: count_images_as<double, double>(logits, type, counting); break;
    case ScalarType::Half:
      count_images_as<torch::headeronly::Half, float>(logits, type, counting);
      break;
    case ScalarType::BFloat16:
      count_images_as<torch::headeronly::BFloat16, float>(logits, type, counting);
      break;
    default: PYSEG_CHECK(false, "logits must be float16, bfloat16, float32 or float64");
  }
  int64_t bad_targets = 0;
  for (int64_t image = 0; image < images; ++image)
    bad_targets += split_table(tables.data() + image * cells, classes,
                               matrix.mutable_data_ptr<int64_t>() + image * classes * classes,
                               missed.mutable_data_ptr<int64_t>() + image * classes)
                       .first;
  if (bad_targets) switch (type) {
      case ScalarType::Byte: report_target<uint8_t>(target, classes, ignore_index);
      case ScalarType::Char: report_target<int8_t>(target, classes, ignore_index);
      case ScalarType::Short: report_target<int16_t>(target, classes, ignore_index);
      case ScalarType::Int: report_target<int32_t>(target, classes, ignore_index);
      default: report_target<int64_t>(target, classes, ignore_index);
    }
  return {matrix, missed, invalid};
}

}  // namespace

// What confusion_matrix returns for upsample_argmax's labels.
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "upsample_confusion(Tensor logits, Tensor target, int ignore_index)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_confusion", TORCH_BOX(&upsample_confusion_cpu));
}
