// The lattices of a batch of images on CUDA: how they are built, filled and blurred.
//
// The image is cut into tiles of up to 512 pixels; a block names the vertices that its tile
// touches in a table in shared memory, adds them to one table in global memory for the whole batch
// (the image and the kernel are part of a vertex's key) and lists its pixels per vertex, in the
// order of pixels and in rows of at most kRow. After that vertices are sorted by key, and the rows
// of each get places that follow each other, in the order of tiles. No sum depends on the order in
// which blocks or threads run, so the result has the same bits every time.
//
// How many vertices there are, only the device knows: a bound would be dozens of times too large.
// So the host waits once for these counts, after the tables are filled, allocates what is needed
// and reports bad input. In a stream that is being captured into a graph it must not wait: then
// there is room for at least one vertex and one row per pixel and kernel and kFewest more, which
// photographs stay well below. A graph that is replayed with an image for which this is too little
// prints that, and its result is NaN: check_kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../common/launch.h"
#include "../common/primitives.cuh"
#include "arguments.h"
#include "dense_crf.h"

namespace {

using namespace pyseg;
using Key = unsigned long long;  // of a vertex: kernel, image, name

constexpr int kBuildThreads = 128;
constexpr int kBuildWarps = kBuildThreads / 32;
constexpr int kPassThreads = 256;
constexpr int kRow = 64;                // most entries that one thread sums
constexpr int kSharedBytes = 64 << 10;  // all that a block has on compute capability 7.5
constexpr int kLocateBytes = 63 << 10;  // of it, as locate_kernel has static arrays too
constexpr int kProbes = 256;            // in a table that is at most half full
constexpr int kMostBlocks = 4096;
constexpr int kFewRows = 64;      // more than these are summed by a block together
constexpr int kTogether = 8;      // kernels that are prepared in one launch
constexpr int kFewest = 1 << 16;  // vertices and rows that a captured graph has room for
constexpr Key kNone = ~Key(0);
constexpr uint16_t kNobody = 0xFFFF;

// What the device counts and finds wrong.
struct Counters {
  int locals;        // vertices of tiles
  int rows;          // of all tiles: up to kRow entries of a vertex in a tile
  int vertices;      // of all lattices
  int ring;          // the vertices before `ring` have had their neighbours added
  int overflow;      // a table had too little room
  int bad_features;  // NaN or infinity
  int bad_unary;
  int bad_weights;  // or compatibility
  int bad_names;    // a sigma is too small
  int name_bits;    // of a vertex's name, above which its kernel and image lie in a key
  int failed;       // a graph's result is NaN
  int failures;     // of graphs, not yet reported
};

// Replays of graphs on this device that had too little room or too small a sigma, of which the
// next call that may wait tells.
__device__ int failed_replays;

// Room for as many.
struct Capacity {
  int64_t locals, rows, vertices;
};

// The cut of a batch into tiles. A tile's entries are [pixels, entries], border or not.
struct Tiling {
  int height, width, tile_height, tile_width, across, down;
  int pixels;   // of a tile
  int entries;  // of a pixel
  int kernels, images;

  __host__ __device__ int64_t tiles() const { return int64_t(images) * across * down; }
  __host__ __device__ int64_t per_tile() const { return int64_t(pixels) * entries; }
};

struct Corner {  // of a tile
  int image, x, y;
};

__device__ Corner corner_of(const Tiling& tiling, int tile) {
  const int of_image = tiling.across * tiling.down, in_image = tile % of_image;
  return {tile / of_image, in_image % tiling.across * tiling.tile_width,
          in_image / tiling.across * tiling.tile_height};
}

struct Table {
  Key* keys;  // [slots]
  int* ids;   // [slots] the vertex; 0: not numbered
  int64_t slots;
};

struct Local {  // a vertex of a tile
  int slot;     // in the table; < 0: it had no room
  int unit;     // tile and kernel
  int list;     // where its entries begin in the tile's list
};

struct Row {
  unsigned entries;  // where they are in the tile's list, | how many << 16
  unsigned to;       // first the local vertex, then where its sum goes
};

struct Span {
  int first, count;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// Other threads may be writing what is read here.
__device__ Key load_relaxed(const Key* from) {
#ifdef PYSEG_EMULATED
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#else
  return *const_cast<const volatile Key*>(from);
#endif
}

__device__ Key hash(Key key) { return key * 0x9E3779B97F4A7C15ull; }

__device__ int64_t first_slot(const Table& table, Key key) {
  return int64_t(__umul64hi(hash(key), Key(table.slots)));
}

// The slot of a key, which the table gets if it lacks it; -1: no room.
__device__ int insert(const Table& table, Key key, Counters* counters) {
  int64_t at = first_slot(table, key);
  for (int probe = 0; probe < kProbes; ++probe, at = at + 1 < table.slots ? at + 1 : 0) {
    Key there = load_relaxed(table.keys + at);
    if (there == kNone) {
      there = atomicCAS(table.keys + at, kNone, key);
      if (there == kNone) return int(at);
    }
    if (there == key) return int(at);
  }
  atomicOr(&counters->overflow, 1);
  return -1;
}

__device__ int find(const Table& table, Key key) {
  int64_t at = first_slot(table, key);
  for (int probe = 0; probe < kProbes; ++probe, at = at + 1 < table.slots ? at + 1 : 0) {
    if (table.keys[at] == key) return table.ids[at];
    if (table.keys[at] == kNone) break;
  }
  return 0;
}

// A key is a vertex's name, and above it the number of its kernel and image.
__device__ Key name_mask_of(const Counters* counters) {
  return (Key(1) << counters->name_bits) - 1;
}

__device__ Key neighbour(const VertexNames& names, Key key, int axis, bool after, Key name_mask) {
  const Key name = after ? names.after(key, axis) : names.before(key, axis);
  return (key & ~name_mask) | (name & name_mask);
}

// -- features: their ranges, names of vertices

__host__ __device__ inline Key ordered(double value) {  // as unsigned integers
  union {
    double value;
    Key bits;
  } both;
  both.value = value;
  return both.bits >> 63 ? ~both.bits : both.bits | Key(1) << 63;
}

__device__ double unordered(Key bits) {
  union {
    Key bits;
    double value;
  } both;
  both.bits = bits >> 63 ? bits & ~(Key(1) << 63) : ~bits;
  return both.value;
}

// Grid: y is the plane. ranges [planes, 2] hold the least and the complement of the largest.
template <class Real>
__global__ void ranges_kernel(const Real* features, int images, int planes, int64_t pixels,
                              Key* ranges, Counters* counters) {
  const int plane = blockIdx.y;
  Key least = kNone, most = kNone;
  bool bad = false;
  for (int image = 0; image < images; ++image) {
    const Real* const from = features + (int64_t(image) * planes + plane) * pixels;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
         i += int64_t(gridDim.x) * blockDim.x) {
      const double value = double(from[i]);
      bad |= !(value * 0 == 0);
      const Key key = ordered(value);
      least = key < least ? key : least;
      most = ~key < most ? ~key : most;
    }
  }
  for (int step = 16; step > 0; step /= 2) {
    const Key a = __shfl_down_sync(~0u, least, step), b = __shfl_down_sync(~0u, most, step);
    least = a < least ? a : least;
    most = b < most ? b : most;
  }
  if (threadIdx.x % 32 == 0) {
    atomicMin(ranges + 2 * plane, least);
    atomicMin(ranges + 2 * plane + 1, most);
  }
  if (bad) atomicOr(&counters->bad_features, 1);
}

template <class Real>
__global__ void finite_kernel(const Real* unary, int64_t n, Counters* counters) {
  bool bad = false;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    bad |= !(unary[i] * Real(0) == Real(0));
  if (bad) atomicOr(&counters->bad_unary, 1);
}

template <class Real>
__global__ void usable_kernel(const Real* values, int64_t n, Counters* counters) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    if (!usable(values[i])) atomicOr(&counters->bad_weights, 1);
}

