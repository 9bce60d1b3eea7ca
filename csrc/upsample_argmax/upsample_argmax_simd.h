// The inner loops of upsample_argmax on the CPU: what row_groups.h knows of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::upsampling {

constexpr int kRows = 8;        // output rows of a group
constexpr int kTile = 32;       // output columns of a tile
constexpr int kMostLanes = 16;  // of a vector

template <class T, class Out>
struct Functions {
  // One row of every class of logits as T: the element of a tensor that it begins with, strides of
  // classes and of columns, classes, columns; to rows [classes, stride]. Returns whether all of it
  // is tame.
  bool (*load)(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
  void (*expand)(const T*, const T*, int64_t, int64_t, const int*, const T*, int64_t, T*, T*);
  void (*classify)(const T*, const T*, int64_t, int64_t, const T*, int, int64_t, Out*, int64_t);
};

template <class In>
using WorkType = std::conditional_t<std::is_same_v<In, double>, double, float>;

PYSEG_DECLARE_LEVELS(template <class In, class Out> Functions<WorkType<In>, Out> functions();)

}  // namespace pyseg::upsampling
