// The inner loops of panoptic_head on the CPU: what panoptic_head.cpp knows of them.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::head {

constexpr int kTile = 128;      // output columns
constexpr int kMostLanes = 16;  // of a vector

struct alignas(64) Best {
  float stuff[kTile], thing[kTile], inside[kTile], value[kTile];
  int32_t stuff_at[kTile], value_at[kTile], outside[kTile];
};

struct Loops {
  void (*stretch)(const float*, const int*, const int*, const float*, int, float*);
  void (*best_classes)(const float*, const float*, int64_t, int, int, float, int, Best*);
  void (*add_instance)(const float*, const float*, float, const float*, const int*, const int*,
                       const float*, int, int, int, Best*);
  void (*choose)(const Best*, int, int, int, int32_t*);
};

PYSEG_DECLARE_LEVELS(extern const Loops loops;)

}  // namespace pyseg::head
