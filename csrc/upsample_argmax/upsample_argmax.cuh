// The best class of output pixels on CUDA: shared by the ops that resize logits and want classes.
//
// A thread has one output column and up to `Rows` output rows that lie between the same two rows of
// logits, so that it applies tx once for all of them. It reads its corners through the L1 cache,
// which holds them: neighbouring threads have the same ones.
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "upsample_argmax.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

template <class T>
struct Shape {
  int classes, height, width, out_height, out_width;
  int64_t image_stride, class_stride, row_stride, column_stride;  // of the logits, in elements
  T scale_y, scale_x;
  int chunks;  // threads that share the output rows of one row of logits

  __host__ __device__ int jobs() const { return height * chunks; }  // of an output column
};

template <class T>
Shape<T> make_shape(const torch::stable::Tensor& logits, int64_t out_height, int64_t out_width,
                    int rows) {
  Shape<T> shape;
  shape.classes = int(logits.size(1));
  shape.height = int(logits.size(2)), shape.width = int(logits.size(3));
  shape.out_height = int(out_height), shape.out_width = int(out_width);
  shape.image_stride = logits.stride(0), shape.class_stride = logits.stride(1);
  shape.row_stride = logits.stride(2), shape.column_stride = logits.stride(3);
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

// Calls use(y, end, labels) for all chunks of output rows of a job: rows y to y + Rows - 1, of
// which those from `end` on do not count.
template <class In, class T, int Rows, class Use>
__device__ void classify_column(const In* __restrict__ logits,  // of the image: [C, h, w], strided
                                const Shape<T>& shape, int job, int x, const Use& use) {
  const int top = job / shape.chunks;
  int left;
  T tx;
  pyseg::source_index<T>(x, shape.scale_x, shape.width, &left, &tx);
  const In* corner = logits + top * shape.row_stride + left * shape.column_stride;
  const int64_t right = left + 1 < shape.width ? shape.column_stride : 0;
  const int64_t below = top + 1 < shape.height ? shape.row_stride : 0;
  const int end = first_row(shape, top + 1);
  for (int y = first_row(shape, top) + job % shape.chunks * Rows; y < end;
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
    use(y, end, label);
  }
}

}  // namespace
