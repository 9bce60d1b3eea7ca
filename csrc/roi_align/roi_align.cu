// Pooling of regions of interest on CUDA: RoIAlign (average or maximum of samples) and RoIPool, all
// levels of a pyramid in one launch.
//
// Forward, a thread has a bin or two and four channels; averages have the positions of a bin's
// samples in shared memory, and read four channels at once where a level has them together.
// Backward, a block has a tile of a feature map: it collects, in order, the regions that reach it
// and gathers their gradients, so that nothing is added atomically and the result does not depend
// on the order of anything. A region that is NaN or of no image has the result NaN and no gradient.
#include "roi_align.h"

#include <algorithm>
#include <vector>

#include "../common/launch.h"
#include "../common/primitives.cuh"
#include "../common/transpose.cuh"

namespace {

using namespace pyseg;

constexpr int kThreads = 256;
constexpr int kChannels = 32;  // of a block
constexpr int kQuads = kChannels / 4;
constexpr int kBins = 64;    // of a block, forward
constexpr int kSamples = 4;  // whose positions along an axis a block has at a time
constexpr int kItems = kQuads * kBins / kThreads;  // of a thread: a bin and four channels
constexpr int kSide = 8;  // of a backward block's tile of pixels, which with kThreads makes:
constexpr int kOwn = kQuads * kSide * kSide / kThreads;  // pixels of a thread, with four channels
constexpr int kBinSide = 16;                             // bins looked at together, backward
constexpr int kMaxLevels = int(kMaxRoiLevels);
static_assert(2 * kSide * kBinSide == kThreads);

template <class Real>
struct Level {
  const void* data;
  int height, width;
  Real scale;
  int64_t image_stride, channel_stride, row_stride, column_stride;
  bool adjacent;  // four channels can be read at once
};

template <class Real>
struct Problem {
  Level<Real> levels[kMaxLevels];
  int exponents[kMaxLevels];
  int level_count, images, channels, bins_y, bins_x, sampling_ratio, canonical_level;
  int block_bins;  // of a block, forward: at most kBins
  int64_t regions;
  Real canonical_size;
  bool aligned;
};

// Which map a region is pooled from. False for one that is NaN or of no image.
template <class Real>
__device__ bool find_map(const Problem<Real>& p, const Real* box, int* level, int* image) {
  for (int i = 0; i < 5; ++i)
    if (box[i] != box[i]) return false;
  if (!(box[0] >= Real(0) && box[0] < Real(p.images)) || box[0] != std::floor(box[0])) return false;
  *image = int(box[0]);
  *level = box_level(box + 1, p.level_count, p.exponents, p.canonical_size, p.canonical_level);
  return true;
}

template <class Real>
__device__ Bins<Real> bins_along(const Problem<Real>& p, const Real* box, Real scale, int axis) {
  return sampled_bins(box[1 + axis], box[3 + axis], scale, p.aligned, p.sampling_ratio,
                      axis == 0 ? p.bins_x : p.bins_y);
}

// Which sample or pixel of a bin was the largest: its row and its column.
__device__ int64_t pack(int64_t row, int64_t column) { return (row << 32) | column; }

// What a sample lies on along an axis.
template <class Real>
struct Position {
  int pixel;  // the one before it; < 0: it does not count
  Real t;     // how far from that
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// Of bin (by, bx): what its samples at these positions sum to, in four channels.
template <bool kAdjacent, class T, class Real>
__device__ void add_samples(const Level<Real>& map, const T* data, int channels, int quad,
                            const Position<Real>* rows, const Position<Real>* columns,
                            int row_count, int column_count, Real (&sum)[4]) {
  const T* const first = data + (kAdjacent ? 4 * quad : quad * map.channel_stride);
  for (int r = 0; r < row_count; ++r) {
    const Position<Real> y = rows[r];
    if (y.pixel < 0) continue;
    const T* const row = first + y.pixel * map.row_stride;
    const int64_t down = y.t > Real(0) ? map.row_stride : 0;  // weight 0: the pixel itself
    for (int c = 0; c < column_count; ++c) {
      const Position<Real> x = columns[c];
      if (x.pixel < 0) continue;
      const T* const at = row + x.pixel * map.column_stride;
      const int64_t right = x.t > Real(0) ? map.column_stride : 0;
      const auto take = [&](int v, Real a, Real b, Real c, Real d) {
        const Real above = a + x.t * (b - a), below = c + x.t * (d - c);
        sum[v] += above + y.t * (below - above);
      };
      if constexpr (kAdjacent) {
        const auto load = [&](int64_t offset) {
          return *reinterpret_cast<const Four<T>*>(at + offset);
        };
        const Four<T> a = load(0), b = load(right), c = load(down), d = load(down + right);
        PYSEG_UNROLL
        for (int v = 0; v < 4; ++v) take(v, Real(a.v[v]), Real(b.v[v]), Real(c.v[v]), Real(d.v[v]));
      } else {
        PYSEG_UNROLL
        for (int v = 0; v < 4; ++v) {
          if (v * kQuads + quad >= channels) break;
          const T* const from = at + v * kQuads * map.channel_stride;
          take(v, Real(from[0]), Real(from[right]), Real(from[down]), Real(from[down + right]));
        }
      }
    }
  }
}

// Averages of samples. Grid: regions, channels, bins. out: [regions, channels, bins].
template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    average_kernel(Problem<Real> p, const Real* __restrict__ boxes, T* __restrict__ out) {
  __shared__ Real tile[kChannels][kBins + 1];
  __shared__ Position<Real> positions[2][kBins][kSamples];  // of rows, of columns
  __shared__ int longest[2];                                // samples of a bin that may count
  const int64_t region = blockIdx.x;
  const int first_channel = int(blockIdx.y) * kChannels;
  const int first_bin = int(blockIdx.z) * p.block_bins;
  const int bin_count = p.bins_y * p.bins_x, tid = int(threadIdx.x);
  const int bins = min(p.block_bins, bin_count - first_bin);
  const int channels = min(kChannels, p.channels - first_channel);
  const Real* const box = boxes + 5 * region;
  int level = 0, image = 0;
  const bool valid = find_map(p, box, &level, &image);
  const Level<Real> map = p.levels[level];
  const T* const data = static_cast<const T*>(map.data) + image * map.image_stride +
                        first_channel * map.channel_stride;
  // Neighbouring threads read neighbouring memory, whichever way the level lies.
  const auto quad_of = [&](int item) { return map.adjacent ? item % kQuads : item / bins; };
  const auto bin_of = [&](int item) { return map.adjacent ? item / kQuads : item % bins; };
  Real sums[kItems][4] = {};
  if (valid) {  // for the whole block
    const Bins<Real> axes[2] = {bins_along(p, box, map.scale, 1), bins_along(p, box, map.scale, 0)};
    const auto range = [&](int axis, int bin, int64_t* begin, int64_t* end) {
      const int b = first_bin + bin;
      sample_range(axes[axis], axis == 0 ? b / p.bins_x : b % p.bins_x, -1,
                   axis == 0 ? map.height : map.width, begin, end);
    };
    if (tid < 2) longest[tid] = 0;
    __syncthreads();
    if (tid < 2 * bins) {
      int64_t begin, end;
      range(tid % 2, tid / 2, &begin, &end);
      atomicMax(&longest[tid % 2], int(end > begin ? end - begin : 0));
    }
    __syncthreads();
    const int rows = longest[0], columns = longest[1];
    for (int row = 0; row < rows; row += kSamples) {
      for (int column = 0; column < columns; column += kSamples) {
        for (int i = tid; i < 2 * bins * kSamples; i += kThreads) {
          const int bin = i / (2 * kSamples), axis = i / kSamples % 2, k = i % kSamples;
          int64_t begin, end;
          range(axis, bin, &begin, &end);
          const int64_t sample = begin + (axis == 0 ? row : column) + k;
          const int b = first_bin + bin;
          Position<Real> position{-1, Real(0)};
          if (sample < end &&
              !locate(sample_position(axes[axis], axis == 0 ? b / p.bins_x : b % p.bins_x, sample),
                      axis == 0 ? map.height : map.width, &position.pixel, &position.t))
            position.pixel = -1;
          positions[axis][bin][k] = position;
        }
        __syncthreads();
        PYSEG_UNROLL
        for (int i = 0; i < kItems; ++i) {
          const int item = tid + i * kThreads;
          if (item >= kQuads * bins) break;
          const int quad = quad_of(item), bin = bin_of(item);
          const Position<Real>*const ys = positions[0][bin], *const xs = positions[1][bin];
          const int row_count = min(kSamples, rows - row);
          const int column_count = min(kSamples, columns - column);
          if (map.adjacent) {
            if (4 * quad < channels)
              add_samples<true>(map, data, channels, quad, ys, xs, row_count, column_count,
                                sums[i]);
          } else {
            add_samples<false>(map, data, channels, quad, ys, xs, row_count, column_count, sums[i]);
          }
        }
        __syncthreads();
      }
    }
    const int64_t count = axes[0].samples * axes[1].samples;
    for (auto& sum : sums)
      for (Real& value : sum) value /= Real(count > 1 ? count : 1);
  } else {
    for (auto& sum : sums)
      for (Real& value : sum) value = Real(NAN);
  }
  PYSEG_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const int item = tid + i * kThreads;
    if (item >= kQuads * bins) break;
    const int quad = quad_of(item), bin = bin_of(item);
    for (int v = 0; v < 4; ++v)
      tile[map.adjacent ? 4 * quad + v : v * kQuads + quad][bin] = sums[i][v];
  }
  __syncthreads();
  T* const target = out + (region * p.channels + first_channel) * bin_count + first_bin;
  for (int i = tid; i < channels * bins; i += kThreads)
    target[int64_t(i / bins) * bin_count + i % bins] = T(tile[i / bins][i % bins]);
}

// Maxima. Grid: regions, channels, bins. out: [regions, channels, bins] of T, or with kWithIndex of
// int64: which one it was.
template <class T, class Real, int Mode, bool kWithIndex>
__global__ void __launch_bounds__(kThreads)
    maximum_kernel(Problem<Real> p, const Real* __restrict__ boxes, void* __restrict__ out) {
  using Value = std::conditional_t<kWithIndex, int64_t, Real>;
  __shared__ Value tile[kChannels][kBins + 1];
  const int64_t region = blockIdx.x;
  const int first_channel = int(blockIdx.y) * kChannels, first_bin = int(blockIdx.z) * p.block_bins;
  const int bin_count = p.bins_y * p.bins_x;
  const int bins = min(p.block_bins, bin_count - first_bin);
  const int channels = min(kChannels, p.channels - first_channel);
  const Real* box = boxes + 5 * region;
  int level = 0, image = 0;
  const bool valid = find_map(p, box, &level, &image);
  const Level<Real> map = p.levels[level];
  const T* const data = static_cast<const T*>(map.data) + image * map.image_stride +
                        first_channel * map.channel_stride;
  Bins<Real> ys{}, xs{};
  if (valid && Mode != kMaximumOfPixels)
    ys = bins_along(p, box, map.scale, 1), xs = bins_along(p, box, map.scale, 0);
  for (int item = int(threadIdx.x); item < kQuads * bins; item += kThreads) {
    // Neighbouring threads read neighbouring memory, whichever way the tensor lies.
    const int quad = map.channel_stride == 1 ? item % kQuads : item / bins;
    const int bin = map.channel_stride == 1 ? item / kQuads : item % bins;
    const int by = (first_bin + bin) / p.bins_x, bx = (first_bin + bin) % p.bins_x;
    Real sum[4] = {};
    int64_t best[4] = {-1, -1, -1, -1};
    const auto take = [&](int v, Real value, int64_t row, int64_t column) {
      if (best[v] < 0 || value > sum[v] || value != value)
        sum[v] = value, best[v] = pack(row, column);
    };
    if (!valid) {
      for (int v = 0; v < 4; ++v) sum[v] = Real(NAN);
    } else if (Mode == kMaximumOfPixels) {
      int top, bottom, left, right;
      pixel_range(box[2], box[4], map.scale, p.bins_y, by, map.height, &top, &bottom);
      pixel_range(box[1], box[3], map.scale, p.bins_x, bx, map.width, &left, &right);
      for (int y = top; y < bottom; ++y)
        for (int x = left; x < right; ++x)
          for (int v = 0; v < 4; ++v) {
            const int channel = v * kQuads + quad;
            if (channel < channels)
              take(v,
                   Real(data[channel * map.channel_stride + y * map.row_stride +
                             x * map.column_stride]),
                   y, x);
          }
    } else {
      int64_t row, row_end, column_begin, column_end;
      sample_range(ys, by, -1, map.height, &row, &row_end);
      sample_range(xs, bx, -1, map.width, &column_begin, &column_end);
      for (; row < row_end; ++row) {
        int y, x;
        Real ty, tx;
        if (!locate(sample_position(ys, by, row), map.height, &y, &ty)) continue;
        for (int64_t column = column_begin; column < column_end; ++column) {
          if (!locate(sample_position(xs, bx, column), map.width, &x, &tx)) continue;
          const T* const at = data + y * map.row_stride + x * map.column_stride;
          const int64_t down = ty > Real(0) ? map.row_stride : 0;  // weight 0: the pixel itself
          const int64_t right = tx > Real(0) ? map.column_stride : 0;
          for (int v = 0; v < 4; ++v) {
            const int channel = v * kQuads + quad;
            if (channel >= channels) continue;
            const T* const from = at + channel * map.channel_stride;
            const Real a = Real(from[0]), b = Real(from[right]);
            const Real c = Real(from[down]), d = Real(from[down + right]);
            const Real above = a + tx * (b - a), below = c + tx * (d - c);
            take(v, above + ty * (below - above), row, column);
          }
        }
      }
    }
    for (int v = 0; v < 4; ++v) {
      if constexpr (kWithIndex)
        tile[v * kQuads + quad][bin] = best[v];
      else
        tile[v * kQuads + quad][bin] = sum[v];
    }
  }
  __syncthreads();
  using Out = std::conditional_t<kWithIndex, int64_t, T>;
  Out* const target =
      static_cast<Out*>(out) + (region * p.channels + first_channel) * bin_count + first_bin;
  for (int i = int(threadIdx.x); i < channels * bins; i += kThreads)
    target[int64_t(i / bins) * bin_count + i % bins] = Out(tile[i / bins][i % bins]);
}

// What a sample weighs at a pixel of an axis.
template <class Real>
__device__ Real sample_weight(const Bins<Real>& bins, int64_t bin, int64_t sample, int size,
                              int pixel) {
  int low;
  Real t;
  if (!locate(sample_position(bins, bin, sample), size, &low, &t)) return Real(0);
  return low == pixel ? Real(1) - t : low + 1 == pixel ? t : Real(0);
}

// What a bin's samples weigh there together.
template <class Real>
__device__ Real bin_weight(const Bins<Real>& bins, int64_t bin, int size, int pixel) {
  int64_t sample, end;
  // At the border pixels' positions outside the map count as well.
  sample_range(bins, bin, pixel - 1, pixel + 1 < size ? pixel + 1 : size, &sample, &end);
  Real sum = 0;
  for (; sample < end; ++sample) sum += sample_weight(bins, bin, sample, size, pixel);
  return sum / Real(bins.samples > 1 ? bins.samples : 1);
}

// Grid: tiles of all images, channels. Of one level.
template <class T, class Real, int Mode>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Problem<Real> p, const Real* __restrict__ boxes, int level,
                  const T* __restrict__ gradient,       // [regions, bins, channels]
                  const int64_t* __restrict__ largest,  // [regions, channels, bins], for maxima
                  T* __restrict__ out) {                // [images, channels, height, width]
  using Scan = BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int listed[kThreads];
  // Of rows, of columns; the one half is filled while the other is still read.
  __shared__ Real weights[2][2][kSide][kBinSide];
  __shared__ unsigned bin_masks[2][2][kSide];  // of the weights that are not 0
  __shared__ Real gathered[kChannels][kSide * kSide + 1];
  const int tid = int(threadIdx.x), lane = tid % 32;
  const int height = p.levels[level].height, width = p.levels[level].width;
  const Real scale = p.levels[level].scale;
  const int tiles_x = (width + kSide - 1) / kSide, tiles_y = (height + kSide - 1) / kSide;
  const int tile = int(blockIdx.x) % (tiles_x * tiles_y);
  const int image = int(blockIdx.x) / (tiles_x * tiles_y);
  const int first_y = tile / tiles_x * kSide, first_x = tile % tiles_x * kSide;
  // This thread's channels, and its pixels within the tile, which lie under each other.
  const int quad = tid % kQuads, x = tid / kQuads % kSide, first_row = tid / kQuads / kSide * kOwn;
  const int block_channel = int(blockIdx.y) * kChannels, first_channel = block_channel + 4 * quad;
  const int bin_count = p.bins_y * p.bins_x;
  const bool vectors = p.channels % 4 == 0;
  Real sums[kOwn][4] = {};
  int half = 0;
  for (int64_t base = 0; base < p.regions; base += kThreads) {
    int reaches = 0;
    if (base + tid < p.regions) {
      const Real* box = boxes + 5 * (base + tid);
      int its_level, its_image;
      if (find_map(p, box, &its_level, &its_image) && its_level == level && its_image == image) {
        // Inverted and tiny boxes, rounding and neighbours of samples: three pixels are enough.
        const Real x0 = cut(box[1] * scale), x1 = cut(box[3] * scale);
        const Real y0 = cut(box[2] * scale), y1 = cut(box[4] * scale);
        // Samples up to a pixel outside the map count for the pixel on its border.
        const bool on_x = (x0 < x1 ? x1 : x0) + Real(3) >= Real(first_x) &&
                          (x0 < x1 ? x0 : x1) - Real(3) <= Real(first_x + kSide);
        const bool on_y = (y0 < y1 ? y1 : y0) + Real(3) >= Real(first_y) &&
                          (y0 < y1 ? y0 : y1) - Real(3) <= Real(first_y + kSide);
        reaches = on_x && on_y ? 1 : 0;
      }
    }
    int place, count;
    Scan(scan_storage).ExclusiveSum(reaches, place, count);
    if (reaches) listed[place] = tid;
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const int64_t region = base + listed[i];
      const Real* box = boxes + 5 * region;
      Bins<Real> ys{}, xs{};
      if (Mode != kMaximumOfPixels)
        ys = bins_along(p, box, scale, 1), xs = bins_along(p, box, scale, 0);
      for (int by0 = 0; by0 < p.bins_y; by0 += kBinSide) {
        for (int bx0 = 0; bx0 < p.bins_x; bx0 += kBinSide) {
          {
            const int axis = tid / (kSide * kBinSide), at = tid / kBinSide % kSide;
            const int b = tid % kBinSide, bin = (axis == 0 ? by0 : bx0) + b;
            const int bins = axis == 0 ? p.bins_y : p.bins_x, size = axis == 0 ? height : width;
            const int pixel = (axis == 0 ? first_y : first_x) + at;
            Real weight = 0;
            if (bin < bins && pixel < size) {
              if (Mode == kMaximumOfPixels) {
                int begin, end;
                pixel_range(box[axis == 0 ? 2 : 1], box[axis == 0 ? 4 : 3], scale, bins, bin, size,
                            &begin, &end);
                weight = pixel >= begin && pixel < end ? Real(1) : Real(0);
              } else {
                weight = bin_weight(axis == 0 ? ys : xs, bin, size, pixel);
              }
            }
            weights[half][axis][at][b] = weight;
            const unsigned mask = __ballot_sync(0xffffffffu, weight != Real(0));
            if (lane % kBinSide == 0)
              bin_masks[half][axis][at] = (mask >> (lane / kBinSide * kBinSide)) & 0xffffu;
          }
          __syncthreads();
          PYSEG_UNROLL
          for (int own = 0; own < kOwn; ++own) {
            const int y = first_row + own;
            if (first_channel >= p.channels) break;
            for (unsigned rows = bin_masks[half][0][y]; rows; rows &= rows - 1) {
              const int r = __ffs(int(rows)) - 1;
              for (unsigned columns = bin_masks[half][1][x]; columns; columns &= columns - 1) {
                const int c = __ffs(int(columns)) - 1;
                const int bin = (by0 + r) * p.bins_x + bx0 + c;
                const Real weight = weights[half][0][y][r] * weights[half][1][x][c];
                const T* const from =
                    gradient + (region * bin_count + bin) * p.channels + first_channel;
                if constexpr (Mode == kAverageOfSamples) {
                  Four<T> four{};
                  if (vectors) {
                    four = *reinterpret_cast<const Four<T>*>(from);
                  } else {
                    PYSEG_UNROLL
                    for (int v = 0; v < 4; ++v)
                      if (first_channel + v < p.channels) four.v[v] = from[v];
                  }
                  PYSEG_UNROLL
                  for (int v = 0; v < 4; ++v) sums[own][v] += weight * Real(four.v[v]);
                } else {
                  PYSEG_UNROLL
                  for (int v = 0; v < 4; ++v) {
                    if (first_channel + v >= p.channels) break;
                    const int64_t best =
                        largest[(region * p.channels + first_channel + v) * bin_count + bin];
                    if (best < 0) continue;
                    const int64_t row = best >> 32, column = best & 0xffffffff;
                    Real share;
                    if constexpr (Mode == kMaximumOfPixels)
                      share = row == first_y + y && column == first_x + x ? Real(1) : Real(0);
                    else
                      share = sample_weight(ys, by0 + r, row, height, first_y + y) *
                              sample_weight(xs, bx0 + c, column, width, first_x + x);
                    if (share != Real(0)) sums[own][v] += share * Real(from[v]);
                  }
                }
              }
            }
          }
          half ^= 1;
        }
      }
    }
    __syncthreads();  // before `listed` and the scan's storage are used again
  }
  PYSEG_UNROLL
  for (int own = 0; own < kOwn; ++own)
    for (int v = 0; v < 4; ++v)
      gathered[4 * quad + v][(first_row + own) * kSide + x] = sums[own][v];
  __syncthreads();
  for (int i = tid; i < kChannels * kSide * kSide; i += kThreads) {
    const int channel = block_channel + i / (kSide * kSide);
    const int pixel = i % (kSide * kSide), py = first_y + pixel / kSide,
              px = first_x + pixel % kSide;
    if (channel < p.channels && py < height && px < width)
      out[((int64_t(image) * p.channels + channel) * height + py) * width + px] =
          T(gathered[i / (kSide * kSide)][pixel]);
  }
}

