// The inner loops of panoptic_quality on the CPU.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>

#include "panoptic_quality_simd.h"

#include "../common/level.h"  // after all others

namespace pyseg::panoptic::PYSEG_LEVEL {

#include "../common/bits_simd.h"

#if defined(PYSEG_AVX512)
template <bool Boundary>
PYSEG_INLINE uint64_t changes_of_64(const Maps& maps, int64_t rest) {
  uint64_t word = 0;
  for (int64_t k = 0; k < 64; k += 16) {
    const int64_t here = rest - k < 0 ? 0 : rest - k > 16 ? 16 : rest - k;
    const __mmask16 valid = __mmask16((1u << here) - 1);
    const int32_t *const t = maps.target + k, *const p = maps.prediction + k;
    const __m512i change =
        _mm512_or_si512(_mm512_xor_si512(_mm512_maskz_loadu_epi32(valid, t),
                                         _mm512_maskz_loadu_epi32(valid, t - 1)),
                        _mm512_xor_si512(_mm512_maskz_loadu_epi32(valid, p),
                                         _mm512_maskz_loadu_epi32(valid, p - 1)));
    word |= uint64_t(_mm512_test_epi32_mask(change, change)) << k;
  }
  if (Boundary) {
    const __mmask64 valid = rest >= 64 ? ~uint64_t(0) : (uint64_t(1) << rest) - 1;
    for (const uint8_t* const at : {maps.target_boundary, maps.prediction_boundary})
      word |= _mm512_cmpneq_epi8_mask(_mm512_maskz_loadu_epi8(valid, at),
                                      _mm512_maskz_loadu_epi8(valid, at - 1));
  }
  return word;
}
#else
#ifdef PYSEG_AVX2
PYSEG_INLINE __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
#endif

template <bool Boundary>
PYSEG_INLINE uint64_t changes_of_64(const Maps& maps, int64_t rest) {
  const int32_t *const t = maps.target, *const p = maps.prediction;
  const uint8_t *const tb = maps.target_boundary, *const pb = maps.prediction_boundary;
#ifdef PYSEG_AVX2
  if (rest >= 64) {
    uint64_t same = 0;
    for (int64_t k = 0; k < 64; k += 8) {
      const __m256i equal =
          _mm256_and_si256(_mm256_cmpeq_epi32(load_256(t + k), load_256(t + k - 1)),
                           _mm256_cmpeq_epi32(load_256(p + k), load_256(p + k - 1)));
      same |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(equal)))) << k;
    }
    if (Boundary)
      for (int64_t k = 0; k < 64; k += 32) {
        const __m256i equal =
            _mm256_and_si256(_mm256_cmpeq_epi8(load_256(tb + k), load_256(tb + k - 1)),
                             _mm256_cmpeq_epi8(load_256(pb + k), load_256(pb + k - 1)));
        same &= ~(uint64_t(~uint32_t(_mm256_movemask_epi8(equal))) << k);
      }
    return ~same;
  }
#endif
  alignas(64) uint8_t changed[64] = {};
  const int64_t n = rest < 64 ? rest : 64;
  for (int64_t i = 0; i < n; ++i) changed[i] = (t[i] ^ t[i - 1]) | (p[i] ^ p[i - 1]) ? 1 : 0;
  if (Boundary)
    for (int64_t i = 0; i < n; ++i)
      changed[i] |= (tb[i] != tb[i - 1]) | (pb[i] != pb[i - 1]);  // any byte but 0 may be true
  return bits_of(changed);
}
#endif

template <bool Boundary>
int64_t mark_changes(const Maps& maps, int64_t n, uint64_t* words) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 64) {
    const Maps here{maps.target + i, maps.prediction + i,
                    Boundary ? maps.target_boundary + i : nullptr,
                    Boundary ? maps.prediction_boundary + i : nullptr};
    const uint64_t word = changes_of_64<Boundary>(here, n - i);
    words[i / 64] = word;
    found += __builtin_popcountll(word);
  }
  return found;
}

template int64_t mark_changes<false>(const Maps&, int64_t, uint64_t*);
template int64_t mark_changes<true>(const Maps&, int64_t, uint64_t*);

// Eight are written at a time, whether there are as many or not:
// a branch for each of them would be mispredicted.
void list_bits(const uint64_t* words, int64_t count, const int32_t* next_t, const int32_t* next_p,
               int32_t* places) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 64 * i; k < 64 * (i + 1); k += 16) {
      __builtin_prefetch(next_t + k);
      __builtin_prefetch(next_p + k);
    }
    uint64_t word = words[i];
    const int found = __builtin_popcountll(word);
    for (int k = 0; k < found; k += 8)
      for (int j = k; j < k + 8; ++j) {
        places[j] = int32_t(64 * i) + std::countr_zero(word);
        word &= word - 1;
      }
    places += found;
  }
}

}  // namespace pyseg::panoptic::PYSEG_LEVEL
