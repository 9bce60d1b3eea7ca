// Heuristic panoptic merge on CUDA: masks become bits inside bounding boxes, one block per image
// decides instance by instance on those bits, and the map is written by all blocks at once.
//
// The sequential part reads only the words in an instance's bounding box, so it takes as long as
// the instances are large. All sums are of integers: the order of blocks changes nothing. Nothing
// is read back by the host.
#include "panoptic_merge.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/launch.h"
#include "../common/primitives.cuh"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kDecide = 1024;

struct Shape {
  int instances, height, width, words;  // words of 32 pixels in a row
  int stuff, cells;
  float score_threshold, mask_threshold;
  double overlap_threshold;
  int64_t stuff_area;
};

struct Stuff {  // travels with the launch
  int32_t labels[pyseg::kMaxStuff];
};

struct Bounds {
  int top, bottom, left, right;  // rows and words [first, last)
};

__global__ void clear(uint32_t* taken, int64_t words, int* areas, Bounds* bounds, int64_t instances,
                      int64_t* table, int64_t rows, int* counts, int64_t slots) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < words) taken[i] = 0;
  if (i < instances) areas[i] = 0, bounds[i] = {1 << 30, 0, 1 << 30, 0};
  if (i < rows * 4) table[i] = 0;
  if (i < slots) counts[i] = 0;
}

// The warp's 32 pixels as bits; what they contribute to area and bounds of the instance.
__device__ void record(uint32_t word, int row, int column, uint32_t* bits, int* area,
                       Bounds* bounds) {
  *bits = word;
  if (word == 0) return;
  atomicAdd(area, __popc(word));
  atomicMin(&bounds->top, row);
  atomicMax(&bounds->bottom, row + 1);
  atomicMin(&bounds->left, column);
  atomicMax(&bounds->right, column + 1);
}

// Grid: x counts blocks of words of an instance, y instances (of all images).
__global__ void __launch_bounds__(kThreads)
    pack_masks(const uint8_t* __restrict__ masks,  // [N K, H, W]
               const float* __restrict__ scores, Shape shape, uint32_t* __restrict__ bits,
               int* __restrict__ areas, Bounds* __restrict__ bounds) {
  const int64_t instance = blockIdx.y;
  if (!(scores[instance] >= shape.score_threshold)) return;
  const int word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32;
  const int row = word / shape.words, column = word % shape.words;
  if (row >= shape.height) return;  // the whole warp
  const int lane = int(threadIdx.x) % 32, x = column * 32 + lane;
  const bool inside =
      x < shape.width && masks[(instance * shape.height + row) * shape.width + x] != 0;
  const uint32_t found = __ballot_sync(0xffffffffu, inside);
  if (lane == 0)
    record(found, row, column, bits + (instance * shape.height + row) * shape.words + column,
           areas + instance, bounds + instance);
}

// The same from M x M probabilities; only words in reach of the box are written.
__global__ void __launch_bounds__(kThreads)
    pack_boxes(const float* __restrict__ masks,  // [N K, M, M]
               const float* __restrict__ boxes, const float* __restrict__ scores, Shape shape,
               uint32_t* __restrict__ bits, int* __restrict__ areas, Bounds* __restrict__ bounds) {
  const int64_t instance = blockIdx.y;
  if (!(scores[instance] >= shape.score_threshold)) return;
  const float* const box = boxes + instance * 4;
  const pyseg::CellRange columns = pyseg::pixels_of_box(box[0], box[2], shape.cells, shape.width);
  const pyseg::CellRange rows = pyseg::pixels_of_box(box[1], box[3], shape.cells, shape.height);
  const int first = columns.first / 32, across = (columns.last + 31) / 32 - first;
  const int lane = int(threadIdx.x) % 32;
  const int total = (rows.last - rows.first) * across;
  const float* const mask = masks + instance * shape.cells * shape.cells;
  for (int word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32; word < total;
       word += int(gridDim.x) * kThreads / 32) {
    const int row = rows.first + word / across, column = first + word % across;
    const int x = column * 32 + lane;
    float tx, ty;
    const int low_x = pyseg::cell_of_pixel(x, box[0], box[2], shape.cells, &tx);
    const int low_y = pyseg::cell_of_pixel(row, box[1], box[3], shape.cells, &ty);
    bool inside = false;
    if (x < shape.width && low_x != -2 && low_y != -2) {
      const auto at = [&](int y, int x) {
        return y >= 0 && y < shape.cells && x >= 0 && x < shape.cells ? mask[y * shape.cells + x]
                                                                      : 0.0f;
      };
      // In the order of the CPU: rows first.
      const float a = at(low_y, low_x), b = at(low_y, low_x + 1);
      const float left = a + ty * (at(low_y + 1, low_x) - a);
      const float right = b + ty * (at(low_y + 1, low_x + 1) - b);
      inside = left + tx * (right - left) >= shape.mask_threshold;
    }
    const uint32_t found = __ballot_sync(0xffffffffu, inside);
    if (lane == 0)
      record(found, row, column, bits + (instance * shape.height + row) * shape.words + column,
             areas + instance, bounds + instance);
  }
}

