// Panoptic quality of one image on CUDA. The first kernel counts the pixels of every pair of
// segments, in shared memory where the table fits; the second, one block, applies the rules. All
// sums are of integers, so their order does not matter, and nothing synchronises.
#include "panoptic_quality.h"

#include <algorithm>
#include <optional>

#include "../common/launch.h"

namespace {

using namespace pyseg;
using Sum = unsigned long long;

constexpr int kThreads = 256;
constexpr int kItems = 16;              // consecutive pixels of one thread
constexpr int kSharedBytes = 48 << 10;  // what a kernel may have without asking

// Segments as rows of int64, `columns` wide: id, class and for targets area, Crowd.
struct Segments {
  const int64_t* rows;
  int count, columns;
  int64_t classes;

  __device__ int64_t id(int i) const { return rows[int64_t(i) * columns]; }
  // A class that there is none of, which Python refuses and only a direct call can bring here,
  // counts as the last: nobody waits to report it.
  __device__ int64_t label(int i) const {
    const int64_t label = rows[int64_t(i) * columns + 1];
    return label >= 0 && label < classes ? label : classes - 1;
  }
  __device__ int64_t area(int i) const { return rows[int64_t(i) * columns + 2]; }
  __device__ int64_t crowd(int i) const { return rows[int64_t(i) * columns + 3]; }

  // 0 = void, 1 + place in the list, count + 1 = not listed.
  __device__ int position(int32_t id_wanted) const {
    if (id_wanted == 0) return 0;
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (id(middle) < id_wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return (low < count && id(low) == id_wanted ? low : count) + 1;
  }
};

struct Maps {
  const int32_t* target;
  const int32_t* prediction;
  const uint8_t* target_boundary;  // both or neither
  const uint8_t* prediction_boundary;
};

struct Pixel {
  int32_t target, prediction;
  bool target_boundary, prediction_boundary;

  __device__ Pixel(const Maps& maps, int64_t i)
      : target(maps.target[i]), prediction(maps.prediction[i]) {
    target_boundary = maps.target_boundary && maps.target_boundary[i];
    prediction_boundary = maps.target_boundary && maps.prediction_boundary[i];
  }
  __device__ bool operator==(const Pixel& other) const {
    return target == other.target && prediction == other.prediction &&
           target_boundary == other.target_boundary &&
           prediction_boundary == other.prediction_boundary;
  }
};

// Tables: [2, T + 2, P + 2], the second of boundary pixels where there are boundaries.
template <bool Shared>
__global__ void count_pairs_kernel(Maps maps, int64_t pixels, Segments targets,
                                   Segments predictions, Sum* tables) {
  PYSEG_DYNAMIC_SHARED(uint32_t, block_tables);
  const int width = predictions.count + 2;
  const int64_t size = int64_t(targets.count + 2) * width;
  const int64_t cells = maps.target_boundary ? 2 * size : size;
  if (Shared) {
    for (int64_t i = threadIdx.x; i < cells; i += kThreads) block_tables[i] = 0;
    __syncthreads();
  }
  const auto add = [&](int64_t cell, uint32_t amount) {
    if (Shared)
      atomicAdd(block_tables + cell, amount);
    else
      atomicAdd(tables + cell, Sum(amount));
  };
  const int64_t step = int64_t(gridDim.x) * kThreads * kItems;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kItems; i < pixels; i += step) {
    const int n = pixels - i < kItems ? int(pixels - i) : kItems;
    Pixel run(maps, i);
    uint32_t length = 1;
    for (int k = 1; k <= n; ++k) {
      const Pixel next(maps, k < n ? i + k : i);
      if (k < n && next == run) {
        ++length;
        continue;
      }
      const int row = targets.position(run.target);
      const int column = predictions.position(run.prediction);
      add(int64_t(row) * width + column, length);
      if (maps.target_boundary) {
        const int boundary_row = row == 0 || run.target_boundary ? row : targets.count + 1;
        const int boundary_column =
            column == 0 || run.prediction_boundary ? column : predictions.count + 1;
        add(size + int64_t(boundary_row) * width + boundary_column, length);
      }
      run = next, length = 1;
    }
  }
  if (Shared) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < cells; i += kThreads)
      if (block_tables[i]) atomicAdd(tables + i, Sum(block_tables[i]));
  }
}