// How a kernel's vertices are blurred.
template <class Real>
struct Filter {
  int axes, blurs, rings, passes;
  bool grid;
  Real side[kMaxFeatures + 1];  // [axes] by (side 1 side)

  __device__ int axis_of(int blur) const { return pyseg::axis_of(blur, grid, axes, passes); }
};

// What a launch prepares.
struct Preparation {
  Kernel kernel;
  double feature_scale[kMaxFeatures];
  double message_scale;
  int given;  // its number among the weights
};

struct Preparations {
  Preparation of[kTogether];
};

// A thread is a kernel: the names of its vertices, how they are blurred, and by what its messages
// are multiplied.
template <class Real>
__global__ void prepare_kernel(Preparations some, int height, int width, int bits,
                               const Key* ranges, const Real* weights, VertexNames* all_names,
                               Filter<Real>* filters, Real* factors, Counters* counters) {
  const Preparation& it = some.of[threadIdx.x];
  const Kernel& kernel = it.kernel;
  VertexNames& names = all_names[threadIdx.x];
  Filter<Real>& filter = filters[threadIdx.x];
  filter.axes = kernel.axes;
  filter.blurs = kernel.blur.passes * kernel.axes;
  filter.rings = kernel.blur.rings, filter.passes = kernel.blur.passes;
  filter.grid = kernel.grid;
  for (int axis = 0; axis < kernel.axes; ++axis) filter.side[axis] = Real(kernel.side(axis));
  factors[threadIdx.x] = weights[it.given] * Real(it.message_scale);
  bool fits;
  if (kernel.grid) {
    fits = name_grid(kernel, height, width, bits, names);
  } else {
    double low[kMaxFeatures], high[kMaxFeatures];
    for (int i = 0; i < kernel.features; ++i) {
      const int channel = kernel.channels[i];
      low[i] = channel < 0 ? 0 : unordered(ranges[2 * channel]);
      high[i] =
          channel < 0 ? (channel == -2 ? width : height) - 1 : unordered(~ranges[2 * channel + 1]);
      low[i] *= it.feature_scale[i], high[i] *= it.feature_scale[i];
    }
    fits = name_vertices(kernel.features, low, high, kernel.blur.rings, bits, names);
  }
  if (!fits) atomicOr(&counters->bad_names, 1);
  // One more, so that a neighbour past the least or the largest quotient has a name of its own.
  atomicMax(&counters->name_bits, fits ? min(names.bits + 1, bits) : bits);
}

// -- the lattice

// A pixel's share of a vertex.
template <class Real>
struct alignas(2 * sizeof(Real)) Entry {
  Real weight;      // barycentric, then normalised; 0 beyond the border
  unsigned vertex;  // first a local one or kNoVertex, then a vertex or 0; last, its first vector
};
constexpr unsigned kNoVertex = ~0u;

template <class Real>
struct Entries {          // of all tiles
  Entry<Real>* by_pixel;  // [tiles, pixels, entries]
  uint16_t* lists;        // per tile and kernel: entries by vertex, in the order of pixels
  Local* locals;          // [capacity.locals]
  Row* rows;              // [capacity.rows] per tile and kernel, the longest first
  Span* unit_rows;        // [tiles, kernels]
};

__host__ __device__ constexpr int slots_for(int entries) {
  int slots = 64;
  while (slots < entries + entries / 8) slots *= 2;
  return slots;
}

constexpr int locate_bytes(int pixels, int each) {
  const int entries = pixels * each, slots = slots_for(entries);
  return slots * 8 + slots * 2 + entries * 2;
}

