// Bilinear upsampling fused with argmax on CUDA. A thread has one output column and up to `Rows`
// output rows that lie between the same two rows of logits, so that it applies tx once for all of
// them. It reads its corners through the L1 cache, which holds them: neighbouring threads have the
// same ones. Nothing synchronises, and no result depends on the order of anything.
#include "upsample_argmax.h"

#include <algorithm>

#include "../common/launch.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;

template <class T>
struct Shape {
  int classes, height, width, out_height, out_width;
  int64_t image_stride, class_stride, row_stride, column_stride;  // of the logits, in elements
  T scale_y, scale_x;
  int chunks;  // threads that share the output rows of one row of logits
};

// The first output row whose source row is `low` or later.
template <class T>
__device__ int first_row(const Shape<T>& shape, int low) {
  if (low >= shape.height) return shape.out_height;
  int y = int((T(low) + T(0.5)) / shape.scale_y - T(0.5));  // then corrected for its rounding
  y = y < 0 ? 0 : (y > shape.out_height ? shape.out_height : y);
  int source;
  T t;
  while (y > 0) {
    pyseg::source_index<T>(y - 1, shape.scale_y, shape.height, &source, &t);
    if (source < low) break;
    --y;
  }
  while (y < shape.out_height) {
    pyseg::source_index<T>(y, shape.scale_y, shape.height, &source, &t);
    if (source >= low) break;
    ++y;
  }
  return y;
}

// Grid: x counts (row of logits, chunk, block of output columns), y the images.
template <class In, class T, class Out, int Rows>
__global__ void __launch_bounds__(kThreads)
    upsample_argmax_kernel(const In* __restrict__ logits,  // [N, C, h, w], strided
                           Shape<T> shape,
                           Out* __restrict__ labels) {  // [N, H, W]
  const int blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int row_job = int(blockIdx.x) / blocks;
  const int x = int(blockIdx.x) % blocks * kThreads + int(threadIdx.x);
  if (x >= shape.out_width) return;
  const int top = row_job / shape.chunks;
  int left;
  T tx;
  pyseg::source_index<T>(x, shape.scale_x, shape.width, &left, &tx);
  const In* corner = logits + blockIdx.y * shape.image_stride + top * shape.row_stride +
                     left * shape.column_stride;
  const int64_t right = left + 1 < shape.width ? shape.column_stride : 0;
  const int64_t below = top + 1 < shape.height ? shape.row_stride : 0;
  Out* out = labels + (int64_t(blockIdx.y) * shape.out_height) * shape.out_width + x;
  const int end = first_row(shape, top + 1);
  for (int y = first_row(shape, top) + row_job % shape.chunks * Rows; y < end;
       y += shape.chunks * Rows) {
    T ty[Rows], best[Rows];
    int label[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      int source;
      pyseg::source_index<T>(y + r < end ? y + r : y, shape.scale_y, shape.height, &source, ty + r);
      best[r] = T(0), label[r] = -1;
    }
    bool wild = false;
    const In* p = corner;
#pragma unroll 4
    for (int c = 0; c < shape.classes; ++c, p += shape.class_stride) {
      const T p0 = T(p[0]), p1 = T(p[right]), q0 = T(p[below]), q1 = T(p[below + right]);
      const T a = p0 + tx * (p1 - p0), b = q0 + tx * (q1 - q0), slope = b - a;
      wild |= !(pyseg::tame(a) && pyseg::tame(b));  // a corner that is NaN or infinite shows here
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const T value = a + ty[r] * slope;
        const bool greater = value > best[r] || c == 0;
        best[r] = greater ? value : best[r];
        label[r] = greater ? c : label[r];
      }
    }
    if (wild) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        p = corner;
        for (int c = 0; c < shape.classes; ++c, p += shape.class_stride) {
          const T value = pyseg::blend(pyseg::blend(T(p[0]), T(p[right]), tx),
                                       pyseg::blend(T(p[below]), T(p[below + right]), tx), ty[r]);
          if (c == 0 || pyseg::wins(value, best[r])) best[r] = value, label[r] = c;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      if (y + r < end) out[int64_t(y + r) * shape.out_width] = Out(label[r]);
  }
}

template <class In, class T, class Out, int Rows>
void launch_rows(const Tensor& logits, Tensor& labels, Shape<T> shape, cudaStream_t stream) {
  // As many threads per row of logits as it has chunks of output rows, up to rounding.
  shape.chunks = std::max(1, (shape.out_height / shape.height + Rows / 2) / Rows);
  const int64_t blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int64_t images = logits.size(0);
  const In* in = static_cast<const In*>(logits.const_data_ptr());
  Out* out = static_cast<Out*>(labels.mutable_data_ptr());
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks * shape.height * shape.chunks),
                    unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH((upsample_argmax_kernel<In, T, Out, Rows>), grid, kThreads, 0, stream,
                 in + first * shape.image_stride, shape,
                 out + first * shape.out_height * shape.out_width);
  }
}

template <class In, class T, class Out>
void launch(const Tensor& logits, Tensor& labels, cudaStream_t stream) {
  Shape<T> shape;
  shape.classes = int(logits.size(1));
  shape.height = int(logits.size(2)), shape.width = int(logits.size(3));
  shape.out_height = int(labels.size(1)), shape.out_width = int(labels.size(2));
  shape.image_stride = logits.stride(0), shape.class_stride = logits.stride(1);
  shape.row_stride = logits.stride(2), shape.column_stride = logits.stride(3);
  shape.scale_y = T(shape.height) / T(shape.out_height);
  shape.scale_x = T(shape.width) / T(shape.out_width);
  if (shape.out_height > 4 * shape.height)
    launch_rows<In, T, Out, 8>(logits, labels, shape, stream);
  else if (shape.out_height > shape.height)
    launch_rows<In, T, Out, 4>(logits, labels, shape, stream);
  else
    launch_rows<In, T, Out, 1>(logits, labels, shape, stream);
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
  Tensor labels = torch::stable::new_empty(
      logits, {logits.size(0), height, width},
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
    default:
      throw std::invalid_argument("logits must be float16, bfloat16, float32 or float64");
  }
  return labels;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax_cuda)); }
