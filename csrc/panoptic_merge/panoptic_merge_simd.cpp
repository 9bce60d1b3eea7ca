// The inner loops of panoptic_merge on the CPU.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "panoptic_merge_simd.h"

#include "../common/level.h"  // after all others

namespace pyseg::merging::PYSEG_LEVEL {

// Which of 64 bytes are not 0.
PYSEG_INLINE uint64_t pack_64(const uint8_t* bytes) {
#if defined(PYSEG_AVX512)
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
#elif defined(PYSEG_AVX2)
  const __m256i* const at = reinterpret_cast<const __m256i*>(bytes);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256(at), zero);
  const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256(at + 1), zero);
  return ~(uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32 |
           uint32_t(_mm256_movemask_epi8(low)));
#else
  uint64_t eights[8], any = 0, word = 0;
  std::memcpy(eights, bytes, 64);
  for (const uint64_t eight : eights) any |= eight;
  if (any)
    for (int k = 0; k < 8; ++k) {
      uint64_t x = eights[k];  // every byte that is not 0 becomes 1
      x = ((x & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu) | x;
      x = (x >> 7) & 0x0101010101010101u;
      word |= (x * 0x0102040810204080u) >> 56 << (8 * k);
    }
  return word;
#endif
}

int64_t pack(const uint8_t* bytes, int64_t pixels, uint64_t* words) {
  int64_t area = 0, i = 0;
  for (; i + 64 <= pixels; i += 64) {
    const uint64_t word = pack_64(bytes + i);
    words[i / 64] = word;
    area += __builtin_popcountll(word);
  }
  if (i < pixels) {
    uint8_t last[64] = {};
    std::memcpy(last, bytes + i, pixels - i);
    words[i / 64] = pack_64(last);
    area += __builtin_popcountll(words[i / 64]);
  }
  return area;
}

void threshold_row(const float* __restrict low, const float* __restrict high, float ty,
                   const int* __restrict cell, const float* __restrict tx, int64_t columns,
                   float threshold, int64_t cells, float* __restrict row,
                   uint8_t* __restrict inside) {
  for (int64_t i = 0; i < cells + 4; ++i) row[i] = low[i] + ty * (high[i] - low[i]);
  for (int64_t i = 0; i < columns; ++i) {
    const float a = row[cell[i] + 2], b = row[cell[i] + 3];
    inside[i] = a + tx[i] * (b - a) >= threshold;
  }
}

}  // namespace pyseg::merging::PYSEG_LEVEL
