// Panoptic quality of one image on CUDA. The first kernel stores the lists of segments, which
// travel with its launch, and makes zeros of what is counted; the second counts the pixels of every
// pair of segments, in shared memory where the table fits; the third, one block, applies the rules.
// All sums are of integers, so their order does not matter. Nothing synchronises, and as nothing is
// copied from the host either, a graph can capture it all.
#include "panoptic_quality.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "../common/launch.h"
#include <torch/csrc/stable/ops.h>

namespace {

using namespace pyseg;
using Sum = unsigned long long;

constexpr int kThreads = 256;
constexpr int kRules = 1024;            // threads of the block that applies the rules
constexpr int kPieces = 2;              // of kCount pixels that a thread reads before it counts
constexpr int kCount = 4;               // pixels of 16 bytes
constexpr int kSharedBytes = 48 << 10;  // what a kernel may have without asking
constexpr int kMaxIdBytes = 16 << 10;   // of which ids may take so much
constexpr int kTravelling = 128;        // segments that travel with one launch: 3 of its 4 KiB
constexpr unsigned kAll = 0xffffffffu;

struct Segment {
  int64_t area;  // of targets
  int32_t id, label, crowd;
};

struct Travelling {
  Segment segments[kTravelling];
};

struct Zeros {
  Sum* data[3];
  int64_t size[3];
};

// Grid: x walks over the memory of zeros. Segments go to their place in the list.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Travelling some, int count, Segment* __restrict__ list,
                   int32_t* __restrict__ ids, Zeros zeros) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread < count) {
    list[thread] = some.segments[thread];
    ids[thread] = some.segments[thread].id;
  }
#pragma unroll
  for (int k = 0; k < 3; ++k)
    for (int64_t i = thread; i < zeros.size[k]; i += int64_t(gridDim.x) * kThreads)
      zeros.data[k][i] = 0;
}

// Segments with rising ids.
struct Segments {
  const Segment* rows;
  const int32_t* ids;
  int count;

  // 0 = void, 1 + place in the list, count + 1 = not listed.
  __device__ int position(int32_t id) const {
    if (id == 0) return 0;
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ids[middle] < id)
        low = middle + 1;
      else
        high = middle;
    }
    return (low < count && ids[low] == id ? low : count) + 1;
  }
};

struct Maps {
  const int32_t* target;
  const int32_t* prediction;
  const uint8_t* target_boundary;  // both or neither
  const uint8_t* prediction_boundary;
  bool aligned;  // to pieces of kCount pixels
};

struct Pixel {
  int32_t target, prediction;
  bool target_boundary, prediction_boundary;

  __device__ bool operator==(const Pixel& other) const {
    return target == other.target && prediction == other.prediction &&
           target_boundary == other.target_boundary &&
           prediction_boundary == other.prediction_boundary;
  }
};

// kCount pixels, all read before any is looked at.
struct Piece {
  int32_t target[kCount], prediction[kCount];
  uint8_t target_boundary[kCount], prediction_boundary[kCount];

  template <class Word, class T>
  static __device__ void read_one(const T* from, bool aligned, T* to) {
    static_assert(sizeof(Word) == kCount * sizeof(T));
    if (aligned) {
      const Word word = *reinterpret_cast<const Word*>(from);
      memcpy(to, &word, sizeof word);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) to[k] = from[k];
    }
  }
  __device__ void read(const Maps& maps, int64_t i) {
    read_one<int4>(maps.target + i, maps.aligned, target);
    read_one<int4>(maps.prediction + i, maps.aligned, prediction);
#pragma unroll
    for (int k = 0; k < kCount; ++k) target_boundary[k] = prediction_boundary[k] = 0;
    if (maps.target_boundary) {
      read_one<uint32_t>(maps.target_boundary + i, maps.aligned, target_boundary);
      read_one<uint32_t>(maps.prediction_boundary + i, maps.aligned, prediction_boundary);
    }
  }
  __device__ Pixel at(int k) const {
    return {target[k], prediction[k], target_boundary[k] != 0, prediction_boundary[k] != 0};
  }
};

