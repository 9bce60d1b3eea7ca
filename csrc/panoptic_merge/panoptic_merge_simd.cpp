// The inner loops of panoptic_merge on the CPU.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "panoptic_merge_simd.h"

#include "../common/level.h"  // after all others

namespace pyseg::merging::PYSEG_LEVEL {

#include "../common/bits_simd.h"

int64_t pack(const uint8_t* bytes, int64_t pixels, uint64_t* words) {
  int64_t area = 0, i = 0;
  for (; i + 64 <= pixels; i += 64) {
    const uint64_t word = bits_of(bytes + i);
    words[i / 64] = word;
    area += __builtin_popcountll(word);
  }
  if (i < pixels) {
    uint8_t last[64] = {};
    std::memcpy(last, bytes + i, pixels - i);
    words[i / 64] = bits_of(last);
    area += __builtin_popcountll(words[i / 64]);
  }
  return area;
}

void threshold_row(const float* __restrict low, const float* __restrict high, float ty,
                   const int* __restrict cell, const float* __restrict tx, int64_t columns,
                   float threshold, int64_t cells, float* __restrict row,
                   uint8_t* __restrict inside) {
  for (int64_t i = 0; i < cells + 4; ++i) row[i] = low[i] + ty * (high[i] - low[i]);
#ifdef PYSEG_AVX512
  if (cells + 4 <= 32) {  // the usual 28: the row is in two registers, and nothing is gathered
    const uint32_t valid = uint32_t((uint64_t(1) << (cells + 4)) - 1);
    const __m512 first = _mm512_maskz_loadu_ps(__mmask16(valid), row);
    const __m512 second = _mm512_maskz_loadu_ps(__mmask16(valid >> 16), row + 16);
    for (int64_t i = 0; i < columns; i += 16) {
      const __mmask16 here =
          columns - i < 16 ? __mmask16((1u << (columns - i)) - 1) : __mmask16(0xffff);
      const __m512i at =
          _mm512_add_epi32(_mm512_maskz_loadu_epi32(here, cell + i), _mm512_set1_epi32(2));
      const __m512 a = _mm512_permutex2var_ps(first, at, second);
      const __m512 b =
          _mm512_permutex2var_ps(first, _mm512_add_epi32(at, _mm512_set1_epi32(1)), second);
      const __m512 t = _mm512_maskz_loadu_ps(here, tx + i);
      const __m512 value = _mm512_add_ps(a, _mm512_mul_ps(t, _mm512_sub_ps(b, a)));
      const __mmask16 set = _mm512_cmp_ps_mask(value, _mm512_set1_ps(threshold), _CMP_GE_OQ);
      _mm_mask_storeu_epi8(inside + i, here, _mm_maskz_set1_epi8(set, 1));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < columns; ++i) {
    const float a = row[cell[i] + 2], b = row[cell[i] + 3];
    inside[i] = a + tx[i] * (b - a) >= threshold;
  }
}

}  // namespace pyseg::merging::PYSEG_LEVEL
