// Confusion matrix on CUDA: labels are read 16 bytes at a time, each block counts into shared
// memory, then adds its cells to the image's. All sums are of integers, so their order does not
// matter. Nothing synchronises; labels out of range are counted in `invalid` for the caller to read
// when it wants the result.
#include "confusion_matrix.cuh"

#include <algorithm>
#include <cstring>

#include "../common/common.h"

namespace {

using pyseg::LabelCoder;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of 16 bytes that a thread reads of each map before it counts
constexpr unsigned kAll = 0xffffffffu;

// 16 bytes of labels, as many as that is.
template <class T>
struct Labels {
  static constexpr int kCount = 16 / sizeof(T);
  T label[kCount];

  __device__ void read(const T* from, bool aligned) {
    if (aligned) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(from);
      memcpy(label, &bytes, sizeof bytes);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) label[k] = from[k];
    }
  }
  __device__ bool all_equal() const {
    bool equal = true;
#pragma unroll
    for (int k = 1; k < kCount; ++k) equal &= label[k] == label[0];
    return equal;
  }
};

// Grid: x walks over the pixels of an image, y is the image. Shared: `copies` tables, a warp's
// threads use copy (warp % copies), so that warps do not wait for each other's cells. A warp takes
// kVectors * 32 pieces of 16 bytes; what is left over at both ends is counted label by label.
template <class T, bool Shared>
__global__ void __launch_bounds__(kThreads)
    confusion_matrix_kernel(const T* __restrict__ prediction,  // [N, pixels]
                            const T* __restrict__ target,      // [N, pixels]
                            Outputs out, int64_t pixels, LabelCoder<T> coder, int copies) {
  PYSEG_DYNAMIC_SHARED(uint32_t, tables);
  const int classes = int(coder.num_classes), width = classes + 2, cells = width * width;
  const int64_t image = blockIdx.y;
  if (Shared) {
    for (int i = threadIdx.x; i < cells * copies; i += kThreads) tables[i] = 0;
    __syncthreads();
  }
  uint32_t* table = Shared ? tables + int(threadIdx.x / 32) % copies * cells : nullptr;
  const auto add = [&](uint32_t row, uint32_t column, uint32_t amount) {
    if (Shared)
      atomicAdd(table + row * width + column, amount);
    else
      add_to_image(out, image, classes, row, column, amount);
  };
  const T* const p = prediction + image * pixels;
  const T* const t = target + image * pixels;
  // Maps that are misaligned alike begin with a few labels before the first whole piece.
  constexpr int kCount = Labels<T>::kCount, kLabels = 32 * kVectors * kCount;
  const uintptr_t behind = reinterpret_cast<uintptr_t>(t) % 16;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == behind;
  const int64_t ahead = aligned ? int64_t((16 - behind) % 16 / sizeof(T)) : 0;
  const int64_t head = ahead < pixels ? ahead : pixels;
  const int64_t rounds = (pixels - head) / kLabels;
  const int lane = int(threadIdx.x) % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t round = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; round < rounds;
       round += warps) {
    const int64_t begin = head + round * kLabels + lane * kCount;
    Labels<T> rows[kVectors], columns[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      rows[v].read(t + begin + v * 32 * kCount, aligned);
      columns[v].read(p + begin + v * 32 * kCount, aligned);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t row = coder(rows[v].label[0]), column = coder(columns[v].label[0]);
      // Maps are mostly flat, and lanes that add to one cell would wait for each other.
      const bool flat = rows[v].all_equal() && columns[v].all_equal();
      const bool alike =
          (row == __shfl_sync(kAll, row, 0)) & (column == __shfl_sync(kAll, column, 0));
      if (__all_sync(kAll, flat & alike)) {
        if (lane == 0) add(row, column, 32 * kCount);
        continue;
      }
      uint32_t length = 1;
#pragma unroll
      for (int k = 1; k < kCount; ++k) {  // one addition per run of equal pairs
        const uint32_t next_row = coder(rows[v].label[k]), next_column = coder(columns[v].label[k]);
        if (next_row != row || next_column != column) {
          add(row, column, length);
          row = next_row, column = next_column, length = 0;
        }
        ++length;
      }
      add(row, column, length);
    }
  }
  const int64_t whole = rounds * kLabels, left = pixels - whole;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < left;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t at = i < head ? i : i + whole;
    add(coder(t[at]), coder(p[at]), 1);
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
  const int64_t per_block = int64_t(kThreads) * kVectors * Labels<T>::kCount;
  const auto kernel =
      copies > 0 ? confusion_matrix_kernel<T, true> : confusion_matrix_kernel<T, false>;
  const size_t shared_bytes = size_t(table_bytes * copies);
  // As many as run at once; more would only flush more tables.
  const int64_t resident = pyseg::resident_blocks(kernel, kThreads, shared_bytes) / images;
  const int64_t blocks =
      std::min<int64_t>((pixels + per_block - 1) / per_block, std::max<int64_t>(1, resident));
  const T* p = static_cast<const T*>(prediction.const_data_ptr());
  const T* t = static_cast<const T*>(target.const_data_ptr());
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks), unsigned(std::min<int64_t>(65535, images - first)));
    const Outputs part{out.matrix + first * classes * classes, out.missed + first * classes,
                       out.invalid + first * 2};
    PYSEG_LAUNCH(kernel, grid, kThreads, shared_bytes, stream, p + first * pixels,
                 t + first * pixels, part, pixels, coder, copies);
  }
}

std::tuple<Tensor, Tensor, Tensor> confusion_matrix_cuda(const Tensor& prediction,
                                                         const Tensor& target, int64_t num_classes,
                                                         int64_t ignore_index) {
  pyseg::check_pair(prediction, target);
  const pyseg::DeviceScope device(target, prediction);
  const int64_t images = target.size(0);
  auto [matrix, missed, invalid] =
      zeros(target, {{images, num_classes, num_classes}, {images, num_classes}, {images, 2}},
            device.stream);
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
