// How vertices of a kernel's lattice are named, shared by the CPU and the CUDA kernel; and where a
// point lies in it, which the CPU writes in vectors (`find_simplices` in dense_crf_simd.cpp), to
// the same bits.
//
// The lattice and the barycentric weights are those of Adams, Baek & Davis, "Fast high-dimensional
// filtering using the permutohedral lattice" (2010). A vertex has d + 1 integer coordinates that
// sum to 0 and are all equal modulo d + 1. So a vertex is named by that remainder and by the
// quotients of its first d coordinates, and the names pack into 64 bits even for 8 features.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/host_device.h"

namespace pyseg {

constexpr int kMaxClasses = 256;
constexpr int kMaxFeatures = 8;

// How names of vertices pack into 64 bits: the remainder lowest, then the quotients.
struct VertexNames {
  int features;                     // 0 for a grid
  int axes;                         // along which it is blurred
  int low[kMaxFeatures];            // smallest quotient, including room for neighbours
  uint64_t unit[kMaxFeatures + 1];  // one step of a quotient; 0 for the coordinate left out
  uint64_t all;                     // one step of every quotient
  uint64_t remainder;               // mask of the remainder
  int bits;                         // of a name

  // The neighbour one step along `axis` (0 .. d), where that coordinate falls by d.
  PYSEG_HOST_DEVICE uint64_t after(uint64_t name, int axis) const {
    const uint64_t d = uint64_t(features);
    return name + ((name & remainder) < d ? 1 : all - d) - unit[axis];
  }
  PYSEG_HOST_DEVICE uint64_t before(uint64_t name, int axis) const {
    const uint64_t d = uint64_t(features);
    return name - ((name & remainder) > 0 ? 1 : all - d) + unit[axis];
  }
};

// Round to nearest; vectorises everywhere, for magnitudes below 2^22 (float) or 2^51 (double).
PYSEG_HOST_DEVICE float round_small(float x) { return (x + 12582912.0f) - 12582912.0f; }
PYSEG_HOST_DEVICE double round_small(double x) {
  return (x + 6755399441055744.0) - 6755399441055744.0;
}

// Of a point's simplex: barycentric weights, the quotients of vertex 0 and the order in which
// coordinates fall by d + 1 on the way to the other vertices: first the one of the highest rank.
//
// Feature i must come multiplied by the square root of the lattice's variance and divided by
// sigma * sqrt((i + 1) (i + 2)): see `feature_scale`. Nothing branches.
template <int D, class T>
PYSEG_HOST_DEVICE void find_simplex(const T (&feature)[D], T (&weight)[D + 1], int32_t (&first)[D],
                                    int (&rank)[D + 1]) {
  T offset[D + 1];  // position in the hyperplane, in units of d + 1; then less its rounding
  T sum = 0;
  PYSEG_UNROLL
  for (int i = D; i > 0; --i) {
    offset[i] = sum - product(T(i), feature[i - 1]);
    sum += feature[i - 1];
  }
  offset[0] = sum;
  T quotient[D + 1];
  T excess = 0;
  PYSEG_UNROLL
  for (int i = 0; i <= D; ++i) {
    quotient[i] = round_small(offset[i]);
    offset[i] -= quotient[i];
    excess += quotient[i];
  }
  PYSEG_UNROLL
  for (int i = 0; i <= D; ++i) rank[i] = int(excess);
  PYSEG_UNROLL
  for (int i = 0; i < D; ++i) {
    PYSEG_UNROLL
    for (int j = i + 1; j <= D; ++j) {
      const int less = offset[i] < offset[j];
      rank[i] += less;
      rank[j] += 1 - less;
    }
  }
  PYSEG_UNROLL
  for (int i = 0; i <= D; ++i) {  // back to a vertex whose coordinates sum to 0
    const int step = int(rank[i] < 0) - int(rank[i] > D);
    rank[i] += step * (D + 1);
    quotient[i] += T(step);
    offset[i] -= T(step);
    if (i < D) first[i] = int32_t(quotient[i]);
  }
  T sorted[D + 1];
  PYSEG_UNROLL
  for (int r = 0; r <= D; ++r) {
    sorted[r] = 0;
    PYSEG_UNROLL
    for (int i = 0; i <= D; ++i) sorted[r] += T(int(rank[i] == r)) * offset[i];
  }
  weight[0] = T(1) + sorted[D] - sorted[0];
  PYSEG_UNROLL
  for (int k = 1; k <= D; ++k) weight[k] = sorted[D - k] - sorted[D + 1 - k];
}

template <int D>
PYSEG_HOST_DEVICE void name_simplex(const int32_t (&first)[D], const int (&rank)[D + 1],
                                    const VertexNames& names, uint64_t (&name)[D + 1]) {
  uint64_t unit[D];
  name[0] = 0;
  PYSEG_UNROLL
  for (int i = 0; i < D; ++i) {
    unit[i] = names.unit[i];
    name[0] += uint64_t(first[i] - names.low[i]) * unit[i];
  }
  PYSEG_UNROLL
  for (int k = 1; k <= D; ++k) {
    uint64_t step = 0;
    PYSEG_UNROLL
    for (int i = 0; i < D; ++i) step += (uint64_t(0) - uint64_t(rank[i] == D + 1 - k)) & unit[i];
    name[k] = name[k - 1] - step + 1;
  }
}

template <int D, class T>
PYSEG_HOST_DEVICE void locate(const T (&feature)[D], const VertexNames& names, T (&weight)[D + 1],
                              uint64_t (&name)[D + 1]) {
  int32_t first[D];
  int rank[D + 1];
  find_simplex<D, T>(feature, weight, first, rank);
  name_simplex<D>(first, rank, names, name);
}

// How a lattice is blurred: `passes` times along each axis, by (spread, 1 - 2 spread, spread).
// Adams et al. take one pass of spread 1/4. Smaller spreads bring the fourth moment closer to that
// of a Gaussian, more passes make the lattice finer.
struct Blur {
  int passes;
  double spread;
  int rings;  // of empty vertices around the occupied ones, which pass on what is blurred into them

