// The inner loops of RoI pooling on the CPU, in vectors of the compiler. The element types of a
// unit are PYSEG_REAL and, of float's, the half precisions.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstring>
#include <limits>
#include <utility>

#include "roi_align_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::regions::PYSEG_LEVEL {

#include "../common/vectors_simd.h"
#include "../common/transpose_simd.h"

template <class T>
using Index = Vector<Integer<T>>;

// Vectors of channels whose sums are in registers at a time: a block's, or what fits.
#ifdef PYSEG_AVX512
constexpr int kVectors = 4;
#else
constexpr int kVectors = 8;
#endif
constexpr int kPerLine = 64 / PYSEG_REGISTER;  // vectors in a line of the cache

// How far below a row of pixels of a bin are those of the bin below it, to be prefetched: memory is
// what pooling waits for.
template <class Real>
PYSEG_INLINE int64_t row_ahead(const Pixels<Real>& ys, int row, int64_t bin) {
  const int next = std::min(row + ys.begin[bin + 1] - ys.begin[bin], ys.begin.back() - 1);
  return ys.pixel[next] - ys.pixel[row];
}

// out: [bins, kBlock]
template <int N, class Real>
PYSEG_INLINE void pool_average(const Field<const Real>& field, const Pixels<Real>& ys,
                               const Pixels<Real>& xs, Real* out) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j, out += kBlock) {
      Vector<Real> sum[N] = {};
      for (int r = ys.begin[i]; r < ys.begin[i + 1]; ++r) {
        const Real* row = field.at(ys.pixel[r], 0);
        const Real wy = ys.weight[r];
        const int64_t ahead = row_ahead(ys, r, i) * field.row_stride;
        for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c) {
          const Real* from = row + xs.pixel[c] * field.pixel_stride;
#pragma GCC unroll 8
          for (int n = 0; n < N; n += kPerLine) __builtin_prefetch(from + ahead + n * kLanes<Real>);
          const Vector<Real> w = broadcast(wy * xs.weight[c]);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[n] = fma(w, load(from + n * kLanes<Real>), sum[n]);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(out + n * kLanes<Real>, sum[n]);
    }
  }
}

// Adds the gradients of the bins, [bins, kBlock], to the field's. line: [distinct columns, kBlock].
template <int N, class Real>
PYSEG_INLINE void spread_average(const Real* gradient, const Pixels<Real>& ys,
                                 const Pixels<Real>& xs, Real* line, const Field<Real>& field) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
  const int64_t width = int64_t(xs.distinct.size());
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(line, 0, width * kBlock * sizeof(Real));
    for (int64_t j = 0; j < columns; ++j, gradient += kBlock) {
      Vector<Real> g[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) g[n] = load(gradient + n * kLanes<Real>);
      for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c) {
        Real* to = line + xs.slot[c] * kBlock;
        const Vector<Real> w = broadcast(xs.weight[c]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          store(to + n * kLanes<Real>, fma(w, g[n], load(to + n * kLanes<Real>)));
      }
    }
    for (int r = ys.begin[i]; r < ys.begin[i + 1]; ++r) {
      Real* row = field.at(ys.pixel[r], 0);
      const Vector<Real> w = broadcast(ys.weight[r]);
      for (int64_t c = 0; c < width; ++c) {
        const Real* from = line + c * kBlock;
        Real* to = row + xs.distinct[c] * field.pixel_stride;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          store(to + n * kLanes<Real>,
                fma(w, load(from + n * kLanes<Real>), load(to + n * kLanes<Real>)));
      }
    }
  }
}

