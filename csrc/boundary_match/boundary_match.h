// Contours of label maps, shared by the CPU and the CUDA kernel.
//
// A pixel is on the contour of its class if one of its four neighbours in the image has another
// label; void is a label like any other here, but has no contour of its own. So a contour pixel
// belongs to one class, and one map holds the contours of all classes. Where the target is void,
// the prediction is taken to be void too.
#pragma once

#include <cstdint>

#include "../common/common.h"
#include "../common/host_device.h"
#include "../confusion_matrix/confusion_matrix.h"

namespace pyseg {

enum MatchCount { kPredicted, kPredictedMatched, kTarget, kTargetMatched, kMatchCounts };

// The largest w <= most with w^2 + dy^2 <= squared_radius; -1 if there is none.
PYSEG_HOST_DEVICE int64_t half_width(int64_t squared_radius, int64_t dy, int64_t most) {
  int64_t width = -1;
  while (width < most && (width + 1) * (width + 1) + dy * dy <= squared_radius) ++width;
  return width;
}

// Checks what the memory accesses rely on; Python has checked it in more words.
inline void check_labels(const Tensor& prediction, const Tensor& target, int64_t num_classes,
                         int64_t squared_radius) {
  PYSEG_CHECK(target.dim() == 3 && shape(prediction) == shape(target) &&
                  prediction.scalar_type() == target.scalar_type(),
              "prediction and target must both be [N, H, W] of one dtype, got ", shape(prediction),
              " and ", shape(target));
  PYSEG_CHECK(num_classes >= 1 && num_classes <= 4096, "num_classes must be 1 to 4096, got ",
              num_classes);
  PYSEG_CHECK(squared_radius >= 0 && squared_radius < 4096 * 4096,
              "squared_radius must be from 0 to below 4096^2, got ", squared_radius);
}

}  // namespace pyseg