  // Per feature, in units of the lattice's (d + 1)^2; 1/6 is due to splatting and slicing.
  double variance() const { return 2 * spread * passes + 1.0 / 6; }
};

// Makes the standard deviation of all together one sigma.
inline double feature_scale(int i, double sigma, const Blur& blur) {
  return std::sqrt(blur.variance() / ((i + 1.0) * (i + 2.0))) / sigma;
}

// Packs the names of a kernel's vertices, given the smallest and largest value of each feature,
// multiplied by `feature_scale`, and how many bits there are. False: a range is too large.
PYSEG_HOST_DEVICE bool name_vertices(int features, const double* low, const double* high, int rings,
                                     int available, VertexNames& names) {
  names.features = features, names.axes = features + 1;
  names.all = 0;
  int bits = 0;
  while ((1 << bits) < features + 1) ++bits;
  names.remainder = (uint64_t(1) << bits) - 1;
  bool fits = true;
  for (int axis = 0; axis <= features; ++axis) names.unit[axis] = 0;
  for (int axis = 0; axis < features; ++axis) {  // the same sums as in `locate`
    double least = axis ? -axis * high[axis - 1] : 0, most = axis ? -axis * low[axis - 1] : 0;
    for (int i = axis; i < features; ++i) least += low[i], most += high[i];
    const double margin = 2 + rings, range = most - least + 2 * margin + 2;
    names.low[axis] = least > -1e9 && least < 1e9 ? int(std::floor(least - margin)) : 0;
    if (bits < 64) names.unit[axis] = uint64_t(1) << bits;
    names.all += names.unit[axis];
    int needed = 1;
    while (needed < 64 && double(uint64_t(1) << needed) < range) ++needed;
    bits += needed;
    fits = fits && bits < available && least > -4e6 && most < 4e6;  // NaN does not fit
  }
  names.bits = bits;
  return fits;
}

// Along which the n-th blur is. On a grid no mass then comes back through a vertex that lies beyond
// the image along both axes, so none of those is needed.
PYSEG_HOST_DEVICE int axis_of(int blur_number, bool grid, int axes, int passes) {
  return grid ? blur_number / passes : blur_number % axes;
}

// One kernel: a Gaussian of `features` channels. Channel -2 is x, -1 is y (pixels), others are
// planes of the features tensor. Where there is no other than x and y, pixels fill their lattice
// without gaps, and a regular grid with linear interpolation is as accurate and has fewer vertices.
struct Kernel {
  int features;
  int axes, entries;  // of blurs; of a pixel
  int first_entry;    // of a pixel's entries, where this kernel's begin
  int channels[kMaxFeatures];
  double sigmas[kMaxFeatures];
  Blur blur;
  bool grid;
  int cell[2];  // pixels from one vertex of the grid to the next, of channels[0] and channels[1]
  double spread[2];

