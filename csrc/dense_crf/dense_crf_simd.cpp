// The inner loops of the dense CRF on the CPU, in vectors of the compiler. setup.py compiles this file
// once per instruction set, for PYSEG_REAL float and, at the generic level alone, double: vector
// types are lowered to the target in force where they are written, so target_clones would leave
// them at its default.
//
// Rows of classes are padded: to `Blocks` vectors of 16 and a tail of `Tail` in the lattice, whose
// size matters, and to whole vectors in the buffers of a tile, whose alignment matters.
// Blocks = -1: the number of blocks is an argument.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "tile_passes.h"

#include "../common/level.h"  // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::crf::PYSEG_LEVEL {

#define PYSEG_BYTES 64  // the length of vectors is named everywhere, so that this is of none
#include "../common/vectors_simd.h"
#undef PYSEG_BYTES

// 16 vectors of 16: rows become columns.
template <class Real>
PYSEG_INLINE void transpose(Vector<Real, 16> (&v)[16]) {
  Vector<Real, 16> t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                                   13, 29);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                       14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // column 4 g + 2 j + (0, 1) of the four rows, in group g
      v[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8,
                                             9, 24, 25, 12, 13, 28, 29);
      v[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23,
                                                 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector<Real, 16> a = v[i], b = v[i + 4], c = v[i + 8], d = v[i + 12];
    const Vector<Real, 16> ab =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const Vector<Real, 16> AB =
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const Vector<Real, 16> cd =
        __builtin_shufflevector(c, d, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const Vector<Real, 16> CD =
        __builtin_shufflevector(c, d, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    t[i] = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    t[i + 4] =
        __builtin_shufflevector(AB, CD, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    t[i + 8] = __builtin_shufflevector(ab, cd, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29,
                                       30, 31);
    t[i + 12] = __builtin_shufflevector(AB, CD, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                        29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 4 vectors of 16: within each quarter, rows become columns.
template <class Real>
PYSEG_INLINE void transpose_quarters(Vector<Real, 16> (&v)[4]) {
  const Vector<Real, 16> a =
      __builtin_shufflevector(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const Vector<Real, 16> b = __builtin_shufflevector(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26,
                                                     11, 27, 14, 30, 15, 31);
  const Vector<Real, 16> c =
      __builtin_shufflevector(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const Vector<Real, 16> d = __builtin_shufflevector(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26,
                                                     11, 27, 14, 30, 15, 31);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// exp(x) for x <= 0, within 1e-7; 0 below -70, where products with barycentric weights would become
// denormal. The polynomial is 2^f within 8e-8 of it for |f| <= 1/2.
template <int N>
PYSEG_INLINE Vector<float, N> exponential(Vector<float, N> x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kTerms[] = {1.327647129e-3f, 9.675540961e-3f, 5.550713092e-2f,
                              2.402212024e-1f, 6.931469440e-1f, 1.0f};
#ifdef PYSEG_AVX512
  if constexpr (N == 16) {
    const __m512 v = (__m512)x, scaled = _mm512_mul_ps(v, _mm512_set1_ps(kLog2e));
    const __m512 n = _mm512_roundscale_ps(scaled, 0);
    const __m512 f = _mm512_fmsub_ps(v, _mm512_set1_ps(kLog2e), n);
    __m512 p = _mm512_set1_ps(kTerms[0]);
#pragma GCC unroll 5
    for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kTerms[i]));
    const __mmask16 inside = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-70.0f), _CMP_GT_OQ);
    return (Vector<float, N>)_mm512_maskz_scalef_ps(inside, p, n);
  }
#endif
  typedef int Integers __attribute__((vector_size(N * sizeof(int))));
  const Vector<float, N> low = broadcast<N>(-70.0f), inside = x > low ? x : low;
  const Vector<float, N> shifted = inside * kLog2e + 12582912.0f;
  const Vector<float, N> f = inside * kLog2e - (shifted - 12582912.0f);
  Vector<float, N> p = broadcast<N>(kTerms[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) p = p * f + kTerms[i];
  const Vector<float, N> value = (Vector<float, N>)((Integers)p + ((Integers)shifted << 23));
  return x > low ? value : Vector<float, N>{};
}

template <int N>
PYSEG_INLINE Vector<double, N> exponential(Vector<double, N> x) {
  for (int i = 0; i < N; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class Real, int Blocks, int Tail>
struct Loops {
  static constexpr int kBlocks = Blocks < 0 ? kMaxBlocks : Blocks;
  static constexpr int kTail = Tail ? Tail : 4;
  using Block = Vector<Real, 16>;
  using Rest = Vector<Real, kTail>;

  struct Row {
    Block block[kBlocks ? kBlocks : 1];
    Rest rest;
  };

  // a * b + c, rounded once where that is one instruction
  template <int N>
  static PYSEG_INLINE Vector<Real, N> fused(Vector<Real, N> a, Vector<Real, N> b,
                                            Vector<Real, N> c) {
#ifdef PYSEG_AVX512
    if constexpr (std::is_same_v<Real, float>) {
      if constexpr (N == 16)
        return (Vector<Real, N>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
      if constexpr (N == 8)
        return (Vector<Real, N>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
      if constexpr (N == 4) return (Vector<Real, N>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
    }
#endif
    return a * b + c;
  }

  static PYSEG_INLINE int blocks(int argument) { return Blocks < 0 ? argument : Blocks; }

  static PYSEG_INLINE Rest first(Block block) {
    if constexpr (kTail == 8)
      return __builtin_shufflevector(block, block, 0, 1, 2, 3, 4, 5, 6, 7);
    else
      return __builtin_shufflevector(block, block, 0, 1, 2, 3);
  }

  static PYSEG_INLINE void get(Row& row, const Real* from, int n) {
    for (int b = 0; b < blocks(n); ++b) row.block[b] = load<16>(from + 16 * b);
    if (Tail) row.rest = load<kTail>(from + 16 * blocks(n));
  }
  static PYSEG_INLINE void put(const Row& row, Real* to, int n) {
    for (int b = 0; b < blocks(n); ++b) store<16>(to + 16 * b, row.block[b]);
    if (Tail) store<kTail>(to + 16 * blocks(n), row.rest);
  }
  // row += factor * from
  static PYSEG_INLINE void add(Row& row, Real factor, const Real* from, int n) {
    const Block f = broadcast<16>(factor);
    for (int b = 0; b < blocks(n); ++b)
      row.block[b] = fused<16>(f, load<16>(from + 16 * b), row.block[b]);
    if (Tail) row.rest = fused<kTail>(first(f), load<kTail>(from + 16 * blocks(n)), row.rest);
  }
  static PYSEG_INLINE void add(Row& row, Real factor, const Row& from, int n) {
    const Block f = broadcast<16>(factor);
    for (int b = 0; b < blocks(n); ++b) row.block[b] = fused<16>(f, from.block[b], row.block[b]);
    if (Tail) row.rest = fused<kTail>(first(f), from.rest, row.rest);
  }
  // to += factor * row
  static PYSEG_INLINE void accumulate(const Row& row, Real factor, Real* to, int n) {
    const Block f = broadcast<16>(factor);
    for (int b = 0; b < blocks(n); ++b)
      store<16>(to + 16 * b, fused<16>(f, row.block[b], load<16>(to + 16 * b)));
    if (Tail) {
      Real* const end = to + 16 * blocks(n);
      store<kTail>(end, fused<kTail>(first(f), row.rest, load<kTail>(end)));
    }
  }

  // 16 pixels' rows of classes, `stride` apart, to one vector of pixels per class; and back.
  static PYSEG_INLINE void to_planes(const Real* rows, int stride, int n, Real* planes) {
    for (int b = 0; b < blocks(n); ++b) {
      Block v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = load<16>(rows + i * stride + 16 * b);
      transpose<Real>(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store<16>(planes + 16 * (16 * b + i), v[i]);
    }
    for (int c = 16 * blocks(n); c < 16 * blocks(n) + Tail; c += 4) {
      Block v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Real* const row = rows + i * stride + c;
        const auto low = __builtin_shufflevector(load<4>(row), load<4>(row + 4 * stride), 0, 1, 2,
                                                 3, 4, 5, 6, 7);
        const auto high = __builtin_shufflevector(
            load<4>(row + 8 * stride), load<4>(row + 12 * stride), 0, 1, 2, 3, 4, 5, 6, 7);
        v[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                       15);
      }
      transpose_quarters<Real>(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store<16>(planes + 16 * (c + i), v[i]);
    }
  }

  static PYSEG_INLINE void to_rows(const Real* planes, int n, Real* rows, int stride) {
    for (int b = 0; b < blocks(n); ++b) {
      Block v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = load<16>(planes + 16 * (16 * b + i));
      transpose<Real>(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store<16>(rows + i * stride + 16 * b, v[i]);
    }
    for (int c = 16 * blocks(n); c < 16 * blocks(n) + Tail; c += 4) {
      Block v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = load<16>(planes + 16 * (c + i));
      transpose_quarters<Real>(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Real* const row = rows + i * stride + c;
        store<4>(row, __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3));
        store<4>(row + 4 * stride, __builtin_shufflevector(v[i], v[i], 4, 5, 6, 7));
        store<4>(row + 8 * stride, __builtin_shufflevector(v[i], v[i], 8, 9, 10, 11));
        store<4>(row + 12 * stride, __builtin_shufflevector(v[i], v[i], 12, 13, 14, 15));
      }
    }
  }

  static PYSEG_INLINE Block load_some(const Real* from, int count) {
    if (count == 16) return load<16>(from);
    Block some{};
    for (int i = 0; i < count; ++i) some[i] = from[i];
    return some;
  }
  static PYSEG_INLINE void store_some(Real* to, Block block, int count) {
    if (count == 16)
      store<16>(to, block);
    else
      for (int i = 0; i < count; ++i) to[i] = block[i];
  }

  // Of four rows at once, their tails in vectors of their own.
  static constexpr int kTails = Tail == 8 ? 2 : 1;
  using Four = Vector<Real, 4>;

  static PYSEG_INLINE void join_tails(const Row (&row)[4], Block (&tails)[kTails]) {
    if constexpr (Tail == 4) {
      const auto low = __builtin_shufflevector(row[0].rest, row[1].rest, 0, 1, 2, 3, 4, 5, 6, 7);
      const auto high = __builtin_shufflevector(row[2].rest, row[3].rest, 0, 1, 2, 3, 4, 5, 6, 7);
      tails[0] =
          __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else if constexpr (Tail == 8) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        tails[i] = __builtin_shufflevector(row[2 * i].rest, row[2 * i + 1].rest, 0, 1, 2, 3, 4, 5,
                                           6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }

  static PYSEG_INLINE void part_tails(const Block (&tails)[kTails], Row (&row)[4]) {
    if constexpr (Tail == 4) {
      row[0].rest = __builtin_shufflevector(tails[0], tails[0], 0, 1, 2, 3);
      row[1].rest = __builtin_shufflevector(tails[0], tails[0], 4, 5, 6, 7);
      row[2].rest = __builtin_shufflevector(tails[0], tails[0], 8, 9, 10, 11);
      row[3].rest = __builtin_shufflevector(tails[0], tails[0], 12, 13, 14, 15);
    } else if constexpr (Tail == 8) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        row[2 * i].rest = __builtin_shufflevector(tails[i], tails[i], 0, 1, 2, 3, 4, 5, 6, 7);
        row[2 * i + 1].rest =
            __builtin_shufflevector(tails[i], tails[i], 8, 9, 10, 11, 12, 13, 14, 15);
      }
    }
  }

  // Each row's number, for its lanes of the tails.
  static PYSEG_INLINE Block to_tails(Four four, int number) {
    const auto twice = __builtin_shufflevector(four, four, 0, 1, 2, 3, 4, 5, 6, 7);
    const Block all =
        __builtin_shufflevector(twice, twice, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (Tail == 4)
      return __builtin_shufflevector(all, all, 0, 0, 0, 0, 5, 5, 5, 5, 10, 10, 10, 10, 15, 15, 15,
                                     15);
    if (number == 0)
      return __builtin_shufflevector(all, all, 0, 0, 0, 0, 4, 4, 4, 4, 9, 9, 9, 9, 13, 13, 13, 13);
    return __builtin_shufflevector(all, all, 2, 2, 2, 2, 6, 6, 6, 6, 11, 11, 11, 11, 15, 15, 15,
                                   15);
  }

  // What `combine` makes of all lanes of each row.
  template <class Combine>
  static PYSEG_INLINE Four reduce(const Block (&v)[4], const Block (&tails)[kTails],
                                  Combine combine) {
    Block quarters;  // each holds one number of every row
    if constexpr (Blocks != 0) {
      Block pairs[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        pairs[i] = combine(__builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 16, 1, 17, 4, 20, 5,
                                                   21, 8, 24, 9, 25, 12, 28, 13, 29),
                           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 18, 3, 19, 6, 22, 7,
                                                   23, 10, 26, 11, 27, 14, 30, 15, 31));
      quarters = combine(__builtin_shufflevector(pairs[0], pairs[1], 0, 1, 16, 17, 4, 5, 20, 21, 8,
                                                 9, 24, 25, 12, 13, 28, 29),
                         __builtin_shufflevector(pairs[0], pairs[1], 2, 3, 18, 19, 6, 7, 22, 23, 10,
                                                 11, 26, 27, 14, 15, 30, 31));
    }
    if constexpr (Tail == 4) {
      const Block t = __builtin_shufflevector(tails[0], tails[0], 0, 4, 8, 12, 1, 5, 9, 13, 2, 6,
                                              10, 14, 3, 7, 11, 15);
      quarters = Blocks ? combine(quarters, t) : t;
    } else if constexpr (Tail == 8) {
      const Block t = combine(__builtin_shufflevector(tails[0], tails[1], 0, 8, 16, 24, 1, 9, 17,
                                                      25, 2, 10, 18, 26, 3, 11, 19, 27),
                              __builtin_shufflevector(tails[0], tails[1], 4, 12, 20, 28, 5, 13, 21,
                                                      29, 6, 14, 22, 30, 7, 15, 23, 31));
      quarters = Blocks ? combine(quarters, t) : t;
    }
    const auto halves =
        combine(__builtin_shufflevector(quarters, quarters, 0, 1, 2, 3, 4, 5, 6, 7),
                __builtin_shufflevector(quarters, quarters, 8, 9, 10, 11, 12, 13, 14, 15));
    return combine(__builtin_shufflevector(halves, halves, 0, 1, 2, 3),
                   __builtin_shufflevector(halves, halves, 4, 5, 6, 7));
  }

  // Up to kTileWidth rows of logits become probabilities. All steps of one row in turn would wait
  // for each other; so one step is done for all rows.
  static PYSEG_INLINE void softmax(Real* rows, int count, int n, int stride) {
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    const auto sum = [](auto a, auto b) { return a + b; };
    Real largest[kTileWidth];
    for (int x = 0; x < count; x += 4) {
      Row row[4];
      Block tails[kTails], all[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        get(row[i], rows + (x + i) * stride, n);
        all[i] = row[i].block[0];
        for (int b = 1; b < blocks(n); ++b) all[i] = larger(all[i], row[i].block[b]);
      }
      join_tails(row, tails);
      store<4>(largest + x, reduce(all, tails, larger));
    }
    for (int x = 0; x < count; x += 4) {
      Row row[4];
      Block tails[kTails], all[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        get(row[i], rows + (x + i) * stride, n);
        const Block most = broadcast<16>(largest[x + i]);
        all[i] = Block{};
        for (int b = 0; b < blocks(n); ++b) {
          row[i].block[b] = exponential<16>(row[i].block[b] - most);
          all[i] += row[i].block[b];
        }
      }
      if constexpr (Tail != 0) {
        join_tails(row, tails);
        const Four most = load<4>(largest + x);
        for (int i = 0; i < kTails; ++i) tails[i] = exponential<16>(tails[i] - to_tails(most, i));
      }
      const Four scale = Real(1) / reduce(all, tails, sum);
      if constexpr (Tail != 0) {
        for (int i = 0; i < kTails; ++i) tails[i] *= to_tails(scale, i);
        part_tails(tails, row);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Block factor = broadcast<16>(scale[i]);
        for (int b = 0; b < blocks(n); ++b) row[i].block[b] *= factor;
        put(row[i], rows + (x + i) * stride, n);
      }
    }
  }

  // Calls work(count) with the number of a pixel's entries, as a constant where it is a usual one.
  template <class Work>
  static PYSEG_INLINE void with_entries(int entries, Work work) {
    switch (entries) {
      case 6: return work(std::integral_constant<int, 6>{});
      case 9: return work(std::integral_constant<int, 9>{});
      default: return work(entries);
    }
  }

  // rows += weights of the pixels' entries times rows of the lattices; `fresh`: = instead.
  static PYSEG_INLINE void slice_row(const Real* lattice, const uint16_t* vertices,
                                     const Real* weights, int width, int entries, int n, int stride,
                                     bool fresh, Real* rows) {
    with_entries(entries, [&](auto fixed) {
      const uint16_t* vertex = vertices;
      const Real* weight = weights;
      for (int x = 0; x < width; ++x, vertex += fixed, weight += fixed) {
        Row row{};
        if (!fresh) get(row, rows + x * stride, n);
#pragma GCC unroll 9
        for (int k = 0; k < fixed; ++k) add(row, weight[k], lattice + vertex[k] * stride, n);
        put(row, rows + x * stride, n);
      }
    });
  }

  // The lattices' rows += weights times the pixels' rows.
  static PYSEG_INLINE void splat_row(const Real* rows, const uint16_t* vertices,
                                     const Real* weights, int width, int entries, int n, int stride,
                                     Real* lattice) {
    with_entries(entries, [&](auto fixed) {
      const uint16_t* vertex = vertices;
      const Real* weight = weights;
      for (int x = 0; x < width; ++x, vertex += fixed, weight += fixed) {
        Row row;
        get(row, rows + x * stride, n);
#pragma GCC unroll 9
        for (int k = 0; k < fixed; ++k) accumulate(row, weight[k], lattice + vertex[k] * stride, n);
      }
    });
  }

  // On a grid the pixels of one image row between two columns of vertices have the same four, so
  // those are interpolated along y once, and their sums stay in registers. `weights` are of the
  // axes, [pixels, 2] each.
  static PYSEG_INLINE void slice_grid(const GridPass<Real>& grid, const Real* lattice,
                                      const Real* const (&weights)[2], int y, int width, int n,
                                      int stride, bool fresh, Real* rows) {
    const Real* up =
        lattice + (grid.first_row + (grid.offset[1] + y) / grid.cell[1] * grid.wide) * stride;
    const Real above = weights[1][2 * y], below = weights[1][2 * y + 1];
    Row left, right{};
    const auto next = [&] {
      left = right;
      right = Row{};
      add(right, above, up, n);
      add(right, below, up + grid.wide * stride, n);
      up += stride;
    };
    next();
    for (int x = 0, end = grid.cell[0] - grid.offset[0]; x < width; end += grid.cell[0]) {
      next();
      for (; x < std::min(end, width); ++x) {
        Row row{};
        if (!fresh) get(row, rows + x * stride, n);
        add(row, weights[0][2 * x], left, n);
        add(row, weights[0][2 * x + 1], right, n);
        put(row, rows + x * stride, n);
      }
    }
  }

  static PYSEG_INLINE void splat_grid(const GridPass<Real>& grid, const Real* rows,
                                      const Real* const (&weights)[2], int y, int width, int n,
                                      int stride, Real* lattice) {
    Real* up =
        lattice + (grid.first_row + (grid.offset[1] + y) / grid.cell[1] * grid.wide) * stride;
    const Real above = weights[1][2 * y], below = weights[1][2 * y + 1];
    Row left{}, right{};
    const auto next = [&] {
      accumulate(left, above, up, n);
      accumulate(left, below, up + grid.wide * stride, n);
      up += stride;
      left = right;
      right = Row{};
    };
    for (int x = 0, end = grid.cell[0] - grid.offset[0]; x < width; end += grid.cell[0]) {
      for (; x < std::min(end, width); ++x) {
        add(left, weights[0][2 * x], rows + x * stride, n);
        add(right, weights[0][2 * x + 1], rows + x * stride, n);
      }
      next();
    }
    next();
  }

  // The grids at one row of a tile; false: there are none.
  static PYSEG_INLINE bool slice_grids(const TilePass<Real>& a, const Real* lattice,
                                       bool with_splat_weights, int y, int n, int stride,
                                       Real* rows) {
    bool any = false;
    for (const GridPass<Real>& grid : a.grids) {
      slice_grid(grid, lattice, with_splat_weights ? grid.splat : grid.slice, y, a.width, n, stride,
                 !any, rows);
      any = true;
    }
    return any;
  }

  // All lattices at one row of a tile.
  static PYSEG_INLINE void slice_all(const TilePass<Real>& a, const Real* lattice,
                                     bool with_splat_weights, int y, int n, int stride,
                                     Real* rows) {
    const bool any = slice_grids(a, lattice, with_splat_weights, y, n, stride, rows);
    const int64_t at = int64_t(y) * a.width * a.entries;
    if (a.entries)
      slice_row(lattice, a.rows + at, (with_splat_weights ? a.splat : a.slice) + at, a.width,
                a.entries, n, stride, !any, rows);
  }
  static PYSEG_INLINE void splat_all(const TilePass<Real>& a, const Real* rows,
                                     bool with_slice_weights, int y, int n, int stride,
                                     Real* lattice) {
    for (const GridPass<Real>& grid : a.grids)
      splat_grid(grid, rows, with_slice_weights ? grid.slice : grid.splat, y, a.width, n, stride,
                 lattice);
    const int64_t at = int64_t(y) * a.width * a.entries;
    if (a.entries)
      splat_row(rows, a.rows + at, (with_slice_weights ? a.slice : a.splat) + at, a.width,
                a.entries, n, stride, lattice);
  }

  // At one row of a tile: messages, or their gradients, lose what pixels contribute to their own;
  // `from` holds the tile's pixels as they contributed.
  static void remove_self(const TilePass<Real>& a, const Real* from, const Real* matrix, int y,
                          int n, Real* rows) {
    const int width = Blocks < 0 ? a.stride : 16 * Blocks + Tail;
    const int64_t first = int64_t(y) * a.width;
    for (int x = 0; x < a.width; ++x, rows += a.stride) {
      const Real* const own = from + (first + x) * width;
      const Real factor = -a.self[first + x];
      Row row;
      get(row, rows, n);
      if (matrix)
        for (int c = 0; c < a.classes; ++c) add(row, factor * own[c], matrix + c * a.stride, n);
      else
        add(row, factor, own, n);
      put(row, rows, n);
    }
  }

  // Keeps one row of a tile's pixels for `remove_self`.
  static void keep(const TilePass<Real>& a, const Real* rows, int y, int n, Real* to) {
    const int width = Blocks < 0 ? a.stride : 16 * Blocks + Tail;
    pack(rows, a.width, to + int64_t(y) * a.width * width, n, width);
  }

  // Energies of one row of a tile as rows of classes, without gaps. The last may be read up to a
  // lattice's row beyond its classes.
  static PYSEG_INLINE const Real* unary_row(const TilePass<Real>& a, int y, int n, int stride) {
    const int classes = a.classes, size = a.width * classes;
    const int64_t at = int64_t(y) * size;
    const int width = Blocks < 0 ? 16 * n : 16 * Blocks + Tail;
    if (a.copied && int64_t(a.height - 1 - y) * size >= width - classes) return a.copied + at;
    Real* const lines = a.buffer + kTileWidth * stride;
    if (a.copied) {  // what follows is not ours
      std::copy_n(a.copied + at, size, lines);
      return lines;
    }
    Real planes[16 * (Blocks < 0 ? kMaxClasses : 16 * kBlocks + Tail)];
    Block bad{};
    for (int x = 0; x < a.width; x += 16) {
      const int count = a.width - x < 16 ? a.width - x : 16;
      const Real* const from = a.unary + y * a.image_width + x;
      for (int c = 0; c < classes; ++c) {
        const Block u = load_some(from + c * a.plane, count);
        bad += u * Real(0);
        store<16>(planes + 16 * c, u);
        __builtin_prefetch(from + c * a.plane + a.image_width, 0, 2);  // the row below
      }
      for (int c = classes; c < width; ++c) store<16>(planes + 16 * c, Block{});
      to_rows(planes, n, lines + x * stride, stride);
    }
    for (int i = 0; i < 16; ++i)
      if (bad[i] != bad[i]) *a.not_finite = true;
    for (int x = 0; x < a.width; ++x) {
      Row row;
      get(row, lines + x * stride, n);
      put(row, lines + x * classes, n);
    }
    if (a.copy) std::copy_n(lines, size, a.copy + at);
    return lines;
  }

  // Probabilities of one row of a tile: from messages in `rows`, unless they are to be overwritten,
  // and in `lattice`, unless that is null.
  static PYSEG_INLINE void softmax_row(const TilePass<Real>& a, const Real* unary, bool messages,
                                       const Real* lattice, int y, int n, int stride, Real* rows) {
    constexpr int kAhead = 256;               // pixels
    constexpr int kLast = Tail ? kTail : 16;  // lanes of a row's last vector
    const int valid = a.classes - 16 * (Tail ? blocks(n) : blocks(n) - 1);
    Vector<Real, kLast> number;
    for (int i = 0; i < kLast; ++i) number[i] = Real(i);
    const auto holds_class = number < broadcast<kLast>(Real(valid));
    const auto lowest = broadcast<kLast>(std::numeric_limits<Real>::lowest());
    const int64_t at = int64_t(y) * a.width * a.entries;
    with_entries(lattice ? a.entries : 0, [&](auto entries) {
      for (int x = 0; x < a.width; ++x) {
        Row row{}, energy;
        if (messages) get(row, rows + x * stride, n);
        const uint16_t* const vertex = a.rows + at + x * entries;
        const Real* const weight = a.slice + at + x * entries;
#pragma GCC unroll 9
        for (int k = 0; k < entries; ++k) add(row, weight[k], lattice + vertex[k] * stride, n);
        get(energy, unary + x * a.classes, n);
        // No prefetcher sees these streams between all the other accesses.
        __builtin_prefetch(unary + (x + kAhead) * a.classes);
        __builtin_prefetch(weight + kAhead * entries);
        __builtin_prefetch(vertex + kAhead * entries);
        for (int b = 0; b < blocks(n); ++b) row.block[b] -= energy.block[b];
        if constexpr (Tail != 0) {
          row.rest = holds_class ? row.rest - energy.rest : lowest;
        } else {
          Block& last = row.block[blocks(n) - 1];
          last = holds_class ? last : lowest;
        }
        put(row, rows + x * stride, n);
      }
    });
    softmax(rows, a.width, n, stride);
  }

  // One row of a tile of Q.
  static PYSEG_INLINE void store_q(const TilePass<Real>& a, int y, int n, int stride,
                                   const Real* rows) {
    Real planes[16 * (Blocks < 0 ? kMaxClasses : 16 * kBlocks + Tail)];
    for (int x = 0; x < a.width; x += 16) {
      to_planes(rows + x * stride, stride, n, planes);
      Real* const to = a.q + y * a.image_width + x;
      for (int c = 0; c < a.classes; ++c)
        store_some(to + c * a.plane, load<16>(planes + 16 * c), std::min(16, a.width - x));
    }
  }

  // One mean-field update of a tile: slice every lattice, softmax, splat into every lattice.
  static void tile(const TilePass<Real>& a) {
    const int n = a.stride / 16;
    const int stride = Blocks < 0 ? a.stride : (16 * Blocks + Tail + 15) / 16 * 16;
    for (int y = 0; y < a.height; ++y) {
      const Real* const unary = unary_row(a, y, n, stride);
      if (a.in && a.self) {
        slice_all(a, a.in, false, y, n, stride, a.buffer);
        remove_self(a, a.before, a.matrix, y, n, a.buffer);
        softmax_row(a, unary, true, nullptr, y, n, stride, a.buffer);
      } else {
        const bool messages = a.in && slice_grids(a, a.in, false, y, n, stride, a.buffer);
        softmax_row(a, unary, messages, a.in, y, n, stride, a.buffer);
      }
      if (a.q) store_q(a, y, n, stride, a.buffer);
      if (a.out && a.self) keep(a, a.buffer, y, n, a.after);
      if (a.out) splat_all(a, a.buffer, false, y, n, stride, a.out);
    }
  }

  // Up to 16 pixels in one image row: their messages [16, stride] are replaced by the gradients of
  // the logits; `slopes` [16, stride] are those of Q, unless they come from memory.
  static void softmax_backward(const TileBackward<Real>& a, int64_t pixel, int count, int n,
                               int stride, Real* rows, const Real* slopes) {
    const TilePass<Real>& pass = a.pass;
    const int classes = pass.classes;
    Real planes[16 * (Blocks < 0 ? kMaxClasses : 16 * kBlocks + Tail)];
    Real gradients[16 * (Blocks < 0 ? kMaxClasses : 16 * kBlocks + Tail)];
    const auto pixels = [&](const Real* from) { return load_some(from, count); };
    if (pass.in) to_planes(rows, stride, n, planes);
    if (a.back) to_planes(slopes, stride, n, gradients);
    Block largest = broadcast<16>(std::numeric_limits<Real>::lowest());
    for (int c = 0; c < classes; ++c) {
      const Block u = pixels(pass.unary + c * pass.plane + pixel);
      const Block logit = pass.in ? load<16>(planes + 16 * c) - u : -u;
      largest = logit > largest ? logit : largest;
      store<16>(planes + 16 * c, logit);
    }
    Block sum{}, mean{};
    for (int c = 0; c < classes; ++c) {
      const Block e = exponential<16>(load<16>(planes + 16 * c) - largest);
      const Block g =
          a.back ? load<16>(gradients + 16 * c) : pixels(a.gradient + c * pass.plane + pixel);
      sum += e;
      mean += e * g;
      store<16>(planes + 16 * c, e);
      store<16>(gradients + 16 * c, g);
    }
    const Block scale = Real(1) / sum;
    mean *= scale;
    for (int c = 0; c < classes; ++c) {
      Real* const to = a.unary_gradient + c * pass.plane + pixel;
      const Block slope = load<16>(planes + 16 * c) * scale * (load<16>(gradients + 16 * c) - mean);
      store<16>(planes + 16 * c, slope);
      const Block total = (a.back ? pixels(to) : Block{}) - slope;
      store_some(to, total, count);
    }
    if (!pass.out) return;
    for (int c = classes; c < (Blocks < 0 ? 16 * n : 16 * Blocks + Tail); ++c)
      store<16>(planes + 16 * c, Block{});
    to_rows(planes, n, rows, stride);
  }

  // One mean-field update of a tile, backwards: slice the messages and, with the weights of the
  // splat, the gradients; softmax; splat with the weights of the slice.
  static void tile_backward(const TileBackward<Real>& a) {
    const TilePass<Real>& pass = a.pass;
    const int n = pass.stride / 16, width = pass.width;
    const int stride = Blocks < 0 ? pass.stride : (16 * Blocks + Tail + 15) / 16 * 16;
    Real *const logits = pass.buffer, *const slopes = logits + kTileWidth * stride;
    for (int y = 0; y < pass.height; ++y) {
      if (pass.in) slice_all(pass, pass.in, false, y, n, stride, logits);
      if (a.back) slice_all(pass, a.back, true, y, n, stride, slopes);
      if (pass.in && pass.self) remove_self(pass, pass.before, pass.matrix, y, n, logits);
      if (a.back && pass.self) remove_self(pass, a.kept, a.transposed, y, n, slopes);
      for (int x = 0; x < width; x += 16)
        softmax_backward(a, y * pass.image_width + x, width - x < 16 ? width - x : 16, n, stride,
                         logits + x * stride, slopes + x * stride);
      if (pass.out && pass.self) keep(pass, logits, y, n, a.kept);
      if (pass.out) splat_all(pass, logits, true, y, n, stride, pass.out);
    }
  }

  // Lattice rows are `width` apart, those of a tile `stride`.
  static void gather(const Real* values, const int32_t* vertices, int64_t count, Real* to, int n,
                     int width) {
    const int stride = (width + 15) / 16 * 16;
    for (int64_t i = 0; i < count; ++i) {
      Row row;
      get(row, values + int64_t(vertices[i]) * width, n);
      put(row, to + i * stride, n);
    }
  }

  static void pack(const Real* rows, int64_t count, Real* to, int n, int width) {
    const int stride = (width + 15) / 16 * 16;
    for (int64_t i = 0; i < count; ++i) {
      Row row;
      get(row, rows + i * stride, n);
      put(row, to + i * width, n);
    }
  }

  // Sums the tiles' rows of each vertex, in the order of tiles.
  static void combine(const Real* partial, const int32_t* starts, const int32_t* rows,
                      int64_t begin, int64_t end, Real* values, int n, int width) {
    for (int64_t v = begin; v < end; ++v) {
      Row row{};
      for (int32_t i = starts[v]; i < starts[v + 1]; ++i)
        add(row, Real(1), partial + int64_t(rows[i]) * width, n);
      put(row, values + v * width, n);
    }
  }

  // (side 1 side) along one axis, in place. Links are those of whole chains; see `Link`.
  static void blur(Real* values, const Link* links, const Link* end, bool transposed, Real side,
                   int n, int width) {
    const auto row_of = [&](Link link) { return values + int64_t(link.vertex()) * width; };
    const auto next = [&](Row& row, Link link) {
      get(row, link.filled(transposed) ? row_of(link) : values, n);
    };
    constexpr int64_t kAhead = 24;  // lattices do not fit into the second cache
    Row before{}, row;
    alignas(64) Real nowhere[16 * kBlocks + kTail];
    next(row, *links);
    for (; links < end; ++links) {
      Row after, sum = row;
      next(after, links[1]);
      __builtin_prefetch(row_of(links[std::min<int64_t>(kAhead, end - links)]));
      add(sum, side, before, n);
      add(sum, side, after, n);
      put(sum, links->vertex() ? row_of(*links) : nowhere, n);
      before = row, row = after;
    }
  }

  // values = factor * matrix^T values; matrix [classes, stride], or null for the identity
  static void mix(Real* values, const Real* matrix, Real factor, int64_t begin, int64_t end, int n,
                  int width, int classes) {
    const int stride = (width + 15) / 16 * 16;
    for (int64_t v = begin; v < end; ++v) {
      Real* const value = values + v * width;
      Row row{};
      if (matrix)
        for (int c = 0; c < classes; ++c) add(row, factor * value[c], matrix + c * stride, n);
      else
        add(row, factor, value, n);
      put(row, value, n);
    }
  }

  static RowFunctions<Real> functions() {
    return {tile, tile_backward, gather, pack, combine, blur, mix};
  }
};

template <class Real>
RowFunctions<Real> functions_for(int width) {
  if constexpr (sizeof(Real) == 4) {
    switch (width) {
      case 4: return Loops<Real, 0, 4>::functions();
      case 8: return Loops<Real, 0, 8>::functions();
      case 16: return Loops<Real, 1, 0>::functions();
      case 20: return Loops<Real, 1, 4>::functions();
      case 24: return Loops<Real, 1, 8>::functions();
      case 32: return Loops<Real, 2, 0>::functions();
    }
  } else if (width == 4) {
    return Loops<Real, 0, 4>::functions();
  }
  return Loops<Real, -1, 0>::functions();
}

template <class Real, int D>
void locate_run(const Real* features, const VertexNames& vertex_names, int points, Real* weights,
                uint64_t* vertices) {
  const VertexNames names = vertex_names;  // a copy, which no store of the loop can change
#pragma GCC ivdep  // without it the checks for overlap are too many, and nothing is vectorised
  for (int p = 0; p < points; ++p) {
    Real feature[D], weight[D + 1];
    uint64_t vertex[D + 1];
#pragma GCC unroll 9
    for (int i = 0; i < D; ++i) feature[i] = features[i * kTileWidth + p];
    locate<D, Real>(feature, names, weight, vertex);
#pragma GCC unroll 9
    for (int k = 0; k <= D; ++k) {
      weights[k * kTileWidth + p] = weight[k];
      vertices[k * kTileWidth + p] = vertex[k];
    }
  }
}

template <class Real>
Locate<Real> locate_for(int features) {
  constexpr Locate<Real> functions[kMaxFeatures] = {
      locate_run<Real, 1>, locate_run<Real, 2>, locate_run<Real, 3>, locate_run<Real, 4>,
      locate_run<Real, 5>, locate_run<Real, 6>, locate_run<Real, 7>, locate_run<Real, 8>};
  return functions[features - 1];
}

template RowFunctions<PYSEG_REAL> functions_for<PYSEG_REAL>(int);
template Locate<PYSEG_REAL> locate_for<PYSEG_REAL>(int);

}  // namespace pyseg::crf::PYSEG_LEVEL
