// Dense CRF on CUDA: the mean-field inference of dense_crf.cpp on the same lattices.
//
// The image is cut into tiles of up to 512 pixels; a block names the vertices that its tile
// touches in a table in shared memory, adds them to one table in global memory for the whole batch
// (the image and the kernel are part of a vertex's key) and lists its pixels per vertex, in the
// order of pixels and in rows of at most 64. After that vertices are sorted by key. An iteration is
// one kernel for the tiles (slice, softmax, and splat: a row's sum is written by one thread), one
// that sums each vertex's rows in the order of tiles, and one per two blurs. No sum depends on the
// order in which blocks or threads run, so the result has the same bits every time.
//
// How many vertices there are, only the device knows: a bound would be dozens of times too large.
// So the host waits once for these counts, after the tables are filled, allocates what is needed
// and reports bad input. In a stream that is being captured into a graph it must not wait: then
// there is room for at least one vertex and one row per pixel and kernel and kFewest more, which
// photographs stay well below. A graph that is replayed with an image for which this is too little
// prints that and traps, as assertions on the device do: check_kernel.
#include "dense_crf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../common/launch.h"
#include "../common/primitives.cuh"
#include "arguments.h"

namespace {

using namespace pyseg;
using Key = unsigned long long;  // of a vertex: kernel, image, name

constexpr int kBuildThreads = 128;
constexpr int kBuildWarps = kBuildThreads / 32;
constexpr int kPassThreads = 256;
constexpr int kRow = 64;  // most entries that one thread sums
constexpr int kSharedBytes = 64 << 10;
constexpr int kProbes = 256;  // in a table that is at most half full
constexpr int kBlocks = 4096;
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
};

// Room for as many.
struct Capacity {
  int64_t locals, rows, vertices;
};

// The cut of a batch into tiles. A tile's entries are [pixels, entries], border or not.
struct Grid {
  int height, width, tile_height, tile_width, across, down;
  int pixels;   // of a tile
  int entries;  // of a pixel
  int kernels, images;
  unsigned by_entries;  // 2^32 / entries, rounded up: __umulhi divides entries' numbers < 2^16

  __host__ __device__ int64_t tiles() const { return int64_t(images) * across * down; }
  __host__ __device__ int64_t per_tile() const { return int64_t(pixels) * entries; }
};

struct Place {  // of a tile
  int image, x, y;
};

__device__ Place place_of(const Grid& grid, int tile) {
  const int of_image = grid.across * grid.down, in_image = tile % of_image;
  return {tile / of_image, in_image % grid.across * grid.tile_width,
          in_image / grid.across * grid.tile_height};
}

struct Table {
  Key* keys;  // [slots], a power of two
  int* ids;   // [slots] the vertex; 0: not numbered
  int shift;  // of the hash: 64 - log2(slots)
};

