// What boundary_match is given, shared by the CPU and the CUDA kernel.
#pragma once

#include <cstdint>

#include "../common/common.h"
#include "../confusion_matrix/confusion_matrix.h"
#include "contours.h"

namespace pyseg {

// Checks what the memory accesses rely on; Python has checked it in more words.
inline void check_labels(const Tensor& prediction, const Tensor& target, int64_t num_classes,
                         int64_t squared_radius) {
  check_pair(prediction, target);
  PYSEG_CHECK(num_classes >= 1 && num_classes <= 4096, "num_classes must be 1 to 4096, got ",
              num_classes);
  PYSEG_CHECK(squared_radius >= 0 && squared_radius < 4096 * 4096,
              "squared_radius must be from 0 to below 4096^2, got ", squared_radius);
}

}  // namespace pyseg
