// The best class of output pixels on CUDA: shared by the ops that resize logits and want classes.
//
// A thread has one output column and up to `Rows` output rows that lie between the same two rows of
// logits, so that it applies tx once for all of them. It reads its corners through the L1 cache,
// which holds them: neighbouring threads have the same ones. Where output pixels are many, the best
// class of every pixel of the logits is found first: what lies between four that agree has it too,
// as its values are means of theirs.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/launch.h"
#include "upsample_argmax.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

template <class T>
struct Shape {
  int classes, height, width, out_height, out_width;
  int64_t image_stride, class_stride;  // of the logits, in elements
  uint32_t row_step, column_step;  // of the logits, in bytes: a class's pixels span less than 2^32
  T scale_y, scale_x;
  int chunks;  // threads that share the output rows of one row of logits

  __host__ __device__ int jobs() const { return height * chunks; }  // of an output column
};

template <class In>
bool steps_fit(const torch::stable::Tensor& logits) {
  const int64_t rows = (logits.size(2) - 1) * logits.stride(2),
                columns = (logits.size(3) - 1) * logits.stride(3);
  return logits.numel() == 0 || (rows + columns + 1) * int64_t(sizeof(In)) <= int64_t(1) << 32;
}

// The logits as the kernels can walk over them.
template <class In>
torch::stable::Tensor walkable(const torch::stable::Tensor& logits) {
  if (steps_fit<In>(logits)) return logits;
  torch::stable::Tensor compact = torch::stable::contiguous(logits);
  if (!steps_fit<In>(compact))
    throw std::invalid_argument("on CUDA the logits of a class may have at most 4 GiB per image");
  return compact;
}

// Of logits that are `walkable`.
template <class In, class T>
Shape<T> make_shape(const torch::stable::Tensor& logits, int64_t out_height, int64_t out_width,
                    int rows) {
  Shape<T> shape;
  shape.classes = int(logits.size(1));
  shape.height = int(logits.size(2)), shape.width = int(logits.size(3));
  shape.out_height = int(out_height), shape.out_width = int(out_width);
  shape.image_stride = logits.stride(0), shape.class_stride = logits.stride(1);
  shape.row_step = uint32_t(logits.stride(2) * int64_t(sizeof(In)));
  shape.column_step = uint32_t(logits.stride(3) * int64_t(sizeof(In)));
  shape.scale_y = T(shape.height) / T(shape.out_height);
  shape.scale_x = T(shape.width) / T(shape.out_width);
  // As many threads per row of logits as it has chunks of output rows, up to rounding.
  shape.chunks = std::max(1, (shape.out_height / shape.height + rows / 2) / rows);
  return shape;
}

// Output rows of a thread.
inline int rows_per_thread(int64_t height, int64_t out_height) {
  return out_height > 4 * height ? 8 : (out_height > height ? 4 : 1);
}

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

// Reads logits of a class: the place is in bytes from its first pixel, which is the same for all
// threads, so that no addresses of 64 bits are computed.
template <class T, class In>
__device__ T logit_at(const In* of_class, uint32_t place) {
  return T(*reinterpret_cast<const In*>(reinterpret_cast<const char*>(of_class) + place));
}

constexpr int kBestThreads = 128;

// The best class of every pixel of the logits, -1 where one is wild. Grid: x counts blocks of
// pixels, y the images.
template <class In, class T>
__global__ void __launch_bounds__(kBestThreads)
    best_classes_kernel(const In* __restrict__ logits, Shape<T> shape, int16_t* __restrict__ best) {
  const int i = int(blockIdx.x) * kBestThreads + int(threadIdx.x);
  if (i >= shape.height * shape.width) return;
  const In* of_class = logits + blockIdx.y * shape.image_stride;
  const uint32_t place =
      uint32_t(i / shape.width) * shape.row_step + uint32_t(i % shape.width) * shape.column_step;
  T largest = T(0);
  int label = -1;
  bool wild = false;
#pragma unroll 8
  for (int c = 0; c < shape.classes; ++c, of_class += shape.class_stride) {
    const T value = logit_at<T>(of_class, place);
    wild |= !pyseg::tame(value);
    const bool greater = value > largest || c == 0;
    largest = greater ? value : largest;
    label = greater ? c : label;
  }
  best[int64_t(blockIdx.y) * shape.height * shape.width + i] = int16_t(wild ? -1 : label);
}

