// Bilinear upsampling fused with argmax and counting, on the CPU. The labels of up to 8 output rows
// are counted while they are in the cache; no label map exists.
#include "upsample_confusion.h"

#include <type_traits>

#include "../confusion_matrix/count_cells.h"
#include "../upsample_argmax/row_groups.h"

namespace pyseg::upsampling {
namespace {

// Labels as the type that they are counted as, in a buffer unless they are of that type already.
template <class To, class From>
const To* as(const From* labels, int64_t n, To* buffer) {
  if constexpr (std::is_same_v<From, To>) return labels;
  for (int64_t i = 0; i < n; ++i) buffer[i] = To(labels[i]);
  return buffer;
}

// Both kinds of labels are counted as the narrowest type that holds both.
template <class P, class T>
void count_typed(PairCounts& counts, int64_t worker, int64_t image, const P* prediction,
                 const T* target, int64_t n, int64_t classes, int64_t ignore) {
  using Both =
      std::conditional_t<std::is_same_v<P, T>, T, std::conditional_t<(sizeof(T) > 2), T, int16_t>>;
  constexpr int64_t kPiece = 2048;
  Both p[kPiece], t[kPiece];
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t size = std::min(kPiece, n - at);
    counts.add(worker, image, as(prediction + at, size, p), as(target + at, size, t), size,
               LabelCoder<Both>(classes, ignore));
  }
}

template <class Out>
void count_images(PairCounts& counts, const Tensor& logits, const Tensor& target, int64_t ignore) {
  const int64_t height = target.size(1), width = target.size(2), classes = logits.size(1);
  std::vector<std::vector<Out>> labels(torch::stable::get_num_threads());
  with_functions<Out>(logits.scalar_type(), [&](const auto& functions) {
    const RowGroups groups(functions, logits, height, width);
    groups.for_each_group([&](int64_t image, int64_t group, auto& rows, int64_t worker) {
      std::vector<Out>& own = labels[worker];
      own.resize(kRows * width);
      rows.classify(image, group, own.data());
      const int64_t at = (image * height + groups.first_row(group)) * width;
      const int64_t n = groups.rows(group) * width;
      const auto count = [&]<class T>(T) {
        count_typed(counts, worker, image, own.data(),
                    static_cast<const T*>(target.const_data_ptr()) + at, n, classes, ignore);
      };
      switch (target.scalar_type()) {
        case ScalarType::Byte: count(uint8_t()); break;
        case ScalarType::Char: count(int8_t()); break;
        case ScalarType::Short: count(int16_t()); break;
        case ScalarType::Int: count(int32_t()); break;
        default: count(int64_t());
      }
    });
  });
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
  check_target(logits, target_labels);
  const int64_t images = logits.size(0), classes = logits.size(1);
  PYSEG_CHECK(classes >= 1 && classes <= kMaxConfusionClasses, "logits must have 1 to ",
              kMaxConfusionClasses, " classes, got ", shape(logits));
  Tensor matrix = torch::stable::new_zeros(logits, {images, classes, classes}, ScalarType::Long);
  Tensor missed = torch::stable::new_zeros(logits, {images, classes}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(logits, {images, 2}, ScalarType::Long);
  if (target_labels.numel() == 0) return {matrix, missed, invalid};
  const Tensor target = torch::stable::contiguous(target_labels);
  const ScalarType type = target.scalar_type();
  PYSEG_CHECK(type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Short ||
                  type == ScalarType::Int || type == ScalarType::Long,
              "target must be uint8, int8, int16, int32 or int64");
  PairCounts counts(images, classes);
  if (classes <= 255)  // as in upsample_argmax
    count_images<uint8_t>(counts, logits, target, ignore_index);
  else
    count_images<int16_t>(counts, logits, target, ignore_index);
  int64_t bad_targets = 0;
  for (int64_t image = 0; image < images; ++image)
    bad_targets += split_table(counts.table(image), classes,
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
}  // namespace pyseg::upsampling

// What confusion_matrix returns for upsample_argmax's labels.
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "upsample_confusion(Tensor logits, Tensor target, int ignore_index)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_confusion", TORCH_BOX(&pyseg::upsampling::upsample_confusion_cpu));
}
