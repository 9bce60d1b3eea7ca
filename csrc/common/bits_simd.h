// Included after level.h, inside the namespace of its level; needs immintrin.h before that.

// Which of 64 bytes are not 0.
PYSEG_INLINE uint64_t bits_of(const uint8_t* bytes) {
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
#elif defined(__x86_64__)
  uint64_t zeros = 0;
  for (int k = 0; k < 4; ++k) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + k);
    const int equal = _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128()));
    zeros |= uint64_t(uint32_t(equal)) << (16 * k);
  }
  return ~zeros;
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
