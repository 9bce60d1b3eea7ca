// What `<op>_simd.cpp` offers to `<op>.cpp`, once per instruction set (common/simd_level.h).
// Neither needs torch's headers, so that a unit per level is compiled in a second or two.
#pragma once

#include "../common/simd_level.h"
#include "boundary_mask.h"

namespace pyseg::boundary {

// Rows [begin, end) of the mask of one image.
PYSEG_DECLARE_LEVELS(template <class T> void mark_rows(const T* labels, const Window& window,
                                                       int64_t begin, int64_t end, uint8_t* mask);)

}  // namespace pyseg::boundary
