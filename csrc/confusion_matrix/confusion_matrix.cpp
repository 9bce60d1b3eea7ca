// Confusion matrix on the CPU. What it does is in count_cells.h, because another op counts as well.
#include "count_cells.h"

namespace {

template <class T>
void confusion_matrix_typed(const Tensor& prediction, const Tensor& target, int64_t classes,
                            int64_t ignore, int64_t* matrix, int64_t* missed) {
  const int64_t images = target.size(0), pixels = target.size(1) * target.size(2);
  const LabelCoder<T> coder(classes, ignore);
  const T* p = static_cast<const T*>(prediction.const_data_ptr());
  const T* t = static_cast<const T*>(target.const_data_ptr());
  PairCounts counts(images, classes);
  const int64_t piece = counts.piece(), pieces = (pixels + piece - 1) / piece;
  for_each(images * pieces, 4 * std::min(piece, pixels), [&](int64_t item, int64_t worker) {
    const int64_t image = item / pieces, begin = item % pieces * piece;
    const int64_t at = image * pixels + begin;
    counts.add(worker, image, p + at, t + at, std::min(piece, pixels - begin), coder);
  });
  int64_t bad_targets = 0, bad_predictions = 0;
  for (int64_t image = 0; image < images; ++image) {
    const auto [in_targets, in_predictions] = split_table(
        counts.table(image), classes, matrix + image * classes * classes, missed + image * classes);
    bad_targets += in_targets, bad_predictions += in_predictions;
  }
  const int64_t n = images * pixels, row_length = target.size(2);
  if (bad_targets) report<T>("target", t, t, n, pixels, row_length, coder, ignore);
  if (bad_predictions) report<T>("prediction", p, t, n, pixels, row_length, coder, ignore);
}

std::tuple<Tensor, Tensor, Tensor> confusion_matrix_cpu(
    const Tensor& prediction,  // [N, H, W] integer
    const Tensor& target,      // [N, H, W], same dtype
    int64_t num_classes, int64_t ignore_index) {
  PYSEG_CHECK(num_classes >= 1 && num_classes <= kMaxConfusionClasses, "num_classes must be 1 to ",
              kMaxConfusionClasses, ", got ", num_classes);
  check_pair(prediction, target);
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
