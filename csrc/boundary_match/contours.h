// Contours of label maps, shared by the CPU and the CUDA kernel.
//
// A pixel is on the contour of its class if one of its four neighbours in the image has another
// label; void is a label like any other here, but has no contour of its own. So a contour pixel
// belongs to one class, and one map holds the contours of all classes. Where the target is void,
// the prediction is taken to be void too.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace pyseg {

enum MatchCount { kPredicted, kPredictedMatched, kTarget, kTargetMatched, kMatchCounts };

// The largest w <= most with w^2 + dy^2 <= squared_radius; -1 if there is none.
PYSEG_HOST_DEVICE int64_t half_width(int64_t squared_radius, int64_t dy, int64_t most) {
  int64_t width = -1;
  while (width < most && (width + 1) * (width + 1) + dy * dy <= squared_radius) ++width;
  return width;
}

}  // namespace pyseg
