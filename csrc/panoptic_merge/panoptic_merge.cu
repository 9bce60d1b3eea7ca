// Heuristic panoptic merge on CUDA: masks become bits inside bounding boxes, one block per image
// decides on those bits who stays, and the map is written by all blocks at once.
//
// An instance has to wait for those before it whose boxes meet its own, and for no others: so the
// instances go through the deciding block in levels, each of which holds all that wait for none,
// and whose boxes therefore have no word in common. All sums are of integers: the order of blocks
// changes nothing. Nothing is read back by the host.
#include "panoptic_merge.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/launch.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kDecide = 1024;
constexpr int kWords = 4;               // of a thread that packs masks
constexpr int kChunk = 8;               // words of a thread of the deciding block at a time
constexpr int kListed = 512;            // accepted instances that fit the writing block's list
constexpr int kSpan = 4096;             // labels of stuff below this are looked up, others searched
constexpr int kSharedBytes = 40 << 10;  // for the deciding block, whose static arrays take 5 KiB
constexpr unsigned kAll = 0xffffffffu;

struct Shape {
  int instances, height, width, words;  // words of 32 pixels in a row
  int plane;                            // words of an image
  int stuff, span, cells;               // span: 1 + the largest label of stuff; 0: search
  float score_threshold, mask_threshold;
  double overlap_threshold;
  int64_t stuff_area;
};

struct Stuff {  // travels with the launch
  int32_t labels[pyseg::kMaxStuff];
};

struct Bounds {
  int top, bottom, left, right;  // rows and words [first, last)

  __device__ bool has(int row, int word) const {
    return row >= top && row < bottom && word >= left && word < right;
  }
  __device__ bool meets(const Bounds& other) const {
    return top < other.bottom && other.top < bottom && left < other.right && other.left < right;
  }
  __device__ int across() const { return right - left; }
  __device__ int count() const { return across() * (bottom - top); }
};

// Sums and maxima over the bits of an instance, so that zeros are where to begin.
struct Extent {
  int area, above, bottom, before, right;  // above: rows from the top one to the end; before: words

  __device__ void add(uint32_t word, int row, int column, const Shape& shape) {
    if (word == 0) return;
    area += __popc(word);
    above = max(above, shape.height - row), bottom = max(bottom, row + 1);
    before = max(before, shape.words - column), right = max(right, column + 1);
  }
  __device__ Bounds bounds(const Shape& shape) const {
    return {shape.height - above, bottom, shape.words - before, right};
  }
};

__device__ int warp_sum(int value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}
__device__ int warp_max(int value) {
  for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAll, value, step));
  return value;
}

// Adds what a warp has seen to the instance's.
__device__ void add_warp(const Extent& own, Extent* instance) {
  if (!__any_sync(kAll, own.area > 0)) return;
  const int area = warp_sum(own.area), above = warp_max(own.above), bottom = warp_max(own.bottom),
            before = warp_max(own.before), right = warp_max(own.right);
  if (threadIdx.x % 32 != 0) return;
  atomicAdd(&instance->area, area);
  atomicMax(&instance->above, above), atomicMax(&instance->bottom, bottom);
  atomicMax(&instance->before, before), atomicMax(&instance->right, right);
}

// Four bytes, each a flag, to bits.
__device__ uint32_t four_bits(uint32_t bytes) {
  const uint32_t set = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) >> 7 & 0x01010101u;
  return set * 0x01020408u >> 24;
}

