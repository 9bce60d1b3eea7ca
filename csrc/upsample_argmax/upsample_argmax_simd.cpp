// The inner loops of upsample_argmax on the CPU, in vectors of the compiler: it does not keep such
// arrays in registers by itself. PYSEG_REAL is the type of the arithmetic.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstring>
#include <utility>

#include "upsample_argmax.h"
#include "upsample_argmax_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::upsampling::PYSEG_LEVEL {

#include "../common/vectors_simd.h"

#include "../common/transpose_simd.h"

template <class T>
using Label = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

#if defined(PYSEG_AVX512)
constexpr int kRowsAtOnce = 8;  // as many running maxima and labels as fit the registers
PYSEG_INLINE Vector<float> permute(Vector<float> v, Vector<int32_t> lanes) {
  return (Vector<float>)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
}
#elif defined(PYSEG_AVX2)
constexpr int kRowsAtOnce = 4;
PYSEG_INLINE Vector<float> permute(Vector<float> v, Vector<int32_t> lanes) {
  return (Vector<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
}
#else
constexpr int kRowsAtOnce = 4;
#endif

template <class In, class T>
bool load_rows(const void* logits, int64_t first, int64_t class_stride, int64_t column_stride,
               int64_t classes, int64_t width, T* __restrict out, int64_t stride) {
  const In* __restrict in = static_cast<const In*>(logits) + first;
  int wild = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const In* __restrict source = in + c * class_stride;
    T* __restrict row = out + c * stride;
    if (column_stride == 1)
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x]);
    else
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x * column_stride]);
    for (int64_t x = 0; x < width; ++x) wild |= tame(row[x]) ? 0 : 1;
  }
  return wild == 0;
}

// Applies tx to a tile of output columns: the value on the upper row of logits, and its slope
// towards the lower one, both [C, kTile].
template <class T>
void expand(const T* __restrict top,     // [C, stride]
            const T* __restrict bottom,  // [C, stride]
            int64_t stride, int64_t classes, const int* low, const T* tx, int64_t tile,
            T* __restrict value, T* __restrict slope) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t x = 0; x < tile; x += kWidth) {
#if defined(PYSEG_AVX512) || defined(PYSEG_AVX2)
    const int64_t base = low[x];
    if (low[x + kWidth - 1] + 1 - base < kWidth) {
      const Vector<int32_t> left = load(low + x) - int32_t(base), right = left + 1;
      const Vector<T> t = load(tx + x);
      for (int64_t c = 0; c < classes; ++c) {
        const Vector<T> p = load(top + c * stride + base), q = load(bottom + c * stride + base);
        const Vector<T> p0 = permute(p, left), p1 = permute(p, right);
        const Vector<T> q0 = permute(q, left), q1 = permute(q, right);
        const Vector<T> a = fma(t, p1 - p0, p0), b = fma(t, q1 - q0, q0);
        store(value + c * kTile + x, a);
        store(slope + c * kTile + x, b - a);
      }
      continue;
    }
#endif
    for (int64_t c = 0; c < classes; ++c) {
      for (int k = 0; k < kWidth; ++k) {
        const T *p = top + c * stride + low[x + k], *q = bottom + c * stride + low[x + k];
        const T a = p[0] + tx[x + k] * (p[1] - p[0]), b = q[0] + tx[x + k] * (q[1] - q[0]);
        value[c * kTile + x + k] = a;
        slope[c * kTile + x + k] = b - a;
      }
    }
  }
}

// The larger of tame numbers.
template <class V>
PYSEG_INLINE V larger(V a, V b) {
#ifdef PYSEG_AVX2
  return (V)_mm256_max_ps((__m256)a, (__m256)b);  // a selection takes three times as long
#elif defined(__SSE2__) && !defined(PYSEG_AVX512)
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm_max_ps((__m128)a, (__m128)b);
#endif
  return a > b ? a : b;
}