// Sums of rows and columns of one table.
struct Areas {
  int64_t* rows;     // [T + 2]
  int64_t* columns;  // [P + 2]
};

__device__ void sum_areas(const Sum* table, int height, int width, const Areas& areas) {
  for (int column = threadIdx.x; column < width; column += kThreads) {
    Sum sum = 0;
    for (int row = 0; row < height; ++row) sum += table[int64_t(row) * width + column];
    areas.columns[column] = int64_t(sum);
  }
  for (int row = threadIdx.x; row < height; row += kThreads) {
    Sum sum = 0;
    for (int column = 0; column < width; ++column) sum += table[int64_t(row) * width + column];
    areas.rows[row] = int64_t(sum);
  }
}

// One block. matched: [T + P], zero.
__global__ void apply_rules_kernel(Segments targets, Segments predictions,
                                   const Sum* tables,  // [1 or 2, T + 2, P + 2]
                                   bool boundary, Areas whole, Areas edge, int32_t* matched,
                                   Sum* counts,      // [C, 4]
                                   Sum* problems) {  // [6]
  const int T = targets.count, P = predictions.count, width = P + 2;
  const Sum* boundary_table = tables + int64_t(T + 2) * width;
  sum_areas(tables, T + 2, width, whole);
  if (boundary) sum_areas(boundary_table, T + 2, width, edge);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < int64_t(T) * P; i += kThreads) {
    const int t = int(i / P), p = int(i % P);
    const int64_t cell = int64_t(t + 1) * width + p + 1;
    if (tables[cell] == 0 || targets.crowd(t) != kNoCrowd ||
        targets.label(t) != predictions.label(p))
      continue;
    const Overlap pair{int64_t(tables[cell]), targets.area(t), whole.columns[p + 1],
                       int64_t(tables[p + 1])};
    if (pair.all() < pair.both) {
      atomicAdd(problems + kImpossibleArea, Sum(1));
      continue;
    }
    bool match = pair.is_match();
    int64_t iou = pair.iou();
    if (boundary) {
      const Overlap on_edge{int64_t(boundary_table[cell]), edge.rows[t + 1], edge.columns[p + 1],
                            int64_t(boundary_table[p + 1])};
      match = match && on_edge.is_match();
      const int64_t edge_iou = on_edge.iou();
      iou = edge_iou < iou ? edge_iou : iou;
    }
    if (!match) continue;
    atomicExch(matched + t, 1);
    atomicExch(matched + T + p, 1);
    atomicAdd(counts + targets.label(t) * kCounts + kTruePositives, Sum(1));
    atomicAdd(counts + targets.label(t) * kCounts + kIouSum, Sum(iou));
  }
  __syncthreads();
  for (int t = threadIdx.x; t < T; t += kThreads) {
    if (targets.crowd(t) == kNoCrowd && !matched[t])
      atomicAdd(counts + targets.label(t) * kCounts + kFalseNegatives, Sum(1));
    if (whole.rows[t + 1] == 0) atomicAdd(problems + kMissingTarget, Sum(1));
    if (whole.rows[t + 1] != targets.area(t)) atomicAdd(problems + kOtherArea, Sum(1));
  }
  for (int p = threadIdx.x; p < P; p += kThreads) {
    int64_t excused = int64_t(tables[p + 1]);
    for (int t = 0; t < T; ++t)
      if (targets.crowd(t) == kCrowd && targets.label(t) == predictions.label(p))
        excused += int64_t(tables[int64_t(t + 1) * width + p + 1]);
    if (!matched[T + p] && !is_excused(excused, whole.columns[p + 1]))
      atomicAdd(counts + predictions.label(p) * kCounts + kFalsePositives, Sum(1));
    if (whole.columns[p + 1] == 0) atomicAdd(problems + kMissingPrediction, Sum(1));
  }
  if (threadIdx.x == 0) {
    problems[kUnlistedTarget] = Sum(whole.rows[T + 1]);
    problems[kUnlistedPrediction] = Sum(whole.columns[P + 1]);
  }
}

