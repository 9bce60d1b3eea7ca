// The inner loops of panoptic_quality on the CPU: what panoptic_quality.cpp knows of them.
#pragma once

#include <cstdint>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::panoptic {

constexpr int64_t kBlock = 256;  // pixels that are compared before their changes are counted

struct Maps {
  const int32_t* target;
  const int32_t* prediction;
  const uint8_t* target_boundary;  // both or neither
  const uint8_t* prediction_boundary;
};

// mark_changes: one bit for every pixel of [0, n), n <= kBlock, that is not like the one before it,
// which is there for pixel 0 too; returns how many are set.
// list_bits: the set bits as numbers, rising; room for 8 more is needed. Meanwhile memory is
// fetched.
PYSEG_DECLARE_LEVELS(template <bool Boundary>
                     int64_t mark_changes(const Maps& maps, int64_t n, uint64_t* words);
                     void list_bits(const uint64_t* words, int64_t count, const int32_t* next_t,
                                    const int32_t* next_p, int32_t* places);)

}  // namespace pyseg::panoptic