template <class T, class Real>
Problem<Real> make_problem(const std::vector<Tensor>& levels, const Tensor& boxes,
                           const std::vector<double>& scales,
                           const std::vector<int64_t>& output_size, int64_t sampling_ratio,
                           bool aligned, double canonical_size, int64_t canonical_level) {
  constexpr uintptr_t alignment = sizeof(Four<T>);
  Problem<Real> p{};
  p.level_count = int(levels.size());
  for (size_t l = 0; l < levels.size(); ++l) {
    const Tensor& level = levels[l];
    p.levels[l] = {level.const_data_ptr(), int(level.size(2)), int(level.size(3)), Real(scales[l]),
                   level.stride(0),        level.stride(1),    level.stride(2),    level.stride(3)};
    const int64_t image_stride = level.size(0) > 1 ? level.stride(0) : 0;
    p.levels[l].adjacent = level.stride(1) == 1 && level.size(1) % 4 == 0 &&
                           image_stride % 4 == 0 && level.stride(2) % 4 == 0 &&
                           level.stride(3) % 4 == 0 &&
                           reinterpret_cast<uintptr_t>(level.const_data_ptr()) % alignment == 0;
    p.exponents[l] = int(std::lround(-std::log2(scales[l])));
  }
  p.images = int(levels[0].size(0)), p.channels = int(levels[0].size(1));
  p.bins_y = int(output_size[0]), p.bins_x = int(output_size[1]);
  p.sampling_ratio = int(sampling_ratio), p.aligned = aligned, p.regions = boxes.size(0);
  const int bins = p.bins_y * p.bins_x, blocks = (bins + kBins - 1) / kBins;
  p.block_bins = (bins + blocks - 1) / blocks;  // about as many in each
  p.canonical_size = Real(canonical_size), p.canonical_level = int(canonical_level);
  return p;
}

