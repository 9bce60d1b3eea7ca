// Fused multiplication and addition, and transposes, in vectors of a register of the level.
// Included after vectors_simd.h, inside the namespace of the level; needs immintrin.h and <utility>
// before level.h, and torch's half types.

// The compiler must not contract a * b + c in this package, so it is spelled out. Levels therefore
// differ in the last bits.
#if defined(PYSEG_AVX512)
PYSEG_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(PYSEG_AVX2)
PYSEG_INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
template <class V>
PYSEG_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

PYSEG_INLINE float widen(torch::headeronly::BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t(x.x) << 16);
}
// Without branches and tables, so that it vectorises: the exponent moves from bias 15 to 127.
PYSEG_INLINE float widen(torch::headeronly::Half x) {
  const uint32_t bits = x.x, magnitude = (bits & 0x7fff) << 13;
  const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
  const uint32_t value = magnitude >= 0x0f800000u ? special : __builtin_bit_cast(uint32_t, finite);
  const uint32_t with_sign = value | (bits & 0x8000) << 16;
  return __builtin_bit_cast(float, with_sign);
}
template <class T>
PYSEG_INLINE T widen(T x) {
  return x;
}

// Numbers of another type than that of the vector: bfloat16 by arithmetic on its bits, half by the
// instructions for it, which every level above the generic one has.
template <class Real, class T>
PYSEG_INLINE Vector<Real> load_as(const T* from) {
  if constexpr (std::is_same_v<T, Real>) {
    return load(from);
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    const auto bits = load<kLanes<Real>>(reinterpret_cast<const uint16_t*>(from));
    return (Vector<float>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
#if defined(PYSEG_AVX512)
  } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return (Vector<float>)_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(PYSEG_AVX2)
  } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  } else {
    Real row[kLanes<Real>];
    for (int i = 0; i < kLanes<Real>; ++i) row[i] = widen(from[i]);
    return load(row);
  }
}
template <class Real, class T>
PYSEG_INLINE void store_as(T* to, Vector<Real> value) {
  if constexpr (std::is_same_v<T, Real>) {
    store(to, value);
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    const auto bits = (Vector<uint32_t>)value;
    const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    const auto narrow = value == value ? rounded : broadcast(uint32_t(0x7fc0));
    store<kLanes<Real>>(reinterpret_cast<uint16_t*>(to),
                        __builtin_convertvector(narrow, Vector<uint16_t, int(kLanes<Real>)>));
#if defined(PYSEG_AVX512)
  } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PYSEG_AVX2)
  } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < kLanes<Real>; ++i) to[i] = T(value[i]);
  }
}

// Of two vectors the halves that begin at lane `First`, their lanes in turn.
template <int First, class V, int... Lanes>
PYSEG_INLINE V interleave(V a, V b, std::integer_sequence<int, Lanes...>) {
  constexpr int n = sizeof...(Lanes);
  return __builtin_shufflevector(a, b, First + Lanes / 2 + Lanes % 2 * n...);
}

// The transpose of kLanes x kLanes numbers.
template <class Real, class In, class Out>
PYSEG_INLINE void transpose_square(const In* in, int64_t in_stride, Out* out, int64_t out_stride) {
  constexpr int n = kLanes<Real>;
  Vector<Real> a[n], b[n];
#pragma GCC unroll 32
  for (int i = 0; i < n; ++i) a[i] = load_as<Real>(in + i * in_stride);
  // Each pass moves one bit of an element's place from its row to its column.
#pragma GCC unroll 5
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      constexpr auto lanes = std::make_integer_sequence<int, n>();
      b[2 * i] = interleave<0>(a[i], a[i + n / 2], lanes);
      b[2 * i + 1] = interleave<n / 2>(a[i], a[i + n / 2], lanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 32
  for (int i = 0; i < n; ++i) store_as<Real>(out + i * out_stride, a[i]);
}

// [rows, in_stride] -> [columns, out_stride], computed as Real; `next`: how many columns further
// the next call will be.
template <class Real, class In, class Out>
void transpose(const In* in, int64_t in_stride, int64_t rows, int64_t columns, Out* out,
               int64_t out_stride, int64_t next) {
  constexpr int64_t n = kLanes<Real>, kStep = n < 16 ? 16 : n;
  // Where more than a few are left, a square overlaps the one before.
  const auto in_squares = [](int64_t size) {
    return size >= n && size % n > n / 8 ? size : size / n * n;
  };
  const int64_t end_rows = in_squares(rows), end_columns = in_squares(columns);
  for (int64_t c0 = 0; c0 < end_columns; c0 += kStep) {
    for (int64_t r0 = 0; r0 < end_rows; r0 += kStep) {
      const int64_t end = r0 + kStep < end_rows ? r0 + kStep : end_rows;
      const int64_t end_c = c0 + kStep < end_columns ? c0 + kStep : end_columns;
      // Rows are far apart, and the processor does not foresee them.
      for (int64_t r = r0; r < end; ++r) __builtin_prefetch(in + r * in_stride + c0 + next);
      // Where the next squares go: stores are done in order, so each would wait for its line, and
      // those that cross two lines for both.
      const Out* const to = end < end_rows ? out + c0 * out_stride + r0 + 2 * kStep - 1
                                           : out + (c0 + kStep) * out_stride;
      for (int64_t c = 0; c < kStep; ++c) __builtin_prefetch(to + c * out_stride, 1);
      for (int64_t c = c0; c < end_c; c += n) {
        for (int64_t r = r0; r < end; r += n) {
          const int64_t y = r < rows - n ? r : rows - n, x = c < columns - n ? c : columns - n;
          transpose_square<Real>(in + y * in_stride + x, in_stride, out + x * out_stride + y,
                                 out_stride);
        }
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < end_columns ? end_rows : 0; r < rows; ++r)
      out[c * out_stride + r] = Out(widen(in[r * in_stride + c]));
}
