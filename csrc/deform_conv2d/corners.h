// Sampling of deformable convolution, shared by the CPU and the CUDA kernels.
//
// Dai et al., "Deformable Convolutional Networks" (2017); Zhu et al., "Deformable ConvNets v2: More
// Deformable, Better Results" (2019), which adds the mask. Tap (i, j) of the kernel reads the input
// at a fractional position, bilinearly; outside the image there are zeros.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace pyseg::deformable {

// The four pixels around a position, in the order (0, 0), (0, 1), (1, 0), (1, 1) of (y, x), and how
// far it is from the first of them. Pixels outside the image have the index `outside`, where the
// caller keeps zeros. A position of NaN has four such pixels and a distance of NaN, so that its
// value is NaN.
template <class T>
struct Corners {
  int index[4];
  T ty, tx;
};

template <class T>
PYSEG_HOST_DEVICE Corners<T> corners(T y, T x, int height, int width, int outside) {
  const bool near = y >= T(-1) && y < T(height) && x >= T(-1) && x < T(width);
  const T safe_y = near ? y : T(0), safe_x = near ? x : T(0);
  const T low_y = std::floor(safe_y), low_x = std::floor(safe_x);
  const int top = int(low_y), left = int(low_x);
  const bool has_top = near & (top >= 0), has_bottom = near & (top + 1 < height);
  const bool has_left = left >= 0, has_right = left + 1 < width;
  const int first = top * width + left;
  Corners<T> c;
  c.index[0] = (has_top & has_left) ? first : outside;
  c.index[1] = (has_top & has_right) ? first + 1 : outside;
  c.index[2] = (has_bottom & has_left) ? first + width : outside;
  c.index[3] = (has_bottom & has_right) ? first + width + 1 : outside;
  c.ty = y == y ? safe_y - low_y : y;
  c.tx = x == x ? safe_x - low_x : x;
  return c;
}

}  // namespace pyseg::deformable