// A block is a tile. Which of its vertices gets which number is left to chance; nothing else is.
template <class Real, int D, bool kGrid>
__global__ void __launch_bounds__(kBuildThreads)
    locate_kernel(Tiling tiling, Kernel kernel, Vector<Real, kMaxFeatures> scales, int number,
                  const VertexNames* naming, const Real* features, int planes, Table table,
                  Capacity capacity, Counters* counters, Entries<Real> out) {
  constexpr int kEach = kGrid ? 4 : D + 1;
  PYSEG_DYNAMIC_SHARED(Key, keys);  // [slots]
  const int entries = tiling.pixels * kEach, slots = slots_for(entries), mask = slots - 1;
  uint16_t* const numbers = reinterpret_cast<uint16_t*>(keys + slots);  // [slots]
  uint16_t* const own = numbers + slots;  // [pixels, D + 1] a slot, then a number
  // Later in the place of keys: per vertex and warp, where in the list the next entry goes.
  uint16_t* const next = reinterpret_cast<uint16_t*>(keys);
  using Scan = BlockScan<int, kBuildThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int count, base, first_row;
  __shared__ int places[kRow + 1];  // of rows by length

  const int tile = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Corner corner = corner_of(tiling, tile);
  const int64_t first = tile * tiling.per_tile();
  const VertexNames names = *naming;
  const Key name_mask = name_mask_of(counters);
  const Key group = Key(number * tiling.images + corner.image) * (name_mask + 1);
  for (int i = thread; i < slots; i += kBuildThreads) keys[i] = kNone;
  if (thread == 0) count = 0;
  __syncthreads();

  const int64_t plane = int64_t(tiling.height) * tiling.width;
  for (int p = thread; p < tiling.pixels; p += kBuildThreads) {
    const int x = corner.x + p % tiling.tile_width, y = corner.y + p / tiling.tile_width;
    Entry<Real>* const to = out.by_pixel + first + p * tiling.entries + kernel.first_entry;
    if (x >= tiling.width || y >= tiling.height) {
      for (int k = 0; k < kEach; ++k) own[p * kEach + k] = kNobody, to[k].weight = 0;
      continue;
    }
    Real weight[kEach];
    uint64_t name[kEach];
    if constexpr (kGrid) {
      locate_on_grid<Real>(kernel, x, y, names, weight, name);
    } else {
      Real feature[D];
#pragma unroll
      for (int i = 0; i < D; ++i) {
        const int channel = kernel.channels[i];
        const Real value = channel == -2 ? Real(x)
                           : channel == -1
                               ? Real(y)
                               : features[(int64_t(corner.image) * planes + channel) * plane +
                                          int64_t(y) * tiling.width + x];
        feature[i] = product(value, scales.at[i]);
      }
      locate<D, Real>(feature, names, weight, name);
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const Key key = group | (name[k] & name_mask);
      int at = int(hash(key) >> 40) & mask;
      for (;; at = (at + 1) & mask) {  // there is always room
        Key there = load_relaxed(keys + at);
        if (there == kNone) {
          there = atomicCAS(keys + at, kNone, key);
          if (there == kNone) {
            numbers[at] = uint16_t(atomicAdd(&count, 1));
            break;
          }
        }
        if (there == key) break;
      }
      own[p * kEach + k] = uint16_t(at);
      to[k].weight = weight[k];
    }
  }
  __syncthreads();

  if (thread == 0) base = atomicAdd(&counters->locals, count);
  for (int i = thread; i < entries; i += kBuildThreads)
    if (own[i] != kNobody) own[i] = numbers[own[i]];
  __syncthreads();
  const bool fits = base + int64_t(count) <= capacity.locals;
  const int unit = tile * tiling.kernels + number;
  for (int i = thread; i < slots; i += kBuildThreads)
    if (fits && keys[i] != kNone) {
      Local& local = out.locals[base + numbers[i]];
      local.slot = insert(table, keys[i], counters);
      local.unit = unit;
    }
  for (int i = thread; i < entries; i += kBuildThreads)
    out.by_pixel[first + i / kEach * tiling.entries + kernel.first_entry + i % kEach].vertex =
        fits && own[i] != kNobody ? unsigned(base + own[i]) : kNoVertex;
  __syncthreads();

  // A stable counting sort: each warp takes a run of entries in their order.
  const int cells = count * kBuildWarps;
  for (int i = thread; i < cells; i += kBuildThreads) next[i] = 0;
  __syncthreads();
  const int run = ((entries + kBuildWarps - 1) / kBuildWarps + 31) / 32 * 32;
  const int begin = warp * run, end = begin + run;
  for (int i = begin + lane; i < end; i += 32) {
    const int vertex = i < entries ? own[i] : kNobody;
    const unsigned same = __match_any_sync(~0u, vertex);
    if (vertex != kNobody && lane == __ffs(int(same)) - 1)
      next[vertex * kBuildWarps + warp] += uint16_t(__popc(same));
    __syncwarp();
  }
  __syncthreads();
  {
    const int each = (cells + kBuildThreads - 1) / kBuildThreads;
    const int from = min(cells, thread * each), to = min(cells, from + each);
    int sum = 0, before;
    for (int i = from; i < to; ++i) sum += next[i];
    Scan(scan).ExclusiveSum(sum, before);
    for (int i = from; i < to; ++i) {
      const int length = next[i];
      next[i] = uint16_t(before);
      before += length;
    }
  }
  __syncthreads();
  uint16_t* const list = out.lists + first + tiling.pixels * kernel.first_entry;
  for (int i = begin + lane; i < end; i += 32) {
    const int vertex = i < entries ? own[i] : kNobody;
    const unsigned same = __match_any_sync(~0u, vertex);
    int at = 0;
    if (vertex != kNobody) at = next[vertex * kBuildWarps + warp];
    __syncwarp();
    if (vertex != kNobody) {
      list[at + __popc(same & ((1u << lane) - 1))] =
          uint16_t(i / kEach * tiling.entries + kernel.first_entry + i % kEach);
      if (lane == __ffs(int(same)) - 1)
        next[vertex * kBuildWarps + warp] = uint16_t(at + __popc(same));
    }
    __syncwarp();
  }
  __syncthreads();

  // Now `next` holds where the entries of each vertex and warp end. What the list lacks for pixels
  // beyond the border are entries of no row.
  const int listed = count ? next[cells - 1] : 0;
  for (int i = listed + thread; i < entries; i += kBuildThreads)
    list[i] = uint16_t(kernel.first_entry);
  if (thread <= kRow) places[thread] = 0;
  __syncthreads();
  const int each = (count + kBuildThreads - 1) / kBuildThreads;
  const int from = min(count, thread * each), to = min(count, from + each);
  const auto span_of = [&](int v) {
    const int start = v ? next[v * kBuildWarps - 1] : 0;
    return Span{start, next[v * kBuildWarps + kBuildWarps - 1] - start};
  };
  for (int v = from; v < to; ++v) {
    const int length = span_of(v).count;
    if (length >= kRow) atomicAdd(&places[0], length / kRow);
    if (length % kRow) atomicAdd(&places[kRow - length % kRow], 1);
  }
  __syncthreads();
  int before, total;
  Scan(scan).ExclusiveSum(thread <= kRow ? places[thread] : 0, before, total);
  __syncthreads();
  if (thread == 0) first_row = atomicAdd(&counters->rows, total);
  if (thread <= kRow) places[thread] = before;
  __syncthreads();
  const bool rows_fit = fits && first_row + int64_t(total) <= capacity.rows;
  if (thread == 0) out.unit_rows[unit] = {rows_fit ? first_row : 0, rows_fit ? total : 0};
  if (!rows_fit) return;
  for (int v = from; v < to; ++v) {
    const Span span = span_of(v);
    Local& local = out.locals[base + v];
    local.list = span.first + tiling.pixels * kernel.first_entry;
    for (int done = 0; done < span.count; done += kRow) {
      const int length = min(kRow, span.count - done);
      // Which of the rows of one length comes first does not matter: each is summed by itself.
      out.rows[first_row + atomicAdd(&places[kRow - length], 1)] = {
          unsigned(local.list + done) | unsigned(length) << 16, unsigned(base + v)};
    }
  }
}

// Vertices of the table that the list lacks are added to it, in any order.
__global__ void __launch_bounds__(kPassThreads)
    collect_kernel(Table table, int64_t capacity, Key* keys, unsigned* places, Counters* counters) {
  using Scan = BlockScan<int, kPassThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int base;
  for (int64_t block = int64_t(blockIdx.x) * kPassThreads; block < table.slots;
       block += int64_t(gridDim.x) * kPassThreads) {
    const int64_t slot = block + threadIdx.x;
    const bool fresh = slot < table.slots && table.keys[slot] != kNone && table.ids[slot] == 0;
    int before, total;
    Scan(scan).ExclusiveSum(int(fresh), before, total);
    if (threadIdx.x == 0) base = atomicAdd(&counters->vertices, total);
    __syncthreads();
    if (fresh) {
      table.ids[slot] = -1;
      if (base + int64_t(before) < capacity) {
        keys[base + before] = table.keys[slot];
        places[base + before] = unsigned(slot);
      }
    }
    __syncthreads();
  }
}

// Adds the neighbours of the vertices counters->ring .. counters->vertices to the table, of kernels
// that have ring number `ring`.
template <class Real>
__global__ void ring_kernel(Table table, const Key* keys, int64_t capacity, int images, int ring,
                            const VertexNames* naming, const Filter<Real>* filters,
                            Counters* counters) {
  const int64_t end = min(capacity, int64_t(counters->vertices));
  const Key name_mask = name_mask_of(counters);
  for (int64_t i = counters->ring + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < end;
       i += int64_t(gridDim.x) * blockDim.x) {
    const Key key = keys[i];
    const int kernel = int((key >> counters->name_bits) / images);
    if (filters[kernel].rings < ring) continue;
    const VertexNames& names = naming[kernel];
    for (int axis = 0; axis < names.axes; ++axis) {
      insert(table, neighbour(names, key, axis, true, name_mask), counters);
      insert(table, neighbour(names, key, axis, false, name_mask), counters);
    }
  }
}