// The pixels from `pixel` on, of which `count` <= 32 are in the row, as bits. Aligned: rows begin
// at multiples of 16 bytes, so they are read in such pieces. Else by aligned words, shifted; but
// never beyond the end of all masks.
template <bool Aligned>
__device__ uint32_t pack_word(const uint8_t* __restrict__ pixel, int count, const uint8_t* end) {
  uint32_t bits = 0;
  if (Aligned) {
    const uint4 none = {0, 0, 0, 0};
    const uint4* const pieces = reinterpret_cast<const uint4*>(pixel);
    const uint4 a = pieces[0], b = count > 16 ? pieces[1] : none;
    bits = four_bits(a.x) | four_bits(a.y) << 4 | four_bits(a.z) << 8 | four_bits(a.w) << 12 |
           four_bits(b.x) << 16 | four_bits(b.y) << 20 | four_bits(b.z) << 24 |
           four_bits(b.w) << 28;
  } else if (count == 32 && end - pixel >= 36) {
    const uint32_t misplaced = uint32_t(reinterpret_cast<uintptr_t>(pixel) % 4);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(pixel - misplaced);
    uint32_t word[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) word[i] = words[i];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bits |= four_bits(__funnelshift_r(word[i], word[i + 1], misplaced * 8)) << (4 * i);
  } else {
    for (int i = 0; i < count; ++i) bits |= uint32_t(pixel[i] != 0) << i;
  }
  return bits;
}

// Grid: x counts blocks of words of an instance, y instances (of all images). A thread has every
// kThreads-th word of its block's, all of which it reads before it looks at any.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads)
    pack_masks(const uint8_t* __restrict__ masks,  // [N K, H, W]
               const uint8_t* end, const float* __restrict__ scores, Shape shape,
               uint32_t* __restrict__ bits, Extent* __restrict__ extents) {
  const int64_t instance = blockIdx.y;
  if (!(scores[instance] >= shape.score_threshold)) return;
  const uint8_t* const mask = masks + instance * shape.height * shape.width;
  const uint32_t first = blockIdx.x * unsigned(kThreads * kWords) + threadIdx.x;
  uint32_t found[kWords];
  int row[kWords], column[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t word = first + i * kThreads;
    row[i] = int(word / unsigned(shape.words)), column[i] = int(word % unsigned(shape.words));
    const int count = min(32, shape.width - column[i] * 32);
    found[i] = 0;
    if (word < unsigned(shape.plane))
      found[i] =
          pack_word<Aligned>(mask + int64_t(row[i]) * shape.width + column[i] * 32, count, end);
  }
  Extent own{};
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t word = first + i * kThreads;
    if (word >= unsigned(shape.plane)) continue;
    bits[instance * shape.plane + word] = found[i];
    own.add(found[i], row[i], column[i], shape);
  }
  add_warp(own, extents + instance);
}

// The same from M x M probabilities; only words in reach of the box are written. Grid: x counts
// blocks of warps of an instance, y instances. A warp stays in one column of words, so that it
// finds the cells of its columns of pixels once.
__global__ void __launch_bounds__(kThreads)
    pack_boxes(const float* __restrict__ masks,  // [N K, M, M]
               const float* __restrict__ boxes, const float* __restrict__ scores, Shape shape,
               uint32_t* __restrict__ bits, Extent* __restrict__ extents) {
  const int64_t instance = blockIdx.y;
  if (!(scores[instance] >= shape.score_threshold)) return;
  const float* const box = boxes + instance * 4;
  const pyseg::CellRange columns = pyseg::pixels_of_box(box[0], box[2], shape.cells, shape.width);
  const pyseg::CellRange rows = pyseg::pixels_of_box(box[1], box[3], shape.cells, shape.height);
  const int first = columns.first / 32, across = (columns.last + 31) / 32 - first;
  const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x) * kThreads / 32;
  const int warp = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32;
  const float* const mask = masks + instance * shape.cells * shape.cells;
  Extent own{};
  // More columns than warps: each takes several. Else several warps share a column's rows.
  const int sharing = max(1, warps / max(across, 1));
  for (int at = warp; at < across * sharing; at += warps) {
    const int column = first + at % across, x = column * 32 + lane;
    float tx;
    const int low_x = pyseg::cell_of_pixel(x, box[0], box[2], shape.cells, &tx);
    const bool reached = x < shape.width && low_x != -2;
    for (int row = rows.first + at / across; row < rows.last; row += sharing) {
      float ty;
      const int low_y = pyseg::cell_of_pixel(row, box[1], box[3], shape.cells, &ty);
      bool inside = false;
      if (reached && low_y != -2) {
        const auto cell = [&](int y, int x) {
          return y >= 0 && y < shape.cells && x >= 0 && x < shape.cells ? mask[y * shape.cells + x]
                                                                        : 0.0f;
        };
        // In the order of the CPU: rows first.
        const float a = cell(low_y, low_x), b = cell(low_y, low_x + 1);
        const float left = a + pyseg::product(ty, cell(low_y + 1, low_x) - a);
        const float right = b + pyseg::product(ty, cell(low_y + 1, low_x + 1) - b);
        inside = left + pyseg::product(tx, right - left) >= shape.mask_threshold;
      }
      const uint32_t found = __ballot_sync(kAll, inside);
      if (lane == 0) {
        bits[instance * shape.plane + int64_t(row) * shape.words + column] = found;
        own.add(found, row, column, shape);
      }
    }
  }
  add_warp(own, extents + instance);
}

