// The inner loops of boundary_match on the CPU.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "boundary_match_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::contours::PYSEG_LEVEL {

template <class T, class Code>
bool encode_row(const T* __restrict prediction, const T* __restrict target, int64_t width,
                const LabelCoder<T>& labels, Code* __restrict predicted, Code* __restrict truth) {
  const LabelCoder<T> coder = labels;
  const Code void_code = Code(coder.num_classes), bad = Code(coder.num_classes + 1);
  int wrong = 0;
  for (int64_t x = 0; x < width; ++x) {
    const Code t = coder.template code<Code>(target[x]);
    const Code p = t == void_code ? void_code : coder.template code<Code>(prediction[x]);
    truth[x] = t, predicted[x] = p;
    wrong |= (t == bad) | (p == bad);
  }
  return wrong != 0;
}

template <class Code>
PYSEG_INLINE Code on_contour(Code code, Code above, Code below, Code left, Code right, Code classes,
                             Code other) {
  const bool differs = (code != above) | (code != below) | (code != left) | (code != right);
  const bool kept = differs & (code < classes);
  return kept ? code : other;
}

template <class Code>
void keep_contour(const Code* __restrict above, const Code* __restrict row,
                  const Code* __restrict below, int64_t width, Code classes, Code other,
                  Code* __restrict contour) {
  for (int64_t x = 1; x < width - 1; ++x)
    contour[x] = on_contour(row[x], above[x], below[x], row[x - 1], row[x + 1], classes, other);
  for (const int64_t x : {int64_t(0), width - 1})  // they have one neighbour, or none
    contour[x] = on_contour(row[x], above[x], below[x], row[x > 0 ? x - 1 : 0],
                            row[x + 1 < width ? x + 1 : x], classes, other);
}

// 32 bytes at AVX-512, too: a row of the disc begins anywhere, so that every load of 64 bytes reads
// two cache lines. On a Zen 5 the op takes 13.1 ms with 64, 12.4 with 32 and 12.1 at AVX2.
constexpr int64_t kLength = PYSEG_REGISTER < kBytes ? PYSEG_REGISTER : kBytes;
typedef uint64_t Words __attribute__((vector_size(kLength)));

PYSEG_INLINE bool any(Words words) {
#if defined(PYSEG_AVX512) || defined(PYSEG_AVX2)
  return !_mm256_testz_si256((__m256i)words, (__m256i)words);
#else
  return (words[0] | words[1]) != 0;
#endif
}

// Whether a row of the disc, of so many bytes, holds the code.
template <class Code>
PYSEG_INLINE bool row_has(const Code* row, Code code, const uint8_t* mask, int64_t bytes) {
  typedef Code Codes __attribute__((vector_size(kLength), aligned(alignof(Code)), may_alias));
  Words found = {};
  for (int64_t i = 0; i < bytes; i += kLength) {
    Words inside;
    std::memcpy(&inside, mask + i, kLength);
    const Codes codes = *reinterpret_cast<const Codes*>(row + i / int64_t(sizeof(Code)));
    found |= Words(codes == code) & inside;
  }
  return any(found);
}

// Rows from the nearest on, so that most searches end early.
template <class Code>
PYSEG_INLINE bool is_near(const Framed<Code>& contour, int64_t y, int64_t x, Code code,
                          const Disc& disc, const Rows& rows) {
  if (contour.row(y)[x] == code) return true;
  const int64_t nearest = std::max<int64_t>({0, rows.first - y, y - rows.last});
  const int64_t farthest = std::min(disc.radius, std::max(y - rows.first, rows.last - y));
  for (int64_t dy = nearest; dy <= farthest; ++dy) {
    const int64_t half = disc.half_widths[dy], bytes = (2 * half + 1) * int64_t(sizeof(Code));
    const uint8_t* const mask = disc.masks[dy].data();
    if ((y - dy >= rows.first && row_has(contour.row(y - dy) + x - half, code, mask, bytes)) ||
        (y + dy <= rows.last && row_has(contour.row(y + dy) + x - half, code, mask, bytes)))
      return true;
  }
  return false;
}

template <class Code>
void match_row(const Framed<Code>& from, const Framed<Code>& to, int64_t y, Code other,
               const Disc& disc, const Rows* rows, int first, int64_t* counts) {
  const Code* const row = from.row(y);
  for (int64_t x = 0; x < from.width; x += kGroup<Code>) {
    if (!has_contour(row + x)) continue;
    for (int64_t k = x; k < x + kGroup<Code>; ++k) {
      const Code code = row[k];
      if (code == other) continue;
      ++counts[int64_t(code) * kMatchCounts + first];
      counts[int64_t(code) * kMatchCounts + first + 1] += is_near(to, y, k, code, disc, rows[code]);
    }
  }
}

template void keep_contour(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, uint8_t,
                           uint8_t, uint8_t*);
template void keep_contour(const uint16_t*, const uint16_t*, const uint16_t*, int64_t, uint16_t,
                           uint16_t, uint16_t*);
template void match_row(const Framed<uint8_t>&, const Framed<uint8_t>&, int64_t, uint8_t,
                        const Disc&, const Rows*, int, int64_t*);
template void match_row(const Framed<uint16_t>&, const Framed<uint16_t>&, int64_t, uint16_t,
                        const Disc&, const Rows*, int, int64_t*);

#define PYSEG_ENCODE(T)                                                                            \
  template bool encode_row(const T*, const T*, int64_t, const LabelCoder<T>&, uint8_t*, uint8_t*); \
  template bool encode_row(const T*, const T*, int64_t, const LabelCoder<T>&, uint16_t*, uint16_t*);
PYSEG_ENCODE(uint8_t)
PYSEG_ENCODE(int8_t)
PYSEG_ENCODE(int16_t)
PYSEG_ENCODE(int32_t)
PYSEG_ENCODE(int64_t)

}  // namespace pyseg::contours::PYSEG_LEVEL