// One thread, where the host must not wait. What follows then finds an empty lattice, and the
// passes write NaN.
__global__ void check_kernel(Counters* counters, Capacity capacity) {
  Counters& c = *counters;
  const bool narrow = c.bad_names && !c.bad_features;  // NaN has no name; it shows in the result
  if (narrow)
    printf("pyseg dense_crf: a sigma is too small for the image that a CUDA graph was given\n");
  const bool small = c.overflow || c.locals > capacity.locals || c.rows > capacity.rows ||
                     c.vertices > capacity.vertices;
  if (small)
    printf(
        "pyseg dense_crf: an image has more lattice vertices than a CUDA graph has room for (%d "
        "of %lld): use larger sigmas, or call dense_crf without a graph; the result is NaN\n",
        c.vertices, static_cast<long long>(capacity.vertices));
  c.failed = small || narrow || c.bad_features;
  if (c.failed) c.locals = c.rows = c.vertices = 0;
  if (small || narrow) atomicAdd(&failed_replays, 1);
}

// One thread, where the host will wait.
__global__ void report_kernel(Counters* counters) {
  counters->failures = atomicExch(&failed_replays, 0);
}

// Vertices are numbered from 1, by kernel. Row 0 stands for all absent vertices. A thread is a
// kernel and finds where its vertices end.
__global__ void ends_kernel(const Key* keys, int64_t n, int kernels, int images,
                            const Counters* counters, int* kernel_ends) {
  const int l = blockIdx.x * blockDim.x + threadIdx.x;
  if (l >= kernels) return;
  const Key bound = l + 1 == kernels ? kNone : Key(l + 1) * images << counters->name_bits;
  int64_t low = 0, high = min(n, int64_t(counters->vertices));
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < bound)
      low = middle + 1;
    else
      high = middle;
  }
  kernel_ends[l] = int(low) + 1;
}

__global__ void rank_kernel(const Key* keys, const unsigned* places, int64_t n, int images,
                            const Counters* counters, Table table, int* kernel_of) {
  const int64_t vertices = min(n, int64_t(counters->vertices));
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vertices;
       i += int64_t(gridDim.x) * blockDim.x) {
    table.ids[places[i]] = int(i) + 1;
    kernel_of[i + 1] = int((keys[i] >> counters->name_bits) / images);
  }
}

// Of each local vertex: its vertex.
__global__ void locals_kernel(const Local* locals, int64_t n, const Counters* counters, Table table,
                              int* vertices) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int slot = i < counters->locals ? locals[i].slot : -1;
    vertices[i] = slot < 0 ? 0 : max(0, table.ids[slot]);
  }
}

// Keys that sort rows by vertex, then by tile, then by where they are in its list.
struct RowKey {
  int unit_bits, place_bits;
  __device__ Key of(const Row& row, const Local& local, int vertex) const {
    const int place = (int(row.entries & 0xFFFF) - local.list) / kRow;
    return ((Key(vertex) << unit_bits | Key(local.unit)) << place_bits) | Key(place);
  }
  __device__ int64_t vertex_of(Key key) const { return int64_t(key >> (unit_bits + place_bits)); }
};

__global__ void keys_kernel(const Row* rows, int64_t n, const Counters* counters,
                            const Local* locals, const int* vertices, RowKey key, Key* keys,
                            unsigned* order) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    order[i] = unsigned(i);
    keys[i] = kNone;
    if (i < counters->rows) keys[i] = key.of(rows[i], locals[rows[i].to], vertices[rows[i].to]);
  }
}

// Tells rows where their sums go, and vertices where those of theirs begin and end.
__global__ void order_kernel(const Key* keys, const unsigned* order, int64_t n,
                             const Counters* counters, RowKey key, Row* rows, int* begin,
                             int* end) {
  const int64_t some = min(n, int64_t(counters->rows));
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < some;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t vertex = key.vertex_of(keys[i]);
    rows[order[i]].to = unsigned(i);
    if (i == 0 || key.vertex_of(keys[i - 1]) != vertex) begin[vertex] = int(i);
    if (i + 1 == some || key.vertex_of(keys[i + 1]) != vertex) end[vertex] = int(i) + 1;
  }
}

template <class Real>
__global__ void entries_kernel(const int* local_vertices, int64_t n, Entry<Real>* entries) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    const unsigned local = entries[i].vertex;
    entries[i].vertex = local == kNoVertex ? 0 : unsigned(local_vertices[local]);
  }
}

// links [axes, stride] of neighbours before and after; vertex 0 has none.
__global__ void links_kernel(const Key* keys, const int* kernel_of, const int* vertices, int axes,
                             const Counters* counters, Table table, const VertexNames* naming,
                             int64_t stride, int2* links) {
  const Key name_mask = name_mask_of(counters);
  const int64_t end = *vertices;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; v < end;
       v += int64_t(gridDim.x) * blockDim.x) {
    if (v == 0) {
      for (int axis = 0; axis < axes; ++axis) links[axis * stride] = make_int2(0, 0);
      continue;
    }
    const VertexNames& names = naming[kernel_of[v]];
    for (int axis = 0; axis < names.axes; ++axis)
      links[axis * stride + v] =
          make_int2(find(table, neighbour(names, keys[v - 1], axis, true, name_mask)),
                    find(table, neighbour(names, keys[v - 1], axis, false, name_mask)));
  }
}

// -- filtering; a vertex has `vectors` of N numbers, and blocks are [vectors, 256 / vectors]

// `from` by value: so it is loaded as a whole.
template <class T, int N>
__device__ void add(Vector<T, N>& to, T factor, Vector<T, N> from) {
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] += factor * from.at[i];
}

__host__ __device__ inline int launches(int blurs) { return (blurs + 1) / 2; }  // two in each

template <class T, int N>
__device__ Vector<T, N> sum_of(const Vector<T, N>* rows, int count, int vectors) {
  Vector<T, N> sum{};
#pragma unroll 4
  for (int i = 0; i < count; ++i) add(sum, T(1), rows[int64_t(i) * vectors]);
  return sum;
}

// Sums the rows of each vertex, in the order of tiles, into that of the buffers from which its
// blurs end in `even`. A vertex of many rows, such as that of a clear sky, is summed in parts, one
// after the other by the whole block.
template <class T, int N>
__global__ void combine_kernel(const Vector<T, N>* partial, const int* begin, const int* end,
                               const int* last, const int* kernel_of, const Filter<T>* filters,
                               int vectors, Vector<T, N>* even, Vector<T, N>* odd) {
  using Vec = Vector<T, N>;
  PYSEG_DYNAMIC_SHARED(Vec, parts);  // [blockDim.y, vectors]
  const int part = threadIdx.x, rank = threadIdx.y, ranks = blockDim.y;
  const int64_t vertices = *last;
  const auto put = [&](int64_t v, const Vec& sum) {
    (launches(filters[kernel_of[v]].blurs) % 2 ? odd : even)[v * vectors + part] = sum;
  };
  for (int64_t first = 1 + int64_t(blockIdx.x) * ranks; first < vertices;
       first += int64_t(gridDim.x) * ranks) {
    bool many = false;
    if (first + rank < vertices) {
      const int from = begin[first + rank], rows = end[first + rank] - from;
      many = rows > kFewRows;
      if (!many) put(first + rank, sum_of(partial + int64_t(from) * vectors + part, rows, vectors));
    }
    if (!__syncthreads_or(many)) continue;
    for (int64_t v = first; v < first + ranks && v < vertices; ++v) {
      const int rows = end[v] - begin[v], share = (rows + ranks - 1) / ranks;
      if (rows <= kFewRows) continue;
      const int from = min(rows, rank * share), to = min(rows, from + share);
      parts[rank * vectors + part] =
          sum_of(partial + int64_t(begin[v] + from) * vectors + part, to - from, vectors);
      __syncthreads();
      if (rank == 0) put(v, sum_of(parts + part, ranks, vectors));
      __syncthreads();
    }
  }
}