// An instance with a mask, by score.
struct Candidate {
  Bounds box;
  int instance, area;
  int waiting;   // for so many before it
  int hidden;    // pixels that others have
  int chunks;    // of the candidates of its level, up to its own
  int accepted;  // 1 or 0
};

struct Accepted {
  Bounds box;
  int instance;
};

// One block per image: who of the instances stays.
__global__ void __launch_bounds__(kDecide)
    decide(const float* __restrict__ all_scores, const int64_t* __restrict__ all_labels,
           const Extent* __restrict__ all_extents, Shape shape, uint32_t* all_bits,
           uint32_t* all_taken, Candidate* all_candidates, int* all_lists, bool shared,
           int64_t* __restrict__ all_table, Accepted* __restrict__ all_accepted,
           int* __restrict__ accepted_counts) {
  PYSEG_DYNAMIC_SHARED(Candidate, fast);  // [K], then lists as ints [2, K], where these fit
  __shared__ int listed[3];               // lengths of the lists; [2]: of the candidates
  const int64_t image = blockIdx.x, offset = image * shape.instances;
  const float* const scores = all_scores + offset;
  const Extent* const extents = all_extents + offset;
  uint32_t* const image_bits = all_bits + offset * shape.plane;
  uint32_t* const taken = all_taken + image * shape.plane;
  Candidate* const candidates = shared ? fast : all_candidates + offset;
  int* const lists =
      shared ? reinterpret_cast<int*>(fast + shape.instances) : all_lists + 2 * offset;
  const int rows = shape.instances + shape.stuff;
  int64_t* const table = all_table + image * rows * 4;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  constexpr int kWarps = kDecide / 32;
  if (thread < 3) listed[thread] = 0;
  for (int i = thread; i < rows * 4; i += kDecide) table[i] = 0;
  __syncthreads();
  const auto counts = [&](int k) {
    return scores[k] >= shape.score_threshold && extents[k].area > 0;
  };
  for (int k = thread; k < shape.instances; k += kDecide) {
    if (!counts(k)) continue;
    const float own = scores[k];
    int rank = 0;
    for (int j = 0; j < shape.instances; ++j)
      rank += counts(j) && (scores[j] > own || (scores[j] == own && j < k));
    candidates[rank] = {extents[k].bounds(shape), k, extents[k].area, 0, 0, 0, 0};
    atomicAdd(listed + 2, 1);
  }
  __syncthreads();
  const int count = listed[2];
  for (int k = warp; k < count; k += kWarps) {
    const Bounds box = candidates[k].box;
    int before = 0;
    for (int j = lane; j < k; j += 32) before += candidates[j].box.meets(box);
    before = warp_sum(before);
    if (lane != 0) continue;
    candidates[k].waiting = before;
    if (before == 0) lists[atomicAdd(listed, 1)] = k;
  }
  __syncthreads();
  for (int turn = 0; listed[turn] > 0; turn ^= 1) {
    const int length = listed[turn];
    const int* const level = lists + turn * shape.instances;
    int* const next = lists + (turn ^ 1) * shape.instances;
    // A warp counts and marks kChunk * 32 words at a time: where each candidate's chunks begin.
    if (warp == 0) {
      int total = 0;
      for (int i = 0; i < length; i += 32) {
        int own = 0;
        if (i + lane < length)
          own = (candidates[level[i + lane]].box.count() + kChunk * 32 - 1) / (kChunk * 32);
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(kAll, own, step);
          if (lane >= step) own += other;
        }
        if (i + lane < length) candidates[level[i + lane]].chunks = total + own;
        total += __shfl_sync(kAll, own, 31);
      }
    }
    if (thread == 0) listed[turn ^ 1] = 0;
    __syncthreads();
    const int total = candidates[level[length - 1]].chunks;
    const auto each_chunk = [&](const auto& use) {
      for (int item = warp; item < total; item += kWarps) {
        int low = 0, high = length - 1;  // the first whose chunks end behind the item
        while (low < high) {
          const int middle = (low + high) / 2;
          if (candidates[level[middle]].chunks > item)
            high = middle;
          else
            low = middle + 1;
        }
        const int begin = low > 0 ? candidates[level[low - 1]].chunks : 0;
        use(candidates[level[low]], (item - begin) * kChunk * 32 + lane);
      }
    };
    // Where the words lie that a thread has of a chunk: `place` is -1 behind the last.
    const auto places = [&](const Bounds& box, int i, int* place) {
      const int across = box.across(), words = box.count();
      const int step_row = 32 / across, step_column = 32 % across;
      int row = i / across, column = i % across;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        place[k] = i + 32 * k < words ? (box.top + row) * shape.words + box.left + column : -1;
        row += step_row, column += step_column;
        if (column >= across) column -= across, ++row;
      }
    };
    each_chunk([&](Candidate& candidate, int i) {
      const uint32_t* const bits = image_bits + int64_t(candidate.instance) * shape.plane;
      int place[kChunk], hidden = 0;
      places(candidate.box, i, place);
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (place[k] >= 0) hidden += __popc(bits[place[k]] & taken[place[k]]);
      hidden = warp_sum(hidden);
      if (lane == 0 && hidden > 0) atomicAdd(&candidate.hidden, hidden);
    });
    __syncthreads();
    const auto stays = [&](const Candidate& candidate) {
      const int hidden = candidate.hidden, area = candidate.area;
      return hidden < area && !(double(hidden) / double(area) > shape.overlap_threshold);
    };
    each_chunk([&](Candidate& candidate, int i) {
      if (!stays(candidate)) return;
      uint32_t* const bits = image_bits + int64_t(candidate.instance) * shape.plane;
      int place[kChunk];
      uint32_t own[kChunk], others[kChunk];
      places(candidate.box, i, place);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        own[k] = place[k] >= 0 ? bits[place[k]] : 0;
        others[k] = place[k] >= 0 ? taken[place[k]] : 0;
      }
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if (own[k] == 0) continue;
        if (own[k] & others[k]) bits[place[k]] = own[k] & ~others[k];
        taken[place[k]] = own[k] | others[k];
      }
    });
    for (int i = warp; i < length; i += kWarps) {
      const int k = level[i];
      const Bounds box = candidates[k].box;
      if (lane == 0) candidates[k].accepted = stays(candidates[k]);
      for (int j = k + 1 + lane; j < count; j += 32)
        if (candidates[j].box.meets(box) && atomicSub(&candidates[j].waiting, 1) == 1)
          next[atomicAdd(listed + (turn ^ 1), 1)] = j;
    }
    __syncthreads();
  }
  if (warp != 0) return;
  int found = 0;
  for (int i = 0; i < count; i += 32) {
    const bool stays = i + lane < count && candidates[i + lane].accepted;
    const uint32_t staying = __ballot_sync(kAll, stays);
    if (stays) {
      const Candidate& candidate = candidates[i + lane];
      const int n = found + __popc(staying & ((1u << lane) - 1));
      all_accepted[offset + n] = {candidate.box, candidate.instance};
      int64_t* const row = table + n * 4;
      row[0] = n + 1, row[1] = all_labels[offset + candidate.instance];
      row[2] = candidate.area - candidate.hidden, row[3] = candidate.instance;
    }
    found += __popc(staying);
  }
  if (lane == 0) accepted_counts[image] = found;
}

