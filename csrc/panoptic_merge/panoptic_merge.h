// Where a mask of M x M cells, stretched over a box, lies on the image; shared by the CPU and the
// CUDA kernel of panoptic_merge.
//
// Cell i of a box [from, to) covers an M-th of it. A pixel is sampled at its centre, bilinearly
// between the centres of cells; beyond the outermost centres the mask falls to 0 at one cell's
// distance, as with zeros all around it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace pyseg {

constexpr int kMaxStuff = 512;

struct CellRange {
  int first, last;  // pixels [first, last) that can be above 0
};

PYSEG_HOST_DEVICE CellRange pixels_of_box(float from, float to, int cells, int size) {
  // Negated so that NaN counts as empty.
  if (!(to > from) || !(from < float(size)) || !(to > 0.0f)) return {0, 0};
  const float reach = 0.5f * (to - from) / float(cells);
  const float low = from - reach - 1.0f, high = to + reach + 1.0f;
  const int first = low > 0.0f ? int(low) : 0;
  const int last = high < float(size) ? int(high) + 1 : size;
  return {first, last < size ? last : size};
}

// Pixel -> the lower of its two cells, -1 to M - 1 (cells -1 and M are 0), and the distance from
// it; a pixel out of reach gets cell -2.
PYSEG_HOST_DEVICE int cell_of_pixel(int pixel, float from, float to, int cells, float* t) {
  const float at = product((float(pixel) + 0.5f - from) / (to - from), float(cells)) - 0.5f;
  const float floor = std::floor(at);
  *t = at - floor;
  return floor < -1.0f || !(floor < float(cells)) ? -2 : int(floor);
}

}  // namespace pyseg
