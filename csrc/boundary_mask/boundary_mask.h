// Which pixels are near another label, shared by the CPU and the CUDA kernel.
//
// boundary_mask is the smallest op, and commented as a template for others. Its .h holds what both
// back ends must agree on: the method, constants, plain structures, and mathematics as functions
// under PYSEG_HOST_DEVICE (common/host_device.h), so that no formula is written twice. It includes
// no CUDA, and torch only where both back ends check tensors by one function, as here.
//
// A pixel is inside its region if the square window of (2 d + 1)^2 pixels around it has one label:
// if the windows of 2 d + 1 pixels along the row do, in each of the 2 d + 1 rows, and those rows
// agree. Both are lengths of runs of equal pixels, so the cost does not depend on d, nor on the
// number of classes.
#pragma once

#include <cstdint>

#include "../common/common.h"
#include "../common/host_device.h"

namespace pyseg {

// Guards memory against calls of torch.ops.pyseg itself: pyseg/ops/boundary_mask.py has checked the
// arguments and named what is wrong.
inline void check_labels(const Tensor& labels, int64_t distance) {
  PYSEG_CHECK(labels.dim() == 3, "labels must be [N, H, W], got ", shape(labels));
  PYSEG_CHECK(distance >= 1, "distance must be at least 1, got ", distance);
}

struct Window {
  int64_t height, width;
  int64_t distance;  // at most the larger side
  bool border;       // whether the outside of the image is another label, or continues the image
};

}  // namespace pyseg