// Blurs number 2 step and 2 step + 1, where a kernel has as many, by (side 1 side). The vertex's
// neighbours along the first axis and theirs are read, so that nothing lies between. Blurs along
// different axes do not commute where vertices are absent: `transposed` takes them in reverse.
template <class T, int N>
__global__ void blur_kernel(Vector<T, N>* even, Vector<T, N>* odd, const int* last,
                            const int2* links, int64_t stride, const int* kernel_of,
                            const Filter<T>* filters, const T* factors,  // null: 1
                            int step, bool transposed, int vectors) {
  const int64_t vertices = *last;
  for (int64_t v = 1 + int64_t(blockIdx.x) * blockDim.y + threadIdx.y; v < vertices;
       v += int64_t(gridDim.x) * blockDim.y) {
    const int kernel = kernel_of[v];
    const Filter<T>& filter = filters[kernel];
    const int blurs = filter.blurs;
    if (2 * step >= blurs) continue;
    const bool to_even = (launches(blurs) - 1 - step) % 2 == 0;
    const Vector<T, N>* const from = (to_even ? odd : even) + threadIdx.x;
    const int first = transposed ? blurs - 1 - 2 * step : 2 * step;
    const int axis = filter.axis_of(first);
    const int2* const along = links + axis * stride;
    const T side = filter.side[axis];
    const auto blurred = [&](int64_t at) {
      Vector<T, N> sum = from[at * vectors];
      const int2 link = along[at];
      add(sum, side, from[int64_t(link.x) * vectors]);
      add(sum, side, from[int64_t(link.y) * vectors]);
      return sum;
    };
    Vector<T, N> sum = blurred(v);
    if (2 * step + 1 < blurs) {
      const int second = filter.axis_of(transposed ? first - 1 : first + 1);
      const int2 link = links[second * stride + v];
      const Vector<T, N> before = blurred(link.x), after = blurred(link.y);
      const T along_second = filter.side[second];
      add(sum, along_second, before);
      add(sum, along_second, after);
    }
    if (factors && 2 * step + 2 >= blurs) {
      const T factor = factors[kernel];
#pragma unroll
      for (int i = 0; i < N; ++i) sum.at[i] *= factor;
    }
    (to_even ? even : odd)[v * vectors + threadIdx.x] = sum;
  }
}

// -- normalisation

// The splat of ones; a block is a tile.
template <class Real>
__global__ void ones_kernel(Tiling tiling, Entries<Real> entries, const Counters* counters,
                            Vector<Real, 1>* partial) {
  if (counters->failed) return;  // rows do not know where their sums go
  const int64_t first = blockIdx.x * tiling.per_tile();
  const Span* const units = entries.unit_rows + int64_t(blockIdx.x) * tiling.kernels;
  for (int l = 0; l < tiling.kernels; ++l)
    for (int r = threadIdx.x; r < units[l].count; r += blockDim.x) {
      const Row row = entries.rows[units[l].first + r];
      const uint16_t* const list = entries.lists + first + (row.entries & 0xFFFF);
      Real sum = 0;
      for (unsigned i = 0; i < row.entries >> 16; ++i)
        sum += entries.by_pixel[first + list[i]].weight;
      partial[row.to].at[0] = sum;
    }
}

// Row sums of kernel `number`, less the self terms where those are left out, go into the weights of
// the pixels' entries. Then self [pixels, kernels] gets what is left of Q in a pixel's own message,
// before `factors`.
template <class Real>
__global__ void normalize_kernel(Tiling tiling, int first_entry, int count, int number,
                                 int64_t pixels, Real scale, Normalization how,
                                 SelfTerm<Real> self_term, const Real* sums, Entry<Real>* entries,
                                 Real* self) {  // null: self terms stay
  for (int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < pixels;
       p += int64_t(gridDim.x) * blockDim.x) {
    Entry<Real>* const its = entries + p * tiling.entries + first_entry;
    Real sum = 0, weights[kMaxFeatures + 1];
    for (int k = 0; k < count; ++k) {
      weights[k] = its[k].weight;
      sum += weights[k] * sums[its[k].vertex];
    }
    sum = sum * scale + Real(1e-20);
    bool alone = false;
    if (self) {
      const Real own = self_term(weights);
      sum -= own;
      alone = sum < Real(kAlone) * own;
      const Real share = alone ? Real(0) : how == Normalization::none ? own : own / sum;
      self[p * tiling.kernels + number] = share / scale;
    }
    const Real divisor = how == Normalization::none        ? Real(1)
                         : how == Normalization::symmetric ? sqrt(sum)
                                                           : sum;
    const Real factor = alone ? Real(0) : Real(1) / divisor;
    for (int k = 0; k < count; ++k) its[k].weight *= factor;
  }
}

// Of a pixel's own Q in its message, before the compatibility.
template <class Real>
__global__ void shares_kernel(const Real* self, const Real* factors, int64_t pixels, int kernels,
                              Real* shares) {
  for (int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < pixels;
       p += int64_t(gridDim.x) * blockDim.x) {
    Real sum = 0;
    for (int l = 0; l < kernels; ++l) sum += factors[l] * self[p * kernels + l];
    shares[p] = sum;
  }
}

// What passes read of the entries: those of each pixel, and the lists' weights and pixels, both
// counted in vectors.
template <class Real>
struct Arranged {
  const Entry<Real>* by_pixel;
  const Real* list_weights;  // [tiles, per_tile]
};

// A block is a tile. Weights go into the order of lists; kLast: lists then name pixels, in shared
// memory with `stride` vectors each, instead of entries.
template <class Real, bool kLast>
__global__ void arrange_kernel(Tiling tiling, int vectors, int stride, Entry<Real>* by_pixel,
                               uint16_t* lists, Real* list_weights) {
  const int64_t first = blockIdx.x * tiling.per_tile();
  for (int i = threadIdx.x; i < tiling.per_tile(); i += blockDim.x) {
    const int entry = lists[first + i];
    list_weights[first + i] = by_pixel[first + entry].weight;
    if (kLast) lists[first + i] = uint16_t(entry / tiling.entries * stride);
    by_pixel[first + i].vertex *= unsigned(vectors);
  }
}

// -- the host

int log2_above(int64_t n) {  // the least power of two that is more
  int bits = 0;
  while ((int64_t(1) << bits) <= n) ++bits;
  return bits;
}

unsigned blocks_for(int64_t items, int threads) {
  return unsigned(
      std::max<int64_t>(1, std::min<int64_t>(kMostBlocks, (items + threads - 1) / threads)));
}

