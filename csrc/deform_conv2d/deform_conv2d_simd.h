// The inner loops of deformable convolution on the CPU: what deform_conv2d.cpp knows of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../common/inline.h"
#include "../common/simd_level.h"

namespace pyseg::deformable {

constexpr int kTile = 96;  // output pixels at a time: whole groups of rows
constexpr int kBackwardTile = 60;
constexpr int kRowGroup = 12;  // what PYSEG_ROWS divides
constexpr int kLine = 16;      // numbers of 4 bytes in a line of the cache
constexpr int kPadding = 16;   // what the lanes of a vector divide

// Of the kernel, and what positions need of the input.
struct Taps {
  int count, width;
  int dilation_y, dilation_x;
  int input_height, input_width;
};

// Positions of the taps at a tile's pixels, for the channels of an offset group.
template <class Real>
struct Samples {
  int taps;
  int32_t* indices;  // [taps, 4, kTile] corners
  Real* values;      // [taps, 7, kTile] weights of the corners, ty, tx, mask
  int32_t* index(int corner, int tap) const { return indices + (tap * 4 + corner) * kTile; }
  Real* weight(int corner, int tap) const { return values + (tap * 7 + corner) * kTile; }
  Real* ty(int tap) const { return weight(4, tap); }
  Real* tx(int tap) const { return weight(5, tap); }
  Real* scale(int tap) const { return weight(6, tap); }
};

template <class T>
using Multiply = void (*)(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t,
                          const T*, int64_t, T*, int64_t);
template <class From, class To>
using Transpose = void (*)(const From*, int64_t, int64_t, int64_t, To*, int64_t, int64_t);

template <class T, class Real>
struct Functions {
  void (*locate)(const T*, const T*, int64_t, const Taps&, const Real*, const Real*, int,
                 const Samples<Real>&);
  void (*gather)(const Real*, int64_t, const Samples<Real>&, int, Real*, int64_t);
  Multiply<Real> multiply;
  void (*scatter)(const Real*, int64_t, const Samples<Real>&, int, const Real*, Real*, int64_t,
                  Real*, Real*);
  void (*offset_gradients)(const Samples<Real>&, int, const Real*, Real*, int64_t);
  // in, its stride, rows, columns, out, its stride, columns from here to the next call
  Transpose<T, Real> transpose_in;
  Transpose<Real, T> transpose_out;
  // With dot products of bfloat16, else null.
  void (*gather_pairs)(const uint16_t*, int64_t, const Samples<float>&, int, uint16_t*,
                       int64_t) = nullptr;
  Multiply<float> multiply_pairs = nullptr;
  Transpose<uint16_t, uint16_t> transpose_bits = nullptr;
};

template <class T>
using WorkType = std::conditional_t<std::is_same_v<T, double>, double, float>;

PYSEG_DECLARE_LEVELS(template <class T> Functions<T, WorkType<T>> functions();)

}  // namespace pyseg::deformable