struct Local {  // a vertex of a tile
  int slot;     // in the table; < 0: it had no room
  int unit;     // tile and kernel
  int first_row, rows;
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

// The slot of a key, which the table gets if it lacks it; -1: no room.
__device__ int insert(const Table& table, Key key, Counters* counters) {
  const Key last = ~Key(0) >> table.shift;
  Key at = hash(key) >> table.shift;
  for (int probe = 0; probe < kProbes; ++probe, at = (at + 1) & last) {
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
  const Key last = ~Key(0) >> table.shift;
  Key at = hash(key) >> table.shift;
  for (int probe = 0; probe < kProbes; ++probe, at = (at + 1) & last) {
    if (table.keys[at] == key) return table.ids[at];
    if (table.keys[at] == kNone) break;
  }
  return 0;
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

struct Scales {
  double of[kMaxFeatures];
};

// How a kernel's vertices are blurred.
template <class Real>
struct Filter {
  int axes, blurs, rings, passes;
  bool grid;
  Real side[kMaxFeatures + 1];  // [axes] by (side 1 side)

  __device__ int axis_of(int blur) const { return pyseg::axis_of(blur, grid, axes, passes); }
};

// One thread: the names of a kernel's vertices, how they are blurred, and by what its messages are
// multiplied.
template <class Real>
__global__ void prepare_kernel(Kernel kernel, Scales scales, int height, int width, int bits,
                               const Key* ranges, const Real* weight, Real scale,
                               VertexNames* names, Filter<Real>* filter, Real* factor,
                               Counters* counters) {
  filter->axes = kernel.axes;
  filter->blurs = kernel.blur.passes * kernel.axes;
  filter->rings = kernel.blur.rings, filter->passes = kernel.blur.passes;
  filter->grid = kernel.grid;
  for (int axis = 0; axis < kernel.axes; ++axis) filter->side[axis] = Real(kernel.side(axis));
  *factor = *weight * scale;
  if (kernel.grid) {
    if (!name_grid(kernel, height, width, bits, *names)) atomicOr(&counters->bad_names, 1);
    return;
  }
  double low[kMaxFeatures], high[kMaxFeatures];
  for (int i = 0; i < kernel.features; ++i) {
    const int channel = kernel.channels[i];
    low[i] = channel < 0 ? 0 : unordered(ranges[2 * channel]);
    high[i] =
        channel < 0 ? (channel == -2 ? width : height) - 1 : unordered(~ranges[2 * channel + 1]);
    low[i] *= scales.of[i], high[i] *= scales.of[i];
  }
  if (!name_vertices(kernel.features, low, high, kernel.blur.rings, bits, *names))
    atomicOr(&counters->bad_names, 1);
}

// -- the lattice

template <class Real>
struct Entries {    // of all tiles, [tiles, pixels, entries]
  Real* weights;    // barycentric; 0 beyond the border
  int* vertices;    // first a local vertex or -1, then a vertex or 0
  uint16_t* lists;  // per tile and kernel: entries by vertex, in the order of pixels
  Local* locals;    // [capacity.locals]
  unsigned* rows;   // [capacity.rows] where in the tile's list, | length << 16
  Span* unit_rows;  // [tiles, kernels]
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
    locate_kernel(Grid grid, Kernel kernel, Vector<Real, kMaxFeatures> scales, int number,
                  int shift,  // of the kernel and image in keys
                  const VertexNames* naming, const Real* features, int planes, Table table,
                  Capacity capacity, Counters* counters, Entries<Real> out) {
  constexpr int kEach = kGrid ? 4 : D + 1;
  PYSEG_DYNAMIC_SHARED(Key, keys);  // [slots]
  const int entries = grid.pixels * kEach, slots = slots_for(entries), mask = slots - 1;
  uint16_t* const numbers = reinterpret_cast<uint16_t*>(keys + slots);  // [slots]
  uint16_t* const own = numbers + slots;  // [pixels, D + 1] a slot, then a number
  // Later in the place of keys: per vertex and warp, where in the list the next entry goes.
  uint16_t* const next = reinterpret_cast<uint16_t*>(keys);
  using Scan = BlockScan<int, kBuildThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int count, base, first_row;

  const int tile = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Place place = place_of(grid, tile);
  const int64_t first = tile * grid.per_tile();
  const VertexNames names = *naming;
  const Key group = Key(number * grid.images + place.image) << shift;
  const Key name_mask = (Key(1) << shift) - 1;
  for (int i = thread; i < slots; i += kBuildThreads) keys[i] = kNone;
  if (thread == 0) count = 0;
  __syncthreads();

  const int64_t plane = int64_t(grid.height) * grid.width;
  for (int p = thread; p < grid.pixels; p += kBuildThreads) {
    const int x = place.x + p % grid.tile_width, y = place.y + p / grid.tile_width;
    Real* const to = out.weights + first + p * grid.entries + kernel.first_entry;
    if (x >= grid.width || y >= grid.height) {
      for (int k = 0; k < kEach; ++k) own[p * kEach + k] = kNobody, to[k] = 0;
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
                               : features[(int64_t(place.image) * planes + channel) * plane +
                                          int64_t(y) * grid.width + x];
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
      to[k] = weight[k];
    }
  }
  __syncthreads();

  if (thread == 0) base = atomicAdd(&counters->locals, count);
  for (int i = thread; i < entries; i += kBuildThreads)
    if (own[i] != kNobody) own[i] = numbers[own[i]];
  __syncthreads();
  const bool fits = base + int64_t(count) <= capacity.locals;
  const int unit = tile * grid.kernels + number;
  for (int i = thread; i < slots; i += kBuildThreads)
    if (fits && keys[i] != kNone) {
      Local& local = out.locals[base + numbers[i]];
      local.slot = insert(table, keys[i], counters);
      local.unit = unit;
    }
  for (int i = thread; i < entries; i += kBuildThreads)
    out.vertices[first + i / kEach * grid.entries + kernel.first_entry + i % kEach] =
        fits && own[i] != kNobody ? base + own[i] : -1;
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
  uint16_t* const list = out.lists + first + grid.pixels * kernel.first_entry;
  for (int i = begin + lane; i < end; i += 32) {
    const int vertex = i < entries ? own[i] : kNobody;
    const unsigned same = __match_any_sync(~0u, vertex);
    int at = 0;
    if (vertex != kNobody) at = next[vertex * kBuildWarps + warp];
    __syncwarp();
    if (vertex != kNobody) {
      list[at + __popc(same & ((1u << lane) - 1))] =
          uint16_t(i / kEach * grid.entries + kernel.first_entry + i % kEach);
      if (lane == __ffs(int(same)) - 1)
        next[vertex * kBuildWarps + warp] = uint16_t(at + __popc(same));
    }
    __syncwarp();
  }
  __syncthreads();

  // Now `next` holds where the entries of each vertex and warp end.
  const int each = (count + kBuildThreads - 1) / kBuildThreads;
  const int from = min(count, thread * each), to = min(count, from + each);
  int rows = 0, before, total;
  for (int v = from; v < to; ++v) {
    const int start = v ? next[v * kBuildWarps - 1] : 0;
    rows += (next[v * kBuildWarps + kBuildWarps - 1] - start + kRow - 1) / kRow;
  }
  Scan(scan).ExclusiveSum(rows, before, total);
  if (thread == 0) first_row = atomicAdd(&counters->rows, total);
  __syncthreads();
  const bool rows_fit = fits && first_row + int64_t(total) <= capacity.rows;
  if (thread == 0) out.unit_rows[unit] = {rows_fit ? first_row : 0, rows_fit ? total : 0};
  if (!rows_fit) return;
  for (int v = from; v < to; ++v) {
    int start = v ? next[v * kBuildWarps - 1] : 0;
    const int stop = next[v * kBuildWarps + kBuildWarps - 1];
    Local& local = out.locals[base + v];
    local.first_row = first_row + before;
    local.rows = (stop - start + kRow - 1) / kRow;
    for (; start < stop; start += kRow)
      out.rows[first_row + before++] = unsigned(start + grid.pixels * kernel.first_entry) |
                                       unsigned(min(kRow, stop - start)) << 16;
  }
}

// Vertices of the table that the list lacks are added to it, in any order.
__global__ void __launch_bounds__(kPassThreads)
    collect_kernel(Table table, int64_t slots, int64_t capacity, Key* keys, unsigned* places,
                   Counters* counters) {
  using Scan = BlockScan<int, kPassThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int base;
  for (int64_t block = int64_t(blockIdx.x) * kPassThreads; block < slots;
       block += int64_t(gridDim.x) * kPassThreads) {
    const int64_t slot = block + threadIdx.x;
    const bool fresh = slot < slots && table.keys[slot] != kNone && table.ids[slot] == 0;
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
__global__ void ring_kernel(Table table, const Key* keys, int64_t capacity, int shift, int images,
                            int ring, const VertexNames* naming, const Filter<Real>* filters,
                            Counters* counters) {
  const int64_t end = min(capacity, int64_t(counters->vertices));
  const Key name_mask = (Key(1) << shift) - 1;
  for (int64_t i = counters->ring + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < end;
       i += int64_t(gridDim.x) * blockDim.x) {
    const Key key = keys[i];
    const int kernel = int((key >> shift) / images);
    if (filters[kernel].rings < ring) continue;
    const VertexNames& names = naming[kernel];
    for (int axis = 0; axis < names.axes; ++axis) {
      insert(table, neighbour(names, key, axis, true, name_mask), counters);
      insert(table, neighbour(names, key, axis, false, name_mask), counters);
    }
  }
}

// One thread, where the host must not wait.
__global__ void check_kernel(const Counters* counters, Capacity capacity) {
  const Counters& c = *counters;
  const bool narrow = c.bad_names && !c.bad_features;  // NaN has no name; it shows in the result
  if (narrow)
    printf("pyseg dense_crf: a sigma is too small for the image that a CUDA graph was given\n");
  const bool small = c.overflow || c.locals > capacity.locals || c.rows > capacity.rows ||
                     c.vertices > capacity.vertices;
  if (small)
    printf(
        "pyseg dense_crf: an image has more lattice vertices than a CUDA graph has room for (%d "
        "of %lld): use larger sigmas, or call dense_crf without a graph\n",
        c.vertices, static_cast<long long>(capacity.vertices));
  if (small || narrow) __trap();
}

// Vertices are numbered from 1, by kernel. Row 0 stands for all absent vertices. A thread is a
// kernel and finds where its vertices end.
__global__ void ends_kernel(const Key* keys, int64_t n, int kernels, int images, int shift,
                            int* kernel_ends) {
  const int l = blockIdx.x * blockDim.x + threadIdx.x;
  if (l >= kernels) return;
  const Key bound = l + 1 == kernels ? kNone : Key(l + 1) * images << shift;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < bound)
      low = middle + 1;
    else
      high = middle;
  }
  kernel_ends[l] = int(low) + 1;
}

__global__ void rank_kernel(const Key* keys, const unsigned* places, int64_t n, int shift,
                            int images, Table table, int* kernel_of) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    if (keys[i] == kNone) return;
    table.ids[places[i]] = int(i) + 1;
    kernel_of[i + 1] = int((keys[i] >> shift) / images);
  }
}

// Of each local vertex: its vertex, and a key that sorts by vertex, then by tile.
__global__ void locals_kernel(const Local* locals, int64_t n, const Counters* counters, Table table,
                              int unit_bits, int* vertices, Key* keys, unsigned* order) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    keys[i] = kNone;
    order[i] = unsigned(i);
    if (i >= counters->locals) continue;
    const int slot = locals[i].slot, vertex = slot < 0 ? 0 : max(0, table.ids[slot]);
    vertices[i] = vertex;
    keys[i] = Key(vertex) << unit_bits | Key(locals[i].unit);
  }
}

// Where the sorted local vertices of each vertex begin and end, and their rows.
__global__ void spans_kernel(const Key* keys, const unsigned* order, const Local* locals, int64_t n,
                             int unit_bits, Span* rows, int* begin, int* end) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    if (keys[i] == kNone) return;
    const Key vertex = keys[i] >> unit_bits;
    if (i == 0 || keys[i - 1] >> unit_bits != vertex) begin[vertex] = int(i);
    if (i + 1 == n || keys[i + 1] >> unit_bits != vertex) end[vertex] = int(i) + 1;
    const Local& local = locals[order[i]];
    rows[i] = {local.first_row, local.rows};
  }
}

__global__ void entries_kernel(const int* local_vertices, int64_t n, int* entries) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    entries[i] = entries[i] < 0 ? 0 : local_vertices[entries[i]];
}

// links [axes, stride] of neighbours before and after; those of vertex 0 were set to 0.
__global__ void links_kernel(const Key* keys, const int* kernel_of, const int* vertices, int shift,
                             Table table, const VertexNames* naming, int64_t stride, int2* links) {
  const Key name_mask = (Key(1) << shift) - 1;
  const int64_t end = *vertices;
  for (int64_t v = 1 + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; v < end;
       v += int64_t(gridDim.x) * blockDim.x) {
    const VertexNames& names = naming[kernel_of[v]];
    for (int axis = 0; axis < names.axes; ++axis)
      links[axis * stride + v] =
          make_int2(find(table, neighbour(names, keys[v - 1], axis, true, name_mask)),
                    find(table, neighbour(names, keys[v - 1], axis, false, name_mask)));
  }
}

// -- filtering; blocks are [rows of vectors, 256 / width]

// `from` by value: so it is loaded as a whole.
template <class T, int N>
__device__ void add(Vector<T, N>& to, T factor, Vector<T, N> from) {
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] += factor * from.at[i];
}

__host__ __device__ inline int launches(int blurs) { return (blurs + 1) / 2; }  // two in each

