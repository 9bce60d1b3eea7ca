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

// Feature i must come multiplied by the square root of the lattice's variance and divided by
// sigma * sqrt((i + 1) (i + 2)): see `feature_scale`. Nothing branches, so that a loop over
// this function vectorises.
template <int D, class T>
PYSEG_HOST_DEVICE void locate(const T (&feature)[D], const VertexNames& names, T (&weight)[D + 1],
                              uint64_t (&name)[D + 1]) {
  T offset[D + 1];  // position in the hyperplane, in units of d + 1; then less its rounding
  T sum = 0;
#pragma GCC unroll 9
  for (int i = D; i > 0; --i) {
    offset[i] = sum - T(i) * feature[i - 1];
    sum += feature[i - 1];
  }
  offset[0] = sum;
  T quotient[D + 1];
  T excess = 0;
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) {
    quotient[i] = round_small(offset[i]);
    offset[i] -= quotient[i];
    excess += quotient[i];
  }
  int rank[D + 1];
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) rank[i] = int(excess);
#pragma GCC unroll 9
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 9
    for (int j = i + 1; j <= D; ++j) {
      const int less = offset[i] < offset[j];
      rank[i] += less;
      rank[j] += 1 - less;
    }
  uint64_t first = 0, unit[D];
#pragma GCC unroll 9
  for (int i = 0; i < D; ++i) unit[i] = names.unit[i];
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) {  // back to a vertex whose coordinates sum to 0
    const int step = int(rank[i] < 0) - int(rank[i] > D);
    rank[i] += step * (D + 1);
    quotient[i] += T(step);
    offset[i] -= T(step);
    if (i < D) first += uint64_t(int32_t(quotient[i]) - names.low[i]) * unit[i];
  }
  T sorted[D + 1];
#pragma GCC unroll 9
  for (int r = 0; r <= D; ++r) {
    sorted[r] = 0;
#pragma GCC unroll 9
    for (int i = 0; i <= D; ++i) sorted[r] += T(int(rank[i] == r)) * offset[i];
  }
  weight[0] = T(1) + sorted[D] - sorted[0];
  name[0] = first;
#pragma GCC unroll 9
  for (int k = 1; k <= D; ++k) {
    weight[k] = sorted[D - k] - sorted[D + 1 - k];
    uint64_t step = 0;
#pragma GCC unroll 9
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
  return positional && quality.passes == 2 ? Blur{1, 0.21, 0} : quality;
}

// Makes the standard deviation of all together one sigma.
inline double feature_scale(int i, double sigma, const Blur& blur) {
  return std::sqrt(blur.variance() / ((i + 1.0) * (i + 2.0))) / sigma;
}

}  // namespace pyseg
