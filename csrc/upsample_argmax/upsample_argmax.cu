// Bilinear upsampling fused with argmax on CUDA. Nothing synchronises, and no result depends on the
// order of anything.
#include "upsample_argmax.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;

// Grid: x counts (row of logits, chunk, block of output columns), y the images.
template <class In, class T, class Out, int Rows>
__global__ void __launch_bounds__(kThreads)
    upsample_argmax_kernel(const In* __restrict__ logits,  // [N, C, h, w], strided
                           Shape<T> shape,
                           const int16_t* __restrict__ known,  // [N, h, w] or null
                           Out* __restrict__ labels) {         // [N, H, W]
  const int blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int x = int(blockIdx.x) % blocks * kThreads + int(threadIdx.x);
  if (x >= shape.out_width) return;
  Out* out = labels + (int64_t(blockIdx.y) * shape.out_height) * shape.out_width + x;
  if (known) known += int64_t(blockIdx.y) * shape.height * shape.width;
  classify_column<In, T, Rows>(logits + blockIdx.y * shape.image_stride, shape, known,
                               int(blockIdx.x) / blocks, x, [&](int y, int end, const int* label) {
#pragma unroll
                                 for (int r = 0; r < Rows; ++r)
                                   if (y + r < end)
                                     out[int64_t(y + r) * shape.out_width] = Out(label[r]);
                               });
}

template <class In, class T, class Out, int Rows>
void launch_rows(const Tensor& logits, Tensor& labels, cudaStream_t stream) {
  const auto shape = make_shape<In, T>(logits, labels.size(1), labels.size(2), Rows);
  const std::optional<Tensor> best = best_classes<In, T>(logits, shape, stream);
  const int16_t* const known = best ? static_cast<const int16_t*>(best->const_data_ptr()) : nullptr;
  const int64_t blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int64_t images = logits.size(0), pixels = int64_t(shape.height) * shape.width;
  const In* in = static_cast<const In*>(logits.const_data_ptr());
  Out* out = static_cast<Out*>(labels.mutable_data_ptr());
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks * shape.jobs()),
                    unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH((upsample_argmax_kernel<In, T, Out, Rows>), grid, kThreads, 0, stream,
                 in + first * shape.image_stride, shape, known ? known + first * pixels : nullptr,
                 out + first * shape.out_height * shape.out_width);
  }
}

template <class In, class T, class Out>
void launch(const Tensor& given, Tensor& labels, cudaStream_t stream) {
  const Tensor logits = walkable<In>(given);
  switch (rows_per_thread(logits.size(2), labels.size(1))) {
    case 8: launch_rows<In, T, Out, 8>(logits, labels, stream); break;
    case 4: launch_rows<In, T, Out, 4>(logits, labels, stream); break;
    default: launch_rows<In, T, Out, 1>(logits, labels, stream);
  }
}

template <class In, class T>
void launch_to(const Tensor& logits, Tensor& labels, cudaStream_t stream) {
  if (labels.scalar_type() == ScalarType::Byte)
    launch<In, T, uint8_t>(logits, labels, stream);
  else
    launch<In, T, int16_t>(logits, labels, stream);
}

Tensor upsample_argmax_cuda(const Tensor& logits, int64_t height, int64_t width) {
  const pyseg::DeviceScope device(logits);
  Tensor labels =
      torch::stable::new_empty(logits, {logits.size(0), height, width},
                               logits.size(1) <= 255 ? ScalarType::Byte : ScalarType::Short);
  if (labels.numel() == 0) return labels;
  switch (logits.scalar_type()) {
    case ScalarType::Float: launch_to<float, float>(logits, labels, device.stream); break;
    case ScalarType::Double: launch_to<double, double>(logits, labels, device.stream); break;
    case ScalarType::Half:
      launch_to<torch::headeronly::Half, float>(logits, labels, device.stream);
      break;
    case ScalarType::BFloat16:
      launch_to<torch::headeronly::BFloat16, float>(logits, labels, device.stream);
      break;
    default: throw std::invalid_argument("logits must be float16, bfloat16, float32 or float64");
  }
  return labels;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax_cuda)); }