// Labels as Out. Compilers without an instruction for it take the vector apart.
template <class T, class Out>
PYSEG_INLINE void store_labels(Out* to, Vector<Label<T>> labels) {
#if defined(PYSEG_AVX2)
  const __m256i wide = (__m256i)labels;
  const __m128i shorts =
      _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  if constexpr (sizeof(Out) == 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), shorts);
  else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(shorts, shorts));
#elif defined(__SSE2__) && !defined(PYSEG_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m128i shorts = _mm_packs_epi32((__m128i)labels, (__m128i)labels);
    if constexpr (sizeof(Out) == 2) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), shorts);
    } else {
      const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
      std::memcpy(to, &bytes, 4);
    }
  } else {
    for (int i = 0; i < kLanes<T>; ++i) to[i] = Out(labels[i]);
  }
#else
  store<kLanes<T>>(to, __builtin_convertvector(labels, Vector<Out, int(kLanes<T>)>));
#endif
}

template <int Rows, class T, class Out>
PYSEG_INLINE void classify_rows(const T* value, const T* slope, int64_t stride, int64_t classes,
                                const T* ty, int64_t width, Out* labels, int64_t label_stride) {
  for (int64_t x = 0; x < width; x += kLanes<T>) {
    const Vector<T> first = load(value + x), first_slope = load(slope + x);
    Vector<T> best[Rows];
    Vector<Label<T>> index[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      best[r] = fma(broadcast(ty[r]), first_slope, first), index[r] = Vector<Label<T>>{};
    for (int64_t c = 1; c < classes; ++c) {
      const Vector<T> p = load(value + c * stride + x), s = load(slope + c * stride + x);
      const Vector<Label<T>> label = broadcast(Label<T>(c));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vector<T> v = fma(broadcast(ty[r]), s, p);
        const auto greater = v > best[r];
        best[r] = larger(v, best[r]);
        index[r] = greater ? label : index[r];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) store_labels<T>(labels + r * label_stride + x, index[r]);
  }
}

// The first class of the largest value + ty * slope, for `rows` values of ty (readable up to 8).
template <class T, class Out>
void classify(const T* value,  // [C, stride]
              const T* slope,  // [C, stride]
              int64_t stride, int64_t classes, const T* ty, int rows,
              int64_t width,  // a multiple of 16
              Out* labels,    // [8, label_stride]; more than `rows` may be written
              int64_t label_stride) {
  for (int r = 0; r < rows;) {
    const T* t = ty + r;
    Out* out = labels + r * label_stride;
    if (rows - r == 1) {
      classify_rows<1>(value, slope, stride, classes, t, width, out, label_stride), r += 1;
    } else if (rows - r <= 4) {
      classify_rows<4>(value, slope, stride, classes, t, width, out, label_stride), r += 4;
    } else {
      classify_rows<kRowsAtOnce>(value, slope, stride, classes, t, width, out, label_stride);
      r += kRowsAtOnce;
    }
  }
}

template <class In, class Out>
Functions<WorkType<In>, Out> functions() {
  using T = WorkType<In>;
  return {&load_rows<In, T>, &expand<T>, &classify<T, Out>};
}

#ifdef PYSEG_REAL_DOUBLE
template Functions<PYSEG_REAL, uint8_t> functions<double, uint8_t>();
template Functions<PYSEG_REAL, int16_t> functions<double, int16_t>();
#else
template Functions<float, uint8_t> functions<float, uint8_t>();
template Functions<float, int16_t> functions<float, int16_t>();
template Functions<float, uint8_t> functions<torch::headeronly::Half, uint8_t>();
template Functions<float, int16_t> functions<torch::headeronly::Half, int16_t>();
template Functions<float, uint8_t> functions<torch::headeronly::BFloat16, uint8_t>();
template Functions<float, int16_t> functions<torch::headeronly::BFloat16, int16_t>();
#endif

}  // namespace pyseg::upsampling::PYSEG_LEVEL
