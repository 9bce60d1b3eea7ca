// The panoptic head of UPSNet on CUDA. A thread has one output column and up to `kRows` rows that
// lie between the same two rows of logits; it reads its corners through the L1 cache. A block first
// collects, in order, the instances whose boxes meet its pixels. No result depends on the order of
// anything, and the host waits for nothing.
#include "panoptic_head.h"

#include <algorithm>
#include <cmath>

#include "../common/launch.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using namespace pyseg;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#include "winner.inc"

constexpr int kThreads = 128;
constexpr int kRows = 4;
constexpr int kListed = 256;  // instances that a block looks at together

struct Shape {
  int classes, stuff, instances, cells, low_height, low_width, height, width;
  float scale_y, scale_x;
};

__device__ float sample(const float* __restrict__ plane, int top, int bottom, int left, int right,
                        float ty, float tx) {
  const float a = plane[top + left] + tx * (plane[top + right] - plane[top + left]);
  const float b = plane[bottom + left] + tx * (plane[bottom + right] - plane[bottom + left]);
  return a + ty * (b - a);
}

// Grid: blocks of columns, blocks of rows, images.
__global__ void __launch_bounds__(kThreads)
    panoptic_head_kernel(const float* __restrict__ logits,    // [N, C, h, w]
                         const float* __restrict__ masks,     // [N, K, M, M]
                         const float* __restrict__ boxes,     // [N, K, 4]
                         const int64_t* __restrict__ labels,  // [N, K]
                         Shape shape, int32_t* __restrict__ out) {
  __shared__ PixelBox box_of[kListed];
  __shared__ int label_of[kListed];
  const int x = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const int first_row = int(blockIdx.y) * kRows;
  const int64_t n = blockIdx.z;
  const bool on_image = x < shape.width;
  int left = 0;
  float tx = 0;
  if (on_image) source_index<float>(x, shape.scale_x, shape.low_width, &left, &tx);
  const int right = min(left + 1, shape.low_width - 1);
  const int64_t plane = int64_t(shape.low_height) * shape.low_width;
  const float* const image = logits + n * shape.classes * plane;
  Pixel<float, int> pixels[kRows];
  int tops[kRows], bottoms[kRows];
  float ty[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int y = min(first_row + r, shape.height - 1);
    source_index<float>(y, shape.scale_y, shape.low_height, &tops[r], &ty[r]);
    bottoms[r] = min(tops[r] + 1, shape.low_height - 1) * shape.low_width;
    tops[r] *= shape.low_width;
    const float lowest = -HUGE_VALF;
    pixels[r] = {lowest, lowest, 0.0f, 0.0f, -1, -1, -1};
  }
  if (on_image)
    for (int c = 0; c < shape.classes; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float value = sample(image + c * plane, tops[r], bottoms[r], left, right, ty[r], tx);
        if (c < shape.stuff) {
          if (value > pixels[r].stuff) pixels[r].stuff = value, pixels[r].stuff_at = c;
        } else if (value > pixels[r].thing) {
          pixels[r].thing = value;
        }
      }
    }
  for (int start = 0; start < shape.instances; start += kListed) {
    __syncthreads();
    const int listed = min(kListed, shape.instances - start);
    for (int i = int(threadIdx.x); i < listed; i += kThreads) {
      const int64_t k = n * shape.instances + start + i;
      const int64_t label = labels[k];
      label_of[i] = label >= shape.stuff && label < shape.classes ? int(label) : -1;
      box_of[i] = pixel_box(boxes + k * 4);
    }
    __syncthreads();
    if (!on_image) continue;
    for (int i = 0; i < listed; ++i) {
      const int label = label_of[i];
      if (label < 0) continue;
      const PixelBox box = box_of[i];
      const bool column_inside = box.has_column(x);
      int cell = 0;
      float cell_t = 0;
      if (column_inside)
        source_index<float>(x - box.left, float(shape.cells) / float(box.width), shape.cells, &cell,
                            &cell_t);
      const int cell_right = min(cell + 1, shape.cells - 1);
      const float* const mask =
          masks + (n * shape.instances + start + i) * shape.cells * shape.cells;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Pixel<float, int>& pixel = pixels[r];
        const int y = first_row + r;
        if (!column_inside || !box.has_row(y)) {
          if (pixel.outside < 0) pixel.outside = start + i;
          continue;
        }
        int row;
        float row_t;
        source_index<float>(y - box.top, float(shape.cells) / float(box.height), shape.cells, &row,
                            &row_t);
        const float* const upper = mask + row * shape.cells;
        const float* const lower = mask + min(row + 1, shape.cells - 1) * shape.cells;
        const float a = upper[cell] + row_t * (lower[cell] - upper[cell]);
        const float b = upper[cell_right] + row_t * (lower[cell_right] - upper[cell_right]);
        const float logit =
            sample(image + label * plane, tops[r], bottoms[r], left, right, ty[r], tx);
        const float value = logit + (a + cell_t * (b - a));
        const bool first = pixel.value_at < 0;
        if (first || logit > pixel.inside) pixel.inside = logit;
        if (first || value > pixel.value) pixel.value = value, pixel.value_at = start + i;
      }
    }
  }
  if (!on_image) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first_row + r < shape.height)
      out[(n * shape.height + first_row + r) * shape.width + x] =
          winner(pixels[r], shape.stuff, shape.instances);
}

Tensor panoptic_head_cuda(const Tensor& logits, const Tensor& masks, const Tensor& boxes,
                          const Tensor& labels, int64_t stuff, int64_t height, int64_t width) {
  const DeviceScope device(logits, masks, boxes, labels);
  const int64_t images = logits.size(0);
  Tensor out = torch::stable::new_empty(logits, {images, height, width}, ScalarType::Int);
  if (out.numel() == 0) return out;
  const Tensor x = torch::stable::contiguous(logits), m = torch::stable::contiguous(masks),
               b = torch::stable::contiguous(boxes), l = torch::stable::contiguous(labels);
  Shape shape{};
  shape.classes = int(x.size(1)), shape.stuff = int(stuff), shape.instances = int(m.size(1));
  shape.cells = int(m.size(2)), shape.low_height = int(x.size(2)), shape.low_width = int(x.size(3));
  shape.height = int(height), shape.width = int(width);
  shape.scale_y = float(shape.low_height) / float(height);
  shape.scale_x = float(shape.low_width) / float(width);
  const int64_t plane = int64_t(shape.low_height) * shape.low_width;
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.z
    const dim3 grid(unsigned((width + kThreads - 1) / kThreads),
                    unsigned((height + kRows - 1) / kRows),
                    unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH(panoptic_head_kernel, grid, kThreads, 0, device.stream,
                 x.const_data_ptr<float>() + first * shape.classes * plane,
                 m.const_data_ptr<float>() + first * shape.instances * shape.cells * shape.cells,
                 b.const_data_ptr<float>() + first * shape.instances * 4,
                 l.const_data_ptr<int64_t>() + first * shape.instances, shape,
                 out.mutable_data_ptr<int32_t>() + first * height * width);
  }
  return out;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("panoptic_head", TORCH_BOX(&panoptic_head_cuda)); }
