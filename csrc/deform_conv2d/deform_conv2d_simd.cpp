// The inner loops of deformable convolution on the CPU, in vectors of the compiler. The element
// types of a unit are PYSEG_REAL and, of float's, the half precisions.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "corners.h"
#include "deform_conv2d_simd.h"

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpragma-clang-attribute"  // the target is set twice
#endif
#include "../common/level.h"  // after all others

#ifdef PYSEG_AVX512
// With dot products of bfloat16, which no compiler makes of other code: what uses them is only
// called where the processor has them.
#define PYSEG_BF16
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4,avx512bf16"))), \
                             apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC target("avx512bf16")
#endif
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::deformable::PYSEG_LEVEL {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "../common/vectors_simd.h"
#include "../common/transpose_simd.h"

// Rows of a product at a time: as many sums as fit the registers, two vectors each.
#if defined(PYSEG_AVX512)
#define PYSEG_ROWS 12
#elif defined(PYSEG_AVX2)
#define PYSEG_ROWS 6
#else
#define PYSEG_ROWS 4
#endif

template <class T>
PYSEG_INLINE T sum(Vector<T> v) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// What a product multiplies: numbers, or pairs of bfloat16 in the bits of a float.
template <class T>
struct Numbers {
  static PYSEG_INLINE Vector<T> add_product(Vector<T> a, Vector<T> b, Vector<T> c) {
    return fma(a, b, c);
  }
};
#ifdef PYSEG_BF16
struct Pairs {
  static PYSEG_INLINE Vector<float> add_product(Vector<float> a, Vector<float> b, Vector<float> c) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Kind, int Width, class T>
PYSEG_INLINE void multiply_panel(int64_t depth, const T* a, int64_t am, int64_t ak, const T* b,
                                 int64_t bk, const T* start, int64_t sm, T* c, int64_t cm) {
  Vector<T> sums[PYSEG_ROWS][Width];
#pragma GCC unroll 12
  for (int m = 0; m < PYSEG_ROWS; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < Width; ++n) sums[m][n] = load(start + m * sm + n * kLanes<T>);
  for (int64_t k = 0; k < depth; ++k, a += ak, b += bk) {
    Vector<T> right[Width];
#pragma GCC unroll 2
    for (int n = 0; n < Width; ++n) right[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 12
    for (int m = 0; m < PYSEG_ROWS; ++m) {
      const Vector<T> left = broadcast(a[m * am]);
#pragma GCC unroll 2
      for (int n = 0; n < Width; ++n) sums[m][n] = Kind::add_product(left, right[n], sums[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < PYSEG_ROWS; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < Width; ++n) store(c + m * cm + n * kLanes<T>, sums[m][n]);
}

// c[m, n] = start[m * sm + n] + sum over k of a[m * am + k * ak] b[k * bk + n], for whole groups of
// rows and whole vectors of columns.
template <class Kind, class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t am, int64_t ak,
              const T* b, int64_t bk, const T* start, int64_t sm, T* c, int64_t cm) {
  int64_t n = 0;
  for (; n + 2 * kLanes<T> <= columns; n += 2 * kLanes<T>)
    for (int64_t m = 0; m < rows; m += PYSEG_ROWS)
      multiply_panel<Kind, 2>(depth, a + m * am, am, ak, b + n, bk, start + m * sm + n, sm,
                              c + m * cm + n, cm);
  if (n < columns)
    for (int64_t m = 0; m < rows; m += PYSEG_ROWS)
      multiply_panel<Kind, 1>(depth, a + m * am, am, ak, b + n, bk, start + m * sm + n, sm,
                              c + m * cm + n, cm);
}

// Columns as the arithmetic has them, or as the bits of bfloat16.
template <class T>
PYSEG_INLINE Vector<T> load_wide(const T* from) {
  return load(from);
}
template <class T>
PYSEG_INLINE void store_narrow(T* to, Vector<T> value) {
  store(to, value);
}
#ifdef PYSEG_BF16
PYSEG_INLINE Vector<float> load_wide(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
PYSEG_INLINE void store_narrow(uint16_t* to, Vector<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#endif

// Corners and weights of every tap at the pixels of a tile.
template <class T, class Real>
void locate(const T* offset,  // [taps, 2, plane], from the tile's first pixel on
            const T* mask,    // [taps, plane], or null
            int64_t plane, const Taps& taps, const Real* base_y, const Real* base_x, int count,
            const Samples<Real>& samples) {
  for (int t = 0; t < taps.count; ++t) {
    const T* __restrict offset_y = offset + 2 * t * plane;
    const T* __restrict offset_x = offset_y + plane;
    const T* __restrict modulation = mask ? mask + t * plane : nullptr;
    const Real tap_y = Real(t / taps.width * taps.dilation_y);
    const Real tap_x = Real(t % taps.width * taps.dilation_x);
    int32_t* __restrict index = samples.index(0, t);
    Real* __restrict weight = samples.weight(0, t);
    Real* __restrict ty = samples.ty(t);
    Real* __restrict tx = samples.tx(t);
    Real* __restrict scale = samples.scale(t);
    for (int p = 0; p < count; ++p) scale[p] = modulation ? Real(modulation[p]) : Real(1);
    for (int p = 0; p < count; ++p) {
      const Corners<Real> c =
          corners(base_y[p] + tap_y + Real(offset_y[p]), base_x[p] + tap_x + Real(offset_x[p]),
                  taps.input_height, taps.input_width, taps.input_height * taps.input_width);
      const Real top = (1 - c.ty) * scale[p], bottom = c.ty * scale[p];
      index[p] = c.index[0], index[kTile + p] = c.index[1];
      index[2 * kTile + p] = c.index[2], index[3 * kTile + p] = c.index[3];
      weight[p] = top * (1 - c.tx), weight[kTile + p] = top * c.tx;
      weight[2 * kTile + p] = bottom * (1 - c.tx), weight[3 * kTile + p] = bottom * c.tx;
      ty[p] = c.ty, tx[p] = c.tx;
    }
  }
}

// The columns of a tile: columns[p, t * width + c], channel c of a block at tap t of pixel p. A
// vector that overlaps the next tap is written before that tap; rows have room for one more.
template <class Real, class Column>
void gather(const Column* block,  // [input pixels + 1, width]
            int64_t width, const Samples<Real>& samples, int count, Column* columns,
            int64_t stride) {
  for (int t = 0; t < samples.taps; ++t) {
    const int32_t* index = samples.index(0, t);
    const Real* weight = samples.weight(0, t);
    Column* to = columns + t * width;
    for (int p = 0; p < count; ++p, to += stride) {
      const Column* p0 = block + index[p] * width;
      const Column* p1 = block + index[kTile + p] * width;
      const Column* p2 = block + index[2 * kTile + p] * width;
      const Column* p3 = block + index[3 * kTile + p] * width;
      const Vector<Real> w0 = broadcast(weight[p]), w1 = broadcast(weight[kTile + p]);
      const Vector<Real> w2 = broadcast(weight[2 * kTile + p]);
      const Vector<Real> w3 = broadcast(weight[3 * kTile + p]);
      for (int64_t c = 0; c < width; c += kLanes<Real>)
        store_narrow(to + c, fma(w3, load_wide(p3 + c),
                                 fma(w2, load_wide(p2 + c),
                                     fma(w1, load_wide(p1 + c), w0 * load_wide(p0 + c)))));
    }
  }
}

// From the gradient of the columns: the columns again, the gradient of the block, and per tap and
// pixel the products of the column's gradient with each of its four corners, [taps, 4, kTile].
template <class Real>
void scatter(const Real* block,  // [input pixels + 1, width]
             int64_t width, const Samples<Real>& samples, int count,
             const Real* column_gradients,  // [count, stride]
             Real* columns,                 // [count, stride]
             int64_t stride, Real* block_gradients, Real* products) {
  typedef std::conditional_t<sizeof(Real) == 4, int32_t, int64_t> Integer;
  Vector<Integer> lane;
  for (int i = 0; i < kLanes<Real>; ++i) lane[i] = i;
  const int64_t whole = width / kLanes<Real> * kLanes<Real>;
  // Lanes from here on belong to the next pixel, or to the next tap.
  const Vector<Integer> inside = lane < (Vector<Integer>{} + Integer(width - whole));
  for (int t = 0; t < samples.taps; ++t) {
    const int32_t* index = samples.index(0, t);
    const Real* weight = samples.weight(0, t);
    Real* product = products + int64_t(t) * 4 * kTile;
    for (int p = 0; p < count; ++p) {
      const Real* g = column_gradients + p * stride + t * width;
      Real* to = columns + p * stride + t * width;
      int64_t at[4];
      Vector<Real> w[4], dots[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        at[i] = index[i * kTile + p] * width;
        w[i] = broadcast(weight[i * kTile + p]);
        dots[i] = Vector<Real>{};
      }
      for (int64_t c = 0; c < whole; c += kLanes<Real>) {
        const Vector<Real> gradient = load(g + c);
        Vector<Real> column{};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector<Real> value = load(block + at[i] + c);
          dots[i] = fma(gradient, value, dots[i]);
          column = fma(w[i], value, column);
        }
        store(to + c, column);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Real* target = block_gradients + at[i] + c;
          store(target, fma(w[i], gradient, load(target)));
        }
      }
      if (whole < width) {
        const Vector<Real> gradient = load(g + whole);
        Vector<Real> column{};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector<Real> value = load(block + at[i] + whole);
          const Vector<Real> product = gradient * value;
          dots[i] += inside ? product : Vector<Real>{};
          column = fma(w[i], value, column);
        }
        store(to + whole, column);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Real* target = block_gradients + at[i] + whole;
          const Vector<Real> product = w[i] * gradient;
          store(target, load(target) + (inside ? product : Vector<Real>{}));
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) product[i * kTile + p] = sum<Real>(dots[i]);
    }
  }
}

// Gradients of offsets and mask, [taps, 3, plane] from the tile's first pixel on, of one block.
template <class Real>
void offset_gradients(const Samples<Real>& samples, int count, const Real* products,
                      Real* gradients, int64_t plane) {
  for (int t = 0; t < samples.taps; ++t) {
    const Real* __restrict s = products + int64_t(t) * 4 * kTile;
    const Real* __restrict ty = samples.ty(t);
    const Real* __restrict tx = samples.tx(t);
    const Real* __restrict scale = samples.scale(t);
    Real* __restrict to = gradients + 3 * t * plane;
    for (int p = 0; p < count; ++p) {
      const Real s0 = s[p], s1 = s[kTile + p], s2 = s[2 * kTile + p], s3 = s[3 * kTile + p];
      const Real top = s0 + tx[p] * (s1 - s0), bottom = s2 + tx[p] * (s3 - s2);
      to[p] = scale[p] * (bottom - top);
      to[plane + p] = scale[p] * ((s1 - s0) + ty[p] * ((s3 - s2) - (s1 - s0)));
      to[2 * plane + p] = top + ty[p] * (bottom - top);
    }
  }
}

template <class T>
Functions<T, WorkType<T>> functions() {
  using Real = WorkType<T>;
  Functions<T, Real> f;
  f.locate = &locate<T, Real>;
  f.gather = &gather<Real, Real>;
  f.multiply = &multiply<Numbers<Real>, Real>;
  f.scatter = &scatter<Real>;
  f.offset_gradients = &offset_gradients<Real>;
  f.transpose_in = &transpose<Real, T, Real>;
  f.transpose_out = &transpose<Real, Real, T>;
#ifdef PYSEG_BF16
  if constexpr (std::is_same_v<T, BFloat16>)
    if (__builtin_cpu_supports("avx512bf16")) {
      f.gather_pairs = &gather<float, uint16_t>;
      f.multiply_pairs = &multiply<Pairs, float>;
      f.transpose_bits = &transpose<uint16_t, uint16_t, uint16_t>;
    }
#endif
  return f;
}

#ifdef PYSEG_REAL_DOUBLE
template Functions<double, double> functions<double>();
#else
template Functions<float, float> functions<float>();
template Functions<Half, float> functions<Half>();
template Functions<BFloat16, float> functions<BFloat16>();
#endif

}  // namespace pyseg::deformable::PYSEG_LEVEL
