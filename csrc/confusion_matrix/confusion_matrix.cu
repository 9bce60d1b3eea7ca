// Confusion matrix on CUDA: each block counts into shared memory, then adds its cells to the
// image's. All sums are of integers, so their order does not matter. Nothing synchronises; labels
// out of range are counted in `invalid` for the caller to read when it wants the result.
#include "confusion_matrix.cuh"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using pyseg::LabelCoder;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kItems = 16;  // consecutive pixels of one thread

// Grid: x walks over the pixels of an image, y is the image. Shared: `copies` tables, a warp's
// threads use copy (warp % copies), so that warps do not wait for each other's cells.
template <class T, bool Shared>
__global__ void confusion_matrix_kernel(const T* prediction,  // [N, pixels]
                                        const T* target,      // [N, pixels]
                                        Outputs out, int64_t pixels, LabelCoder<T> coder,
                                        int copies) {
  PYSEG_DYNAMIC_SHARED(uint32_t, tables);
  const int classes = int(coder.num_classes), width = classes + 2, cells = width * width;
  const int64_t image = blockIdx.y;
  if (Shared) {
    for (int i = threadIdx.x; i < cells * copies; i += kThreads) tables[i] = 0;
    __syncthreads();
  }
  uint32_t* table = Shared ? tables + int(threadIdx.x / 32) % copies * cells : nullptr;
  const T* p = prediction + image * pixels;
  const T* t = target + image * pixels;
  const int64_t step = int64_t(gridDim.x) * kThreads * kItems;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kItems; i < pixels; i += step) {
    const int n = pixels - i < kItems ? int(pixels - i) : kItems;
    uint32_t row = coder(t[i]), column = coder(p[i]), length = 1;
    for (int k = 1; k <= n; ++k) {  // one addition per run of equal pairs
      uint32_t next_row = ~0u, next_column = ~0u;
      if (k < n) next_row = coder(t[i + k]), next_column = coder(p[i + k]);
      if (next_row == row && next_column == column) {
        ++length;
        continue;
      }
      if (Shared)
        atomicAdd(table + row * width + column, length);
      else
        add_to_image(out, image, classes, row, column, length);
      row = next_row, column = next_column, length = 1;
    }
  }
  if (Shared) {
    __syncthreads();
    for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
      Count total = 0;
      for (int copy = 0; copy < copies; ++copy) total += tables[copy * cells + cell];
      if (total) add_to_image(out, image, classes, cell / width, cell % width, total);
    }
  }
}

template <class T>
void launch(const Tensor& prediction, const Tensor& target, const Outputs& out, int64_t classes,
            int64_t ignore, cudaStream_t stream) {
  const int64_t images = target.size(0), pixels = target.size(1) * target.size(2);
  const LabelCoder<T> coder(classes, ignore);
  const int64_t table_bytes = (classes + 2) * (classes + 2) * int64_t(sizeof(uint32_t));
  const int copies = int(std::min<int64_t>(kThreads / 32, kSharedBytes / table_bytes));
  const int64_t per_block = int64_t(kThreads) * kItems;
  // About four blocks per multiprocessor of a large GPU; more would only flush more tables.
  const int64_t blocks =
      std::min<int64_t>((pixels + per_block - 1) / per_block, std::max<int64_t>(1, 528 / images));
  const T* p = static_cast<const T*>(prediction.const_data_ptr());
  const T* t = static_cast<const T*>(target.const_data_ptr());
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks), unsigned(std::min<int64_t>(65535, images - first)));
    const Outputs part{out.matrix + first * classes * classes, out.missed + first * classes,
                       out.invalid + first * 2};
    if (copies > 0)
      PYSEG_LAUNCH((confusion_matrix_kernel<T, true>), grid, kThreads, size_t(table_bytes * copies),
                   stream, p + first * pixels, t + first * pixels, part, pixels, coder, copies);
    else
      PYSEG_LAUNCH((confusion_matrix_kernel<T, false>), grid, kThreads, 0, stream,
                   p + first * pixels, t + first * pixels, part, pixels, coder, 1);
  }
}

std::tuple<Tensor, Tensor, Tensor> confusion_matrix_cuda(const Tensor& prediction,
                                                         const Tensor& target, int64_t num_classes,
                                                         int64_t ignore_index) {
  const pyseg::DeviceScope device(target, prediction);
  const int64_t images = target.size(0);
  Tensor matrix =
      torch::stable::new_zeros(target, {images, num_classes, num_classes}, ScalarType::Long);
  Tensor missed = torch::stable::new_zeros(target, {images, num_classes}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(target, {images, 2}, ScalarType::Long);
  if (target.numel() == 0) return {matrix, missed, invalid};
  const Tensor p = torch::stable::contiguous(prediction), t = torch::stable::contiguous(target);
  const Outputs out{static_cast<Count*>(matrix.mutable_data_ptr()),
                    static_cast<Count*>(missed.mutable_data_ptr()),
                    static_cast<Count*>(invalid.mutable_data_ptr())};
  const auto stream = device.stream;
  switch (target.scalar_type()) {
    case ScalarType::Byte: launch<uint8_t>(p, t, out, num_classes, ignore_index, stream); break;
    case ScalarType::Char: launch<int8_t>(p, t, out, num_classes, ignore_index, stream); break;
    case ScalarType::Short: launch<int16_t>(p, t, out, num_classes, ignore_index, stream); break;
    case ScalarType::Int: launch<int32_t>(p, t, out, num_classes, ignore_index, stream); break;
    case ScalarType::Long: launch<int64_t>(p, t, out, num_classes, ignore_index, stream); break;
    default:
      throw std::invalid_argument(
          "prediction and target must be uint8, int8, int16, int32 or int64");
  }
  return {matrix, missed, invalid};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix_cuda)); }
