// The panoptic head of UPSNet on CUDA. A thread has one output column and up to `Rows` rows that
// lie between the same two rows of logits (see upsample_argmax.cuh), a block as many neighbours: it
// first collects, in order, the instances whose boxes meet its pixels, and what all of its threads
// need of them. No result depends on the order of anything, and the host waits for nothing.
#include "panoptic_head.h"

#include <algorithm>
#include <cmath>

#include "../upsample_argmax/upsample_argmax.cuh"

namespace {

using namespace pyseg;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#include "winner.inc"

constexpr int kThreads = 128;  // also the instances that a block looks at together
constexpr unsigned kAll = 0xffffffffu;

struct Instances {
  int count, cells, stuff;
};

// Where a row of pixels lies in an instance's mask.
struct CellRow {
  int upper, lower;  // first cells of both rows; -1: nowhere, the box does not have the row
  float t;
};

template <int Rows>
struct Listed {
  int index, label;
  int left, width;  // of the box
  float scale;      // cells per column
  CellRow rows[Rows];
};

// Grid: x counts (row of logits, chunk, block of output columns), y the images.
template <int Rows>
__global__ void __launch_bounds__(kThreads)
    panoptic_head_kernel(const float* __restrict__ all_logits,    // [N, C, h, w]
                         const float* __restrict__ all_masks,     // [N, K, M, M]
                         const float* __restrict__ all_boxes,     // [N, K, 4]
                         const int64_t* __restrict__ all_labels,  // [N, K]
                         Shape<float> shape, Instances instances, int32_t* __restrict__ out) {
  __shared__ Listed<Rows> list[kThreads];
  __shared__ int in_warp[kThreads / 32], culled[kThreads / 32];
  const int blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int job = int(blockIdx.x) / blocks, first_x = int(blockIdx.x) % blocks * kThreads;
  const int x = first_x + int(threadIdx.x), last_x = min(first_x + kThreads, shape.out_width) - 1;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const bool on_image = x < shape.out_width;
  const int64_t n = blockIdx.y, plane = shape.class_stride;
  const float* const logits = all_logits + n * shape.image_stride;
  const float* const masks = all_masks + n * instances.count * instances.cells * instances.cells;
  const float* const boxes = all_boxes + n * instances.count * 4;
  const int64_t* const labels = all_labels + n * instances.count;
  const int top = job / shape.chunks;
  int left = 0;
  float tx = 0;
  if (on_image) source_index<float>(x, shape.scale_x, shape.width, &left, &tx);
  const uint32_t right = left + 1 < shape.width, below = top + 1 < shape.height;
  const uint32_t p0 = uint32_t(top) * shape.row_step + uint32_t(left) * shape.column_step;
  const uint32_t p1 = p0 + right * shape.column_step, q0 = p0 + below * shape.row_step;
  const uint32_t q1 = q0 + right * shape.column_step;
  const int end = first_row(shape, top + 1);
  // The same in all threads: the barriers below are for the whole block.
  for (int first = first_row(shape, top) + job % shape.chunks * Rows; first < end;
       first += shape.chunks * Rows) {
    const int last = min(first + Rows, end) - 1;
    Pixel<float, int> pixels[Rows];
    float ty[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      int source;
      source_index<float>(min(first + r, last), shape.scale_y, shape.height, &source, &ty[r]);
      const float lowest = -HUGE_VALF;
      pixels[r] = {lowest, lowest, 0.0f, 0.0f, -1, -1, -1};
    }
    // A class along the column: its value at the upper row of logits, and the way to the lower one.
    const auto along = [&](const float* of_class, float* value, float* slope) {
      const float a = logit_at<float>(of_class, p0), b = logit_at<float>(of_class, q0);
      *value = a + tx * (logit_at<float>(of_class, p1) - a);
      *slope = b + tx * (logit_at<float>(of_class, q1) - b) - *value;
    };
    const float* of_class = logits;
#pragma unroll 4
    for (int c = 0; c < instances.stuff; ++c, of_class += plane) {
      float a, slope;
      along(of_class, &a, &slope);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float value = a + ty[r] * slope;
        if (value > pixels[r].stuff) pixels[r].stuff = value, pixels[r].stuff_at = c;
      }
    }
#pragma unroll 4
    for (int c = instances.stuff; c < shape.classes; ++c, of_class += plane) {
      float a, slope;
      along(of_class, &a, &slope);
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        pixels[r].thing = fmaxf(pixels[r].thing, a + ty[r] * slope);  // a NaN is passed over
    }
    for (int start = 0; start < instances.count; start += kThreads) {
      // Every thread looks at one instance.
      const int own = start + int(threadIdx.x);
      int label = -1;
      PixelBox box{0, 0, 0, 0};
      if (own < instances.count) {
        const int64_t named = labels[own];
        if (named >= instances.stuff && named < shape.classes) label = int(named);
        if (label >= 0) box = pixel_box(boxes + int64_t(own) * 4);
      }
      const bool meets = box.width > 0 && box.left <= last_x && box.left + box.width > first_x &&
                         box.top <= last && box.top + box.height > first;
      const uint32_t meeting = __ballot_sync(kAll, label >= 0 && meets);
      const uint32_t missing = __ballot_sync(kAll, label >= 0 && !meets);
      __syncthreads();  // the list of the instances before has been read
      if (lane == 0) {
        in_warp[warp] = __popc(meeting);
        culled[warp] = missing ? start + warp * 32 + __ffs(int(missing)) - 1 : -1;
      }
      __syncthreads();
      int place = __popc(meeting & ((1u << lane) - 1)), listed = 0, outside = -1;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) place += in_warp[w];
        listed += in_warp[w];
        if (outside < 0) outside = culled[w];
      }
      if (label >= 0 && meets) {
        Listed<Rows>& item = list[place];
        item.index = own, item.label = label, item.left = box.left, item.width = box.width;
        item.scale = float(instances.cells) / float(box.width);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const int y = first + r;
          CellRow row{-1, -1, 0.0f};
          if (box.has_row(y)) {
            source_index<float>(y - box.top, float(instances.cells) / float(box.height),
                                instances.cells, &row.upper, &row.t);
            row.lower = min(row.upper + 1, instances.cells - 1) * instances.cells;
            row.upper *= instances.cells;
          }
          item.rows[r] = row;
        }
      }
      __syncthreads();
      if (!on_image) continue;
      // The first instance without the pixel is the first of those culled or one of those listed.
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        bool known = pixels[r].outside >= 0;
        if (!known) pixels[r].outside = outside;
        for (int i = 0; i < listed && !known; ++i) {
          const Listed<Rows>& item = list[i];
          if (outside >= 0 && item.index > outside) break;
          const bool column_inside = x >= item.left && x - item.left < item.width;
          known = !column_inside || item.rows[r].upper < 0;
          if (known) pixels[r].outside = item.index;
        }
      }
      for (int i = 0; i < listed; ++i) {
        const Listed<Rows>& item = list[i];
        if (x < item.left || x - item.left >= item.width) continue;
        int cell;
        float cell_t, a, slope;
        source_index<float>(x - item.left, item.scale, instances.cells, &cell, &cell_t);
        const int cell_right = min(cell + 1, instances.cells - 1);
        const float* const mask = masks + int64_t(item.index) * instances.cells * instances.cells;
        along(logits + item.label * plane, &a, &slope);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const CellRow row = item.rows[r];
          if (row.upper < 0) continue;
          Pixel<float, int>& pixel = pixels[r];
          const float* const upper = mask + row.upper;
          const float* const lower = mask + row.lower;
          const float m = upper[cell] + row.t * (lower[cell] - upper[cell]);
          const float m_right = upper[cell_right] + row.t * (lower[cell_right] - upper[cell_right]);
          const float logit = a + ty[r] * slope;
          const float value = logit + (m + cell_t * (m_right - m));
          const bool none = pixel.value_at < 0;
          if (none || logit > pixel.inside) pixel.inside = logit;
          if (none || value > pixel.value) pixel.value = value, pixel.value_at = item.index;
        }
      }
    }
    if (!on_image) continue;
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      if (first + r <= last)
        out[(n * shape.out_height + first + r) * shape.out_width + x] =
            winner(pixels[r], instances.stuff, instances.count);
  }
}