// One block per image: the sequence of instances by score, and who of them stays.
__global__ void __launch_bounds__(kDecide)
    decide(const float* __restrict__ all_scores, const int64_t* __restrict__ all_labels,
           const int* __restrict__ all_areas, const Bounds* __restrict__ all_bounds, Shape shape,
           uint32_t* __restrict__ all_bits, uint32_t* __restrict__ all_taken,
           int* __restrict__ all_order, int64_t* __restrict__ all_table,
           int* __restrict__ accepted) {
  using Reduce = pyseg::BlockReduce<int, kDecide>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ int covered;
  const int64_t image = blockIdx.x, first = image * shape.instances;
  const int64_t plane = int64_t(shape.height) * shape.words;
  const float* const scores = all_scores + first;
  int* const order = all_order + first;
  uint32_t* const taken = all_taken + image * plane;
  int64_t* const table = all_table + image * (shape.instances + shape.stuff) * 4;
  const int thread = int(threadIdx.x);
  for (int k = thread; k < shape.instances; k += kDecide) order[k] = -1;
  __syncthreads();
  for (int k = thread; k < shape.instances; k += kDecide) {
    const float own = scores[k];
    if (!(own >= shape.score_threshold)) continue;
    int rank = 0;
    for (int j = 0; j < shape.instances; ++j)
      rank += scores[j] > own || (scores[j] == own && j < k);
    order[rank] = k;
  }
  __syncthreads();
  int count = 0;
  for (int rank = 0; rank < shape.instances; ++rank) {
    const int k = order[rank];
    if (k < 0) break;
    const int area = all_areas[first + k];
    if (area == 0) continue;
    const Bounds box = all_bounds[first + k];
    const int across = box.right - box.left, words = across * (box.bottom - box.top);
    uint32_t* const bits = all_bits + (first + k) * plane;
    int own = 0;
    for (int i = thread; i < words; i += kDecide) {
      const int64_t at = int64_t(box.top + i / across) * shape.words + box.left + i % across;
      own += __popc(bits[at] & taken[at]);
    }
    const int sum = Reduce(storage).Sum(own);
    if (thread == 0) covered = sum;
    __syncthreads();
    const int hidden = covered;
    __syncthreads();
    if (hidden == area || double(hidden) / double(area) > shape.overlap_threshold) continue;
    for (int i = thread; i < words; i += kDecide) {
      const int64_t at = int64_t(box.top + i / across) * shape.words + box.left + i % across;
      const uint32_t fresh = bits[at] & ~taken[at];
      bits[at] = fresh;
      taken[at] |= fresh;
    }
    if (thread == 0) {
      table[count * 4 + 1] = all_labels[first + k];
      table[count * 4 + 2] = area - hidden;
      table[count * 4 + 3] = k;
      table[count * 4] = count + 1;
    }
    ++count;
    __syncthreads();
  }
  if (thread == 0) accepted[image] = count;
}

template <class Label>
__device__ int slot_of(Label label, const Stuff& stuff, int count) {
  for (int s = 0; s < count; ++s)
    if (int64_t(label) == stuff.labels[s]) return s;
  return -1;
}