// Sums the rows of each vertex, in the order of tiles, into that of the buffers from which its
// blurs end in `even`.
template <class T, int N>
__global__ void combine_kernel(const Vector<T, N>* partial, const Span* rows, const int* begin,
                               const int* end, const int* last, const int* kernel_of,
                               const Filter<T>* filters, int width, Vector<T, N>* even,
                               Vector<T, N>* odd) {
  const int64_t vertices = *last;
  for (int64_t v = 1 + int64_t(blockIdx.x) * blockDim.y + threadIdx.y; v < vertices;
       v += int64_t(gridDim.x) * blockDim.y) {
    Vector<T, N> sum{};
    const int stop = end[v];
    for (int i = begin[v]; i < stop; ++i) {
      const Span span = rows[i];
      for (int r = 0; r < span.count; ++r)
        add(sum, T(1), partial[int64_t(span.first + r) * width + threadIdx.x]);
    }
    (launches(filters[kernel_of[v]].blurs) % 2 ? odd : even)[v * width + threadIdx.x] = sum;
  }
}

// Blurs number 2 step and 2 step + 1, where a kernel has as many, by (side 1 side). The vertex's
// neighbours along the first axis and theirs are read, so that nothing lies between. Blurs along
// different axes do not commute where vertices are absent: `transposed` takes them in reverse.
template <class T, int N>
__global__ void blur_kernel(Vector<T, N>* even, Vector<T, N>* odd, const int* last,
                            const int2* links, int64_t stride, const int* kernel_of,
                            const Filter<T>* filters, const T* factors,  // null: 1
                            int step, bool transposed, int width) {
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
      Vector<T, N> sum = from[at * width];
      const int2 link = along[at];
      add(sum, side, from[int64_t(link.x) * width]);
      add(sum, side, from[int64_t(link.y) * width]);
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
    (to_even ? even : odd)[v * width + threadIdx.x] = sum;
  }
}

// out = -factor compatibility in, per vertex, or factor in; a thread per vertex and class.
template <class T>
__global__ void mix_kernel(const T* in, const T* compatibility, const T* factors,
                           const int* kernel_of, const int* last, int classes, int stride,
                           bool transposed, T* out) {
  const int64_t n = int64_t(*last) * stride;
  const int along = transposed ? classes : 1, across = transposed ? 1 : classes;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t v = i / stride;
    const int to = int(i % stride);
    T sum = 0;
    if (v > 0 && to < classes) {
      if (!compatibility) sum = in[i];
      for (int from = 0; compatibility && from < classes; ++from)
        sum -= compatibility[to * across + from * along] * in[v * stride + from];
      sum *= factors[kernel_of[v]];
    }
    out[i] = sum;
  }
}

// -- normalisation

// The splat of ones; a block is a tile.
template <class Real>
__global__ void ones_kernel(Grid grid, Entries<Real> entries, Vector<Real, 1>* partial) {
  const int64_t first = blockIdx.x * grid.per_tile();
  const Span* const units = entries.unit_rows + int64_t(blockIdx.x) * grid.kernels;
  for (int l = 0; l < grid.kernels; ++l)
    for (int r = threadIdx.x; r < units[l].count; r += blockDim.x) {
      const unsigned row = entries.rows[units[l].first + r];
      const uint16_t* const list = entries.lists + first + (row & 0xFFFF);
      Real sum = 0;
      for (unsigned i = 0; i < row >> 16; ++i) sum += entries.weights[first + list[i]];
      partial[units[l].first + r].at[0] = sum;
    }
}

// Row sums of kernel `number`, less the self terms where those are left out, go into the weights of
// the pixels' entries. Then self [pixels, kernels] gets what is left of Q in a pixel's own message,
// before `factors`.
template <class Real>
__global__ void normalize_kernel(Grid grid, int first_entry, int count, int number, int64_t pixels,
                                 Real scale, Normalization how, SelfTerm<Real> self_term,
                                 const Real* sums, const int* vertices, Real* weights,
                                 Real* self) {  // null: self terms stay
  for (int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < pixels;
       p += int64_t(gridDim.x) * blockDim.x) {
    const int64_t entry = p * grid.entries + first_entry;
    Real sum = 0;
    for (int k = 0; k < count; ++k) sum += weights[entry + k] * sums[vertices[entry + k]];
    sum = sum * scale + Real(1e-20);
    bool alone = false;
    if (self) {
      const Real own = self_term(weights + entry);
      sum -= own;
      alone = sum < Real(kAlone) * own;
      const Real share = how == Normalization::none ? own : alone ? Real(0) : own / sum;
      self[p * grid.kernels + number] = share / scale;
    }
    if (how == Normalization::none) continue;
    const Real divisor = how == Normalization::symmetric ? sqrt(sum) : sum;
    const Real factor = alone ? Real(0) : Real(1) / divisor;
    for (int k = 0; k < count; ++k) weights[entry + k] *= factor;
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

// -- mean field

template <class Real>
struct Pass {
  const Real* unary;    // [N, C, H, W]
  const Real* values;   // [vertices, width] messages; null: there are none yet
  Real* q;              // [N, C, H, W]; null but in the last pass
  Real* partial;        // [rows, width] sums; null in the last pass
  const Real* weights;  // the entries' weights when slicing, and when splatting
  const Real* splat;
  const int* vertices;
  const uint16_t* lists;
  const unsigned* rows;
  const Span* unit_rows;
  const Counters* counters;
  int classes;
  // Of kernels with kOthers:
  const Real* shares;         // [pixels] of their own Q in messages
  const Real* compatibility;  // [C, C], or null
  const Real* before;         // [pixels, width] the last pass's Q
  Real* after;                // the same of this pass, may be the same memory
};

// The same when gradients flow back.
template <class Real>
struct Back {
  const Real* gradient;  // of q; null but in the first pass back
  const Real* values;    // gradients of the splat sums, blurred; null in the first pass back
  Real* of_unary;        // set by the first pass back, then added to
  Real* kept;            // [pixels, width] those of messages: of the later pass, then of this
};

// Shared memory holds the classes of each pixel together, in an odd number of vectors, so that
// threads that read one vector of consecutive pixels each do not wait for each other.
template <class Real>
struct Rows {
  static constexpr int N = 16 / sizeof(Real);
  using Vec = Vector<Real, N>;
  int width, stride;

  __device__ explicit Rows(int classes) : width((classes + N - 1) / N), stride(width | 1) {}

  // Calls visit(item, part) for all items and vectors, consecutive vectors in consecutive threads.
  template <class Visit>
  __device__ void each(int items, Visit visit) const {
    int item = int(threadIdx.x) / width, part = int(threadIdx.x) % width;
    while (item < items) {
      visit(item, part);
      item += kPassThreads / width, part += kPassThreads % width;
      if (part >= width) part -= width, ++item;
    }
  }

  __device__ void slice(const Grid& grid, const Real* values, const Real* weights,
                        const int* vertices, Vec* to) const {
    const Vec* const from = reinterpret_cast<const Vec*>(values);
    each(grid.pixels, [&](int p, int part) {
      Vec sum{};
#pragma unroll 3
      for (int e = p * grid.entries; e < (p + 1) * grid.entries; ++e)
        add(sum, weights[e], from[int64_t(vertices[e]) * width + part]);
      to[p * stride + part] = sum;
    });
  }

  // Messages, or their gradients, lose what pixels contribute to their own; `all` holds the pixels
  // as they contributed. Right after `slice`: a thread changes what it has written.
  __device__ void remove_self(const Grid& grid, const Pass<Real>& pass, const Real* all,
                              bool transposed, Vec* to) const {
    const int64_t first = int64_t(blockIdx.x) * grid.pixels;
    const Real* const matrix = pass.compatibility;
    const int classes = pass.classes;
    const int along = transposed ? classes : 1, across = transposed ? 1 : classes;
    each(grid.pixels, [&](int p, int part) {
      const Real* const own = all + (first + p) * width * N;
      const Real share = pass.shares[first + p];
      Vec taken{};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int c = part * N + i;
        if (!matrix) taken.at[i] = own[c];
        for (int from = 0; matrix && c < classes && from < classes; ++from)
          taken.at[i] -= matrix[c * across + from * along] * own[from];
      }
      add(to[p * stride + part], -share, taken);
    });
  }

  // Keeps a tile's pixels for `remove_self`, with 0 beyond the border.
  __device__ void keep(const Grid& grid, const Vec* from, Real* all) const {
    const Place place = place_of(grid, blockIdx.x);
    Vec* const to = reinterpret_cast<Vec*>(all) + int64_t(blockIdx.x) * grid.pixels * width;
    each(grid.pixels, [&](int p, int part) {
      const int x = place.x + p % grid.tile_width, y = place.y + p / grid.tile_width;
      const bool inside = x < grid.width && y < grid.height;
      to[p * width + part] = inside ? from[p * stride + part] : Vec{};
    });
  }

  __device__ void splat(const Grid& grid, const Pass<Real>& pass, const Real* weights,
                        const Vec* from) const {
    const uint16_t* const lists = pass.lists + blockIdx.x * grid.per_tile();
    for (int l = 0; l < grid.kernels; ++l) {
      const Span unit = pass.unit_rows[int64_t(blockIdx.x) * grid.kernels + l];
      Vec* const to = reinterpret_cast<Vec*>(pass.partial) + int64_t(unit.first) * width;
      each(unit.count, [&](int r, int part) {
        const unsigned row = pass.rows[unit.first + r];
        const uint16_t* const list = lists + (row & 0xFFFF);
        Vec sum{};
#pragma unroll 4
        for (unsigned i = 0; i < row >> 16; ++i) {
          const unsigned entry = list[i];
          add(sum, weights[entry], from[__umulhi(entry, grid.by_entries) * stride + part]);
        }
        to[r * width + part] = sum;
      });
    }
  }

  // A pixel's messages, if there are any, become probabilities, and 0 past the last class.
  __device__ void softmax(const Real* unary, int64_t plane, int classes, bool messages,
                          Vec* row) const {
    Real largest = -INFINITY, sum = 0;
    for (int part = 0; part < width; ++part) {
      Vec logits{};
      if (messages) logits = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (part * N + i < classes) {
          logits.at[i] -= unary[(part * N + i) * plane];
          largest = logits.at[i] > largest ? logits.at[i] : largest;
        }
      row[part] = logits;
    }
    for (int part = 0; part < width; ++part) {
      Vec e = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        e.at[i] = part * N + i < classes ? exp(e.at[i] - largest) : Real(0);
        sum += e.at[i];
      }
      row[part] = e;
    }
    const Real scale = Real(1) / sum;
    for (int part = 0; part < width; ++part) {
      Vec e = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i) e.at[i] *= scale;
      row[part] = e;
    }
  }
};

