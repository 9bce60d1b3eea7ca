// The inner loops of RoI pooling on the CPU: what roi_align.cpp knows of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::regions {

constexpr int64_t kBlock = 64;    // channels
constexpr int64_t kTile = 64;     // pixels
constexpr int64_t kPadding = 16;  // what the lanes of a vector divide

template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// What one axis of a region reads: bins as lists of pixels with weights, as samples, or as ranges.
template <class Real>
struct Pixels {
  std::vector<int> begin;  // of each bin in the lists below, and the end of the last
  std::vector<int> pixel;
  std::vector<Real> weight;   // of the pixel; of samples: of the pixel after it
  std::vector<int> distinct;  // by find_distinct(): the pixels, each once and in order
  std::vector<int> slot;      // of each in `pixel`: its place there
};

// The channels of a block at all pixels: those of a pixel together.
template <class Real>
struct Field {
  Real* data;
  int64_t pixel_stride, row_stride;
  PYSEG_INLINE Real* at(int64_t y, int64_t x) const {
    return data + y * row_stride + x * pixel_stride;
  }
};

template <class T, class Real>
struct Functions {
  // [rows, in_stride] -> [columns, out_stride]: in, its stride, rows, columns, out, its stride, and
  // columns from here to the next call
  void (*lay_out)(const T*, int64_t, int64_t, int64_t, Real*, int64_t, int64_t);
  void (*lay_back)(const Real*, int64_t, int64_t, int64_t, T*, int64_t, int64_t);
  void (*average)(const Field<const Real>&, const Pixels<Real>&, const Pixels<Real>&, int64_t,
                  Real*);
  void (*spread)(const Real*, const Pixels<Real>&, const Pixels<Real>&, int64_t, Real*,
                 const Field<Real>&);
  void (*maximum_of_samples)(const Field<const Real>&, const Pixels<Real>&, const Pixels<Real>&,
                             int64_t, Real*, Integer<Real>*);
  void (*maximum_of_pixels)(const Field<const Real>&, const Pixels<Real>&, const Pixels<Real>&,
                            int64_t, Real*, Integer<Real>*);
};

template <class T>
using WorkType = std::conditional_t<std::is_same_v<T, double>, double, float>;

PYSEG_DECLARE_LEVELS(template <class T> Functions<T, WorkType<T>> functions();)

}  // namespace pyseg::regions