// Tables: [2, T + 2, P + 2], the second of boundary pixels where there are boundaries. Shared: ids
// where `own_ids`, then a block's tables. Grid: x walks over the pixels, a warp takes
// kPieces * 32 * kCount of them; those left over are counted one by one.
template <bool Shared>
__global__ void __launch_bounds__(kThreads)
    count_pairs_kernel(Maps maps, int64_t pixels, Segments targets, Segments predictions,
                       bool own_ids, Sum* __restrict__ tables) {
  PYSEG_DYNAMIC_SHARED(uint32_t, memory);
  const int width = predictions.count + 2;
  const int64_t size = int64_t(targets.count + 2) * width;
  const int64_t cells = maps.target_boundary ? 2 * size : size;
  uint32_t* block_tables = memory;
  if (own_ids) {
    int32_t* const ids = reinterpret_cast<int32_t*>(memory);
    for (int i = threadIdx.x; i < targets.count; i += kThreads) ids[i] = targets.ids[i];
    for (int i = threadIdx.x; i < predictions.count; i += kThreads)
      ids[targets.count + i] = predictions.ids[i];
    targets.ids = ids, predictions.ids = ids + targets.count;
    block_tables += targets.count + predictions.count;
  }
  if (Shared)
    for (int64_t i = threadIdx.x; i < cells; i += kThreads) block_tables[i] = 0;
  __syncthreads();
  const auto add_to = [&](int64_t cell, uint32_t amount) {
    if (Shared)
      atomicAdd(block_tables + cell, amount);
    else
      atomicAdd(tables + cell, Sum(amount));
  };
  const auto add = [&](const Pixel& run, uint32_t amount) {
    const int row = targets.position(run.target);
    const int column = predictions.position(run.prediction);
    add_to(int64_t(row) * width + column, amount);
    if (maps.target_boundary) {
      const int boundary_row = row == 0 || run.target_boundary ? row : targets.count + 1;
      const int boundary_column =
          column == 0 || run.prediction_boundary ? column : predictions.count + 1;
      add_to(size + int64_t(boundary_row) * width + boundary_column, amount);
    }
  };
  constexpr int kPixels = 32 * kCount * kPieces;
  const int lane = int(threadIdx.x) % 32;
  const int64_t rounds = pixels / kPixels, warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t round = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; round < rounds;
       round += warps) {
    Piece pieces[kPieces];
#pragma unroll
    for (int v = 0; v < kPieces; ++v)
      pieces[v].read(maps, round * kPixels + (v * 32 + lane) * kCount);
#pragma unroll
    for (int v = 0; v < kPieces; ++v) {
      Pixel run = pieces[v].at(0);
      // Maps are mostly flat, and lanes that add to one cell would wait for each other.
      bool flat = run.target == __shfl_sync(kAll, run.target, 0);
      flat &= run.prediction == __shfl_sync(kAll, run.prediction, 0);
      const int edges = 2 * run.target_boundary + run.prediction_boundary;
      flat &= edges == __shfl_sync(kAll, edges, 0);
#pragma unroll
      for (int k = 1; k < kCount; ++k) flat &= pieces[v].at(k) == run;
      if (__all_sync(kAll, flat)) {
        if (lane == 0) add(run, 32 * kCount);
        continue;
      }
      uint32_t length = 1;
#pragma unroll
      for (int k = 1; k <= kCount; ++k) {  // one addition per run of equal pixels
        const Pixel next = pieces[v].at(k < kCount ? k : 0);
        if (k < kCount && next == run) {
          ++length;
          continue;
        }
        add(run, length);
        run = next, length = 1;
      }
    }
  }
  for (int64_t i = rounds * kPixels + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < pixels;
       i += int64_t(gridDim.x) * kThreads) {
    const bool edges = maps.target_boundary != nullptr;
    add({maps.target[i], maps.prediction[i], edges && maps.target_boundary[i],
         edges && maps.prediction_boundary[i]},
        1);
  }
  if (Shared) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < cells; i += kThreads)
      if (block_tables[i]) atomicAdd(tables + i, Sum(block_tables[i]));
  }
}

// Sums of rows and columns of one table; zeros at first.
struct Areas {
  Sum* rows;     // [T + 2]
  Sum* columns;  // [P + 2]
};

// A warp has a row. Few cells are not zero, so the sums of columns take few additions.
__device__ void sum_areas(const Sum* table, int height, int width, const Areas& areas) {
  const int lane = int(threadIdx.x) % 32;
  for (int row = int(threadIdx.x) / 32; row < height; row += kRules / 32) {
    Sum sum = 0;
    for (int column = lane; column < width; column += 32) {
      const Sum cell = table[int64_t(row) * width + column];
      if (cell) atomicAdd(areas.columns + column, cell);
      sum += cell;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane == 0) areas.rows[row] = sum;
  }
}