// Levels whose pixels do not have their channels together are copied so that they have, where so
// many samples are read that 32 bytes for each number of one are more than that.
template <class T, class Real>
std::vector<Tensor> lay_out(Problem<Real>& p, const std::vector<Tensor>& levels,
                            cudaStream_t stream) {
  std::vector<Tensor> copies;
  int64_t pixels = 0;
  for (const Tensor& level : levels) pixels += level.size(0) * level.size(2) * level.size(3);
  const int64_t samples = p.sampling_ratio > 0 ? int64_t(p.sampling_ratio) * p.sampling_ratio : 4;
  const bool worth = double(p.regions) * p.bins_y * p.bins_x * 4 * double(samples) > pixels / 2;
  for (size_t l = 0; worth && p.channels % 4 == 0 && l < levels.size(); ++l) {
    Level<Real>& level = p.levels[l];
    if (level.adjacent) continue;
    const Tensor packed = torch::stable::contiguous(levels[l]);
    const int64_t plane = int64_t(level.height) * level.width;
    copies.push_back(torch::stable::new_empty(packed, {packed.numel()}));
    T* const data = static_cast<T*>(copies.back().mutable_data_ptr());
    transpose(static_cast<const T*>(packed.const_data_ptr()), packed.size(0), p.channels, plane, 0,
              1, data, stream);
    level.data = data, level.adjacent = true;
    level.image_stride = p.channels * plane, level.channel_stride = 1;
    level.row_stride = int64_t(p.channels) * level.width, level.column_stride = p.channels;
  }
  return copies;
}

