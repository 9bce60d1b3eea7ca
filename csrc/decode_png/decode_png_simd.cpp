// A zlib stream of filtered rows to pixels. The rows are unfiltered while they are in the cache,
// before more is inflated: of the whole picture only the result is kept.
//
// Label maps are mostly flat, and what a filter leaves of flat regions is zeros. Where the pixel to
// the left and the one above that are equal, Paeth's filter predicts the one above; so through a
// run of zeros, however long, the row above is copied.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "decode_png_simd.h"

#include "../common/level.h"  // after all others

namespace pyseg::png::PYSEG_LEVEL {

#include "../common/bits_simd.h"
#include "inflate_simd.h"

PYSEG_INLINE uint8_t paeth(int a, int b, int c) {
  int pa = b - c, pb = a - c, pc = pa + pb;
  pa = pa < 0 ? -pa : pa, pb = pb < 0 ? -pb : pb, pc = pc < 0 ? -pc : pc;
  const int least = pb <= pc ? b : c;
  return uint8_t(pa <= pb && pa <= pc ? a : least);
}

template <int B>
struct Pixel {
  uint8_t v[B];
};

template <int B>
PYSEG_INLINE bool equal(const Pixel<B>& one, const Pixel<B>& other) {
  return std::memcmp(&one, &other, B) == 0;
}

template <int B>
PYSEG_INLINE Pixel<B> pixel_at(const uint8_t* from) {
  Pixel<B> pixel;
  std::memcpy(&pixel, from, B);
  return pixel;
}

// Which of 64 bytes are not those that stand B before them.
template <int B>
PYSEG_INLINE uint64_t changes(const uint8_t* bytes) {
#if defined(PYSEG_AVX512)
  return _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes - B));
#else
  alignas(64) uint8_t different[64];
  for (int k = 0; k < 64; ++k) different[k] = bytes[k] ^ bytes[k - B];
  return bits_of(different);
#endif
}

// `row` is filtered, of n bytes, and 64 more can be read; `above` and `to` have n.
template <int B>
void undo_paeth(const uint8_t* row, const uint8_t* above, int64_t n, uint8_t* to) {
  constexpr int kWhole = 64 / B * B;  // bytes of whole pixels
  Pixel<B> left{}, corner{};
  int64_t x = 0;
  while (x < n) {
    const Pixel<B> up = pixel_at<B>(above + x);
    Pixel<B> here = pixel_at<B>(row + x);
    if (equal(here, Pixel<B>{})) {
      if (equal(left, corner)) {
        while (true) {
          const uint64_t other = bits_of(row + x);
          int64_t same = other ? __builtin_ctzll(other) / B * B : kWhole;
          if (same > n - x) same = n - x;
          if (x + 64 <= n)
            std::memcpy(to + x, above + x, 64);
          else
            std::memcpy(to + x, above + x, same);
          x += same;
          if (other || x >= n) break;
        }
        left = corner = pixel_at<B>(above + x - B);  // what was copied last
        continue;
      }
      // The pixel to the left, as long as what is above is all the same.
      if (equal(up, corner) && x + 64 <= n) {
        uint8_t pattern[64 + B];
        for (int k = 0; k < 64; k += B) std::memcpy(pattern + k, &left, B);
        uint64_t other;
        do {
          other = bits_of(row + x) | changes<B>(above + x);
          std::memcpy(to + x, pattern, 64);
          x += other ? __builtin_ctzll(other) / B * B : kWhole;
        } while (!other && x + 64 <= n);
        continue;
      }
    }
    for (int k = 0; k < B; ++k)
      here.v[k] = uint8_t(here.v[k] + paeth(left.v[k], up.v[k], corner.v[k]));
    std::memcpy(to + x, &here, B);
    left = here, corner = up;
    x += B;
  }
}