// Grid: x counts blocks of words of an image, y images. Free pixels of every stuff class.
template <class Label>
__global__ void __launch_bounds__(kThreads)
    count_stuff(const Label* __restrict__ semantic, const uint32_t* __restrict__ taken, Stuff stuff,
                Shape shape, int* __restrict__ counts) {
  const int64_t image = blockIdx.y;
  const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x) * kThreads / 32;
  for (int word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32;
       word < shape.height * shape.words; word += warps) {
    const int row = word / shape.words, x = word % shape.words * 32 + lane;
    const bool free =
        x < shape.width && !(taken[image * shape.height * shape.words + word] >> lane & 1);
    const int slot =
        free ? slot_of(semantic[(image * shape.height + row) * shape.width + x], stuff, shape.stuff)
             : -1;
    // One lane of every different slot adds for all that have it.
    for (uint32_t left = __ballot_sync(0xffffffffu, slot >= 0); left;) {
      const int leader = __ffs(int(left)) - 1;
      const int theirs = __shfl_sync(0xffffffffu, slot, leader);
      const uint32_t same = __ballot_sync(0xffffffffu, slot == theirs);
      if (lane == leader) atomicAdd(counts + image * shape.stuff + theirs, __popc(same));
      left &= ~same;
    }
  }
}

template <class Label>
__global__ void __launch_bounds__(kThreads)
    write(const Label* __restrict__ semantic, const uint32_t* __restrict__ taken,
          const uint32_t* __restrict__ bits, const Bounds* __restrict__ bounds, Stuff stuff,
          const int* __restrict__ counts, const int* __restrict__ accepted, Shape shape,
          int64_t* all_table, int32_t* __restrict__ map) {
  PYSEG_DYNAMIC_SHARED(int, ids);  // [stuff], 0 = left out
  const int64_t image = blockIdx.y;
  int64_t* const table = all_table + image * (shape.instances + shape.stuff) * 4;
  const int things = accepted[image];
  if (threadIdx.x == 0) {
    int next = things;
    for (int s = 0; s < shape.stuff; ++s) {
      const int area = counts[image * shape.stuff + s];
      const bool kept = area > 0 && area >= shape.stuff_area;
      ids[s] = kept ? next + 1 : 0;
      if (kept && blockIdx.x == 0) {
        int64_t* const row = table + next * 4;
        row[0] = next + 1, row[1] = stuff.labels[s], row[2] = area, row[3] = -1;
      }
      next += kept;
    }
  }
  __syncthreads();
  const int64_t plane = int64_t(shape.height) * shape.words;
  const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x) * kThreads / 32;
  for (int word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32; word < plane;
       word += warps) {
    const int row = word / shape.words, column = word % shape.words, x = column * 32 + lane;
    const uint32_t covered = taken[image * plane + word];
    int32_t id = 0;
    if (covered) {
      uint32_t found = 0;
      for (int n = 0; n < things && found != covered; ++n) {
        const int64_t k = image * shape.instances + table[n * 4 + 3];
        const Bounds box = bounds[k];
        if (row < box.top || row >= box.bottom || column < box.left || column >= box.right)
          continue;
        const uint32_t own = bits[k * plane + word];
        if (own >> lane & 1) id = n + 1;
        found |= own;
      }
    }
    if (x >= shape.width) continue;
    const int64_t pixel = (image * shape.height + row) * shape.width + x;
    if (!(covered >> lane & 1)) {
      const int slot = slot_of(semantic[pixel], stuff, shape.stuff);
      id = slot < 0 ? 0 : ids[slot];
    }
    map[pixel] = id;
  }
}