  PYSEG_HOST_DEVICE double spread_along(int axis) const {
    return grid ? spread[axis] : blur.spread;
  }
  PYSEG_HOST_DEVICE double side(int axis) const {
    return spread_along(axis) / (1 - 2 * spread_along(axis));
  }
  PYSEG_HOST_DEVICE int axis_of(int blur_number) const {
    return pyseg::axis_of(blur_number, grid, axes, blur.passes);
  }
  // of vertices beyond the image, through which mass passes from one of its vertices to another
  PYSEG_HOST_DEVICE int margin() const { return blur.passes - 1; }
};

// Of exp(-k^2 / 2 sigma^2) over all whole k. From sigma = 1 on the variance is sigma^2.
struct Sampled {
  double sum, variance;
};
inline Sampled sampled(double sigma) {
  if (sigma >= 4) return {std::sqrt(2 * M_PI) * sigma, sigma * sigma};
  double sum = 1, squares = 0;
  for (int k = 1; k < 40; ++k) {
    const double value = 2 * std::exp(-0.5 * k * k / (sigma * sigma));
    sum += value, squares += k * k * value;
  }
  return {sum, squares / sum};
}

// Of positions, in pixels: no lattice passes anything on over more than 11 sigmas, and neighbours
// are 16 apart. So any smaller sigma has the same result, without coordinates that overflow.
constexpr double kLeastSigma = 1.0 / 16;

// Chooses the lattice of a kernel whose channels and sigmas are set. A grid's row sums are products
// of those along its axes; without the self terms, `self_term` false, they are not.
inline void choose_lattice(Kernel& kernel, const Blur& quality, bool self_term, int64_t height,
                           int64_t width) {
  kernel.blur = quality;
  kernel.axes = kernel.entries = kernel.features + 1;
  const int* const channel = kernel.channels;
  kernel.grid = self_term && quality.rings > 0 && kernel.features == 2 && channel[0] < 0 &&
                channel[1] < 0 && channel[0] != channel[1];
  if (!kernel.grid) return;
  // Interpolating between vertices h pixels apart when splatting and when slicing has a variance
  // of (h^2 - 1) / 3; blurs have the rest. More than 1/5 outside would be far from a Gaussian.
  const double finer = quality.passes == 1 ? 1.0 : 0.75;
  double rest[2];
  int passes = 1;
  for (int i = 0; i < 2; ++i) {
    const double sigma = kernel.sigmas[i], h = std::fmax(1, std::floor(finer * sigma));
    // How the filter varies within a cell does not average out over few cells.
    if (4 * h > double(channel[i] == -2 ? width : height)) {
      kernel.grid = false;
      return;
    }
    kernel.cell[i] = int(h);
    rest[i] = (sampled(sigma).variance - (h * h - 1) / 3) / (2 * h * h);
    passes = int(std::fmax(passes, std::ceil(rest[i] / 0.2)));
  }
  for (int i = 0; i < 2; ++i) kernel.spread[i] = rest[i] / passes;
  kernel.blur = {passes, 0, passes - 1};
  kernel.axes = 2, kernel.entries = 4;
}

// Packs the names of a grid's vertices; false: there are too many.
PYSEG_HOST_DEVICE bool name_grid(const Kernel& kernel, int height, int width, int available,
                                 VertexNames& names) {
  names = {};
  names.axes = 2;
  int bits = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t size = kernel.channels[i] == -2 ? width : height;
    const int64_t cells = (size - 1) / kernel.cell[i] + 2 + 2 * kernel.margin();
    names.unit[i] = uint64_t(1) << bits;
    for (int64_t left = cells - 1; left > 0; left >>= 1) ++bits;
  }
  names.bits = bits;
  return bits < available;
}

