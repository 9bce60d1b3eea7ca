// The inner loops of the dense CRF on the CPU, in vectors of the compiler that are as long as the
// registers of the level: 16 floats with AVX-512, 8 with AVX2, 4 elsewhere. setup.py compiles this
// file once per level for PYSEG_REAL float and, at the generic level alone, double.
//
// What a lattice has of a vertex, and a tile of a pixel, is a row of classes, padded (`padded`).
// Loops over rows keep parts of up to 32 classes in registers; a wider row is done part by part.
// The softmax turns the rows of as many pixels as a register holds into one vector per class. So
// nothing is summed across a register, and no exponential is taken of padding.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "dense_crf_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::crf::PYSEG_LEVEL {

#include "../common/vectors_simd.h"

namespace {

using Real = PYSEG_REAL;

constexpr int kRegister = std::max<int>(4, PYSEG_REGISTER / sizeof(Real));  // numbers in a vector
using Pixels = Vector<Real, kRegister>;
using Quarter = Vector<Real, 4>;

// a * b + c, rounded once where that is one instruction
template <int N>
PYSEG_INLINE Vector<Real, N> fused(Vector<Real, N> a, Vector<Real, N> b, Vector<Real, N> c) {
#if defined(PYSEG_AVX512)
  if constexpr (N == 16) return (Vector<Real, N>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(PYSEG_AVX512) || defined(PYSEG_AVX2)
  if constexpr (N == 8) return (Vector<Real, N>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (N == 4) return (Vector<Real, N>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#endif
  return a * b + c;
}

template <int N>
PYSEG_INLINE Vector<Real, N> larger(Vector<Real, N> a, Vector<Real, N> b) {
#if defined(PYSEG_AVX512)
  if constexpr (N == 16) return (Vector<Real, N>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(PYSEG_AVX2)
  if constexpr (N == 8) return (Vector<Real, N>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(a) == 16) return (Vector<Real, N>)_mm_max_ps((__m128)a, (__m128)b);
#endif
  return a > b ? a : b;
}

// exp(x) for x <= 0, within 1e-7; 0 below -70, where products with barycentric weights would become
// denormal. The polynomial is 2^f within 8e-8 of it for |f| <= 1/2.
template <int N>
PYSEG_INLINE Vector<float, N> exponential(Vector<float, N> x) {
  constexpr float kTerms[] = {1.327647129e-3f, 9.675540961e-3f, 5.550713092e-2f,
                              2.402212024e-1f, 6.931469440e-1f, 1.0f};
  const Vector<float, N> log2e = broadcast<N>(1.44269504f);
  Vector<float, N> p = broadcast<N>(kTerms[0]);
#ifdef PYSEG_AVX512
  const __m512 v = (__m512)x, n = _mm512_roundscale_ps(_mm512_mul_ps(v, (__m512)log2e), 0);
  const Vector<float, N> f = (Vector<float, N>)_mm512_fmsub_ps(v, (__m512)log2e, n);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = fused<N>(p, f, broadcast<N>(kTerms[i]));
  const __mmask16 inside = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-70.0f), _CMP_GT_OQ);
  return (Vector<float, N>)_mm512_maskz_scalef_ps(inside, (__m512)p, n);
#else
  typedef int Integers __attribute__((vector_size(N * sizeof(int))));
  const Vector<float, N> low = broadcast<N>(-70.0f), inside = larger<N>(x, low);
  const Vector<float, N> magic = broadcast<N>(12582912.0f);
  const Vector<float, N> shifted = fused<N>(inside, log2e, magic);
  const Vector<float, N> f = fused<N>(inside, log2e, magic - shifted);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = fused<N>(p, f, broadcast<N>(kTerms[i]));
  const Integers value = (Integers)p + ((Integers)shifted << 23);
  return (Vector<float, N>)(value & (Integers)(x > low));
#endif
}

template <int N>
PYSEG_INLINE Vector<double, N> exponential(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 4 vectors: within each quarter, rows become columns.
template <int N>
PYSEG_INLINE void transpose_quarters(Vector<Real, N> (&v)[4]) {
  if constexpr (N == 4) {
    const auto a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
    const auto b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const auto c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
    const auto d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  } else if constexpr (N == 8) {
    const auto a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const auto b = __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const auto c = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const auto d = __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
    v[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
    v[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
    v[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
  } else {
    const auto a = __builtin_shufflevector(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12,
                                           28, 13, 29);
    const auto b = __builtin_shufflevector(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                           14, 30, 15, 31);
    const auto c = __builtin_shufflevector(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12,
                                           28, 13, 29);
    const auto d = __builtin_shufflevector(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                           14, 30, 15, 31);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[1] =
        __builtin_shufflevector(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    v[2] = __builtin_shufflevector(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[3] =
        __builtin_shufflevector(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
}

// A vector of N / 4 quarters, 4 * stride apart; and back.
template <int N>
PYSEG_INLINE Vector<Real, N> load_quarters(const Real* from, int64_t stride) {
  if constexpr (N == 4) {
    return load<4>(from);
  } else {
    const auto low = load_quarters<N / 2>(from, stride);
    const auto high = load_quarters<N / 2>(from + N / 2 * stride, stride);
    if constexpr (N == 8)
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    else
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                     15);
  }
}
template <int N>
PYSEG_INLINE void store_quarters(Real* to, int64_t stride, Vector<Real, N> v) {
  if constexpr (N == 4) {
    store<4>(to, v);
  } else if constexpr (N == 8) {
    store<4>(to, __builtin_shufflevector(v, v, 0, 1, 2, 3));
    store<4>(to + 4 * stride, __builtin_shufflevector(v, v, 4, 5, 6, 7));
  } else {
    store<4>(to, __builtin_shufflevector(v, v, 0, 1, 2, 3));
    store<4>(to + 4 * stride, __builtin_shufflevector(v, v, 4, 5, 6, 7));
    store<4>(to + 8 * stride, __builtin_shufflevector(v, v, 8, 9, 10, 11));
    store<4>(to + 12 * stride, __builtin_shufflevector(v, v, 12, 13, 14, 15));
  }
}

// The rows of kRegister pixels, `stride` apart, to one vector per class; and back, with a factor
// for each pixel. Classes up to the next multiple of 4 come along.
PYSEG_INLINE void to_planes(const Real* rows, int64_t stride, int classes, Real* planes) {
  for (int c = 0; c < classes; c += 4) {
    Pixels v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = load_quarters<kRegister>(rows + i * stride + c, stride);
    transpose_quarters<kRegister>(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store<kRegister>(planes + kRegister * (c + i), v[i]);
  }
}
PYSEG_INLINE void to_rows(const Real* planes, Pixels factor, int classes, Real* rows,
                          int64_t stride) {
  for (int c = 0; c < classes; c += 4) {
    Pixels v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = load<kRegister>(planes + kRegister * (c + i)) * factor;
    transpose_quarters<kRegister>(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_quarters<kRegister>(rows + i * stride + c, stride, v[i]);
  }
}

// Of fewer pixels than a vector holds, at the right edge of an image.
PYSEG_INLINE Pixels load_some(const Real* from, int count) {
  if (__builtin_expect(count == kRegister, 1)) return load<kRegister>(from);
  Real some[kRegister] = {};
  std::memcpy(some, from, count * sizeof(Real));
  return load<kRegister>(some);
}
PYSEG_INLINE void store_some(Real* to, Pixels value, int count) {
  if (__builtin_expect(count == kRegister, 1)) return store<kRegister>(to, value);
  Real some[kRegister];
  store<kRegister>(some, value);
  std::memcpy(to, some, count * sizeof(Real));
}

// `Part` classes of a row, in registers.
template <int Part>
struct Row {
  static constexpr int kVectors = Part / kRegister, kRest = Part % kRegister;
  static constexpr int kTail = kRest ? kRest : 4;
  static_assert(kRest == 0 || kRest == 4 || kRest == 8);
  Pixels whole[kVectors ? kVectors : 1];
  Vector<Real, kTail> rest;

  PYSEG_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) whole[i] = Pixels{};
    if (kRest) rest = Vector<Real, kTail>{};
  }
  PYSEG_INLINE void get(const Real* from) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) whole[i] = load<kRegister>(from + kRegister * i);
    if (kRest) rest = load<kTail>(from + kRegister * kVectors);
  }
  PYSEG_INLINE void put(Real* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) store<kRegister>(to + kRegister * i, whole[i]);
    if (kRest) store<kTail>(to + kRegister * kVectors, rest);
  }
  // += factor * from
  PYSEG_INLINE void add(Real factor, const Real* from) {
    const Pixels f = broadcast<kRegister>(factor);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      whole[i] = fused<kRegister>(f, load<kRegister>(from + kRegister * i), whole[i]);
    if (kRest)
      rest = fused<kTail>(broadcast<kTail>(factor), load<kTail>(from + kRegister * kVectors), rest);
  }
  PYSEG_INLINE void add(Real factor, const Row& from) {
    const Pixels f = broadcast<kRegister>(factor);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) whole[i] = fused<kRegister>(f, from.whole[i], whole[i]);
    if (kRest) rest = fused<kTail>(broadcast<kTail>(factor), from.rest, rest);
  }
  // to += factor * this
  PYSEG_INLINE void add_to(Real factor, Real* to) const {
    const Pixels f = broadcast<kRegister>(factor);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      store<kRegister>(to + kRegister * i,
                       fused<kRegister>(f, whole[i], load<kRegister>(to + kRegister * i)));
    if (kRest) {
      Real* const end = to + kRegister * kVectors;
      store<kTail>(end, fused<kTail>(broadcast<kTail>(factor), rest, load<kTail>(end)));
    }
  }
};

// A line of pixels of a tile, and the lattices' rows that they touch.
struct Line {
  const uint16_t* vertices;  // [pixels, entries]
  const Real* weights;
  int pixels, entries;
  int64_t stride;
};

template <int Part>
struct Rows {
  // rows += weights of the pixels' entries times rows of the lattices; `fresh`: = instead.
  static void slice(const Line& line, const Real* lattice, bool fresh, Real* rows) {
    const int64_t stride = line.stride;
    const uint16_t* vertex = line.vertices;
    const Real* weight = line.weights;
    for (int x = 0; x < line.pixels; ++x, rows += stride) {
      Row<Part> row;
      if (fresh)
        row.clear();
      else
        row.get(rows);
      int k = line.entries;
      for (; k >= 3; k -= 3, vertex += 3, weight += 3) {  // position has 3, position and RGB 6
        row.add(weight[0], lattice + vertex[0] * stride);
        row.add(weight[1], lattice + vertex[1] * stride);
        row.add(weight[2], lattice + vertex[2] * stride);
      }
      for (; k > 0; --k) row.add(*weight++, lattice + *vertex++ * stride);
      row.put(rows);
    }
  }

  // The lattices' rows += weights times the pixels' rows.
  static void splat(const Line& line, const Real* rows, Real* lattice) {
    const int64_t stride = line.stride;
    const uint16_t* vertex = line.vertices;
    const Real* weight = line.weights;
    for (int x = 0; x < line.pixels; ++x, rows += stride) {
      Row<Part> row;
      row.get(rows);
      int k = line.entries;
      for (; k >= 3; k -= 3, vertex += 3, weight += 3) {
        row.add_to(weight[0], lattice + vertex[0] * stride);
        row.add_to(weight[1], lattice + vertex[1] * stride);
        row.add_to(weight[2], lattice + vertex[2] * stride);
      }
      for (; k > 0; --k) row.add_to(*weight++, lattice + *vertex++ * stride);
    }
  }

  // On a grid the pixels of one image row between two columns of vertices have the same four, so
  // those are interpolated along y once, and their sums stay in registers. `weights` are of the
  // axes, [pixels, 2] each.
  static void slice_grid(const GridPass<Real>& grid, const Real* lattice, const Real* along_x,
                         const Real* along_y, int y, int width, int64_t stride, bool fresh,
                         Real* rows) {
    const Real* up =
        lattice + (grid.first_row + (grid.offset[1] + y) / grid.cell[1] * grid.wide) * stride;
    const Real above = along_y[2 * y], below = along_y[2 * y + 1];
    Row<Part> left, right;
    right.clear();
    right.add(above, up);
    right.add(below, up + grid.wide * stride);
    for (int x = 0, end = grid.cell[0] - grid.offset[0]; x < width; end += grid.cell[0]) {
      up += stride;
      left = right;
      right.clear();
      right.add(above, up);
      right.add(below, up + grid.wide * stride);
      for (const int last = std::min(end, width); x < last; ++x, rows += stride) {
        Row<Part> row;
        if (fresh)
          row.clear();
        else
          row.get(rows);
        row.add(along_x[2 * x], left);
        row.add(along_x[2 * x + 1], right);
        row.put(rows);
      }
    }
  }

  static void splat_grid(const GridPass<Real>& grid, const Real* rows, const Real* along_x,
                         const Real* along_y, int y, int width, int64_t stride, Real* lattice) {
    Real* up =
        lattice + (grid.first_row + (grid.offset[1] + y) / grid.cell[1] * grid.wide) * stride;
    const Real above = along_y[2 * y], below = along_y[2 * y + 1];
    Row<Part> left, right;
    left.clear();
    for (int x = 0, end = grid.cell[0] - grid.offset[0]; x < width; end += grid.cell[0]) {
      right.clear();
      for (const int last = std::min(end, width); x < last; ++x, rows += stride) {
        left.add(along_x[2 * x], rows);
        right.add(along_x[2 * x + 1], rows);
      }
      left.add_to(above, up);
      left.add_to(below, up + grid.wide * stride);
      up += stride;
      left = right;
    }
    left.add_to(above, up);
    left.add_to(below, up + grid.wide * stride);
  }

  // At one line of a tile: messages, or their gradients, lose what pixels contribute to their own;
  // `from` holds the line's pixels as they contributed, `padded` apart, `own` the first class.
  static void remove_self(const Real* shares, const Real* from, const Real* own, int64_t padded,
                          const Real* matrix, int classes, int pixels, int64_t stride, Real* rows) {
    for (int x = 0; x < pixels; ++x, rows += stride, from += padded, own += padded) {
      const Real factor = -shares[x];
      Row<Part> row;
      row.get(rows);
      if (matrix)
        for (int c = 0; c < classes; ++c) row.add(factor * own[c], matrix + c * stride);
      else
        row.add(factor, from);
      row.put(rows);
    }
  }

  // Copies rows: from those of `vertices`, or one after the other.
  static void gather(const Real* from, const int32_t* vertices, int64_t count, int64_t from_stride,
                     int64_t stride, Real* to) {
    for (int64_t i = 0; i < count; ++i, to += stride) {
      Row<Part> row;
      row.get(from + vertices[i] * from_stride);
      row.put(to);
    }
  }
  static void copy(const Real* from, int64_t count, int64_t from_stride, int64_t stride, Real* to) {
    for (int64_t i = 0; i < count; ++i, from += from_stride, to += stride) {
      Row<Part> row;
      row.get(from);
      row.put(to);
    }
  }

  // Sums the tiles' rows of each vertex, in the order of tiles.
  static void combine(const Real* partial, const int32_t* starts, const int32_t* rows,
                      int64_t begin, int64_t end, int64_t padded, Real* values) {
    constexpr int64_t kAhead = 16;
    const int64_t last = starts[end] - 1;
    for (int64_t v = begin; v < end; ++v) {
      Row<Part> row;
      row.clear();
      for (int32_t i = starts[v]; i < starts[v + 1]; ++i) {
        __builtin_prefetch(partial + rows[std::min<int64_t>(i + kAhead, last)] * padded);
        row.add(Real(1), partial + rows[i] * padded);
      }
      row.put(values + v * padded);
    }
  }

  // (side 1 side) along one axis, in place. Links are those of whole chains; see `Link`.
  static void blur(Real* values, const Link* links, const Link* end, bool transposed, Real side,
                   int64_t padded) {
    constexpr int64_t kAhead = 24;  // lattices do not fit into the second cache
    const Real* const none = values;
    alignas(64) Real nowhere[Part];
    Row<Part> before, row, after;
    before.clear();
    row.get(links->filled(transposed) ? values + links->vertex() * padded : none);
    for (; links < end; ++links) {
      const Link next = links[1];
      after.get(next.filled(transposed) ? values + int64_t(next.vertex()) * padded : none);
      __builtin_prefetch(values +
                         int64_t(links[std::min<int64_t>(kAhead, end - links)].vertex()) * padded);
      Row<Part> sum = row;
      sum.add(side, before);
      sum.add(side, after);
      const int64_t vertex = links->vertex();
      sum.put(vertex ? values + vertex * padded : nowhere);
      before = row, row = after;
    }
  }

  // values = factor * matrix^T values, `from` the first class of each row; no matrix: the identity.
  static void mix(const Real* matrix, Real factor, const Real* from, int64_t stride, int classes,
                  Real* to) {
    Row<Part> row;
    row.clear();
    if (matrix)
      for (int c = 0; c < classes; ++c) row.add(factor * from[c], matrix + c * stride);
    else
      row.add(factor, to);
    row.put(to);
  }
};

// The functions for a part of a row.
struct PartFunctions {
  decltype(&Rows<4>::slice) slice;
  decltype(&Rows<4>::splat) splat;
  decltype(&Rows<4>::slice_grid) slice_grid;
  decltype(&Rows<4>::splat_grid) splat_grid;
  decltype(&Rows<4>::remove_self) remove_self;
  decltype(&Rows<4>::gather) gather;
  decltype(&Rows<4>::copy) copy;
  decltype(&Rows<4>::combine) combine;
  decltype(&Rows<4>::blur) blur;
  decltype(&Rows<4>::mix) mix;
};
template <int Part>
constexpr PartFunctions functions_of() {
  using R = Rows<Part>;
  return {R::slice,  R::splat, R::slice_grid, R::splat_grid, R::remove_self,
          R::gather, R::copy,  R::combine,    R::blur,       R::mix};
}

// The parts of a row, from left to right.
struct Parts {
  static constexpr bool kFloat = sizeof(Real) == 4;
  static constexpr int kMost = kFloat ? 32 : 16;
  int first, left;
  explicit Parts(int padded) : first(0), left(padded) {}
  explicit operator bool() const { return left > 0; }
  void next() { first += kMost, left -= kMost; }
  const PartFunctions& functions() const {
    static constexpr PartFunctions of_4 = functions_of<4>(), of_8 = functions_of<kFloat ? 8 : 4>(),
                                   of_16 = functions_of<16>(),
                                   of_20 = functions_of<kFloat ? 20 : 16>(),
                                   of_24 = functions_of<kFloat ? 24 : 16>(),
                                   of_32 = functions_of<kFloat ? 32 : 16>();
    switch (left) {
      case 4: return of_4;
      case 8: return of_8;
      case 16: return of_16;
      case 20: return of_20;
      case 24: return of_24;
      default: return of_32;
    }
  }
};

Line line_of(const TilePass<Real>& a, bool with_splat_weights, int y) {
  const int64_t at = int64_t(y) * a.width * a.entries;
  return {a.rows + at, (with_splat_weights ? a.splat : a.slice) + at, a.width, a.entries, a.stride};
}

// All lattices at one line of a tile.
void slice_all(const TilePass<Real>& a, const Real* lattice, bool with_splat_weights, int y,
               Real* rows) {
  for (Parts part(a.padded); part; part.next()) {
    const PartFunctions& functions = part.functions();
    bool fresh = true;
    for (const GridPass<Real>& grid : a.grids) {
      const Real* const* const weights = with_splat_weights ? grid.splat : grid.slice;
      functions.slice_grid(grid, lattice + part.first, weights[0], weights[1], y, a.width, a.stride,
                           fresh, rows + part.first);
      fresh = false;
    }
    if (a.entries)
      functions.slice(line_of(a, with_splat_weights, y), lattice + part.first, fresh,
                      rows + part.first);
  }
}
void splat_all(const TilePass<Real>& a, const Real* rows, bool with_slice_weights, int y,
               Real* lattice) {
  for (Parts part(a.padded); part; part.next()) {
    const PartFunctions& functions = part.functions();
    for (const GridPass<Real>& grid : a.grids) {
      const Real* const* const weights = with_slice_weights ? grid.slice : grid.splat;
      functions.splat_grid(grid, rows + part.first, weights[0], weights[1], y, a.width, a.stride,
                           lattice + part.first);
    }
    if (a.entries)
      functions.splat(line_of(a, !with_slice_weights, y), rows + part.first, lattice + part.first);
  }
}

// `from` holds the tile's pixels as they contributed.
void remove_self(const TilePass<Real>& a, const Real* from, const Real* matrix, int y, Real* rows) {
  const int64_t first = int64_t(y) * a.width;
  const Real* const own = from + first * a.padded;
  for (Parts part(a.padded); part; part.next())
    part.functions().remove_self(a.self + first, own + part.first, own, a.padded,
                                 matrix ? matrix + part.first : nullptr, a.classes, a.width,
                                 a.stride, rows + part.first);
}

// Rows of a lattice are `padded` apart, those of a tile `stride`.
void gather(const Real* values, const int32_t* vertices, int64_t count, int padded, int stride,
            Real* to) {
  for (Parts part(padded); part; part.next())
    part.functions().gather(values + part.first, vertices, count, padded, stride, to + part.first);
}
void pack(const Real* rows, int64_t count, int padded, int stride, Real* to) {
  for (Parts part(padded); part; part.next())
    part.functions().copy(rows + part.first, count, stride, padded, to + part.first);
}

// Keeps one line of a tile's pixels for `remove_self`.
void keep(const TilePass<Real>& a, const Real* rows, int y, Real* to) {
  pack(rows, a.width, a.padded, a.stride, to + int64_t(y) * a.width * a.padded);
}

// Planes of fewer pixels than a vector holds, filled up with zeros. Not in the loop of `logits_of`:
// the calls of memcpy there, four of them, would make clang save vectors.
void copy_edge(const Real* from, int64_t plane, int count, int classes, Real* planes) {
  for (int c = 0; c < classes; ++c) {
    std::memset(planes + kRegister * c, 0, kRegister * sizeof(Real));
    std::memcpy(planes + kRegister * c, from + c * plane, count * sizeof(Real));
  }
}

// Logits of kRegister pixels, from `pixel` of the image's planes on, as one vector per class;
// `rows` are the pixels' messages, null in the first pass. Returns the largest of each pixel.
PYSEG_INLINE Pixels logits_of(const TilePass<Real>& a, const Real* rows, int64_t pixel, int count,
                              Real* planes) {
  const int classes = a.classes;
  const Real* unary = a.unary + pixel;
  int64_t plane = a.plane;
  if (count < kRegister) {
    copy_edge(unary, plane, count, classes, planes);
    unary = planes;
    plane = kRegister;
  }
  Pixels largest = broadcast<kRegister>(std::numeric_limits<Real>::lowest()), bad{};
  for (int c = 0; c < classes; c += 4) {
    Pixels v[4]{};
    if (rows) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        v[i] = load_quarters<kRegister>(rows + i * a.stride + c, a.stride);
      transpose_quarters<kRegister>(v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, unary += plane) {
      if (c + i == classes) break;
      const Pixels energy = load<kRegister>(unary), logit = v[i] - energy;
      __builtin_prefetch(unary + a.image_width, 0, 2);  // the line below
      if (!rows) bad += energy * Real(0);
      largest = larger<kRegister>(largest, logit);
      store<kRegister>(planes + kRegister * (c + i), logit);
    }
  }
  if (!rows && a.not_finite)
    for (int i = 0; i < kRegister; ++i)
      if (bad[i] != bad[i]) *a.not_finite = true;
  return largest;
}

// Logits become their exponentials, less the largest. Returns their sums.
PYSEG_INLINE Pixels exponentials(Pixels largest, int classes, Real* planes) {
  Pixels sum{};
  for (int c = 0; c < classes; ++c) {
    const Pixels e = exponential<kRegister>(load<kRegister>(planes + kRegister * c) - largest);
    sum += e;
    store<kRegister>(planes + kRegister * c, e);
  }
  return sum;
}

// What `to_rows` takes beyond the classes.
PYSEG_INLINE void clear_padding(int classes, Real* planes) {
  for (int c = classes; c % 4; ++c) store<kRegister>(planes + kRegister * c, Pixels{});
}

// One mean-field update of a tile: slice every lattice, softmax, splat into every lattice.
void tile(const TilePass<Real>& a) {
  Real *const rows = a.buffer, *const planes = rows + kTileWidth * a.stride;
  clear_padding(a.classes, planes);
  for (int y = 0; y < a.height; ++y) {
    if (a.in) {
      slice_all(a, a.in, false, y, rows);
      if (a.self) remove_self(a, a.before, a.matrix, y, rows);
    }
    for (int x = 0; x < a.width; x += kRegister) {
      const int64_t pixel = y * a.image_width + x;
      const int count = std::min(kRegister, a.width - x);
      const Real* const messages = a.in ? rows + x * a.stride : nullptr;
      const Pixels largest = logits_of(a, messages, pixel, count, planes);
      const Pixels scale = Real(1) / exponentials(largest, a.classes, planes);
      if (a.q) {
        Real* to = a.q + pixel;
        for (int c = 0; c < a.classes; ++c, to += a.plane)
          store_some(to, load<kRegister>(planes + kRegister * c) * scale, count);
      }
      if (a.out) to_rows(planes, scale, a.classes, rows + x * a.stride, a.stride);
    }
    if (!a.out) continue;
    if (a.self) keep(a, rows, y, a.after);
    splat_all(a, rows, false, y, a.out);
  }
}

// The same, backwards: slice the messages and, with the weights of the splat, the gradients;
// softmax; splat with the weights of the slice.
void tile_backward(const TileBackward<Real>& a) {
  const TilePass<Real>& pass = a.pass;
  const int classes = pass.classes;
  Real *const logits = pass.buffer, *const slopes = logits + kTileWidth * pass.stride;
  Real *const planes = slopes + kTileWidth * pass.stride, *const gradients =
                                                              planes + kRegister * pass.stride;
  for (int y = 0; y < pass.height; ++y) {
    if (pass.in) slice_all(pass, pass.in, false, y, logits);
    if (a.back) slice_all(pass, a.back, true, y, slopes);
    if (pass.in && pass.self) remove_self(pass, pass.before, pass.matrix, y, logits);
    if (a.back && pass.self) remove_self(pass, a.kept, a.transposed, y, slopes);
    for (int x = 0; x < pass.width; x += kRegister) {
      const int64_t pixel = y * pass.image_width + x;
      const int count = std::min(kRegister, pass.width - x);
      const Real* const messages = pass.in ? logits + x * pass.stride : nullptr;
      const Pixels largest = logits_of(pass, messages, pixel, count, planes);
      if (a.back) to_planes(slopes + x * pass.stride, pass.stride, classes, gradients);
      const Pixels scale = Real(1) / exponentials(largest, classes, planes);
      if (!a.back)
        for (int c = 0; c < classes; ++c)
          store<kRegister>(gradients + kRegister * c,
                           load_some(a.gradient + c * pass.plane + pixel, count));
      Pixels mean{};
      for (int c = 0; c < classes; ++c)
        mean = fused<kRegister>(load<kRegister>(planes + kRegister * c),
                                load<kRegister>(gradients + kRegister * c), mean);
      mean *= scale;
      for (int c = 0; c < classes; ++c) {
        Real* const to = a.unary_gradient + c * pass.plane + pixel;
        const Pixels slope = load<kRegister>(planes + kRegister * c) * scale *
                             (load<kRegister>(gradients + kRegister * c) - mean);
        store<kRegister>(planes + kRegister * c, slope);
        store_some(to, (a.back ? load_some(to, count) : Pixels{}) - slope, count);
      }
      if (!pass.out) continue;
      clear_padding(classes, planes);
      to_rows(planes, broadcast<kRegister>(Real(1)), classes, logits + x * pass.stride,
              pass.stride);
    }
    if (!pass.out) continue;
    if (pass.self) keep(pass, logits, y, a.kept);
    splat_all(pass, logits, true, y, pass.out);
  }
}

void splat_tile(const TilePass<Real>& a) {
  Real *const rows = a.buffer, *const planes = rows + kTileWidth * a.stride;
  clear_padding(a.classes, planes);
  for (int y = 0; y < a.height; ++y) {
    for (int x = 0; x < a.width; x += kRegister) {
      const Real* const from = a.unary + y * a.image_width + x;
      const int count = std::min(kRegister, a.width - x);
      for (int c = 0; c < a.classes; ++c)
        store<kRegister>(planes + kRegister * c, load_some(from + c * a.plane, count));
      to_rows(planes, broadcast<kRegister>(Real(1)), a.classes, rows + x * a.stride, a.stride);
    }
    splat_all(a, rows, false, y, a.out);
  }
}

void slice_tile(const TilePass<Real>& a) {
  Real *const rows = a.buffer, *const planes = rows + kTileWidth * a.stride;
  for (int y = 0; y < a.height; ++y) {
    slice_all(a, a.in, false, y, rows);
    for (int x = 0; x < a.width; x += kRegister) {
      Real* const to = a.q + y * a.image_width + x;
      const int count = std::min(kRegister, a.width - x);
      to_planes(rows + x * a.stride, a.stride, a.classes, planes);
      for (int c = 0; c < a.classes; ++c)
        store_some(to + c * a.plane, load<kRegister>(planes + kRegister * c), count);
    }
  }
}

void combine(const Real* partial, const int32_t* starts, const int32_t* rows, int64_t begin,
             int64_t end, int padded, Real* values) {
  for (Parts part(padded); part; part.next())
    part.functions().combine(partial + part.first, starts, rows, begin, end, padded,
                             values + part.first);
}

void blur(Real* values, const Link* links, const Link* end, bool transposed, Real side,
          int padded) {
  for (Parts part(padded); part; part.next())
    part.functions().blur(values + part.first, links, end, transposed, side, padded);
}

// values = factor * matrix^T values; matrix [classes, stride], or null for the identity
void mix(Real* values, const Real* matrix, Real factor, int64_t count, int padded, int stride,
         int classes) {
  Real row[kMaxClasses];
  for (int64_t v = 0; v < count; ++v, values += padded) {
    if (matrix) std::copy_n(values, classes, row);
    for (Parts part(padded); part; part.next())
      part.functions().mix(matrix ? matrix + part.first : nullptr, factor, row, stride, classes,
                           values + part.first);
  }
}

// products[i, j] += sum of a[v, i] * b[v, j] over rows that are `padded` apart; `matrix` false:
// only their trace, into products[0]. With `factors`, `apart` each, of the rows.
void add_products(const Real* a, const Real* b, const Real* factors, int apart, int64_t count,
                  int padded, int classes, bool matrix, Real* products) {
  for (int64_t v = 0; v < count; ++v, a += padded, b += padded) {
    const Real of_row = factors ? factors[v * apart] : 1;
    if (matrix) {
      for (int i = 0; i < classes; ++i) {
        Real* const row = products + i * classes;
        const Real factor = of_row * a[i];
#pragma omp simd
        for (int j = 0; j < classes; ++j) row[j] += factor * b[j];
      }
    } else {
      Quarter sum{};  // padding holds 0
      for (int j = 0; j < padded; j += 4) sum += load<4>(a + j) * load<4>(b + j);
      products[0] += of_row * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
}

// The smallest and largest of n values; false where one is not finite.
bool range_of(const Real* values, int64_t n, double& low, double& high) {
  Pixels least = broadcast<kRegister>(values[0]), most = least, bad{};
  int64_t step = kRegister;
  for (int64_t i = 0; i < n; i += step) {
    if (n - i < kRegister) step = 1;
    const Pixels v = step == 1 ? broadcast<kRegister>(values[i]) : load<kRegister>(values + i);
    least = v < least ? v : least;
    most = larger<kRegister>(v, most);
    bad += v * Real(0);
  }
  low = least[0], high = most[0];
  bool finite = true;
  for (int lane = 0; lane < kRegister; ++lane) {
    low = std::min(low, double(least[lane])), high = std::max(high, double(most[lane]));
    finite = finite && bad[lane] == 0;
  }
  return finite;
}

// `find_simplex` of dense_crf.h, of as many points as a register holds and to the same bits: of its
// comparisons g++ makes branches where there are no masks.
using Integers = decltype(Pixels{} < Pixels{});  // a comparison gives -1 where it holds

template <int D>
PYSEG_INLINE void find_simplices(const Pixels (&feature)[D], Pixels (&weight)[D + 1],
                                 Integers (&first)[D], Integers (&rank)[D + 1]) {
  constexpr Real kRound = sizeof(Real) == 4 ? Real(12582912.0) : Real(6755399441055744.0);
  Pixels offset[D + 1], quotient[D + 1], sum{}, excess{};
#pragma GCC unroll 9
  for (int i = D; i > 0; --i) {
    offset[i] = sum - Real(i) * feature[i - 1];
    sum += feature[i - 1];
  }
  offset[0] = sum;
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) {
    quotient[i] = (offset[i] + kRound) - kRound;
    offset[i] -= quotient[i];
    excess += quotient[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) rank[i] = __builtin_convertvector(excess, Integers);
#pragma GCC unroll 9
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 9
    for (int j = i + 1; j <= D; ++j) {
      const Integers less = offset[i] < offset[j];
      rank[i] -= less;
      rank[j] += less + 1;
    }
#pragma GCC unroll 9
  for (int i = 0; i <= D; ++i) {
    const Integers step = (rank[i] > D) - (rank[i] < 0);
    rank[i] += step * (D + 1);
    offset[i] -= __builtin_convertvector(step, Pixels);
    if (i < D) first[i] = __builtin_convertvector(quotient[i], Integers) + step;
  }
  Pixels sorted[D + 1];
#pragma GCC unroll 9
  for (int r = 0; r <= D; ++r) {
    sorted[r] = Pixels{};
#pragma GCC unroll 9
    for (int i = 0; i <= D; ++i) sorted[r] += (Pixels)((rank[i] == r) & (Integers)offset[i]);
  }
  weight[0] = Real(1) + sorted[D] - sorted[0];
#pragma GCC unroll 9
  for (int k = 1; k <= D; ++k) weight[k] = sorted[D - k] - sorted[D + 1 - k];
}

// Names have 64 bits: half as many fit into a register.
constexpr int kHalf = kRegister / 2;
using Names = Vector<uint64_t, kHalf>;

// Half: a parameter, as clang looks into branches that depend on none.
template <int First, int Half = kHalf>
PYSEG_INLINE Names widened(Integers v) {
  using Signed = Vector<int64_t, Half>;
  if constexpr (Half == 2)
    return (Names) __builtin_convertvector(__builtin_shufflevector(v, v, First, First + 1), Signed);
  else if constexpr (Half == 4)
    return (Names) __builtin_convertvector(
        __builtin_shufflevector(v, v, First, First + 1, First + 2, First + 3), Signed);
  else
    return (Names) __builtin_convertvector(
        __builtin_shufflevector(v, v, First, First + 1, First + 2, First + 3, First + 4, First + 5,
                                First + 6, First + 7),
        Signed);
}

// `name_simplex` of dense_crf.h, of kHalf points from `First` on; one vertex after the other.
template <int D, int First>
PYSEG_INLINE void name_half(const Integers (&first)[D], const Integers (&rank)[D + 1],
                            const VertexNames& names, uint64_t* to) {
  Names name{};
#pragma GCC unroll 9
  for (int i = 0; i < D; ++i)  // a unit is a power of 2
    name += widened<First>(first[i] - names.low[i]) << __builtin_ctzll(names.unit[i]);
  store<kHalf>(to + First, name);
#pragma GCC unroll 9
  for (int k = 1; k <= D; ++k) {
    Names step{};
#pragma GCC unroll 9
    for (int i = 0; i < D; ++i) step |= widened<First>(rank[i] == D + 1 - k) & names.unit[i];
    name += 1 - step;
    store<kHalf>(to + k * kTileWidth + First, name);
  }
}

// Up to kTileWidth points; whole vectors of them are read and written.
template <int D>
void locate_run(const Real* features, const VertexNames& vertex_names, int points, Real* weights,
                uint64_t* vertices) {
  const VertexNames names = vertex_names;  // a copy, which no store of the loop can change
  for (int p = 0; p < points; p += kRegister) {
    Pixels feature[D], weight[D + 1];
    Integers first[D], rank[D + 1];
#pragma GCC unroll 9
    for (int i = 0; i < D; ++i) feature[i] = load<kRegister>(features + i * kTileWidth + p);
    find_simplices<D>(feature, weight, first, rank);
#pragma GCC unroll 9
    for (int k = 0; k <= D; ++k) store<kRegister>(weights + k * kTileWidth + p, weight[k]);
    name_half<D, 0>(first, rank, names, vertices + p);
    name_half<D, kHalf>(first, rank, names, vertices + p);
  }
}

}  // namespace

template <>
LevelFunctions<PYSEG_REAL> functions<PYSEG_REAL>() {
  return {kRegister,
          tile,
          tile_backward,
          gather,
          pack,
          combine,
          blur,
          mix,
          splat_tile,
          slice_tile,
          add_products,
          range_of,
          {locate_run<1>, locate_run<2>, locate_run<3>, locate_run<4>, locate_run<5>, locate_run<6>,
           locate_run<7>, locate_run<8>}};
}

}  // namespace pyseg::crf::PYSEG_LEVEL
