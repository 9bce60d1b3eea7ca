// Pixels near another label: the hot loops, row by row, with the length of the run of equal rows
// kept per column.
//
// The template of such a file: setup.py compiles it once per instruction set, with PYSEG_LEVEL as
// the name of the set and of the namespace. Plain loops over arrays under __restrict do: the
// compiler makes vectors of them. Where it does not, write vectors (common/vectors_simd.h). What a
// loop calls has to be inlined: PYSEG_INLINE.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "boundary_mask_simd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/inline.h"

#include "../common/level.h"  // after all others

namespace pyseg::boundary::PYSEG_LEVEL {

#include "../common/bits_simd.h"

constexpr int64_t kBlock = 64;  // pixels that are compared together

struct alignas(64) Line {  // of the cache: a vector that begins elsewhere may cross two
  uint8_t bytes[64];
};

// Room for n numbers, all 0.
template <class T>
std::vector<Line> lines_for(int64_t n) {
  return std::vector<Line>((n * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
}

// Sets the pixels whose window along the row has one label; returns nothing else.
template <class T>
PYSEG_INLINE void find_uniform(const T* labels, Window window, uint8_t* uniform) {
  const int64_t width = window.width;
  std::memset(uniform, 0, width);
  int64_t start = 0;
  const auto close = [&](int64_t end) __attribute__((always_inline)) {
    const int64_t first = start == 0 && !window.border ? 0 : start + window.distance;
    const int64_t last = end == width && !window.border ? width : end - window.distance;
    if (first < last) std::memset(uniform + first, 1, last - first);
    start = end;
  };
  int64_t x = 1;
  for (; x + kBlock <= width; x += kBlock) {
    uint8_t changed[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) changed[k] = labels[x + k] != labels[x + k - 1] ? 1 : 0;
    for (uint64_t word = bits_of(changed); word; word &= word - 1) close(x + __builtin_ctzll(word));
  }
  for (; x < width; ++x)
    if (labels[x] != labels[x - 1]) close(x);
  close(width);
}

// streak: how many rows up to this one were uniform and had this label; `needed` are enough.
template <class T, class Streak>
PYSEG_INLINE void add_row(const uint8_t* __restrict uniform, const T* __restrict labels,
                          const T* __restrict above, int64_t width, Streak needed,
                          Streak* __restrict streak) {
  for (int64_t x = 0; x < width; ++x) {
    const Streak before = labels[x] == above[x] ? streak[x] : Streak(0);
    const Streak longer = Streak(before + (before < needed ? 1 : 0));
    streak[x] = uniform[x] ? longer : Streak(0);
  }
}

template <class Streak>
PYSEG_INLINE void write_row(const Streak* __restrict streak, int64_t width, Streak needed,
                            uint8_t* __restrict mask) {
  for (int64_t x = 0; x < width; ++x) mask[x] = streak[x] < needed;
}

// Rows [begin, end) of one image.
template <class T, class Streak>
void mark_rows_counting(const T* labels, const Window& window, int64_t begin, int64_t end,
                        uint8_t* mask) {
  const int64_t width = window.width, last = window.height - 1, distance = window.distance;
  std::vector<Line> uniform_lines = lines_for<uint8_t>(width), streaks = lines_for<Streak>(width);
  uint8_t* const uniform = uniform_lines[0].bytes;
  Streak* const streak = reinterpret_cast<Streak*>(streaks.data());
  const Streak needed = Streak(2 * distance + 1);
  int64_t ready = -1;  // the row that `uniform` is of
  for (int64_t y = begin - distance; y < end + distance; ++y) {
    const bool outside = y < 0 || y > last;
    const int64_t row = std::clamp<int64_t>(y, 0, last);
    if (outside && window.border) {
      std::fill_n(streak, width, Streak(0));
    } else {
      if (row != ready) find_uniform(labels + row * width, window, uniform);
      ready = row;
      const int64_t above = std::clamp<int64_t>(y - 1, 0, last);
      add_row(uniform, labels + row * width, labels + above * width, width, needed, streak);
    }
    if (y - distance >= begin) write_row(streak, width, needed, mask + (y - distance) * width);
  }
}

template <class T>
void mark_rows(const T* labels, const Window& window, int64_t begin, int64_t end, uint8_t* mask) {
  const auto mark = 2 * window.distance < 255 ? mark_rows_counting<T, uint8_t>  // more lanes
                                              : mark_rows_counting<T, int32_t>;
  mark(labels, window, begin, end, mask);
}

// Labels are only compared, so a sign makes no difference.
template void mark_rows(const uint8_t*, const Window&, int64_t, int64_t, uint8_t*);
template void mark_rows(const int16_t*, const Window&, int64_t, int64_t, uint8_t*);
template void mark_rows(const int32_t*, const Window&, int64_t, int64_t, uint8_t*);
template void mark_rows(const int64_t*, const Window&, int64_t, int64_t, uint8_t*);

}  // namespace pyseg::boundary::PYSEG_LEVEL