// Calls visit(p, where it is in [N, C, H, W]) for the pixels of a tile.
template <class Visit>
__device__ void each_pixel(const Grid& grid, int classes, Visit visit) {
  const Place place = place_of(grid, blockIdx.x);
  const int64_t plane = int64_t(grid.height) * grid.width;
  for (int p = threadIdx.x; p < grid.pixels; p += kPassThreads) {
    const int x = place.x + p % grid.tile_width, y = place.y + p / grid.tile_width;
    if (x < grid.width && y < grid.height)
      visit(p, place.image * classes * plane + int64_t(y) * grid.width + x);
  }
}

// One mean-field update of a tile: slice every lattice, softmax, splat into every lattice.
// kOthers: without self terms.
template <class Real, bool kOthers>
__global__ void __launch_bounds__(kPassThreads) pass_kernel(Grid grid, Pass<Real> pass) {
  using Vec = typename Rows<Real>::Vec;
  PYSEG_DYNAMIC_SHARED(Vec, shared);  // [pixels, stride]
  const Rows<Real> rows(pass.classes);
  const int64_t first = blockIdx.x * grid.per_tile(), plane = int64_t(grid.height) * grid.width;
  if (pass.values) {
    rows.slice(grid, pass.values, pass.weights + first, pass.vertices + first, shared);
    if (kOthers) rows.remove_self(grid, pass, pass.before, false, shared);
    __syncthreads();
  }
  const Real invalid = pass.counters->bad_features ? NAN : 0;
  each_pixel(grid, pass.classes, [&](int p, int64_t pixel) {
    Vec* const row = shared + p * rows.stride;
    rows.softmax(pass.unary + pixel, plane, pass.classes, pass.values, row);
    if (pass.q)
      for (int c = 0; c < pass.classes; ++c)
        pass.q[pixel + c * plane] = row[c / Rows<Real>::N].at[c % Rows<Real>::N] + invalid;
  });
  if (!pass.partial) return;
  __syncthreads();
  if (kOthers) rows.keep(grid, shared, pass.after);
  rows.splat(grid, pass, pass.splat + first, shared);
}

// The update backwards: recomputes q, slices its gradient, adds to the gradient of unary and splats
// that of the messages.
template <class Real, bool kOthers>
__global__ void __launch_bounds__(kPassThreads)
    back_kernel(Grid grid, Pass<Real> pass, Back<Real> back) {
  constexpr int N = Rows<Real>::N;
  using Vec = typename Rows<Real>::Vec;
  PYSEG_DYNAMIC_SHARED(Vec, shared);  // [2, pixels, stride]
  const Rows<Real> rows(pass.classes);
  Vec* const gradients = shared + grid.pixels * rows.stride;
  const int64_t first = blockIdx.x * grid.per_tile(), plane = int64_t(grid.height) * grid.width;
  if (pass.values)
    rows.slice(grid, pass.values, pass.weights + first, pass.vertices + first, shared);
  if (back.values)
    rows.slice(grid, back.values, pass.splat + first, pass.vertices + first, gradients);
  if (kOthers && pass.values) rows.remove_self(grid, pass, pass.before, false, shared);
  if (kOthers && back.values) rows.remove_self(grid, pass, back.kept, true, gradients);
  __syncthreads();
  each_pixel(grid, pass.classes, [&](int p, int64_t pixel) {
    Vec* const row = shared + p * rows.stride;
    Vec* const gradient = gradients + p * rows.stride;
    rows.softmax(pass.unary + pixel, plane, pass.classes, pass.values, row);
    Real dot = 0;
    for (int part = 0; part < rows.width; ++part) {
      Vec g{};
      if (back.values) g = gradient[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!back.values && part * N + i < pass.classes)
          g.at[i] = back.gradient[pixel + (part * N + i) * plane];
        dot += row[part].at[i] * g.at[i];
      }
      gradient[part] = g;
    }
    for (int part = 0; part < rows.width; ++part) {
      Vec g = gradient[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g.at[i] = row[part].at[i] * (g.at[i] - dot);
        if (part * N + i < pass.classes) {
          Real& of_unary = back.of_unary[pixel + (part * N + i) * plane];
          of_unary = (back.values ? of_unary : Real(0)) - g.at[i];
        }
      }
      row[part] = g;
    }
  });
  if (!pass.partial) return;
  __syncthreads();
  if (kOthers) rows.keep(grid, shared, back.kept);
  rows.splat(grid, pass, pass.weights + first, shared);
}

// Adds products of the gradients of messages, still to be blurred, with the sums that the messages
// were made of, over a kernel's vertices. Or, kSelf, takes away what was in the messages of the
// pixels' own: the gradients `even` of messages with Q, `sums`, over pixels. Grid: y is the kernel.
// Without a compatibility matrix a block adds to one number, otherwise to [C, C]. Each block takes
// the same vertices every time.
template <class T, bool kSelf>
__global__ void __launch_bounds__(kPassThreads)
    products_kernel(const T* even, const T* odd, const T* sums, const Filter<T>* filters,
                    const int* kernel_ends, const T* self, int64_t pixels, int classes, int stride,
                    bool matrix, double* products) {  // [kernels, blocks, 1 or C * C]
  const int l = blockIdx.y;
  const int64_t begin = kSelf ? 0 : l ? kernel_ends[l - 1] : 1;
  const int64_t end = kSelf ? pixels : kernel_ends[l];
  const int cells = matrix ? classes * classes : 1;
  double* const to = products + (int64_t(l) * gridDim.x + blockIdx.x) * cells;
  if (begin >= end) return;
  const T* const gradients = !kSelf && launches(filters[l].blurs) % 2 ? odd : even;
  const auto times = [&](int64_t i, T product) {
    return kSelf ? -self[i * gridDim.y + l] * product : product;
  };
  if (!matrix) {
    using Reduce = BlockReduce<double, kPassThreads>;
    __shared__ typename Reduce::TempStorage storage;
    double sum = 0;
    for (int64_t v = begin + int64_t(blockIdx.x) * kPassThreads + threadIdx.x; v < end;
         v += int64_t(gridDim.x) * kPassThreads) {
      T dot = 0;
      for (int c = 0; c < classes; ++c) dot += gradients[v * stride + c] * sums[v * stride + c];
      sum += times(v, dot);
    }
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x == 0) *to += sum;
    return;
  }
  constexpr int kRun = 64;  // so many products are summed in T
  for (int cell = threadIdx.x; cell < cells; cell += kPassThreads) {
    const int row = cell / classes, column = cell % classes;
    double sum = 0;
    for (int64_t v = begin + int64_t(blockIdx.x) * kRun; v < end; v += int64_t(gridDim.x) * kRun) {
      const int64_t stop = min(end, v + kRun);
      T few = 0;
      for (int64_t i = v; i < stop; ++i)
        few += times(i, gradients[i * stride + row] * sums[i * stride + column]);
      sum += few;
    }
    to[cell] += sum;
  }
}