// The largest value of each bin and channel, and which it is of the bin's rows * columns: the first
// of equal ones, and NaN above all; -1 in an empty bin. [bins, kBlock]
//
// To look for NaN takes as long as to find the largest. Without Exact their sum is taken instead:
// the result is false where that is NaN, and the bins then may be wrong.
template <int N, bool Samples, bool WithIndex, bool Exact, class Real>
PYSEG_INLINE bool pool_maximum(const Field<const Real>& field, const Pixels<Real>& ys,
                               const Pixels<Real>& xs, Real* out, Integer<Real>* best_index) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
  Vector<Real> total[N] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const bool empty = ys.begin[i] == ys.begin[i + 1] || xs.begin[j] == xs.begin[j + 1];
      Vector<Real> best[N];
      Index<Real> index[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        best[n] = broadcast(empty ? Real(0) : -std::numeric_limits<Real>::infinity());
        index[n] = Index<Real>{} - (empty ? 1 : 0);
      }
      Integer<Real> count = 0;
      for (int r = ys.begin[i]; r < ys.begin[i + 1]; ++r) {
        const Real* row = field.at(ys.pixel[r], 0);
        const Real ty = Samples ? ys.weight[r] : Real(0);
        const int64_t down = ty > 0 ? field.row_stride : 0;
        const int64_t ahead = row_ahead(ys, r, i) * field.row_stride;
        for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c, ++count) {
          const Real tx = Samples ? xs.weight[c] : Real(0);
          const int64_t right = tx > 0 ? field.pixel_stride : 0;
          const Real* from = row + xs.pixel[c] * field.pixel_stride;
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n, from += kLanes<Real>) {
            if (n % kPerLine == 0) __builtin_prefetch(from + ahead);
            Vector<Real> value = load(from);
            if constexpr (Samples) {  // weighed, for a difference of infinities would be NaN
              Vector<Real> lower = load(from + down);
              if (tx > 0) {
                value = fma(broadcast(tx), load(from + right), broadcast(1 - tx) * value);
                lower = fma(broadcast(tx), load(from + down + right), broadcast(1 - tx) * lower);
              }
              if (ty > 0) value = fma(broadcast(ty), lower, broadcast(1 - ty) * value);
            }
            if constexpr (Exact) {
              const auto wins = (value > best[n]) | (value != value);
              best[n] = wins ? value : best[n];
              if constexpr (WithIndex) index[n] = wins ? Index<Real>{} + count : index[n];
            } else {
              best[n] = value > best[n] ? value : best[n];
              total[n] += value;
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const int64_t at = (i * columns + j) * kBlock + n * kLanes<Real>;
        if constexpr (WithIndex)
          store(best_index + at, index[n]);
        else
          store(out + at, best[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int64_t lane = 0; lane < kLanes<Real>; ++lane)
      if (total[n][lane] != total[n][lane]) return false;
  return true;
}

// The functions above for all channels of a block, some vectors at a time and then one.
template <class Real>
void average(const Field<const Real>& field, const Pixels<Real>& ys, const Pixels<Real>& xs,
             int64_t lanes, Real* out) {
  for (int64_t lane = 0; lane < lanes;) {
    const Field<const Real> part{field.data + lane, field.pixel_stride, field.row_stride};
    const bool some = lane + kVectors * kLanes<Real> <= lanes;
    if (some)
      pool_average<kVectors>(part, ys, xs, out + lane);
    else
      pool_average<1>(part, ys, xs, out + lane);
    lane += (some ? kVectors : 1) * kLanes<Real>;
  }
}

template <class Real>
void spread(const Real* gradient, const Pixels<Real>& ys, const Pixels<Real>& xs, int64_t lanes,
            Real* line, const Field<Real>& field) {
  for (int64_t lane = 0; lane < lanes;) {
    const Field<Real> part{field.data + lane, field.pixel_stride, field.row_stride};
    const bool some = lane + kVectors * kLanes<Real> <= lanes;
    if (some)
      spread_average<kVectors>(gradient + lane, ys, xs, line, part);
    else
      spread_average<1>(gradient + lane, ys, xs, line, part);
    lane += (some ? kVectors : 1) * kLanes<Real>;
  }
}

// One of `out` and `index` is null.
template <bool Samples, class Real>
void maximum(const Field<const Real>& field, const Pixels<Real>& ys, const Pixels<Real>& xs,
             int64_t lanes, Real* out, Integer<Real>* index) {
  for (int64_t lane = 0; lane < lanes;) {
    const Field<const Real> part{field.data + lane, field.pixel_stride, field.row_stride};
    const bool four = lane + 4 * kLanes<Real> <= lanes;
    if (four && out) {
      if (!pool_maximum<4, Samples, false, false>(part, ys, xs, out + lane, index))
        pool_maximum<4, Samples, false, true>(part, ys, xs, out + lane, index);
    } else if (out) {
      pool_maximum<1, Samples, false, true>(part, ys, xs, out + lane, index);
    } else if (four) {
      pool_maximum<4, Samples, true, true>(part, ys, xs, out, index + lane);
    } else {
      pool_maximum<1, Samples, true, true>(part, ys, xs, out, index + lane);
    }
    lane += four ? 4 * kLanes<Real> : kLanes<Real>;
  }
}

template <class T>
Functions<T, WorkType<T>> functions() {
  using Real = WorkType<T>;
  return {&transpose<Real, T, Real>, &transpose<Real, Real, T>, &average<Real>, &spread<Real>,
          &maximum<true, Real>,      &maximum<false, Real>};
}

#ifdef PYSEG_REAL_DOUBLE
template Functions<PYSEG_REAL, double> functions<double>();
#else
template Functions<float, float> functions<float>();
template Functions<torch::headeronly::Half, float> functions<torch::headeronly::Half>();
template Functions<torch::headeronly::BFloat16, float> functions<torch::headeronly::BFloat16>();
#endif

}  // namespace pyseg::regions::PYSEG_LEVEL