// Device memory that lives as long as this; the allocator orders its reuse by the stream.
class Memory {
 public:
  explicit Memory(const Tensor& like) : like_(like) {}
  template <class T>
  T* get(int64_t n) {
    held_.push_back(torch::stable::new_empty(like_, {std::max<int64_t>(n, 1) * int64_t(sizeof(T))},
                                             ScalarType::Byte));
    return static_cast<T*>(held_.back().mutable_data_ptr());
  }
  void* operator()(size_t bytes) { return get<char>(int64_t(bytes)); }  // what CUB's callers take

 private:
  const Tensor& like_;
  std::vector<Tensor> held_;
};

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The lattices of a batch of images, and what runs on them.
template <class Real>
struct Lattice {
  static constexpr int kVector = 16 / sizeof(Real);
  using Vec = Vector<Real, kVector>;

  const Settings& settings;
  const cudaStream_t stream;
  const Tensor& like;
  Memory memory;
  const int classes, vectors;   // of a pixel's classes
  std::vector<Kernel> kernels;  // more entries first
  std::vector<int> given;       // their numbers in the arguments
  Tiling tiling{};
  Capacity capacity{};  // and then how many there are, unless the host must not know
  Counters* counters = nullptr;
  VertexNames* names = nullptr;
  Filter<Real>* filters = nullptr;  // [kernels]
  Real* factors = nullptr;          // [kernels]
  Entries<Real> entries{};
  Arranged<Real> arranged[2] = {};  // for slices and splats forward; backward they change places
  Real* self = nullptr;             // [pixels, kernels], see normalize_kernel; null: they stay
  Real* shares = nullptr;           // [pixels]
  int* kernel_ends = nullptr;       // [kernels] of their vertices
  int* kernel_of = nullptr;         // [1 + vertices]
  int2* links = nullptr;            // [axes, 1 + vertices]
  int *begin = nullptr, *end = nullptr;  // [1 + vertices] of their rows' sums

  // `buffers` of all classes of a tile's pixels must fit into shared memory.
  Lattice(const Settings& settings, const Tensor& like, int64_t images, int classes, int64_t height,
          int64_t width, int buffers, cudaStream_t stream)
      : settings(settings),
        stream(stream),
        like(like),
        memory(like),
        classes(classes),
        vectors((classes + kVector - 1) / kVector) {
    given.resize(settings.kernels.size());
    std::iota(given.begin(), given.end(), 0);
    std::stable_sort(given.begin(), given.end(), [&](int a, int b) {
      return settings.kernels[a].entries > settings.kernels[b].entries;
    });
    for (const int number : given) {
      kernels.push_back(settings.kernels[number]);
      kernels.back().first_entry = tiling.entries;
      tiling.entries += kernels.back().entries;
    }
    const int most = kernels.empty() ? 1 : kernels[0].entries;
    static constexpr int kShapes[][2] = {{16, 32}, {16, 16}, {8, 16}, {8, 8},
                                         {4, 8},   {4, 4},   {2, 4}};
    for (const auto& shape : kShapes) {
      tiling.tile_height = shape[0], tiling.tile_width = shape[1];
      tiling.pixels = shape[0] * shape[1];
      if (tile_bytes(buffers) <= kSharedBytes && tiling.pixels * tiling.entries < 1 << 16 &&
          locate_bytes(tiling.pixels, most) <= kLocateBytes)
        break;
    }
    tiling.height = int(height), tiling.width = int(width), tiling.images = int(images);
    tiling.across = (tiling.width + tiling.tile_width - 1) / tiling.tile_width;
    tiling.down = (tiling.height + tiling.tile_height - 1) / tiling.tile_height;
    tiling.kernels = count();
  }

  int count() const { return int(kernels.size()); }
  int stride() const { return vectors | 1; }  // of a pixel in shared memory: Rows
  int tile_bytes(int buffers) const { return buffers * tiling.pixels * stride() * 16; }
  int group_bits() const { return std::max(1, log2_above(int64_t(count()) * tiling.images - 1)); }
  int64_t pixels() const { return tiling.tiles() * tiling.pixels; }
  const int* last() const { return kernel_ends + count() - 1; }  // after the last vertex
  Real scale_of(int l) const { return Real(kernel_scale(kernels[l], settings.classic_scale)); }

  void build(const Real* unary, const Real* features, int planes, const Real* weights,
             const Real* compatibility);
  // Sums rows per vertex, into one buffer or the other; `blur` then leaves its result in `values`.
  template <class T, int N>
  void combine(const Vector<T, N>* partial, int vectors, Vector<T, N>* values,
               Vector<T, N>* spare) const;
  template <class T, int N>
  void blur(int vectors, const T* factors, bool transposed, Vector<T, N>* values,
            Vector<T, N>* spare) const;
  template <class Kernel, class... Arguments>
  void over(int64_t items, Kernel kernel, Arguments... arguments) const {  // a grid-stride loop
    PYSEG_LAUNCH(kernel, blocks_for(items, 256), 256, 0, stream, arguments...);
  }

 private:
  int rings() const {
    int most = 0;
    for (const Kernel& kernel : kernels) most = std::max(most, kernel.blur.rings);
    return most;
  }
  Capacity worst() const;
  Capacity bound(bool captured, double more) const;
  struct Found {  // vertices, while they are looked for
    Table table;
    Key* keys;         // [vertices] that are in the table
    unsigned* places;  // [vertices] where
  };
  Found fill_table(const Real* features, int planes, const Key* ranges, const Real* weights,
                   bool wait, Memory& scratch);
  template <int D, bool kGrid = false>
  void locate(int l, const Real* features, int planes, const Table& table);
  void number(const Found& found, int name_bits, Memory& scratch);
  void normalize();
  void arrange(Entry<Real>* splat);
};

template <class Real>
Capacity Lattice<Real>::worst() const {
  const double pixels = double(tiling.tiles()) * tiling.pixels;
  double vertices = 0;
  for (const Kernel& kernel : kernels)
    vertices += pixels * kernel.entries * std::pow(2 * kernel.axes + 1, kernel.blur.rings);
  const double entries = pixels * tiling.entries, most = double(1 << 30);
  return {int64_t(std::min(most, entries)), int64_t(std::min(most, entries)),
          int64_t(std::min(most, vertices))};
}

// Photographs have up to 0.6 rows per pixel and kernel, and 0.3 vertices, or 1 with two rings. The
// result is `more` times as much room, or what a graph gets.
template <class Real>
Capacity Lattice<Real>::bound(bool captured, double more) const {
  const double pixels = double(tiling.images) * tiling.height * tiling.width * count();
  const Capacity most = worst();
  const auto room = [&](double each, int64_t limit) {
    const double wanted =
        captured ? kFewest + pixels * std::max(1.0, 2 * each) : more * (4096 + pixels * each);
    return std::min(limit, int64_t(std::min(1e9, wanted)));
  };
  return {room(0.7, most.locals), room(0.7, most.rows),
          room(rings() > 1 ? 1.1 : 0.4, most.vertices)};
}