std::tuple<Tensor, Tensor> panoptic_merge_cuda(
    const Tensor& masks, const std::optional<Tensor>& boxes, const Tensor& scores,
    const Tensor& labels, const Tensor& semantic, std::vector<int64_t> stuff_classes,
    double score_threshold, double overlap_threshold, int64_t stuff_area, double mask_threshold) {
  const pyseg::DeviceScope device(masks, boxes, scores, labels, semantic);
  const Tensor m = torch::stable::contiguous(masks), s = torch::stable::contiguous(scores),
               l = torch::stable::contiguous(labels), c = torch::stable::contiguous(semantic);
  const int64_t images = m.size(0), instances = m.size(1), stuff = stuff_classes.size();
  if (stuff > pyseg::kMaxStuff) throw std::invalid_argument("too many stuff_classes");
  Stuff list{};
  for (int64_t i = 0; i < stuff; ++i) list.labels[i] = int32_t(stuff_classes[i]);
  Shape shape{};
  shape.instances = int(instances), shape.stuff = int(stuff), shape.cells = int(m.size(2));
  shape.height = int(c.size(1)), shape.width = int(c.size(2)),
  shape.words = (shape.width + 31) / 32;
  shape.score_threshold = float(score_threshold), shape.mask_threshold = float(mask_threshold);
  shape.overlap_threshold = overlap_threshold, shape.stuff_area = stuff_area;
  const int64_t plane = int64_t(shape.height) * shape.words, rows = images * (instances + stuff);
  Tensor map = torch::stable::new_empty(c, {images, shape.height, shape.width}, ScalarType::Int);
  Tensor table = torch::stable::new_empty(c, {images, instances + stuff, 4}, ScalarType::Long);
  const auto ints = [&](int64_t count) {
    return torch::stable::new_empty(c, {std::max<int64_t>(count, 1)}, ScalarType::Int);
  };
  Tensor bits = ints(images * instances * plane), taken = ints(images * plane),
         areas = ints(images * instances), bounds = ints(images * instances * 4),
         order = ints(images * instances), accepted = ints(images), counts = ints(images * stuff);
  const auto data = [](Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); };
  auto* const bit_words = reinterpret_cast<uint32_t*>(data(bits));
  auto* const taken_words = reinterpret_cast<uint32_t*>(data(taken));
  auto* const boxes_of = reinterpret_cast<Bounds*>(data(bounds));
  int64_t* const table_rows = table.mutable_data_ptr<int64_t>();
  const int64_t most =
      std::max({images * plane, images * instances, rows * 4, images * stuff, int64_t(1)});
  if (images == 0) return {map, table};
  PYSEG_LAUNCH(clear, unsigned((most + kThreads - 1) / kThreads), kThreads, 0, device.stream,
               taken_words, images * plane, data(areas), boxes_of, images * instances, table_rows,
               rows, data(counts), images * stuff);
  const int64_t blocks = (plane * 32 + kThreads - 1) / kThreads;
  for (int64_t first = 0; first < images * instances && plane > 0; first += 65535) {
    const dim3 grid(unsigned(boxes ? std::min<int64_t>(blocks, 64) : blocks),
                    unsigned(std::min<int64_t>(65535, images * instances - first)));
    if (boxes) {
      const Tensor b = torch::stable::contiguous(*boxes);
      PYSEG_LAUNCH(pack_boxes, grid, kThreads, 0, device.stream,
                   m.const_data_ptr<float>() + first * shape.cells * shape.cells,
                   b.const_data_ptr<float>() + first * 4, s.const_data_ptr<float>() + first, shape,
                   bit_words + first * plane, data(areas) + first, boxes_of + first);
    } else {
      PYSEG_LAUNCH(
          pack_masks, grid, kThreads, 0, device.stream,
          static_cast<const uint8_t*>(m.const_data_ptr()) + first * shape.height * shape.width,
          s.const_data_ptr<float>() + first, shape, bit_words + first * plane, data(areas) + first,
          boxes_of + first);
    }
  }
  PYSEG_LAUNCH(decide, unsigned(images), kDecide, 0, device.stream, s.const_data_ptr<float>(),
               l.const_data_ptr<int64_t>(), data(areas), boxes_of, shape, bit_words, taken_words,
               data(order), table_rows, data(accepted));
  if (plane == 0) return {map, table};
  const auto finish = [&]<class Label>(Label) {
    const auto* const classes = static_cast<const Label*>(c.const_data_ptr());
    for (int64_t first = 0; first < images; first += 65535) {
      const dim3 grid(unsigned(std::min<int64_t>(blocks, 1024)),
                      unsigned(std::min<int64_t>(65535, images - first)));
      const int64_t pixels = int64_t(shape.height) * shape.width;
      if (stuff > 0)
        PYSEG_LAUNCH((count_stuff<Label>), grid, kThreads, 0, device.stream,
                     classes + first * pixels, taken_words + first * plane, list, shape,
                     data(counts) + first * stuff);
      PYSEG_LAUNCH((write<Label>), grid, kThreads, stuff * sizeof(int), device.stream,
                   classes + first * pixels, taken_words + first * plane,
                   bit_words + first * instances * plane, boxes_of + first * instances, list,
                   data(counts) + first * stuff, data(accepted) + first, shape,
                   table_rows + first * (instances + stuff) * 4,
                   map.mutable_data_ptr<int32_t>() + first * pixels);
    }
  };
  switch (c.scalar_type()) {
    case ScalarType::Byte: finish(uint8_t()); break;
    case ScalarType::Short: finish(int16_t()); break;
    case ScalarType::Int: finish(int32_t()); break;
    case ScalarType::Long: finish(int64_t()); break;
    default: throw std::invalid_argument("semantic must be uint8, int16, int32 or int64");
  }
  return {map, table};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("panoptic_merge", TORCH_BOX(&panoptic_merge_cuda)); }