// Places of labels in the list of stuff; the block makes `slots` [span] before it looks any up.
struct Lookup {
  const Stuff& stuff;
  const Shape& shape;
  int16_t* slots;

  __device__ void prepare() const {
    for (int i = int(threadIdx.x); i < shape.span; i += kThreads) slots[i] = -1;
    __syncthreads();
    if (shape.span > 0)
      for (int s = int(threadIdx.x); s < shape.stuff; s += kThreads)
        slots[stuff.labels[s]] = int16_t(s);
    __syncthreads();
  }
  template <class Label>
  __device__ int slot_of(Label label) const {
    if (shape.span > 0)
      return std::make_unsigned_t<Label>(label) < unsigned(shape.span) ? slots[int(label)] : -1;
    for (int s = 0; s < shape.stuff; ++s)
      if (int64_t(label) == stuff.labels[s]) return s;
    return -1;
  }
};

// Grid: x counts blocks of words of an image, y images. Free pixels of every stuff class.
template <class Label>
__global__ void __launch_bounds__(kThreads)
    count_stuff(const Label* __restrict__ semantic, const uint32_t* __restrict__ taken,
                const __grid_constant__ Stuff stuff, Shape shape, int* __restrict__ counts) {
  PYSEG_DYNAMIC_SHARED(int, block_counts);  // [stuff], then the lookup's
  const Lookup lookup{stuff, shape, reinterpret_cast<int16_t*>(block_counts + shape.stuff)};
  for (int s = int(threadIdx.x); s < shape.stuff; s += kThreads) block_counts[s] = 0;
  lookup.prepare();
  const int64_t image = blockIdx.y;
  const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x) * kThreads / 32;
  for (int64_t word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32; word < shape.plane;
       word += warps) {
    const int row = int(word) / shape.words, x = int(word) % shape.words * 32 + lane;
    const bool free = x < shape.width && !(taken[image * shape.plane + word] >> lane & 1);
    const int slot =
        free ? lookup.slot_of(semantic[(image * shape.height + row) * shape.width + x]) : -1;
    // One lane of every different slot adds for all that have it.
    for (uint32_t left = __ballot_sync(kAll, slot >= 0); left;) {
      const int leader = __ffs(int(left)) - 1;
      const int theirs = __shfl_sync(kAll, slot, leader);
      const uint32_t same = __ballot_sync(kAll, slot == theirs);
      if (lane == leader) atomicAdd(block_counts + theirs, __popc(same));
      left &= ~same;
    }
  }
  __syncthreads();
  for (int s = int(threadIdx.x); s < shape.stuff; s += kThreads)
    if (block_counts[s] > 0) atomicAdd(counts + image * shape.stuff + s, block_counts[s]);
}