// One block. matched: [T + P], excused: [P], both zeros at first.
__global__ void __launch_bounds__(kRules)
    apply_rules_kernel(Segments targets, Segments predictions,
                       const Sum* tables,  // [1 or 2, T + 2, P + 2]
                       bool boundary, Areas whole, Areas edge, Sum* excused, Sum* matched,
                       Sum* counts,      // [C, 4]
                       Sum* problems) {  // [6]
  const int T = targets.count, P = predictions.count, width = P + 2;
  const int lane = int(threadIdx.x) % 32;
  const Sum* boundary_table = tables + int64_t(T + 2) * width;
  sum_areas(tables, T + 2, width, whole);
  if (boundary) sum_areas(boundary_table, T + 2, width, edge);
  __syncthreads();
  for (int t = int(threadIdx.x) / 32; t < T; t += kRules / 32) {  // a warp has a target
    const Segment target = targets.rows[t];
    if (target.crowd != kNoCrowd && target.crowd != kCrowd) continue;
    for (int p = lane; p < P; p += 32) {
      const int64_t cell = int64_t(t + 1) * width + p + 1;
      const Sum both = tables[cell];
      if (both == 0 || target.label != predictions.rows[p].label) continue;
      if (target.crowd == kCrowd) {
        atomicAdd(excused + p, both);
        continue;
      }
      const Overlap pair{int64_t(both), target.area, int64_t(whole.columns[p + 1]),
                         int64_t(tables[p + 1])};
      if (pair.all() < pair.both) {
        atomicAdd(problems + kImpossibleArea, Sum(1));
        continue;
      }
      bool match = pair.is_match();
      int64_t iou = pair.iou();
      if (boundary) {
        const Overlap on_edge{int64_t(boundary_table[cell]), int64_t(edge.rows[t + 1]),
                              int64_t(edge.columns[p + 1]), int64_t(boundary_table[p + 1])};
        match = match && on_edge.is_match();
        const int64_t edge_iou = on_edge.iou();
        iou = edge_iou < iou ? edge_iou : iou;
      }
      if (!match) continue;
      atomicExch(matched + t, Sum(1));
      atomicExch(matched + T + p, Sum(1));
      atomicAdd(counts + int64_t(target.label) * kCounts + kTruePositives, Sum(1));
      atomicAdd(counts + int64_t(target.label) * kCounts + kIouSum, Sum(iou));
    }
  }
  __syncthreads();
  for (int t = threadIdx.x; t < T; t += kRules) {
    const Segment target = targets.rows[t];
    if (target.crowd == kNoCrowd && !matched[t])
      atomicAdd(counts + int64_t(target.label) * kCounts + kFalseNegatives, Sum(1));
    if (whole.rows[t + 1] == 0) atomicAdd(problems + kMissingTarget, Sum(1));
    if (int64_t(whole.rows[t + 1]) != target.area) atomicAdd(problems + kOtherArea, Sum(1));
  }
  for (int p = threadIdx.x; p < P; p += kRules) {
    const int64_t area = int64_t(whole.columns[p + 1]);
    if (!matched[T + p] && !is_excused(int64_t(tables[p + 1] + excused[p]), area))
      atomicAdd(counts + int64_t(predictions.rows[p].label) * kCounts + kFalsePositives, Sum(1));
    if (area == 0) atomicAdd(problems + kMissingPrediction, Sum(1));
  }
  if (threadIdx.x == 0) {
    problems[kUnlistedTarget] = whole.rows[T + 1];
    problems[kUnlistedPrediction] = whole.columns[P + 1];
  }
}

// A row of a list. A class that there is none of, which Python refuses and only a direct call can
// bring here, counts as the last: it must not be written beyond the counts.
Segment segment(const int64_t* row, int64_t columns, int64_t num_classes) {
  const bool listed = row[1] >= 0 && row[1] < num_classes;
  return {columns > 2 ? row[2] : 0, int32_t(row[0]), int32_t(listed ? row[1] : num_classes - 1),
          int32_t(columns > 2 ? std::clamp<int64_t>(row[3], -1, 3) : 0)};
}