// One block per kernel: the gradient of its weight.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    weight_gradient_kernel(const double* products, const T* compatibility, int blocks, int cells,
                           T scale, T* gradient) {
  using Reduce = BlockReduce<double, kPassThreads>;
  __shared__ typename Reduce::TempStorage storage;
  double sum = 0;
  for (int cell = threadIdx.x; cell < cells; cell += kPassThreads)
    for (int block = 0; block < blocks; ++block) {
      const double value = products[int64_t(block) * cells + cell];
      sum += compatibility ? -double(compatibility[cell]) * value : value;
    }
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) *gradient += T(double(scale) * sum);
}

// A thread is an element of the compatibility matrix.
template <class T>
__global__ void compatibility_gradient_kernel(const double* products, const T* factors, int kernels,
                                              int blocks, int cells, T* gradient) {
  const int cell = blockIdx.x * blockDim.x + threadIdx.x;
  if (cell >= cells) return;
  double total = 0;
  for (int l = 0; l < kernels; ++l) {
    double sum = 0;
    for (int block = 0; block < blocks; ++block)
      sum += products[(int64_t(l) * blocks + block) * cells + cell];
    total -= double(factors[l]) * sum;
  }
  gradient[cell] += T(total);
}

// -- the host

int log2_above(int64_t n) {  // the least power of two that is more
  int bits = 0;
  while ((int64_t(1) << bits) <= n) ++bits;
  return bits;
}

