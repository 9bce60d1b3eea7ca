// The inner loops of panoptic_merge on the CPU: what panoptic_merge.cpp knows of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::merging {

// pack: [pixels] bytes to bits; the last word is filled up with zeros. Returns how many are set.
// threshold_row: of one row of one instance from cells [low], [high], which of its pixels are
// inside; `row` has room for cells + 4.
PYSEG_DECLARE_LEVELS(int64_t pack(const uint8_t* bytes, int64_t pixels, uint64_t* words);
                     void threshold_row(const float* low, const float* high, float ty,
                                        const int* cell, const float* tx, int64_t columns,
                                        float threshold, int64_t cells, float* row,
                                        uint8_t* inside);)

}  // namespace pyseg::merging