template <class T, class Real, int Mode, bool kWithIndex>
void launch_pool(const Problem<Real>& p, const Tensor& boxes, void* out, cudaStream_t stream) {
  if (p.regions == 0) return;
  const int channel_blocks = (p.channels + kChannels - 1) / kChannels;
  const int bin_blocks = (p.bins_y * p.bins_x + p.block_bins - 1) / p.block_bins;
  PYSEG_CHECK(p.regions < int64_t(1) << 31 && channel_blocks < 65536 && bin_blocks < 65536,
              "boxes, channels or output_size are too many for one launch: ", p.regions, ", ",
              p.channels, " and ", p.bins_y, " x ", p.bins_x);
  const dim3 grid(unsigned(p.regions), unsigned(channel_blocks), unsigned(bin_blocks));
  const Real* const regions = static_cast<const Real*>(boxes.const_data_ptr());
  if constexpr (Mode == kAverageOfSamples)
    PYSEG_LAUNCH((average_kernel<T, Real>), grid, kThreads, 0, stream, p, regions,
                 static_cast<T*>(out));
  else
    PYSEG_LAUNCH((maximum_kernel<T, Real, Mode, kWithIndex>), grid, kThreads, 0, stream, p, regions,
                 out);
}

template <class Run>
void dispatch(ScalarType type, int64_t mode, Run run) {
  const auto with_mode = [&]<class T, class Real>(T, Real) {
    if (mode == kAverageOfSamples)
      run.template operator()<T, Real, kAverageOfSamples>();
    else if (mode == kMaximumOfSamples)
      run.template operator()<T, Real, kMaximumOfSamples>();
    else
      run.template operator()<T, Real, kMaximumOfPixels>();
  };
  switch (type) {
    case ScalarType::Float: with_mode(float(), float()); break;
    case ScalarType::Double: with_mode(double(), double()); break;
    case ScalarType::Half: with_mode(torch::headeronly::Half(), float()); break;
    case ScalarType::BFloat16: with_mode(torch::headeronly::BFloat16(), float()); break;
    default: throw std::invalid_argument("levels must be float16, bfloat16, float32 or float64");
  }
}