const uint8_t* bytes(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> panoptic_quality_cuda(const Tensor& prediction, const Tensor& target,
                                                 const Tensor& prediction_segments,
                                                 const Tensor& target_segments, int64_t num_classes,
                                                 const std::optional<Tensor>& prediction_boundary,
                                                 const std::optional<Tensor>& target_boundary) {
  const DeviceScope device(target, prediction, target_boundary, prediction_boundary);
  check_maps(prediction, target, prediction_segments, target_segments, num_classes,
             prediction_boundary, target_boundary);
  PYSEG_CHECK(prediction_segments.is_cpu() && target_segments.is_cpu(),
              "the lists of segments must be on the CPU");
  PYSEG_CHECK(num_classes > 0 || (prediction_segments.size(0) == 0 && target_segments.size(0) == 0),
              "there are segments, but no classes");
  narrow("num_classes", num_classes);
  const Tensor p = torch::stable::contiguous(prediction), t = torch::stable::contiguous(target);
  const Tensor p_segments = torch::stable::contiguous(prediction_segments);
  const Tensor t_segments = torch::stable::contiguous(target_segments);
  std::optional<Tensor> pb, tb;
  if (prediction_boundary) {
    pb = torch::stable::contiguous(*prediction_boundary);
    tb = torch::stable::contiguous(*target_boundary);
  }
  const int T = narrow("the number of segments", t_segments.size(0));
  const int P = narrow("the number of segments", p_segments.size(0));
  const int64_t height = int64_t(T) + 2, width = int64_t(P) + 2, all = int64_t(T) + P;
  if (height * width > int64_t(1) << 26)
    throw std::invalid_argument("an image may have at most 67108864 pairs of segments");
  const int64_t cells = (pb ? 2 : 1) * height * width;
  Tensor counts =
      torch::stable::new_empty(target, {num_classes, int64_t(kCounts)}, ScalarType::Long);
  Tensor problems = torch::stable::new_empty(target, {int64_t(kProblems)}, ScalarType::Long);
  // What starts as zeros: tables, rows and columns of both, what is excused, what was matched.
  // Then the lists, in units of int64.
  const int64_t size = cells + 2 * (height + width) + P + all;
  constexpr int64_t kSegment = sizeof(Segment) / sizeof(int64_t);
  Tensor scratch =
      torch::stable::new_empty(target, {size + all * kSegment + (all + 1) / 2}, ScalarType::Long);
  Sum* next = static_cast<Sum*>(scratch.mutable_data_ptr());
  const auto take = [&](int64_t size) { return std::exchange(next, next + size); };
  Sum* const tables = take(cells);
  const Areas whole{take(height), take(width)}, edge{take(height), take(width)};
  Sum* const excused = take(P);
  Sum* const matched = take(all);
  Segment* const list = reinterpret_cast<Segment*>(take(all * kSegment));
  int32_t* const ids = reinterpret_cast<int32_t*>(next);
  const Segments targets{list, ids, T}, predictions{list + T, ids + T, P};

  const int64_t* const t_rows = t_segments.const_data_ptr<int64_t>();
  const int64_t* const p_rows = p_segments.const_data_ptr<int64_t>();
  Zeros zeros{{tables, static_cast<Sum*>(counts.mutable_data_ptr()),
               static_cast<Sum*>(problems.mutable_data_ptr())},
              {size, counts.numel(), problems.numel()}};
  Travelling some{};
  for (int64_t first = 0; first == 0 || first < all; first += kTravelling) {
    for (int64_t i = first; i < std::min(all, first + kTravelling); ++i)
      some.segments[i - first] = i < T ? segment(t_rows + 4 * i, 4, num_classes)
                                       : segment(p_rows + 2 * (i - T), 2, num_classes);
    const int64_t count = std::min<int64_t>(kTravelling, all - first);
    const int64_t most = std::max({count, zeros.size[0], zeros.size[1], zeros.size[2]});
    const unsigned blocks = unsigned(std::min<int64_t>((most + kThreads - 1) / kThreads, 1024));
    PYSEG_LAUNCH(prepare_kernel, blocks, kThreads, 0, device.stream, some, int(count), list + first,
                 ids + first, zeros);
    zeros = {};
  }
  const auto aligned_to = [](const void* p, uintptr_t n) {
    return reinterpret_cast<uintptr_t>(p) % n == 0;
  };
  Maps maps{static_cast<const int32_t*>(t.const_data_ptr()),
            static_cast<const int32_t*>(p.const_data_ptr()), bytes(tb), bytes(pb), false};
  maps.aligned = aligned_to(maps.target, 16) && aligned_to(maps.prediction, 16) &&
                 aligned_to(maps.target_boundary, 4) && aligned_to(maps.prediction_boundary, 4);
  const int64_t pixels = t.numel();
  if (pixels > 0) {
    const int64_t id_bytes = all * int64_t(sizeof(int32_t));
    const bool own_ids = id_bytes <= kMaxIdBytes;
    const int64_t table_bytes = cells * int64_t(sizeof(uint32_t));
    const bool shared = table_bytes + (own_ids ? id_bytes : 0) <= kSharedBytes;
    const size_t shared_bytes = size_t((own_ids ? id_bytes : 0) + (shared ? table_bytes : 0));
    const auto kernel = shared ? count_pairs_kernel<true> : count_pairs_kernel<false>;
    const int64_t per_block = int64_t(kThreads) * kCount * kPieces;
    // As many as run at once; more would only flush more tables.
    const int64_t blocks = std::min<int64_t>(resident_blocks(kernel, kThreads, shared_bytes),
                                             (pixels + per_block - 1) / per_block);
    PYSEG_LAUNCH(kernel, unsigned(blocks), kThreads, shared_bytes, device.stream, maps, pixels,
                 targets, predictions, own_ids, tables);
  }
  PYSEG_LAUNCH(apply_rules_kernel, 1, kRules, 0, device.stream, targets, predictions, tables,
               pb.has_value(), whole, edge, excused, matched,
               static_cast<Sum*>(counts.mutable_data_ptr()),
               static_cast<Sum*>(problems.mutable_data_ptr()));
  return {counts, problems};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("panoptic_quality", TORCH_BOX(&panoptic_quality_cuda)); }
