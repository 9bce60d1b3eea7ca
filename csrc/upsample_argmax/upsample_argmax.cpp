// Bilinear upsampling fused with argmax, on the CPU.
#include "row_groups.h"

namespace {

constexpr int64_t kMaxClasses = 32767;

template <class In, class T, class Out>
void upsample_argmax_typed(const Tensor& logits, Tensor& labels) {
  Out* out = static_cast<Out*>(labels.mutable_data_ptr());
  const int64_t height = labels.size(1), width = labels.size(2);
  const RowGroups<In, T, Out> groups(logits, height, width);
  torch::stable::parallel_for(
      0, logits.size(0) * groups.count(), groups.grain(), [&](int64_t begin, int64_t end) {
        typename RowGroups<In, T, Out>::Worker worker(groups);
        for (int64_t job = begin; job < end; ++job) {
          const int64_t image = job / groups.count(), group = job % groups.count();
          const int64_t y = image * height + groups.first_row(group);
          worker.classify(image, group, out + y * width);
        }
      });
}

template <class In, class T>
void upsample_argmax_to(const Tensor& logits, Tensor& labels) {
  if (labels.scalar_type() == ScalarType::Byte)
    upsample_argmax_typed<In, T, uint8_t>(logits, labels);
  else
    upsample_argmax_typed<In, T, int16_t>(logits, labels);
}

Tensor upsample_argmax_cpu(const Tensor& logits,  // [N, C, h, w] floating point
                           int64_t height, int64_t width) {
  const int64_t classes = logits.size(1);
  PYSEG_CHECK(classes >= 1 && classes <= kMaxClasses, "logits must have 1 to ", kMaxClasses,
              " classes, got ", shape(logits));
  Tensor labels = torch::stable::new_empty(logits, {logits.size(0), height, width},
                                           classes <= 255 ? ScalarType::Byte : ScalarType::Short);
  if (labels.numel() == 0) return labels;
  PYSEG_CHECK(logits.numel() > 0, "logits must have pixels to sample, got ", shape(logits));
  switch (logits.scalar_type()) {
    case ScalarType::Float: upsample_argmax_to<float, float>(logits, labels); break;
    case ScalarType::Double: upsample_argmax_to<double, double>(logits, labels); break;
    case ScalarType::Half:
      upsample_argmax_to<torch::headeronly::Half, float>(logits, labels);
      break;
    case ScalarType::BFloat16:
      upsample_argmax_to<torch::headeronly::BFloat16, float>(logits, labels);
      break;
    default: PYSEG_CHECK(false, "logits must be float16, bfloat16, float32 or float64");
  }
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax_cpu));
}
