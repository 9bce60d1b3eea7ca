// Bilinear upsampling fused with argmax, on the CPU.
#include "row_groups.h"

namespace pyseg::upsampling {
namespace {

constexpr int64_t kMaxClasses = 32767;

template <class Out>
void upsample_argmax_to(const Tensor& logits, Tensor& labels) {
  Out* out = static_cast<Out*>(labels.mutable_data_ptr());
  const int64_t height = labels.size(1), width = labels.size(2);
  with_functions<Out>(logits.scalar_type(), [&](const auto& functions) {
    const RowGroups groups(functions, logits, height, width);
    groups.for_each_group([&](int64_t image, int64_t group, auto& worker, int64_t) {
      worker.classify(image, group, out + (image * height + groups.first_row(group)) * width);
    });
  });
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
  if (classes <= 255)
    upsample_argmax_to<uint8_t>(logits, labels);
  else
    upsample_argmax_to<int16_t>(logits, labels);
  return labels;
}

}  // namespace
}  // namespace pyseg::upsampling

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&pyseg::upsampling::upsample_argmax_cpu));
}
