// How a (target, prediction) pair becomes a cell; shared by the CPU and the CUDA kernel.
//
// Both labels are coded 0 .. C-1 for a class, C for ignore_index and C+1 for anything else, so
// that one table of (C+2) x (C+2) counts takes every pair without a branch. Afterwards row C is
// dropped (void in the ground truth), column C is "missed" (void predicted where there is a
// class), row C+1 and column C+1 hold the labels that are errors.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/host_device.h"

namespace pyseg {

template <class T>
struct LabelCoder {
  uint32_t num_classes;
  T ignore_index;
  bool can_ignore;  // false where ignore_index does not fit T, such as -1 for uint8

  LabelCoder(int64_t classes, int64_t ignore)
      : num_classes(uint32_t(classes)),
        ignore_index(T(ignore)),
        can_ignore(ignore >= int64_t(std::numeric_limits<T>::min()) &&
                   ignore <= int64_t(std::numeric_limits<T>::max())) {}

  PYSEG_HOST_DEVICE uint32_t operator()(T label) const {
    const bool in_range = label >= T(0) && uint64_t(label) < num_classes;
    const uint32_t code = in_range ? uint32_t(label) : num_classes + 1;
    return can_ignore && label == ignore_index ? num_classes : code;
  }
};

}  // namespace pyseg
