// Where a point lies in the permutohedral lattice; shared by the CPU and the CUDA kernel.
//
// The lattice and the barycentric weights are those of Adams, Baek & Davis, "Fast high-dimensional
// filtering using the permutohedral lattice" (2010). A vertex has d + 1 integer coordinates that
// sum to 0 and are all equal modulo d + 1. So a vertex is named by that remainder and by the
// quotients of its first d coordinates, and the names pack into 64 bits even for 8 features.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace pyseg {

constexpr int kMaxFeatures = 8;

// How names of vertices pack into 64 bits: the remainder lowest, then the quotients.
struct VertexNames {
  int features;
  int low[kMaxFeatures];            // smallest quotient, including room for neighbours
  uint64_t unit[kMaxFeatures + 1];  // one step of a quotient; 0 for the coordinate left out
  uint64_t all;                     // one step of every quotient
  uint64_t remainder;               // mask of the remainder

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

// a * b, rounded: nvcc would fuse it with the sum that follows, and CUDA name other vertices.
PYSEG_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PYSEG_HOST_DEVICE double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Feature i must come multiplied by the square root of the lattice's variance and divided by
// sigma * sqrt((i + 1) (i + 2)): see `feature_scale`. Nothing branches, so that a loop over
// this function vectorises.
template <int D, class T>
PYSEG_HOST_DEVICE void locate(const T (&feature)[D], const VertexNames& names, T (&weight)[D + 1],
                              uint64_t (&name)[D + 1]) {
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
  int rank[D + 1];
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
  uint64_t first = 0, unit[D];
  PYSEG_UNROLL
  for (int i = 0; i < D; ++i) unit[i] = names.unit[i];
  PYSEG_UNROLL
  for (int i = 0; i <= D; ++i) {  // back to a vertex whose coordinates sum to 0
    const int step = int(rank[i] < 0) - int(rank[i] > D);
    rank[i] += step * (D + 1);
    quotient[i] += T(step);
    offset[i] -= T(step);
    if (i < D) first += uint64_t(int32_t(quotient[i]) - names.low[i]) * unit[i];
  }
  T sorted[D + 1];
  PYSEG_UNROLL
  for (int r = 0; r <= D; ++r) {
    sorted[r] = 0;
    PYSEG_UNROLL
    for (int i = 0; i <= D; ++i) sorted[r] += T(int(rank[i] == r)) * offset[i];
  }
  weight[0] = T(1) + sorted[D] - sorted[0];
  name[0] = first;
  PYSEG_UNROLL
  for (int k = 1; k <= D; ++k) {
    weight[k] = sorted[D - k] - sorted[D + 1 - k];
    uint64_t step = 0;
    PYSEG_UNROLL
    for (int i = 0; i < D; ++i) step += (uint64_t(0) - uint64_t(rank[i] == D + 1 - k)) & unit[i];
    name[k] = name[k - 1] - step + 1;
  }
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

// The blur of one kernel's lattice at a quality level. Pixels fill a lattice over position without
// gaps, and it is the finest of all: where two passes are asked for, one without rings is accurate
// enough there.
inline Blur blur_of(bool positional, const Blur& quality) {
  return positional && quality.rings > 0 && quality.passes <= 2 ? Blur{1, 0.21, 0} : quality;
}

// Makes the standard deviation of all together one sigma.
inline double feature_scale(int i, double sigma, const Blur& blur) {
  return std::sqrt(blur.variance() / ((i + 1.0) * (i + 2.0))) / sigma;
}

// Packs the names of a kernel's vertices, given the smallest and largest value of each feature,
// multiplied by `feature_scale`, and how many bits there are. False: a range is too large.
PYSEG_HOST_DEVICE bool name_vertices(int features, const double* low, const double* high, int rings,
                                     int available, VertexNames& names) {
  names.features = features;
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
  return fits;
}

// One kernel: a Gaussian of `features` channels. Channel -2 is x, -1 is y (pixels), others are
// planes of the features tensor.
struct Kernel {
  int features;
  int first_entry;  // of a pixel's entries, where this kernel's d + 1 begin
  int channels[kMaxFeatures];
  double sigmas[kMaxFeatures];
  Blur blur;
};

// What makes the lattice's kernel 1 at distance 0, as exp(0) is, where it is not normalised. The
// classic value is that of Adams et al.; ours keeps the integral over space, which is what a dense
// image sums.
inline double kernel_scale(int features, const Blur& blur, bool classic) {
  const double d = features;
  if (classic) return 1 / (1 + std::exp2(-d));
  return std::pow(2 * M_PI * blur.variance(), d / 2) * std::sqrt(d + 1) *
         std::pow(1 - 2 * blur.spread, blur.passes * (d + 1));
}

}  // namespace pyseg
