// The inner loops of RoI pooling on the CPU, in vectors of the compiler.
// roi_align.cpp includes this file once per instruction set, in a namespace of its own, with
//   PYSEG_BYTES  the width of a vector

#include "../common/vectors_simd.h"

template <class T>
using Index = Vector<Integer<T>>;

// The first (or second) halves of two vectors, their lanes in turn.
template <class T, int... Lanes>
PYSEG_INLINE Vector<T> interleave(Vector<T> a, Vector<T> b, bool second,
                                  std::integer_sequence<int, Lanes...>) {
  constexpr int n = sizeof...(Lanes);
  return second ? __builtin_shufflevector(a, b, (n + Lanes) / 2 + Lanes % 2 * n...)
                : __builtin_shufflevector(a, b, Lanes / 2 + Lanes % 2 * n...);
}

// The transpose of kLanes x kLanes numbers.
template <class In, class Out>
PYSEG_INLINE void transpose_square(const In* in, int64_t in_stride, Out* out, int64_t out_stride) {
  using Real = std::conditional_t<std::is_same_v<In, double>, double, float>;
  constexpr int n = kLanes<Real>;
  Vector<Real> a[n], b[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<In, Real>) {
      a[i] = load(in + i * in_stride);
    } else {
      Real row[n];
      for (int j = 0; j < n; ++j) row[j] = widen(in[i * in_stride + j]);
      a[i] = load(row);
    }
  }
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      b[i] =
          interleave<Real>(a[i / 2], a[i / 2 + n / 2], i % 2, std::make_integer_sequence<int, n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<Out, Real>) {
      store(out + i * out_stride, a[i]);
    } else {
      for (int j = 0; j < n; ++j) out[i * out_stride + j] = Out(a[i][j]);
    }
  }
}

// [rows, in_stride] -> [columns, out_stride]
template <class In, class Out>
void transpose(const In* in, int64_t in_stride, int64_t rows, int64_t columns, Out* out,
               int64_t out_stride) {
  constexpr int64_t n = kLanes<std::conditional_t<std::is_same_v<In, double>, double, float>>;
  // Where more than a few are left, a square overlaps the one before.
  const auto in_squares = [](int64_t size) {
    return size >= n && size % n > n / 8 ? size : size / n * n;
  };
  const int64_t end_rows = in_squares(rows), end_columns = in_squares(columns);
  for (int64_t c0 = 0; c0 < end_columns; c0 += 16) {
    for (int64_t r0 = 0; r0 < end_rows; r0 += 16) {
      const int64_t end = std::min(r0 + 16, end_rows);
      // For the next call: rows are far apart, and the processor does not foresee them.
      for (int64_t r = r0; r < end; ++r) __builtin_prefetch(in + r * in_stride + c0 + kTile);
      for (int64_t c = c0; c < std::min(c0 + 16, end_columns); c += n) {
        for (int64_t r = r0; r < end; r += n) {
          const int64_t y = std::min(r, rows - n), x = std::min(c, columns - n);
          transpose_square(in + y * in_stride + x, in_stride, out + x * out_stride + y, out_stride);
        }
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < end_columns ? end_rows : 0; r < rows; ++r)
      out[c * out_stride + r] = Out(widen(in[r * in_stride + c]));
}

// How far below a row of pixels of a bin are those of the bin below it, to be prefetched: memory is
// what pooling waits for.
template <class Real>
PYSEG_INLINE int64_t row_ahead(const Axis<Real>& ys, int row, int64_t bin) {
  const int next = std::min(row + ys.begin[bin + 1] - ys.begin[bin], ys.begin.back() - 1);
  return ys.pixel[next] - ys.pixel[row];
}

// out: [bins, kBlock]
template <int N, class Real>
PYSEG_INLINE void pool_average(const Field<const Real>& field, const Axis<Real>& ys,
                               const Axis<Real>& xs, Real* out) {
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
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) __builtin_prefetch(from + ahead + n * kLanes<Real>);
          const Vector<Real> w = broadcast(wy * xs.weight[c]);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[n] += w * load(from + n * kLanes<Real>);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(out + n * kLanes<Real>, sum[n]);
    }
  }
}

