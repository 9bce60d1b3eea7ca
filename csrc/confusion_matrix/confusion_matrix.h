// How a (target, prediction) pair becomes a cell; shared by the CPU and the CUDA kernel.
//
// Both labels are coded 0 .. C-1 for a class, C for ignore_index and C+1 for anything else, so
// that one table of (C+2) x (C+2) counts takes every pair without a branch. Afterwards row C is
// dropped (void in the ground truth), column C is "missed" (void predicted where there is a
// class), row C+1 and column C+1 hold the labels that are errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../common/host_device.h"

namespace pyseg {

template <class T>
struct LabelCoder {
  using Unsigned = std::make_unsigned_t<T>;
  uint32_t num_classes;
  Unsigned last;  // the largest label in range that T can hold; as Unsigned, negative ones are more
  T ignore_index;
  bool can_ignore;  // false where ignore_index does not fit T, such as -1 for uint8

  LabelCoder(int64_t classes, int64_t ignore)
      : num_classes(uint32_t(classes)),
        last(Unsigned(std::min(classes - 1, int64_t(std::numeric_limits<T>::max())))),
        ignore_index(T(ignore)),
        can_ignore(ignore >= int64_t(std::numeric_limits<T>::min()) &&
                   ignore <= int64_t(std::numeric_limits<T>::max())) {}

  // Code must hold num_classes + 1; a narrow one gives the CPU more lanes.
  template <class Code>
  PYSEG_HOST_DEVICE Code code(T label) const {
    const Code code = Unsigned(label) <= last ? Code(label) : Code(num_classes + 1);
    return can_ignore && label == ignore_index ? Code(num_classes) : code;
  }
  PYSEG_HOST_DEVICE uint32_t operator()(T label) const { return code<uint32_t>(label); }
};

}  // namespace pyseg
