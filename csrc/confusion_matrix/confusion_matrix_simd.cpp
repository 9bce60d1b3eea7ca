// The inner loops of counting pairs of labels on the CPU.
//
// Milliseconds for 1024 x 2048 noise of 19 classes in bytes, AVX2 / AVX-512 on a Sapphire Rapids,
// one thread: counting stores once per pixel, which takes 0.8 at AVX2 whatever the copies of the
// table (4, 8 or 16, apart or side by side, of 16 or 32 bits, cells read four at a time: within 3 %
// of the whole at AVX2, 5 % at AVX-512; on a Zen 5 side by side is 5 and 8 % faster than apart).
// Slower: two pixels as one index into 390 KB, 2.5 instead of 1.5 / 1.8; 16 copies of 8-bit
// counters, emptied in time, 2.3 / 2.6. Coding took 1.05 / 0.41 as the compiler widens bytes, and
// takes 0.44 / 0.25 by products of pairs of bytes.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "confusion_matrix_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::counting::PYSEG_LEVEL {

constexpr int64_t kBlock = 512;  // pixels coded at a time: these stay in the L1 cache
constexpr int64_t kRun = 32;     // pixels that are counted at once where they are all alike

// A code of a label is as wide as the label where it can be, because changing the width between
// comparing and selecting costs more than both.
template <class T, class Code, class Cell>
PYSEG_INLINE void encode(const T* __restrict prediction, const T* __restrict target, int64_t n,
                         LabelCoder<T> coder, Cell* __restrict cells) {
  const Cell width = Cell(coder.num_classes + 2);
  for (int64_t i = 0; i < n; ++i) {
    const Code row = coder.template code<Code>(target[i]);
    const Code column = coder.template code<Code>(prediction[i]);
    cells[i] = Cell(Cell(Cell(row) * width) + Cell(column));
  }
}

// Labels of 8 bits and a width that a signed byte holds: the pixels of whole vectors, whose order
// changes. Returns how many these are.
#if defined(PYSEG_AVX512)
PYSEG_INLINE __m512i code_bytes(const void* labels, __m512i last, __m512i ignored,
                                __m512i void_code, __m512i bad) {
  const __m512i x = _mm512_loadu_si512(labels);
  const __m512i code = _mm512_mask_mov_epi8(bad, _mm512_cmple_epu8_mask(x, last), x);
  return _mm512_mask_mov_epi8(code, _mm512_cmpeq_epi8_mask(x, ignored), void_code);
}

template <class T>
PYSEG_INLINE int64_t encode_bytes(const T* prediction, const T* target, int64_t n,
                                  const LabelCoder<T>& coder, uint16_t* cells) {
  const char classes = char(coder.num_classes), wrong = char(classes + 1);
  const __m512i last = _mm512_set1_epi8(char(coder.last)), bad = _mm512_set1_epi8(wrong);
  // Where nothing is ignored: a label that is wrong anyway.
  const __m512i ignored = _mm512_set1_epi8(coder.can_ignore ? char(coder.ignore_index) : classes);
  const __m512i void_code = _mm512_set1_epi8(coder.can_ignore ? classes : wrong);
  const __m512i factors = _mm512_set1_epi16(int16_t((classes + 2) << 8 | 1));
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i p = code_bytes(prediction + i, last, ignored, void_code, bad);
    const __m512i t = code_bytes(target + i, last, ignored, void_code, bad);
    _mm512_storeu_si512(cells + i, _mm512_maddubs_epi16(_mm512_unpacklo_epi8(p, t), factors));
    _mm512_storeu_si512(cells + i + 32, _mm512_maddubs_epi16(_mm512_unpackhi_epi8(p, t), factors));
  }
  return i;
}
#elif defined(PYSEG_AVX2)
PYSEG_INLINE __m256i code_bytes(const void* labels, __m256i last, __m256i ignored,
                                __m256i void_code, __m256i bad) {
  const __m256i x = _mm256_loadu_si256(static_cast<const __m256i*>(labels));
  const __m256i in_range = _mm256_cmpeq_epi8(_mm256_min_epu8(x, last), x);
  const __m256i code = _mm256_blendv_epi8(bad, x, in_range);
  return _mm256_blendv_epi8(code, void_code, _mm256_cmpeq_epi8(x, ignored));
}

template <class T>
PYSEG_INLINE int64_t encode_bytes(const T* prediction, const T* target, int64_t n,
                                  const LabelCoder<T>& coder, uint16_t* cells) {
  const char classes = char(coder.num_classes), wrong = char(classes + 1);
  const __m256i last = _mm256_set1_epi8(char(coder.last)), bad = _mm256_set1_epi8(wrong);
  // Where nothing is ignored: a label that is wrong anyway.
  const __m256i ignored = _mm256_set1_epi8(coder.can_ignore ? char(coder.ignore_index) : classes);
  const __m256i void_code = _mm256_set1_epi8(coder.can_ignore ? classes : wrong);
  const __m256i factors = _mm256_set1_epi16(int16_t((classes + 2) << 8 | 1));
  __m256i* to = reinterpret_cast<__m256i*>(cells);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32, to += 2) {
    const __m256i p = code_bytes(prediction + i, last, ignored, void_code, bad);
    const __m256i t = code_bytes(target + i, last, ignored, void_code, bad);
    _mm256_storeu_si256(to, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(p, t), factors));
    _mm256_storeu_si256(to + 1, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(p, t), factors));
  }
  return i;
}
#else
template <class T>
PYSEG_INLINE int64_t encode_bytes(const T*, const T*, int64_t, const LabelCoder<T>&, uint16_t*) {
  return 0;
}
#endif