const uint8_t* bytes(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> panoptic_quality_cuda(const Tensor& prediction, const Tensor& target,
                                                 const Tensor& prediction_segments,
                                                 const Tensor& target_segments, int64_t num_classes,
                                                 const std::optional<Tensor>& prediction_boundary,
                                                 const std::optional<Tensor>& target_boundary) {
  const DeviceScope device(target, prediction, target_segments, prediction_segments,
                           target_boundary, prediction_boundary);
  check_maps(prediction, target, prediction_segments, target_segments, num_classes,
             prediction_boundary, target_boundary);
  PYSEG_CHECK(num_classes > 0 || (prediction_segments.size(0) == 0 && target_segments.size(0) == 0),
              "there are segments, but no classes");
  Tensor counts =
      torch::stable::new_zeros(target, {num_classes, int64_t(kCounts)}, ScalarType::Long);
  Tensor problems = torch::stable::new_zeros(target, {int64_t(kProblems)}, ScalarType::Long);
  const Tensor p = torch::stable::contiguous(prediction), t = torch::stable::contiguous(target);
  const Tensor p_segments = torch::stable::contiguous(prediction_segments);
  const Tensor t_segments = torch::stable::contiguous(target_segments);
  std::optional<Tensor> pb, tb;
  if (prediction_boundary) {
    pb = torch::stable::contiguous(*prediction_boundary);
    tb = torch::stable::contiguous(*target_boundary);
  }
  const Maps maps{static_cast<const int32_t*>(t.const_data_ptr()),
                  static_cast<const int32_t*>(p.const_data_ptr()), bytes(tb), bytes(pb)};
  const Segments predictions{static_cast<const int64_t*>(p_segments.const_data_ptr()),
                             narrow("the number of segments", p_segments.size(0)), 2, num_classes};
  const Segments targets{static_cast<const int64_t*>(t_segments.const_data_ptr()),
                         narrow("the number of segments", t_segments.size(0)), 4, num_classes};
  const int64_t height = int64_t(targets.count) + 2, width = int64_t(predictions.count) + 2;
  if (height * width > int64_t(1) << 26)
    throw std::invalid_argument("an image may have at most 67108864 pairs of segments");
  const int64_t cells = (pb ? 2 : 1) * height * width;
  // The tables, then rows and columns of both, then what was matched; all start as zeros.
  Tensor scratch =
      torch::stable::new_zeros(target, {cells + 3 * (height + width)}, ScalarType::Long);
  int64_t* memory = static_cast<int64_t*>(scratch.mutable_data_ptr());
  Sum* tables = reinterpret_cast<Sum*>(memory);
  memory += cells;
  const Areas whole{memory, memory + height};
  memory += height + width;
  const Areas edge{memory, memory + height};
  int32_t* matched = reinterpret_cast<int32_t*>(memory + height + width);
  const int64_t pixels = t.numel(), per_block = int64_t(kThreads) * kItems;
  // About four blocks per multiprocessor of a large GPU; more would only flush more tables.
  const unsigned blocks = unsigned(std::min<int64_t>(528, (pixels + per_block - 1) / per_block));
  if (pixels > 0) {
    if (cells * int64_t(sizeof(uint32_t)) <= kSharedBytes)
      PYSEG_LAUNCH((count_pairs_kernel<true>), blocks, kThreads, size_t(cells) * sizeof(uint32_t),
                   device.stream, maps, pixels, targets, predictions, tables);
    else
      PYSEG_LAUNCH((count_pairs_kernel<false>), blocks, kThreads, 0, device.stream, maps, pixels,
                   targets, predictions, tables);
  }
  PYSEG_LAUNCH(apply_rules_kernel, 1, kThreads, 0, device.stream, targets, predictions, tables,
               pb.has_value(), whole, edge, matched, static_cast<Sum*>(counts.mutable_data_ptr()),
               static_cast<Sum*>(problems.mutable_data_ptr()));
  return {counts, problems};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("panoptic_quality", TORCH_BOX(&panoptic_quality_cuda)); }