template <int B>
bool undo_filter(const uint8_t* row, const uint8_t* above, int64_t n, uint8_t* to) {
  const uint8_t filter = *row++;
  switch (filter) {
    case 0: std::memcpy(to, row, n); return true;
    case 1: {
      Pixel<B> sum{};
      for (int64_t x = 0; x < n; x += B) {
        for (int k = 0; k < B; ++k) sum.v[k] = uint8_t(sum.v[k] + row[x + k]);
        std::memcpy(to + x, &sum, B);
      }
      return true;
    }
    case 2:
      for (int64_t x = 0; x < n; ++x) to[x] = uint8_t(row[x] + above[x]);
      return true;
    case 3: {
      Pixel<B> left{};
      for (int64_t x = 0; x < n; x += B) {
        for (int k = 0; k < B; ++k)
          left.v[k] = uint8_t(row[x + k] + (left.v[k] + above[x + k]) / 2);
        std::memcpy(to + x, &left, B);
      }
      return true;
    }
    case 4: undo_paeth<B>(row, above, n, to); return true;
    default: return false;
  }
}

void join_ids(const uint8_t* rgb, int64_t n, int32_t* to) {
  int64_t x = 0;
#if defined(PYSEG_AVX2) || defined(PYSEG_AVX512)
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0,
                                          1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  for (; x + 10 <= n; x += 8) {  // the second half reads four bytes more than it takes
    const __m128i* const low = reinterpret_cast<const __m128i*>(rgb + 3 * x);
    const __m128i* const high = reinterpret_cast<const __m128i*>(rgb + 3 * x + 12);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                                 _mm_loadu_si128(high), 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + x), _mm256_shuffle_epi8(both, spread));
  }
#endif
  for (; x < n; ++x) to[x] = rgb[3 * x] | rgb[3 * x + 1] << 8 | rgb[3 * x + 2] << 16;
}

bool decode(const uint8_t* stream, int64_t size, const Picture& picture, Form form, uint8_t* memory,
            void* to) {
  // CM 8, a window of 32 KB at most, no dictionary; a multiple of 31.
  if (size < 6 || (stream[0] & 15) != 8 || stream[0] >> 4 > 7 || stream[1] & 32 ||
      (stream[0] << 8 | stream[1]) % 31)
    return false;
  const int64_t n = picture.row(), stride = n + 1;
  Inflater inflater{stream + 2, stream + size, reinterpret_cast<Codes*>(memory)};
  uint8_t* const window = memory + kTables;
  uint8_t* const most = window + kHistory + kSlab + stride;
  uint8_t* rows[2] = {most + kSlack, most + kSlack + n + kSlack};  // of segment ids
  std::memset(rows[1], 0, n);                                      // above the first row
  const uint8_t* above = rows[1];
  const auto undo = picture.bytes == 3 ? undo_filter<3> : undo_filter<1>;
  uint8_t* out = window;         // up to where it is inflated
  const uint8_t* next = window;  // the row that is unfiltered next
  const uint8_t* checked = window;
  uint32_t sum = 1, sums = 0;
  for (int64_t y = 0;;) {
    const Step step = inflater.run(window, out, most);
    if (step == Step::wrong) return false;
    add_to_checksum(checked, out - checked, sum, sums);
    for (; out - next >= stride && y < picture.height; next += stride, ++y) {
      uint8_t* const here = form == kSegmentIds ? rows[y & 1] : static_cast<uint8_t*>(to) + y * n;
      if (!undo(next, above, n, here)) return false;
      if (form == kSegmentIds)
        join_ids(here, picture.width, static_cast<int32_t*>(to) + y * picture.width);
      above = here;
    }
    if (step == Step::end) {
      if (y < picture.height || next != out) return false;
      break;
    }
    if (y == picture.height) {
      if (next != out) return false;  // more than there are pixels
    }
    // What later copies reach, and what is not unfiltered yet, goes to the front.
    int64_t kept = out - next > kHistory ? out - next : kHistory;
    if (kept > out - window) kept = out - window;
    std::memmove(window, out - kept, kept);
    next = window + kept - (out - next);
    out = window + kept;
    checked = out;
  }
  const uint8_t* const end = inflater.stop();
  if (stream + size - end != 4) return false;
  const uint32_t wanted = uint32_t(end[0]) << 24 | end[1] << 16 | end[2] << 8 | end[3];
  return wanted == (sums << 16 | sum);
}

}  // namespace pyseg::png::PYSEG_LEVEL