// Adds the gradients of the bins, [bins, kBlock], to the field's. line: [distinct columns, kBlock].
template <int N, class Real>
PYSEG_INLINE void spread_average(const Real* gradient, const Axis<Real>& ys, const Axis<Real>& xs,
                                 Real* line, const Field<Real>& field) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
  const int64_t width = int64_t(xs.distinct.size());
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(line, 0, width * kBlock * sizeof(Real));
    for (int64_t j = 0; j < columns; ++j, gradient += kBlock) {
      Vector<Real> g[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) g[n] = load(gradient + n * kLanes<Real>);
      for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c) {
        Real* to = line + xs.slot[c] * kBlock;
        const Vector<Real> w = broadcast(xs.weight[c]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          store(to + n * kLanes<Real>, load(to + n * kLanes<Real>) + w * g[n]);
      }
    }
    for (int r = ys.begin[i]; r < ys.begin[i + 1]; ++r) {
      Real* row = field.at(ys.pixel[r], 0);
      const Vector<Real> w = broadcast(ys.weight[r]);
      for (int64_t c = 0; c < width; ++c) {
        const Real* from = line + c * kBlock;
        Real* to = row + xs.distinct[c] * field.pixel_stride;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          store(to + n * kLanes<Real>,
                load(to + n * kLanes<Real>) + w * load(from + n * kLanes<Real>));
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
PYSEG_INLINE bool pool_maximum(const Field<const Real>& field, const Axis<Real>& ys,
                               const Axis<Real>& xs, Real* out, Integer<Real>* best_index) {
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
            __builtin_prefetch(from + ahead);
            Vector<Real> value = load(from);
            if constexpr (Samples) {  // weighed, for a difference of infinities would be NaN
              Vector<Real> lower = load(from + down);
              if (tx > 0) {
                value = broadcast(1 - tx) * value + broadcast(tx) * load(from + right);
                lower = broadcast(1 - tx) * lower + broadcast(tx) * load(from + down + right);
              }
              if (ty > 0) value = broadcast(1 - ty) * value + broadcast(ty) * lower;
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

// The functions above for all channels of a block, four vectors at a time and then one.
template <class Real>
void average(const Field<const Real>& field, const Axis<Real>& ys, const Axis<Real>& xs,
             int64_t lanes, Real* out) {
  for (int64_t lane = 0; lane < lanes;) {
    const Field<const Real> part{field.data + lane, field.pixel_stride, field.row_stride};
    const bool four = lane + 4 * kLanes<Real> <= lanes;
    if (four)
      pool_average<4>(part, ys, xs, out + lane);
    else
      pool_average<1>(part, ys, xs, out + lane);
    lane += four ? 4 * kLanes<Real> : kLanes<Real>;
  }
}

template <class Real>
void spread(const Real* gradient, const Axis<Real>& ys, const Axis<Real>& xs, int64_t lanes,
            Real* line, const Field<Real>& field) {
  for (int64_t lane = 0; lane < lanes;) {
    const Field<Real> part{field.data + lane, field.pixel_stride, field.row_stride};
    const bool four = lane + 4 * kLanes<Real> <= lanes;
    if (four)
      spread_average<4>(gradient + lane, ys, xs, line, part);
    else
      spread_average<1>(gradient + lane, ys, xs, line, part);
    lane += four ? 4 * kLanes<Real> : kLanes<Real>;
  }
}

// One of `out` and `index` is null.
template <bool Samples, class Real>
void maximum(const Field<const Real>& field, const Axis<Real>& ys, const Axis<Real>& xs,
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

template <class T, class Real>
Functions<T, Real> functions() {
  return {&transpose<T, Real>, &transpose<Real, T>,  &average<Real>,
          &spread<Real>,       &maximum<true, Real>, &maximum<false, Real>};
}
#undef PYSEG_BYTES