template <class Real>
template <int D, bool kGrid>
void Lattice<Real>::locate(int l, const Real* features, int planes, const Table& table) {
  const Kernel& kernel = kernels[l];
  Vector<Real, kMaxFeatures> scales{};
  for (int i = 0; i < D; ++i) scales.at[i] = Real(feature_scale(i, kernel.sigmas[i], kernel.blur));
  const auto launched = locate_kernel<Real, D, kGrid>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(launched, cudaFuncAttributeMaxDynamicSharedMemorySize, kLocateBytes));
  PYSEG_LAUNCH(launched, unsigned(tiling.tiles()), kBuildThreads,
               locate_bytes(tiling.pixels, kernel.entries), stream, tiling, kernel, scales, l,
               names + l, features, planes, table, capacity, counters, entries);
}

// Finds the vertices of all tiles and the empty ones around them.
template <class Real>
typename Lattice<Real>::Found Lattice<Real>::fill_table(const Real* features, int planes,
                                                        const Key* ranges, const Real* weights,
                                                        bool wait, Memory& scratch) {
  const int64_t vertices = capacity.vertices, slots = 2 * vertices;
  const Found found{{scratch.get<Key>(slots), scratch.get<int>(slots), slots},
                    scratch.get<Key>(vertices),
                    scratch.get<unsigned>(vertices)};
  const Table& table = found.table;
  entries.locals = scratch.get<Local>(capacity.locals);
  entries.rows = memory.template get<Row>(capacity.rows);
  STD_CUDA_CHECK(cudaMemsetAsync(table.keys, 0xFF, slots * sizeof(Key), stream));
  STD_CUDA_CHECK(cudaMemsetAsync(table.ids, 0, slots * sizeof(int), stream));
  if (!wait)  // then all of them are sorted
    STD_CUDA_CHECK(cudaMemsetAsync(found.keys, 0xFF, vertices * sizeof(Key), stream));
  STD_CUDA_CHECK(cudaMemsetAsync(counters, 0, offsetof(Counters, bad_features), stream));
  for (int first = 0; first < count(); first += kTogether) {
    Preparations some{};
    const int together = std::min(kTogether, count() - first);
    for (int l = 0; l < together; ++l) {
      Preparation& it = some.of[l];
      it.kernel = kernels[first + l];
      for (int i = 0; i < it.kernel.features; ++i)
        it.feature_scale[i] = pyseg::feature_scale(i, it.kernel.sigmas[i], it.kernel.blur);
      it.message_scale = scale_of(first + l), it.given = given[first + l];
    }
    PYSEG_LAUNCH(prepare_kernel<Real>, 1, together, 0, stream, some, tiling.height, tiling.width,
                 64 - group_bits(), ranges, weights, names + first, filters + first,
                 factors + first, counters);
  }
  for (int l = 0; l < count(); ++l) {
    if (kernels[l].grid) {
      locate<2, true>(l, features, planes, table);
      continue;
    }
    switch (kernels[l].features) {
      case 1: locate<1>(l, features, planes, table); break;
      case 2: locate<2>(l, features, planes, table); break;
      case 3: locate<3>(l, features, planes, table); break;
      case 4: locate<4>(l, features, planes, table); break;
      case 5: locate<5>(l, features, planes, table); break;
      case 6: locate<6>(l, features, planes, table); break;
      case 7: locate<7>(l, features, planes, table); break;
      case 8: locate<8>(l, features, planes, table); break;
    }
  }
  for (int ring = 0; ring <= rings(); ++ring) {
    if (ring > 0) {
      over(vertices, ring_kernel<Real>, table, found.keys, vertices, tiling.images, ring, names,
           filters, counters);
      STD_CUDA_CHECK(cudaMemcpyAsync(&counters->ring, &counters->vertices, sizeof(int),
                                     cudaMemcpyDeviceToDevice, stream));
    }
    over(slots, collect_kernel, table, vertices, found.keys, found.places, counters);
  }
  return found;
}

template <class Real>
void Lattice<Real>::build(const Real* unary, const Real* features, int planes, const Real* weights,
                          const Real* compatibility) {
  const int64_t tiles = tiling.tiles();
  counters = memory.template get<Counters>(1);
  STD_CUDA_CHECK(cudaMemsetAsync(counters, 0, sizeof(Counters), stream));
  const bool wait = !capturing(stream);
  const int64_t plane = int64_t(tiling.height) * tiling.width;
  if (wait) {
    over(tiling.images * plane * classes, finite_kernel<Real>, unary,
         tiling.images * plane * classes, counters);
    over(count(), usable_kernel<Real>, weights, count(), counters);
    if (compatibility)
      over(classes * classes, usable_kernel<Real>, compatibility, classes * classes, counters);
    PYSEG_LAUNCH(report_kernel, 1, 1, 0, stream, counters);
  }
  Memory scratch(like);
  Key* const ranges = scratch.get<Key>(2 * planes);
  if (planes) {
    STD_CUDA_CHECK(cudaMemsetAsync(ranges, 0xFF, 2 * planes * sizeof(Key), stream));
    PYSEG_LAUNCH(ranges_kernel<Real>, dim3(std::min(64u, blocks_for(plane, 256)), unsigned(planes)),
                 256, 0, stream, features, tiling.images, planes, plane, ranges, counters);
  }
  if (count()) {
    names = memory.template get<VertexNames>(count());
    filters = memory.template get<Filter<Real>>(count());
    factors = memory.template get<Real>(count());
    entries.by_pixel = memory.template get<Entry<Real>>(tiles * tiling.per_tile());
    entries.lists = memory.template get<uint16_t>(tiles * tiling.per_tile());
    entries.unit_rows = memory.template get<Span>(tiles * count());
  }
  for (double more = 1;; more *= 4) {
    Memory table(like);
    Found vertices{};
    if (count()) {
      capacity = bound(!wait, more);
      vertices = fill_table(features, planes, ranges, weights, wait, table);
    }
    Counters found{};
    if (!wait) {
      PYSEG_LAUNCH(check_kernel, 1, 1, 0, stream, counters, capacity);
    } else {
      STD_CUDA_CHECK(
          cudaMemcpyAsync(&found, counters, sizeof found, cudaMemcpyDeviceToHost, stream));
      STD_CUDA_CHECK(cudaStreamSynchronize(stream));
      if (found.failures && more == 1)
        std::fprintf(stderr,
                     "pyseg dense_crf: %d replays of CUDA graphs since the last call had a result "
                     "of NaN, because of too little room or too small a sigma\n",
                     found.failures);
      PYSEG_CHECK(!found.bad_features, "image or features hold NaN or infinity");
      PYSEG_CHECK(!found.bad_weights, kUnusable);
      PYSEG_CHECK(!found.bad_unary,
                  "unary holds NaN or infinity; it must be -log(probability): clamp the "
                  "probabilities, for example p.clamp_min(1e-6).log().neg()");
      PYSEG_CHECK(
          !found.bad_names,
          "a sigma is too small: the features span too many cells of the lattice to be told "
          "apart; use a larger sigma, scale that feature down, or pass fewer images at once");
      if (found.overflow || found.locals > capacity.locals || found.rows > capacity.rows ||
          found.vertices > capacity.vertices) {
        const Capacity most = worst();
        if (capacity.vertices == most.vertices && !found.overflow)
          throw std::invalid_argument("more than 2^30 lattice vertices: pass fewer images at once");
        continue;
      }
      capacity = {found.locals, found.rows, found.vertices};
    }
    PYSEG_CHECK(
        (1 + capacity.vertices) * vectors < int64_t(1) << 32,
        "the classes of all lattice vertices exceed 2^32 vectors: pass fewer images at once");
    if (count()) number(vertices, wait ? found.name_bits : 64 - group_bits(), table);
    break;
  }
  if (count()) normalize();
}