template <int Rows>
void launch(const Tensor& logits, const Tensor& masks, const Tensor& boxes, const Tensor& labels,
            int64_t stuff, Tensor& out, cudaStream_t stream) {
  const int64_t images = out.size(0), height = out.size(1), width = out.size(2);
  const auto shape = make_shape<float, float>(logits, height, width, Rows);
  const Instances instances{int(masks.size(1)), int(masks.size(2)), int(stuff)};
  const int64_t count = instances.count, cells = instances.cells;
  const int64_t blocks = (width + kThreads - 1) / kThreads;
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks * shape.jobs()),
                    unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH(panoptic_head_kernel<Rows>, grid, kThreads, 0, stream,
                 logits.const_data_ptr<float>() + first * shape.image_stride,
                 masks.const_data_ptr<float>() + first * count * cells * cells,
                 boxes.const_data_ptr<float>() + first * count * 4,
                 labels.const_data_ptr<int64_t>() + first * count, shape, instances,
                 out.mutable_data_ptr<int32_t>() + first * height * width);
  }
}

Tensor panoptic_head_cuda(const Tensor& logits, const Tensor& masks, const Tensor& boxes,
                          const Tensor& labels, int64_t stuff, int64_t height, int64_t width) {
  const DeviceScope device(logits, masks, boxes, labels);
  const int64_t images = logits.size(0);
  Tensor out = torch::stable::new_empty(logits, {images, height, width}, ScalarType::Int);
  if (out.numel() == 0) return out;
  const Tensor x = walkable<float>(logits), m = torch::stable::contiguous(masks),
               b = torch::stable::contiguous(boxes), l = torch::stable::contiguous(labels);
  if (height > x.size(2))
    launch<4>(x, m, b, l, stuff, out, device.stream);
  else
    launch<1>(x, m, b, l, stuff, out, device.stream);
  return out;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("panoptic_head", TORCH_BOX(&panoptic_head_cuda)); }