// Whether kRun cells are all alike.
template <class Cell>
PYSEG_INLINE bool all_alike(const Cell* cells) {
#ifdef __x86_64__
  if constexpr (sizeof(Cell) == 2) {
#if defined(PYSEG_AVX512)
    const __m512i first = _mm512_set1_epi16(int16_t(cells[0]));
    return _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(cells), first) == 0;
#elif defined(PYSEG_AVX2)
    const __m256i first = _mm256_set1_epi16(int16_t(cells[0]));
    const __m256i* const at = reinterpret_cast<const __m256i*>(cells);
    const __m256i low = _mm256_xor_si256(_mm256_loadu_si256(at), first);
    const __m256i high = _mm256_xor_si256(_mm256_loadu_si256(at + 1), first);
    const __m256i different = _mm256_or_si256(low, high);
    return _mm256_testz_si256(different, different);
#else
    const __m128i first = _mm_set1_epi16(int16_t(cells[0]));
    const __m128i* const at = reinterpret_cast<const __m128i*>(cells);
    __m128i same = _mm_cmpeq_epi16(_mm_loadu_si128(at), first);
    for (int k = 1; k < 4; ++k)
      same = _mm_and_si128(same, _mm_cmpeq_epi16(_mm_loadu_si128(at + k), first));
    return _mm_movemask_epi8(same) == 0xffff;
#endif
  }
#endif
  Cell different = 0;
  for (int64_t k = 0; k < kRun; ++k) different |= Cell(cells[k] ^ cells[0]);
  return different == 0;
}

// Adjacent pixels go to different copies of a cell, which lie side by side: an increment that
// follows another of the same number would wait for its store, and whole tables one after the other
// need more registers for their beginnings than there are. Meanwhile the labels that `encode` reads
// next are fetched, or counting and reading memory would take turns.
template <int Copies, class T, class Cell>
PYSEG_INLINE void count(const Cell* cells, int64_t n, uint32_t* table, const T* next_prediction,
                        const T* next_target) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int64_t k = i; k < i + kRun; k += kLine) {
      __builtin_prefetch(next_prediction + k);
      __builtin_prefetch(next_target + k);
    }
    if (all_alike(cells + i)) {  // label maps are mostly flat
      table[cells[i] * Copies] += uint32_t(kRun);
      continue;
    }
    for (int64_t k = 0; k < kRun; k += Copies)
      for (int copy = 0; copy < Copies; ++copy) ++table[cells[i + k + copy] * Copies + copy];
  }
  for (; i < n; ++i) ++table[cells[i] * Copies];
}

template <int Copies, class Code, class Cell, class T>
PYSEG_INLINE void count_blocks(const T* prediction, const T* target, int64_t n,
                               const LabelCoder<T>& coder, uint32_t* table) {
  alignas(64) Cell cells[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const T *p = prediction + begin, *t = target + begin;
    int64_t coded = 0;
    if constexpr (sizeof(T) == 1 && Copies == kTableCopies)
      coded = encode_bytes(p, t, size, coder, cells);
    encode<T, Code>(p + coded, t + coded, size - coded, coder, cells + coded);
    count<Copies>(cells, size, table, p + kBlock, t + kBlock);
  }
}

template <class T>
void count_pairs(const T* prediction, const T* target, int64_t n, const LabelCoder<T>& coder,
                 uint32_t* table, int64_t table_size, int copies) {
  using Narrow = typename LabelCoder<T>::Unsigned;
  using Wide = std::conditional_t<sizeof(T) == 1, uint16_t, Narrow>;
  if (copies == kTableCopies)
    count_blocks<kTableCopies, Narrow, uint16_t>(prediction, target, n, coder, table);
  else if (table_size <= int64_t(1) << 16)  // then codes, too, fit a label of 8 bits
    count_blocks<1, Narrow, uint16_t>(prediction, target, n, coder, table);
  else
    count_blocks<1, Wide, uint32_t>(prediction, target, n, coder, table);
}

#define PYSEG_COUNT(T)                                                                             \
  template void count_pairs(const T*, const T*, int64_t, const LabelCoder<T>&, uint32_t*, int64_t, \
                            int);
PYSEG_COUNT(uint8_t)
PYSEG_COUNT(int8_t)
PYSEG_COUNT(int16_t)
PYSEG_COUNT(int32_t)
PYSEG_COUNT(int64_t)

}  // namespace pyseg::counting::PYSEG_LEVEL