// Weights and names of the four vertices around a pixel.
template <class T>
PYSEG_HOST_DEVICE void locate_on_grid(const Kernel& kernel, int x, int y, const VertexNames& names,
                                      T (&weight)[4], uint64_t (&name)[4]) {
  uint64_t first = 0;
  T part[2];
  for (int i = 0; i < 2; ++i) {
    const int at = kernel.channels[i] == -2 ? x : y, cell = kernel.cell[i];
    part[i] = T(at % cell) / T(cell);
    first += uint64_t(at / cell + kernel.margin()) * names.unit[i];
  }
  PYSEG_UNROLL
  for (int k = 0; k < 4; ++k) {
    weight[k] = (k & 1 ? part[0] : 1 - part[0]) * (k & 2 ? part[1] : 1 - part[1]);
    name[k] = first + (k & 1 ? names.unit[0] : 0) + (k & 2 ? names.unit[1] : 0);
  }
}

// On a grid, of one axis: the sum of exp(-k^2 / 2 sigma^2) over all k, over that of the filter.
inline double axis_scale(const Kernel& kernel, int axis) {
  return sampled(kernel.sigmas[axis]).sum / kernel.cell[axis];
}

// What makes the lattice's kernel 1 at distance 0, as exp(0) is, where it is not normalised. The
// classic value is that of Adams et al.; ours keeps the integral over space, which is what a dense
// image sums.
inline double kernel_scale(const Kernel& kernel, bool classic) {
  const Blur& blur = kernel.blur;
  double centre = 1;
  for (int axis = 0; axis < kernel.axes; ++axis)
    centre *= std::pow(1 - 2 * kernel.spread_along(axis), blur.passes);
  if (kernel.grid) return centre * axis_scale(kernel, 0) * axis_scale(kernel, 1);
  const double d = kernel.features;
  if (classic) return 1 / (1 + std::exp2(-d));
  return centre * std::pow(2 * M_PI * blur.variance(), d / 2) * std::sqrt(d + 1);
}

// What a permutohedral lattice's filter gives a pixel of itself, from its barycentric weights. Two
// of its vertices are one step apart along `r` axes, and one step along all d + 1 of them is none.
// So mass gets from one to the other by t + 1 steps along each of those r and t along each other
// axis, for any t. Where vertices on the way are absent, a part of it does not arrive.
template <class T>
struct SelfTerm {
  int entries;
  T share[kMaxFeatures + 1];  // [d + 1] of r: what arrives, times the kernel's scale

  SelfTerm(const Kernel& kernel, double scale) : entries(kernel.entries) {
    const int passes = kernel.blur.passes, middle = passes + 1;     // so that t + 1 is inside, too
    std::vector<double> steps(2 * middle + 2), next(steps.size());  // blurs along one axis
    steps[middle] = 1;
    for (int pass = 0; pass < passes; ++pass) {
      for (size_t i = 1; i + 1 < steps.size(); ++i)
        next[i] = steps[i] + kernel.side(0) * (steps[i - 1] + steps[i + 1]);
      steps.swap(next);
    }
    for (int r = 0; r < entries; ++r) {
      double sum = 0;
      for (size_t t = 0; t + 1 < steps.size(); ++t)
        sum += std::pow(steps[t + 1], r) * std::pow(steps[t], entries - r);
      share[r] = T(scale * sum);
    }
  }

  PYSEG_HOST_DEVICE T operator()(const T* weight) const {
    T sum = 0;
    for (int k = 0; k < entries; ++k) {
      T part = share[0] * weight[k];
      for (int l = 0; l < k; ++l) part += 2 * share[k - l] * weight[l];
      sum += part * weight[k];
    }
    return sum;
  }
};

// A pixel whose neighbours sum to less than this share of its self term is alone. A SelfTerm is up
// to a fifth too large, so such a sum is mostly error, by which nothing may be divided.
constexpr double kAlone = 0.1;

}  // namespace pyseg