template <class Label>
__global__ void __launch_bounds__(kThreads)
    write(const Label* __restrict__ semantic, const uint32_t* __restrict__ taken,
          const uint32_t* __restrict__ bits, const Accepted* __restrict__ all_accepted,
          const __grid_constant__ Stuff stuff, const int* __restrict__ counts,
          const int* __restrict__ accepted_counts, Shape shape, int64_t* __restrict__ all_table,
          int32_t* __restrict__ map) {
  PYSEG_DYNAMIC_SHARED(int, ids);  // [stuff], 0 = left out; then the lookup's
  __shared__ Accepted list[kListed];
  const Lookup lookup{stuff, shape, reinterpret_cast<int16_t*>(ids + shape.stuff)};
  const int64_t image = blockIdx.y;
  const int things = accepted_counts[image], lane = int(threadIdx.x) % 32;
  const Accepted* accepted = all_accepted + image * shape.instances;
  if (things <= kListed) {
    for (int n = int(threadIdx.x); n < things; n += kThreads) list[n] = accepted[n];
    accepted = list;
  }
  if (threadIdx.x < 32) {
    int next = things;
    for (int i = 0; i < shape.stuff; i += 32) {
      const int s = i + lane, area = s < shape.stuff ? counts[image * shape.stuff + s] : 0;
      const bool kept = area > 0 && area >= shape.stuff_area;
      const uint32_t all_kept = __ballot_sync(kAll, kept);
      const int id = next + __popc(all_kept & ((1u << lane) - 1)) + 1;
      if (s < shape.stuff) ids[s] = kept ? id : 0;
      if (kept && blockIdx.x == 0) {
        int64_t* const row = all_table + (image * (shape.instances + shape.stuff) + id - 1) * 4;
        row[0] = id, row[1] = stuff.labels[s], row[2] = area, row[3] = -1;
      }
      next += __popc(all_kept);
    }
  }
  lookup.prepare();
  const int warps = int(gridDim.x) * kThreads / 32;
  for (int64_t word = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / 32; word < shape.plane;
       word += warps) {
    const int row = int(word) / shape.words, column = int(word) % shape.words;
    const int x = column * 32 + lane;
    const uint32_t covered = taken[image * shape.plane + word];
    int32_t id = 0;
    uint32_t found = 0;
    for (int i = 0; i < things && found != covered; i += 32) {  // a lane looks at a box
      uint32_t near =
          __ballot_sync(kAll, i + lane < things && accepted[i + lane].box.has(row, column));
      for (; near && found != covered; near &= near - 1) {
        const int n = i + __ffs(int(near)) - 1;
        const int64_t k = image * shape.instances + accepted[n].instance;
        const uint32_t own = bits[k * shape.plane + word];
        if (own >> lane & 1) id = n + 1;
        found |= own;
      }
    }
    if (x >= shape.width) continue;
    const int64_t pixel = (image * shape.height + row) * shape.width + x;
    if (!(covered >> lane & 1)) {
      const int slot = lookup.slot_of(semantic[pixel]);
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
  shape.plane = shape.height * shape.words;
  for (int64_t i = 0; i < stuff; ++i) shape.span = std::max(shape.span, list.labels[i] + 1);
  if (shape.span > kSpan) shape.span = 0;
  shape.score_threshold = float(score_threshold), shape.mask_threshold = float(mask_threshold);
  shape.overlap_threshold = overlap_threshold, shape.stuff_area = stuff_area;
  const int64_t plane = shape.plane;
  Tensor map = torch::stable::new_empty(c, {images, shape.height, shape.width}, ScalarType::Int);
  Tensor table = torch::stable::new_empty(c, {images, instances + stuff, 4}, ScalarType::Long);
  if (images == 0) return {map, table};
  // One allocation each for what starts as zeros and for what does not.
  constexpr int64_t kExtent = sizeof(Extent) / 4, kCandidate = sizeof(Candidate) / 4,
                    kAccepted = sizeof(Accepted) / 4;
  const int64_t all = images * instances;
  Tensor zeros = torch::stable::new_zeros(c, {images * plane + all * kExtent + images * stuff},
                                          ScalarType::Int);
  Tensor rest = torch::stable::new_empty(c, {all * (plane + kCandidate + kAccepted + 2) + images},
                                         ScalarType::Int);
  int32_t* next = zeros.mutable_data_ptr<int32_t>();
  const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
  auto* const taken = reinterpret_cast<uint32_t*>(take(images * plane));
  auto* const extents = reinterpret_cast<Extent*>(take(all * kExtent));
  int* const counts = take(images * stuff);
  next = rest.mutable_data_ptr<int32_t>();
  auto* const bits = reinterpret_cast<uint32_t*>(take(all * plane));
  auto* const candidates = reinterpret_cast<Candidate*>(take(all * kCandidate));
  auto* const accepted = reinterpret_cast<Accepted*>(take(all * kAccepted));
  int* const lists = take(all * 2);
  int* const accepted_counts = take(images);
  int64_t* const table_rows = table.mutable_data_ptr<int64_t>();
  std::optional<Tensor> b;
  if (boxes) b = torch::stable::contiguous(*boxes);
  const uint8_t* const bytes = static_cast<const uint8_t*>(m.const_data_ptr());
  const int64_t pixels = int64_t(shape.height) * shape.width, per_block = kThreads * kWords;
  const bool aligned = shape.width % 16 == 0 && reinterpret_cast<uintptr_t>(bytes) % 16 == 0;
  for (int64_t first = 0; first < all && plane > 0; first += 65535) {
    const dim3 grid(
        unsigned(b ? std::min<int64_t>(plane, 32) : (plane + per_block - 1) / per_block),
        unsigned(std::min<int64_t>(65535, all - first)));
    const float* const from_scores = s.const_data_ptr<float>() + first;
    const auto pack = [&](auto kernel) {
      PYSEG_LAUNCH(kernel, grid, kThreads, 0, device.stream, bytes + first * pixels,
                   bytes + all * pixels, from_scores, shape, bits + first * plane, extents + first);
    };
    if (b)
      PYSEG_LAUNCH(pack_boxes, grid, kThreads, 0, device.stream,
                   m.const_data_ptr<float>() + first * shape.cells * shape.cells,
                   b->const_data_ptr<float>() + first * 4, from_scores, shape, bits + first * plane,
                   extents + first);
    else if (aligned)
      pack(pack_masks<true>);
    else
      pack(pack_masks<false>);
  }
  const int64_t shared_bytes = instances * int64_t(sizeof(Candidate) + 2 * sizeof(int));
  const bool shared = shared_bytes <= kSharedBytes;
  PYSEG_LAUNCH(decide, unsigned(images), kDecide, shared ? size_t(shared_bytes) : 0, device.stream,
               s.const_data_ptr<float>(), l.const_data_ptr<int64_t>(), extents, shape, bits, taken,
               candidates, lists, shared, table_rows, accepted, accepted_counts);
  if (plane == 0) return {map, table};
  const size_t lookup_bytes = size_t(stuff) * sizeof(int) + size_t(shape.span) * sizeof(int16_t);
  // About four blocks per multiprocessor of a large GPU.
  const int64_t blocks =
      std::min<int64_t>((plane * 32 + kThreads - 1) / kThreads, std::max<int64_t>(1, 528 / images));
  const auto finish = [&]<class Label>(Label) {
    const auto* const classes = static_cast<const Label*>(c.const_data_ptr());
    for (int64_t first = 0; first < images; first += 65535) {
      const dim3 grid{unsigned(blocks), unsigned(std::min<int64_t>(65535, images - first))};
      if (stuff > 0)
        PYSEG_LAUNCH((count_stuff<Label>), grid, kThreads, lookup_bytes, device.stream,
                     classes + first * pixels, taken + first * plane, list, shape,
                     counts + first * stuff);
      PYSEG_LAUNCH((write<Label>), grid, kThreads, lookup_bytes, device.stream,
                   classes + first * pixels, taken + first * plane,
                   bits + first * instances * plane, accepted + first * instances, list,
                   counts + first * stuff, accepted_counts + first, shape,
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