// [N, h, w] int16, where that is worth while.
template <class In, class T>
std::optional<torch::stable::Tensor> best_classes(const torch::stable::Tensor& logits,
                                                  const Shape<T>& shape, cudaStream_t stream) {
  const int64_t images = logits.size(0), pixels = int64_t(shape.height) * shape.width;
  if (int64_t(shape.out_height) * shape.out_width < 4 * pixels || pixels >= int64_t(1) << 30)
    return std::nullopt;
  const std::vector<int64_t> sizes{images, shape.height, shape.width};
  torch::stable::Tensor best =
      torch::stable::new_empty(logits, sizes, torch::headeronly::ScalarType::Short);
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned((pixels + kBestThreads - 1) / kBestThreads),
                    unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH((best_classes_kernel<In, T>), grid, kBestThreads, 0, stream,
                 static_cast<const In*>(logits.const_data_ptr()) + first * shape.image_stride,
                 shape, static_cast<int16_t*>(best.mutable_data_ptr()) + first * pixels);
  }
  return best;
}

// Calls use(y, end, labels) for all chunks of output rows of a job: rows y to y + Rows - 1, of
// which those from `end` on do not count.
template <class In, class T, int Rows, class Use>
__device__ void classify_column(const In* __restrict__ logits,  // of the image: [C, h, w], strided
                                const Shape<T>& shape,
                                const int16_t* __restrict__ known,  // [h, w] or null: best_classes
                                int job, int x, const Use& use) {
  const int top = job / shape.chunks;
  int left;
  T tx;
  pyseg::source_index<T>(x, shape.scale_x, shape.width, &left, &tx);
  const uint32_t right = left + 1 < shape.width, below = top + 1 < shape.height;
  int common = -1;  // the class of all corners
  if (known) {
    const int16_t* const corner = known + int64_t(top) * shape.width + left;
    const int16_t* const under = corner + (below ? shape.width : 0);
    const int16_t a = corner[0], b = corner[right], c = under[0], d = under[right];
    if (a == b && a == c && a == d) common = a;
  }
  const uint32_t p0 = uint32_t(top) * shape.row_step + uint32_t(left) * shape.column_step;
  const uint32_t p1 = p0 + right * shape.column_step, q0 = p0 + below * shape.row_step;
  const uint32_t q1 = q0 + right * shape.column_step;
  const int end = first_row(shape, top + 1);
  for (int y = first_row(shape, top) + job % shape.chunks * Rows; y < end;
       y += shape.chunks * Rows) {
    int label[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) label[r] = common;
    if (common < 0) {
      T ty[Rows], best[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        int source;
        pyseg::source_index<T>(y + r < end ? y + r : y, shape.scale_y, shape.height, &source,
                               ty + r);
        best[r] = T(0);
      }
      bool wild = false;
      const In* of_class = logits;
#pragma unroll 4
      for (int c = 0; c < shape.classes; ++c, of_class += shape.class_stride) {
        const T left_top = logit_at<T>(of_class, p0), left_bottom = logit_at<T>(of_class, q0);
        const T a = left_top + tx * (logit_at<T>(of_class, p1) - left_top);
        const T b = left_bottom + tx * (logit_at<T>(of_class, q1) - left_bottom);
        const T slope = b - a;
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
        of_class = logits;
        for (int c = 0; c < shape.classes; ++c, of_class += shape.class_stride) {
          const T upper = pyseg::blend(logit_at<T>(of_class, p0), logit_at<T>(of_class, p1), tx);
          const T lower = pyseg::blend(logit_at<T>(of_class, q0), logit_at<T>(of_class, q1), tx);
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            const T value = pyseg::blend(upper, lower, ty[r]);
            const bool better = c == 0 || pyseg::wins(value, best[r]);
            best[r] = better ? value : best[r];
            label[r] = better ? c : label[r];
          }
        }
      }
    }
    use(y, end, label);
  }
}

}  // namespace