unsigned blocks_for(int64_t items, int threads) {
  return unsigned(
      std::max<int64_t>(1, std::min<int64_t>(kBlocks, (items + threads - 1) / threads)));
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
class Crf {
 public:
  static constexpr int kVector = 16 / sizeof(Real);
  using Vec = Vector<Real, kVector>;

  // `buffers` of all classes of a tile's pixels must fit into shared memory.
  Crf(const Settings& settings, const Tensor& like, int64_t images, int classes, int64_t height,
      int64_t width, int buffers, cudaStream_t stream)
      : settings_(settings),
        stream_(stream),
        like_(like),
        memory_(like),
        classes_(classes),
        width_((classes + kVector - 1) / kVector) {
    given_.resize(settings.kernels.size());
    std::iota(given_.begin(), given_.end(), 0);
    std::stable_sort(given_.begin(), given_.end(), [&](int a, int b) {
      return settings.kernels[a].entries > settings.kernels[b].entries;
    });
    for (const int number : given_) {
      kernels_.push_back(settings.kernels[number]);
      kernels_.back().first_entry = grid_.entries;
      grid_.entries += kernels_.back().entries;
    }
    const int most = kernels_.empty() ? 1 : kernels_[0].entries;
    static constexpr int kShapes[][2] = {{16, 32}, {16, 16}, {8, 16}, {8, 8},
                                         {4, 8},   {4, 4},   {2, 4}};
    for (const auto& shape : kShapes) {
      grid_.tile_height = shape[0], grid_.tile_width = shape[1];
      grid_.pixels = shape[0] * shape[1];
      if (pass_bytes(buffers) <= kSharedBytes && grid_.pixels * grid_.entries < 1 << 16 &&
          locate_bytes(grid_.pixels, most) <= 48 << 10)
        break;
    }
    grid_.height = int(height), grid_.width = int(width), grid_.images = int(images);
    grid_.across = (grid_.width + grid_.tile_width - 1) / grid_.tile_width;
    grid_.down = (grid_.height + grid_.tile_height - 1) / grid_.tile_height;
    grid_.kernels = kernels();
    if (grid_.entries) grid_.by_entries = unsigned((int64_t(1) << 32) / grid_.entries + 1);
  }

  const Grid& grid() const { return grid_; }
  void build(const Real* unary, const Real* features, int planes, const Real* weights,
             const Real* compatibility);
  struct History {           // of all iterations, which `backward` needs
    std::vector<Vec*> sums;  // blurred: small next to Q
    std::vector<Vec*> q;     // [pixels, width], only without self terms
  };
  void infer(const Real* unary, const Real* compatibility, Real* q, History* history = nullptr);
  void backward(const Real* unary, const Real* compatibility, const Real* gradient, Real* of_unary,
                Real* of_weights, Real* of_compatibility);

 private:
  int pass_bytes(int buffers) const { return buffers * grid_.pixels * (width_ | 1) * 16; }
  int kernels() const { return int(kernels_.size()); }
  int rings() const {
    int most = 0;
    for (const Kernel& kernel : kernels_) most = std::max(most, kernel.blur.rings);
    return most;
  }
  const int* last() const { return kernel_ends_ + kernels() - 1; }  // after the last vertex
  Real scale_of(int l) const { return Real(kernel_scale(kernels_[l], settings_.classic_scale)); }
  Capacity worst() const;
  Capacity bound(bool captured, double more) const;
  void fill_table(const Real* features, int planes, const Key* ranges, const Real* weights,
                  Memory& scratch);
  template <int D, bool kGrid = false>
  void locate(int l, const Real* features, int planes);
  void number(Memory& scratch);
  template <class T, int N>
  void combine(const Vector<T, N>* partial, int width, Vector<T, N>* values, Vector<T, N>* spare);
  template <class T, int N>
  void blur(int width, const T* factors, bool transposed, Vector<T, N>* values,
            Vector<T, N>* spare);
  void mix(const Vec* in, const Real* compatibility, bool transposed, Vec* out);
  Vec* messages() {  // room for [1 + vertices, width]
    Vec* const values = memory_.template get<Vec>((1 + capacity_.vertices) * width_);
    STD_CUDA_CHECK(cudaMemsetAsync(values, 0, width_ * sizeof(Vec), stream_));
    return values;
  }
  int64_t pixels() const { return grid_.tiles() * grid_.pixels; }
  Vec* pixel_rows() { return memory_.template get<Vec>(pixels() * width_); }
  Pass<Real> pass(const Real* unary, const Vec* messages, const Real* compatibility,
                  const Vec* before, Vec* after) const {
    return {unary,
            reinterpret_cast<const Real*>(messages),
            nullptr,
            nullptr,
            entries_.weights,
            splat_,
            entries_.vertices,
            entries_.lists,
            entries_.rows,
            entries_.unit_rows,
            counters_,
            classes_,
            shares_,
            compatibility,
            reinterpret_cast<const Real*>(before),
            reinterpret_cast<Real*>(after)};
  }
  void normalize();
  template <class Kernel, class... Arguments>
  void each(Kernel kernel, int64_t items, Arguments... arguments) {  // of a grid-stride loop
    PYSEG_LAUNCH(kernel, blocks_for(items, 256), 256, 0, stream_, arguments...);
  }

  const Settings& settings_;
  std::vector<Kernel> kernels_;  // more entries first
  std::vector<int> given_;       // their numbers in the arguments
  const cudaStream_t stream_;
  const Tensor& like_;
  Memory memory_;
  const int classes_, width_;
  Grid grid_{};
  int shift_ = 0;
  Capacity capacity_{};  // and then how many there are, unless the host must not know
  Counters* counters_ = nullptr;
  Table table_{};
  int64_t slots_ = 0;
  Key* keys_ = nullptr;         // [vertices] that are in the table
  unsigned* places_ = nullptr;  // [vertices] where
  VertexNames* names_ = nullptr;
  Filter<Real>* filters_ = nullptr;  // [kernels]
  Real* factors_ = nullptr;          // [kernels]
  Entries<Real> entries_{};
  Real* splat_ = nullptr;       // the entries' weights, unless they are entries_.weights
  Real* self_ = nullptr;        // [pixels, kernels], see normalize_kernel; null: self terms stay
  Real* shares_ = nullptr;      // [pixels]
  int* kernel_ends_ = nullptr;  // [kernels] of their vertices
  int* kernel_of_ = nullptr;    // [1 + vertices]
  int2* links_ = nullptr;       // [axes, 1 + vertices]
  Span* spans_ = nullptr;       // [locals] rows, sorted by vertex
  int *begin_ = nullptr, *end_ = nullptr;  // [1 + vertices] of spans_
};

template <class Real>
Capacity Crf<Real>::worst() const {
  const double pixels = double(grid_.tiles()) * grid_.pixels;
  double vertices = 0;
  for (const Kernel& kernel : kernels_)
    vertices += pixels * kernel.entries * std::pow(2 * kernel.axes + 1, kernel.blur.rings);
  const double entries = pixels * grid_.entries, most = double(1 << 30);
  return {int64_t(std::min(most, entries)), int64_t(std::min(most, entries)),
          int64_t(std::min(most, vertices))};
}

// Photographs have up to 0.6 rows per pixel and kernel, and 0.3 vertices, or 1 with two rings. The
// result is `more` times as much room, or what a graph gets.
template <class Real>
Capacity Crf<Real>::bound(bool captured, double more) const {
  const double pixels = double(grid_.images) * grid_.height * grid_.width * kernels();
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
void Crf<Real>::locate(int l, const Real* features, int planes) {
  const Kernel& kernel = kernels_[l];
  Vector<Real, kMaxFeatures> scales{};
  for (int i = 0; i < D; ++i) scales.at[i] = Real(feature_scale(i, kernel.sigmas[i], kernel.blur));
  PYSEG_LAUNCH((locate_kernel<Real, D, kGrid>), unsigned(grid_.tiles()), kBuildThreads,
               locate_bytes(grid_.pixels, kernel.entries), stream_, grid_, kernel, scales, l,
               shift_, names_ + l, features, planes, table_, capacity_, counters_, entries_);
}

// Finds the vertices of all tiles and the empty ones around them.
template <class Real>
void Crf<Real>::fill_table(const Real* features, int planes, const Key* ranges, const Real* weights,
                           Memory& scratch) {
  int bits = 8;
  while (int64_t(1) << bits < 2 * capacity_.vertices) ++bits;
  slots_ = int64_t(1) << bits;
  table_ = {scratch.get<Key>(slots_), scratch.get<int>(slots_), 64 - bits};
  keys_ = scratch.get<Key>(capacity_.vertices);
  places_ = scratch.get<unsigned>(capacity_.vertices);
  entries_.locals = scratch.get<Local>(capacity_.locals);
  entries_.rows = memory_.template get<unsigned>(capacity_.rows);
  STD_CUDA_CHECK(cudaMemsetAsync(table_.keys, 0xFF, slots_ * sizeof(Key), stream_));
  STD_CUDA_CHECK(cudaMemsetAsync(table_.ids, 0, slots_ * sizeof(int), stream_));
  STD_CUDA_CHECK(cudaMemsetAsync(keys_, 0xFF, capacity_.vertices * sizeof(Key), stream_));
  STD_CUDA_CHECK(cudaMemsetAsync(counters_, 0, offsetof(Counters, bad_features), stream_));
  for (int l = 0; l < kernels(); ++l) {
    const Kernel& kernel = kernels_[l];
    Scales scales{};
    for (int i = 0; i < kernel.features; ++i)
      scales.of[i] = feature_scale(i, kernel.sigmas[i], kernel.blur);
    PYSEG_LAUNCH(prepare_kernel<Real>, 1, 1, 0, stream_, kernel, scales, grid_.height, grid_.width,
                 shift_, ranges, weights + given_[l], scale_of(l), names_ + l, filters_ + l,
                 factors_ + l, counters_);
    if (kernel.grid) {
      locate<2, true>(l, features, planes);
      continue;
    }
    switch (kernel.features) {
      case 1: locate<1>(l, features, planes); break;
      case 2: locate<2>(l, features, planes); break;
      case 3: locate<3>(l, features, planes); break;
      case 4: locate<4>(l, features, planes); break;
      case 5: locate<5>(l, features, planes); break;
      case 6: locate<6>(l, features, planes); break;
      case 7: locate<7>(l, features, planes); break;
      case 8: locate<8>(l, features, planes); break;
    }
  }
  for (int ring = 0; ring <= rings(); ++ring) {
    if (ring > 0) {
      each(ring_kernel<Real>, capacity_.vertices, table_, keys_, capacity_.vertices, shift_,
           grid_.images, ring, names_, filters_, counters_);
      STD_CUDA_CHECK(cudaMemcpyAsync(&counters_->ring, &counters_->vertices, sizeof(int),
                                     cudaMemcpyDeviceToDevice, stream_));
    }
    each(collect_kernel, slots_, table_, slots_, capacity_.vertices, keys_, places_, counters_);
  }
}

template <class Real>
void Crf<Real>::build(const Real* unary, const Real* features, int planes, const Real* weights,
                      const Real* compatibility) {
  const int64_t tiles = grid_.tiles(), entries = tiles * grid_.per_tile();
  shift_ = 64 - std::max(1, log2_above(int64_t(kernels()) * grid_.images - 1));
  counters_ = memory_.template get<Counters>(1);
  STD_CUDA_CHECK(cudaMemsetAsync(counters_, 0, sizeof(Counters), stream_));
  const bool wait = !capturing(stream_);
  const int64_t pixels = int64_t(grid_.height) * grid_.width;
  if (wait) {
    each(finite_kernel<Real>, grid_.images * pixels * classes_, unary,
         grid_.images * pixels * classes_, counters_);
    each(usable_kernel<Real>, kernels(), weights, kernels(), counters_);
    if (compatibility)
      each(usable_kernel<Real>, classes_ * classes_, compatibility, classes_ * classes_, counters_);
  }
  Memory scratch(like_);
  Key* const ranges = scratch.get<Key>(2 * planes);
  if (planes) {
    STD_CUDA_CHECK(cudaMemsetAsync(ranges, 0xFF, 2 * planes * sizeof(Key), stream_));
    PYSEG_LAUNCH(ranges_kernel<Real>,
                 dim3(std::min(64u, blocks_for(pixels, 256)), unsigned(planes)), 256, 0, stream_,
                 features, grid_.images, planes, pixels, ranges, counters_);
  }
  if (kernels()) {
    names_ = memory_.template get<VertexNames>(kernels());
    filters_ = memory_.template get<Filter<Real>>(kernels());
    factors_ = memory_.template get<Real>(kernels());
    entries_.weights = memory_.template get<Real>(entries);
    entries_.vertices = memory_.template get<int>(entries);
    entries_.lists = memory_.template get<uint16_t>(entries);
    entries_.unit_rows = memory_.template get<Span>(tiles * kernels());
  }
  for (double more = 1;; more *= 4) {
    Memory table(like_);
    if (kernels()) {
      capacity_ = bound(!wait, more);
      fill_table(features, planes, ranges, weights, table);
    }
    if (!wait) {
      PYSEG_LAUNCH(check_kernel, 1, 1, 0, stream_, counters_, capacity_);
    } else {
      Counters found;
      STD_CUDA_CHECK(
          cudaMemcpyAsync(&found, counters_, sizeof found, cudaMemcpyDeviceToHost, stream_));
      STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
      PYSEG_CHECK(!found.bad_features, "image or features hold NaN or infinity");
      PYSEG_CHECK(!found.bad_weights, kUnusable);
      PYSEG_CHECK(!found.bad_unary,
                  "unary holds NaN or infinity; it must be -log(probability): clamp the "
                  "probabilities, for example p.clamp_min(1e-6).log().neg()");
      PYSEG_CHECK(
          !found.bad_names,
          "a sigma is too small: the features span too many cells of the lattice to be told "
          "apart; use a larger sigma, scale that feature down, or pass fewer images at once");
      if (found.overflow || found.locals > capacity_.locals || found.rows > capacity_.rows ||
          found.vertices > capacity_.vertices) {
        const Capacity most = worst();
        if (capacity_.vertices == most.vertices && !found.overflow)
          throw std::invalid_argument("more than 2^30 lattice vertices: pass fewer images at once");
        continue;
      }
      capacity_ = {found.locals, found.rows, found.vertices};
    }
    if (kernels()) number(table);
    break;
  }
  if (kernels()) normalize();
}

// Numbers the vertices, links them, and finds the rows of each.
template <class Real>
void Crf<Real>::number(Memory& scratch) {
  const int64_t vertices = capacity_.vertices, locals = capacity_.locals, stride = 1 + vertices;
  int axes = 0;
  for (const Kernel& kernel : kernels_) axes = std::max(axes, kernel.axes);
  kernel_ends_ = memory_.template get<int>(kernels());
  kernel_of_ = memory_.template get<int>(stride);
  links_ = memory_.template get<int2>(axes * stride);
  spans_ = memory_.template get<Span>(locals);
  begin_ = memory_.template get<int>(stride);
  end_ = memory_.template get<int>(stride);
  uint64_t* const sorted = scratch.get<uint64_t>(vertices);
  unsigned* const places = scratch.get<unsigned>(vertices);
  sort_pairs(scratch, reinterpret_cast<const uint64_t*>(keys_), sorted, places_, places, vertices,
             stream_);
  const Key* const keys = reinterpret_cast<const Key*>(sorted);
  PYSEG_LAUNCH(ends_kernel, unsigned(kernels() + 31) / 32, 32, 0, stream_, keys, vertices,
               kernels(), grid_.images, shift_, kernel_ends_);
  each(rank_kernel, vertices, keys, places, vertices, shift_, grid_.images, table_, kernel_of_);
  for (int axis = 0; axis < axes; ++axis)
    STD_CUDA_CHECK(cudaMemsetAsync(links_ + axis * stride, 0, sizeof(int2), stream_));
  each(links_kernel, vertices, keys, kernel_of_, last(), shift_, table_, names_, stride, links_);

  const int unit_bits = log2_above(grid_.tiles() * kernels() - 1);
  int* const local_vertices = scratch.get<int>(locals);
  Key* const local_keys = scratch.get<Key>(locals);
  uint64_t* const sorted_keys = scratch.get<uint64_t>(locals);
  unsigned* const order = scratch.get<unsigned>(locals);
  unsigned* const sorted_order = scratch.get<unsigned>(locals);
  each(locals_kernel, locals, entries_.locals, locals, counters_, table_, unit_bits, local_vertices,
       local_keys, order);
  sort_pairs(scratch, reinterpret_cast<const uint64_t*>(local_keys), sorted_keys, order,
             sorted_order, locals, stream_, 0, std::min(64, log2_above(stride) + unit_bits));
  STD_CUDA_CHECK(cudaMemsetAsync(begin_, 0, stride * sizeof(int), stream_));
  STD_CUDA_CHECK(cudaMemsetAsync(end_, 0, stride * sizeof(int), stream_));
  each(spans_kernel, locals, reinterpret_cast<const Key*>(sorted_keys), sorted_order,
       entries_.locals, locals, unit_bits, spans_, begin_, end_);
  const int64_t entries = grid_.tiles() * grid_.per_tile();
  each(entries_kernel, entries, local_vertices, entries, entries_.vertices);
}

// Sums rows per vertex, into one buffer or the other; `blur` then leaves its result in `values`.
template <class Real>
template <class T, int N>
void Crf<Real>::combine(const Vector<T, N>* partial, int width, Vector<T, N>* values,
                        Vector<T, N>* spare) {
  const dim3 block(unsigned(width), unsigned(std::max(1, 256 / width)));
  PYSEG_LAUNCH((combine_kernel<T, N>), blocks_for(capacity_.vertices, int(block.y)), block, 0,
               stream_, partial, spans_, begin_, end_, last(), kernel_of_, filters_, width, values,
               spare);
}

template <class Real>
template <class T, int N>
void Crf<Real>::blur(int width, const T* factors, bool transposed, Vector<T, N>* values,
                     Vector<T, N>* spare) {
  const dim3 block(unsigned(width), unsigned(std::max(1, 256 / width)));
  int blurs = 0;
  for (const Kernel& kernel : kernels_) blurs = std::max(blurs, kernel.blur.passes * kernel.axes);
  for (int step = 0; step < launches(blurs); ++step)
    PYSEG_LAUNCH((blur_kernel<T, N>), blocks_for(capacity_.vertices, int(block.y)), block, 0,
                 stream_, values, spare, last(), links_, 1 + capacity_.vertices, kernel_of_,
                 filters_, factors, step, transposed, width);
}

template <class Real>
void Crf<Real>::mix(const Vec* in, const Real* compatibility, bool transposed, Vec* out) {
  each(mix_kernel<Real>, (1 + capacity_.vertices) * width_ * kVector,
       reinterpret_cast<const Real*>(in), compatibility, factors_, kernel_of_, last(), classes_,
       width_ * kVector, transposed, reinterpret_cast<Real*>(out));
}

template <class Real>
void Crf<Real>::normalize() {
  const Normalization how = settings_.normalization;
  splat_ = entries_.weights;
  const bool self_term = settings_.self_term;
  if (how == Normalization::none && self_term) return;
  Memory scratch(like_);
  const auto partial = scratch.get<Vector<Real, 1>>(capacity_.rows);
  const auto sums = scratch.get<Vector<Real, 1>>(1 + capacity_.vertices);
  const auto spare = scratch.get<Vector<Real, 1>>(1 + capacity_.vertices);
  STD_CUDA_CHECK(cudaMemsetAsync(sums, 0, sizeof *sums, stream_));
  STD_CUDA_CHECK(cudaMemsetAsync(spare, 0, sizeof *spare, stream_));
  PYSEG_LAUNCH(ones_kernel<Real>, unsigned(grid_.tiles()), 128, 0, stream_, grid_, entries_,
               partial);
  combine<Real, 1>(partial, 1, sums, spare);
  blur<Real, 1>(1, nullptr, false, sums, spare);
  if (how == Normalization::before || how == Normalization::after) {
    splat_ = memory_.template get<Real>(pixels() * grid_.entries);
    STD_CUDA_CHECK(cudaMemcpyAsync(splat_, entries_.weights,
                                   pixels() * grid_.entries * sizeof(Real),
                                   cudaMemcpyDeviceToDevice, stream_));
  }
  if (!self_term) self_ = memory_.template get<Real>(pixels() * kernels());
  for (int l = 0; l < kernels(); ++l)
    each(normalize_kernel<Real>, pixels(), grid_, kernels_[l].first_entry, kernels_[l].entries, l,
         pixels(), scale_of(l), how, SelfTerm<Real>(kernels_[l], scale_of(l)),
         reinterpret_cast<const Real*>(sums), entries_.vertices,
         how == Normalization::before ? splat_ : entries_.weights, self_);
  if (self_term) return;
  shares_ = memory_.template get<Real>(pixels());
  each(shares_kernel<Real>, pixels(), self_, factors_, pixels(), kernels(), shares_);
}

// Writes q or, with `history`, that instead.
template <class Real>
void Crf<Real>::infer(const Real* unary, const Real* compatibility, Real* q, History* history) {
  const int iterations = kernels() ? settings_.iterations : 0;
  Vec *partial = nullptr, *values = nullptr, *spare = nullptr, *before = nullptr;
  if (iterations) {
    partial = memory_.template get<Vec>(capacity_.rows * width_);
    if (!history) values = messages();
    if (!history && shares_) before = pixel_rows();
    spare = messages();
  }
  const auto kernel = shares_ ? pass_kernel<Real, true> : pass_kernel<Real, false>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const bool mixes = compatibility || history;
  const Vec* in = nullptr;
  for (int step = 0; step <= iterations; ++step) {
    const bool last = step == iterations;
    if (last && history) break;
    if (history && shares_) history->q.push_back(pixel_rows());
    Vec* const after = history && shares_ ? history->q.back() : before;
    Pass<Real> update = pass(unary, in, compatibility, before, after);
    update.q = last ? q : nullptr;
    update.partial = reinterpret_cast<Real*>(last ? nullptr : partial);
    PYSEG_LAUNCH(kernel, unsigned(grid_.tiles()), kPassThreads, pass_bytes(1), stream_, grid_,
                 update);
    if (last) break;
    before = after;
    if (history) history->sums.push_back(values = messages());
    combine<Real, kVector>(partial, width_, values, spare);
    blur<Real, kVector>(width_, mixes ? nullptr : factors_, false, values, spare);
    in = values;
    if (mixes) mix(values, compatibility, false, spare), in = spare;
  }
}

// Goes through the iterations once more, keeping their blurred sums, which are small next to q;
// then backwards, recomputing each q from them. Gradients other than unary's are added to.
template <class Real>
void Crf<Real>::backward(const Real* unary, const Real* compatibility, const Real* gradient,
                         Real* of_unary, Real* of_weights, Real* of_compatibility) {
  const int iterations = kernels() ? settings_.iterations : 0;
  const int cells = compatibility ? classes_ * classes_ : 1;
  const int blocks = std::clamp((1 << 20) / cells, 16, 128);
  History history;
  infer(unary, compatibility, nullptr, &history);
  Vec *partial = nullptr, *values = nullptr, *spare = nullptr, *mixed = nullptr;
  Vec* slopes = nullptr;  // of messages, per pixel
  double* products = nullptr;
  if (iterations) {
    partial = memory_.template get<Vec>(capacity_.rows * width_);
    values = messages(), spare = messages(), mixed = messages();
    if (shares_) slopes = pixel_rows();
    products = memory_.template get<double>(int64_t(kernels()) * blocks * cells);
    STD_CUDA_CHECK(cudaMemsetAsync(products, 0,
                                   int64_t(kernels()) * blocks * cells * sizeof(double), stream_));
  }
  const auto kernel = shares_ ? back_kernel<Real, true> : back_kernel<Real, false>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const Vec* in = nullptr;
  for (int step = iterations; step >= 0; --step) {
    const Vec* const sums = step > 0 ? history.sums[step - 1] : nullptr;
    const Vec* const q = step > 0 && shares_ ? history.q[step - 1] : nullptr;
    if (step > 0) mix(sums, compatibility, false, mixed);
    Pass<Real> update = pass(unary, step > 0 ? mixed : nullptr, compatibility, q, nullptr);
    update.partial = reinterpret_cast<Real*>(step > 0 ? partial : nullptr);
    const Back<Real> back{gradient, reinterpret_cast<const Real*>(in), of_unary,
                          reinterpret_cast<Real*>(slopes)};
    PYSEG_LAUNCH(kernel, unsigned(grid_.tiles()), kPassThreads, pass_bytes(2), stream_, grid_,
                 update, back);
    if (step == 0) break;
    combine<Real, kVector>(partial, width_, values, spare);
    const auto add_products = [&](auto which, const Vec* even, const Vec* odd, const Vec* with) {
      PYSEG_LAUNCH(which, dim3(unsigned(blocks), unsigned(kernels())), kPassThreads, 0, stream_,
                   reinterpret_cast<const Real*>(even), reinterpret_cast<const Real*>(odd),
                   reinterpret_cast<const Real*>(with), filters_, kernel_ends_, self_, pixels(),
                   classes_, width_ * kVector, compatibility != nullptr, products);
    };
    add_products(products_kernel<Real, false>, values, spare, sums);
    if (shares_) add_products(products_kernel<Real, true>, slopes, slopes, q);
    blur<Real, kVector>(width_, compatibility ? nullptr : factors_, true, values, spare);
    in = values;
    if (compatibility) mix(values, compatibility, true, spare), in = spare;
  }
  if (iterations == 0) return;
  for (int l = 0; l < kernels(); ++l)
    PYSEG_LAUNCH(weight_gradient_kernel<Real>, 1, kPassThreads, 0, stream_,
                 products + int64_t(l) * blocks * cells, compatibility, blocks, cells, scale_of(l),
                 of_weights + given_[l]);
  if (compatibility)
    PYSEG_LAUNCH(compatibility_gradient_kernel<Real>, unsigned((cells + 255) / 256), 256, 0,
                 stream_, products, factors_, kernels(), blocks, cells, of_compatibility);
}

// Calls run(crf, index of the first image), with lattices built, for as many images at once as 31
// bits number the entries of.
template <class Real, class Run>
void for_images(const Arguments& a, int buffers, cudaStream_t stream, Run run) {
  const int64_t images = a.unary.size(0), height = a.unary.size(2), width = a.unary.size(3);
  const int64_t plane = height * width, classes = a.unary.size(1), planes = a.features.size(1);
  const Crf<Real> one(a.settings, a.unary, 1, int(classes), height, width, buffers, stream);
  const int64_t entries = one.grid().tiles() * one.grid().per_tile();
  PYSEG_CHECK(entries < int64_t(1) << 31, "an image of ", height, " x ", width, " pixels with ",
              one.grid().entries, " lattice entries each exceeds 2^31 entries: split the image");
  const int64_t most = std::max<int64_t>(
      1, std::min<int64_t>(4096, ((int64_t(1) << 31) - 1) / std::max<int64_t>(1, entries)));
  for (int64_t first = 0; first < images; first += most) {
    Crf<Real> crf(a.settings, a.unary, std::min(most, images - first), int(classes), height, width,
                  buffers, stream);
    crf.build(a.unary.const_data_ptr<Real>() + first * classes * plane,
              a.features.const_data_ptr<Real>() + first * planes * plane, int(planes),
              a.weights.const_data_ptr<Real>(), data<Real>(a.compatibility));
    run(crf, first);
  }
}

template <class Real>
void infer(const Arguments& a, Tensor& q, cudaStream_t stream) {
  const int64_t image = a.unary.size(1) * a.unary.size(2) * a.unary.size(3);
  for_images<Real>(a, 1, stream, [&](Crf<Real>& crf, int64_t first) {
    crf.infer(a.unary.const_data_ptr<Real>() + first * image, data<Real>(a.compatibility),
              q.mutable_data_ptr<Real>() + first * image);
  });
}

template <class Real>
void backward(const Arguments& a, const Tensor& gradient, Tensor& unary, Tensor& weights,
              Tensor& compatibility, cudaStream_t stream) {
  const int64_t image = a.unary.size(1) * a.unary.size(2) * a.unary.size(3);
  for (Tensor* const tensor : {&weights, &compatibility})
    if (tensor->numel())
      STD_CUDA_CHECK(
          cudaMemsetAsync(tensor->mutable_data_ptr(), 0, tensor->numel() * sizeof(Real), stream));
  for_images<Real>(a, 2, stream, [&](Crf<Real>& crf, int64_t first) {
    crf.backward(a.unary.const_data_ptr<Real>() + first * image, data<Real>(a.compatibility),
                 gradient.const_data_ptr<Real>() + first * image,
                 unary.mutable_data_ptr<Real>() + first * image, weights.mutable_data_ptr<Real>(),
                 compatibility.mutable_data_ptr<Real>());
  });
}

Tensor dense_crf_cuda(const Tensor& unary, const Tensor& features, const Tensor& weights,
                      const std::optional<Tensor>& compatibility, std::vector<int64_t> sizes,
                      std::vector<int64_t> channels, std::vector<double> sigmas, int64_t iterations,
                      int64_t normalization, bool self_term, int64_t passes, double spread,
                      int64_t rings) {
  const DeviceScope device(unary);
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  Tensor q = torch::stable::new_empty(a.unary, a.unary.sizes());
  if (unary.scalar_type() == ScalarType::Float)
    infer<float>(a, q, device.stream);
  else
    infer<double>(a, q, device.stream);
  return q;
}

std::tuple<Tensor, Tensor, Tensor> dense_crf_backward_cuda(
    const Tensor& gradient, const Tensor& unary, const Tensor& features, const Tensor& weights,
    const std::optional<Tensor>& compatibility, std::vector<int64_t> sizes,
    std::vector<int64_t> channels, std::vector<double> sigmas, int64_t iterations,
    int64_t normalization, bool self_term, int64_t passes, double spread, int64_t rings) {
  const DeviceScope device(unary);
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  PYSEG_CHECK(shape(gradient) == shape(unary) && gradient.scalar_type() == unary.scalar_type(),
              "the gradient must be ", shape(unary), " of unary's dtype, got ", shape(gradient));
  const Tensor g = torch::stable::contiguous(gradient);
  const int64_t labels = compatibility ? unary.size(1) : 0;
  Tensor of_unary = torch::stable::new_empty(a.unary, a.unary.sizes());
  Tensor of_weights = torch::stable::new_empty(a.weights, a.weights.sizes());
  Tensor of_compatibility = torch::stable::new_empty(a.unary, {labels, labels});
  if (unary.scalar_type() == ScalarType::Float)
    backward<float>(a, g, of_unary, of_weights, of_compatibility, device.stream);
  else
    backward<double>(a, g, of_unary, of_weights, of_compatibility, device.stream);
  return {of_unary, of_weights, of_compatibility};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) {
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cuda));
  m.impl("_dense_crf_backward", TORCH_BOX(&dense_crf_backward_cuda));
}