// Numbers the vertices, links them, and finds the rows of each.
template <class Real>
void Lattice<Real>::number(const Found& found, int name_bits, Memory& scratch) {
  const int64_t vertices = capacity.vertices, locals = capacity.locals, stride = 1 + vertices;
  int axes = 0;
  for (const Kernel& kernel : kernels) axes = std::max(axes, kernel.axes);
  kernel_ends = memory.template get<int>(count());
  kernel_of = memory.template get<int>(stride);
  links = memory.template get<int2>(axes * stride);
  begin = memory.template get<int>(2 * stride), end = begin + stride;
  uint64_t* const sorted = scratch.get<uint64_t>(vertices);
  unsigned* const places = scratch.get<unsigned>(vertices);
  sort_pairs(scratch, reinterpret_cast<const uint64_t*>(found.keys), sorted, found.places, places,
             vertices, stream, 0, std::min(64, name_bits + group_bits()));
  const Key* const keys = reinterpret_cast<const Key*>(sorted);
  PYSEG_LAUNCH(ends_kernel, unsigned(count() + 31) / 32, 32, 0, stream, keys, vertices, count(),
               tiling.images, counters, kernel_ends);
  over(vertices, rank_kernel, keys, places, vertices, tiling.images, counters, found.table,
       kernel_of);
  over(stride, links_kernel, keys, kernel_of, last(), axes, counters, found.table, names, stride,
       links);

  int* const local_vertices = scratch.get<int>(locals);
  over(locals, locals_kernel, entries.locals, locals, counters, found.table, local_vertices);
  const int64_t rows = capacity.rows;
  const RowKey key{log2_above(tiling.tiles() * count() - 1),
                   log2_above(tiling.pixels * kernels[0].entries / kRow)};
  Key* const row_keys = scratch.get<Key>(rows);
  uint64_t* const sorted_keys = scratch.get<uint64_t>(rows);
  unsigned* const order = scratch.get<unsigned>(rows);
  unsigned* const sorted_order = scratch.get<unsigned>(rows);
  over(rows, keys_kernel, entries.rows, rows, counters, entries.locals, local_vertices, key,
       row_keys, order);
  sort_pairs(scratch, reinterpret_cast<const uint64_t*>(row_keys), sorted_keys, order, sorted_order,
             rows, stream, 0, std::min(64, log2_above(stride) + key.unit_bits + key.place_bits));
  STD_CUDA_CHECK(cudaMemsetAsync(begin, 0, 2 * stride * sizeof(int), stream));
  over(rows, order_kernel, reinterpret_cast<const Key*>(sorted_keys), sorted_order, rows, counters,
       key, entries.rows, begin, end);
  const int64_t all = tiling.tiles() * tiling.per_tile();
  over(all, entries_kernel<Real>, local_vertices, all, entries.by_pixel);
}

template <class Real>
template <class T, int N>
void Lattice<Real>::combine(const Vector<T, N>* partial, int vectors, Vector<T, N>* values,
                            Vector<T, N>* spare) const {
  const dim3 block(unsigned(vectors), unsigned(std::max(1, 256 / vectors)));
  PYSEG_LAUNCH((combine_kernel<T, N>), blocks_for(capacity.vertices, int(block.y)), block,
               int(block.x * block.y * sizeof(Vector<T, N>)), stream, partial, begin, end, last(),
               kernel_of, filters, vectors, values, spare);
}

template <class Real>
template <class T, int N>
void Lattice<Real>::blur(int vectors, const T* factors, bool transposed, Vector<T, N>* values,
                         Vector<T, N>* spare) const {
  const dim3 block(unsigned(vectors), unsigned(std::max(1, 256 / vectors)));
  int blurs = 0;
  for (const Kernel& kernel : kernels) blurs = std::max(blurs, kernel.blur.passes * kernel.axes);
  for (int step = 0; step < launches(blurs); ++step)
    PYSEG_LAUNCH((blur_kernel<T, N>), blocks_for(capacity.vertices, int(block.y)), block, 0, stream,
                 values, spare, last(), links, 1 + capacity.vertices, kernel_of, filters, factors,
                 step, transposed, vectors);
}

// Puts the entries' weights, and where they are those of splats, into the order in which passes
// read them.
template <class Real>
void Lattice<Real>::arrange(Entry<Real>* splat) {
  const auto put = [&](auto kernel, Entry<Real>* by_pixel) {
    Real* const weights = memory.template get<Real>(tiling.tiles() * tiling.per_tile());
    PYSEG_LAUNCH(kernel, unsigned(tiling.tiles()), 256, 0, stream, tiling, vectors, stride(),
                 by_pixel, entries.lists, weights);
    return Arranged<Real>{by_pixel, weights};
  };
  if (splat != entries.by_pixel) arranged[1] = put(arrange_kernel<Real, false>, splat);
  arranged[0] = put(arrange_kernel<Real, true>, entries.by_pixel);
  if (splat == entries.by_pixel) arranged[1] = arranged[0];
}

template <class Real>
void Lattice<Real>::normalize() {
  const Normalization how = settings.normalization;
  Entry<Real>* splat = entries.by_pixel;
  const bool self_term = settings.self_term;
  if (how == Normalization::none && self_term) return arrange(splat);
  Memory scratch(like);
  const auto partial = scratch.get<Vector<Real, 1>>(capacity.rows);
  const auto sums = scratch.get<Vector<Real, 1>>(1 + capacity.vertices);
  const auto spare = scratch.get<Vector<Real, 1>>(1 + capacity.vertices);
  STD_CUDA_CHECK(cudaMemsetAsync(sums, 0, sizeof *sums, stream));
  STD_CUDA_CHECK(cudaMemsetAsync(spare, 0, sizeof *spare, stream));
  PYSEG_LAUNCH(ones_kernel<Real>, unsigned(tiling.tiles()), 128, 0, stream, tiling, entries,
               counters, partial);
  combine<Real, 1>(partial, 1, sums, spare);
  blur<Real, 1>(1, nullptr, false, sums, spare);
  if (how == Normalization::before || how == Normalization::after) {
    splat = memory.template get<Entry<Real>>(pixels() * tiling.entries);
    STD_CUDA_CHECK(cudaMemcpyAsync(splat, entries.by_pixel,
                                   pixels() * tiling.entries * sizeof(Entry<Real>),
                                   cudaMemcpyDeviceToDevice, stream));
  }
  if (!self_term) self = memory.template get<Real>(pixels() * count());
  for (int l = 0; l < count(); ++l)
    over(pixels(), normalize_kernel<Real>, tiling, kernels[l].first_entry, kernels[l].entries, l,
         pixels(), scale_of(l), how, SelfTerm<Real>(kernels[l], scale_of(l)),
         reinterpret_cast<const Real*>(sums),
         how == Normalization::before ? splat : entries.by_pixel, self);
  if (!self_term) {
    shares = memory.template get<Real>(pixels());
    over(pixels(), shares_kernel<Real>, self, factors, pixels(), count(), shares);
  }
  arrange(splat);
}

}  // namespace