Tensor roi_align_cuda(const std::vector<Tensor>& levels, const Tensor& boxes,
                      const std::vector<double>& scales, const std::vector<int64_t>& output_size,
                      int64_t sampling_ratio, bool aligned, int64_t mode, double canonical_size,
                      int64_t canonical_level) {
  const pyseg::DeviceScope device(boxes, levels);
  check_levels(levels);
  Tensor out;
  dispatch(levels[0].scalar_type(), mode, [&]<class T, class Real, int Mode>() {
    check_regions<Real>(levels, boxes, scales, output_size, sampling_ratio, mode, canonical_size,
                        canonical_level);
    out = torch::stable::new_empty(
        levels[0], {boxes.size(0), levels[0].size(1), output_size[0], output_size[1]});
    const Tensor regions = torch::stable::contiguous(boxes);
    auto p = make_problem<T, Real>(levels, regions, scales, output_size, sampling_ratio, aligned,
                                   canonical_size, canonical_level);
    std::vector<Tensor> copies;
    if constexpr (Mode == kAverageOfSamples) copies = lay_out<T>(p, levels, device.stream);
    launch_pool<T, Real, Mode, false>(p, regions, out.mutable_data_ptr(), device.stream);
  });
  return out;
}

std::vector<Tensor> roi_align_backward_cuda(const Tensor& gradient,
                                            const std::vector<Tensor>& levels, const Tensor& boxes,
                                            const std::vector<double>& scales,
                                            const std::vector<int64_t>& output_size,
                                            int64_t sampling_ratio, bool aligned, int64_t mode,
                                            double canonical_size, int64_t canonical_level) {
  const pyseg::DeviceScope device(boxes, gradient, levels);
  check_levels(levels);
  std::vector<Tensor> results;
  dispatch(levels[0].scalar_type(), mode, [&]<class T, class Real, int Mode>() {
    check_regions<Real>(levels, boxes, scales, output_size, sampling_ratio, mode, canonical_size,
                        canonical_level);
    check_region_gradient(gradient, levels, boxes, output_size);
    const Tensor regions = torch::stable::contiguous(boxes);
    const Tensor g = torch::stable::contiguous(gradient);
    Tensor by_bin = torch::stable::new_empty(g, {g.numel()});
    transpose(static_cast<const T*>(g.const_data_ptr()), g.size(0), g.size(1),
              g.size(2) * g.size(3), 0, 1, static_cast<T*>(by_bin.mutable_data_ptr()),
              device.stream);
    const auto p = make_problem<T, Real>(levels, regions, scales, output_size, sampling_ratio,
                                         aligned, canonical_size, canonical_level);
    Tensor largest =
        torch::stable::new_empty(g, {Mode == kAverageOfSamples ? 0 : g.numel()}, ScalarType::Long);
    if constexpr (Mode != kAverageOfSamples)
      launch_pool<T, Real, Mode, true>(p, regions, largest.mutable_data_ptr(), device.stream);
    for (size_t l = 0; l < levels.size(); ++l) {
      Tensor result = torch::stable::new_empty(levels[l], levels[l].sizes());
      results.push_back(result);
      if (result.numel() == 0) continue;
      const int64_t tiles = int64_t((p.levels[l].height + kSide - 1) / kSide) *
                            ((p.levels[l].width + kSide - 1) / kSide);
      const int64_t channel_blocks = (p.channels + kChannels - 1) / kChannels;
      PYSEG_CHECK(tiles * p.images < int64_t(1) << 31 && channel_blocks < 65536,
                  "levels are too large for one launch: ", shape(levels[l]));
      const dim3 grid(unsigned(tiles * p.images), unsigned(channel_blocks));
      PYSEG_LAUNCH((gather_kernel<T, Real, Mode>), grid, kThreads, 0, device.stream, p,
                   static_cast<const Real*>(regions.const_data_ptr()), int(l),
                   static_cast<const T*>(by_bin.const_data_ptr()),
                   static_cast<const int64_t*>(largest.const_data_ptr()),
                   static_cast<T*>(result.mutable_data_ptr()));
    }
  });
  return results;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) {
  m.impl("roi_align", TORCH_BOX(&roi_align_cuda));
  m.impl("_roi_align_backward", TORCH_BOX(&roi_align_backward_cuda));
}
