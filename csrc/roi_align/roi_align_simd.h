// The inner loops of RoI pooling on the CPU, in vectors of the compiler.
// roi_align.cpp includes this file once per instruction set, in a namespace of its own, with
//   PYSEG_BYTES  the width of a vector

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(PYSEG_BYTES)));
  typedef T memory __attribute__((vector_size(PYSEG_BYTES), aligned(alignof(T)), may_alias));
  typedef T four __attribute__((vector_size(4 * sizeof(T))));
  typedef T four_memory __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Index = typename VectorOf<Integer<T>>::type;
template <class T>
constexpr int64_t kLanes = PYSEG_BYTES / sizeof(T);

template <class T>
PYSEG_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::memory*>(from);
}
template <class T>
PYSEG_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::memory*>(to) = value;
}
template <class T>
PYSEG_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// The transpose of 4 x 4 numbers.
template <class In, class Out>
PYSEG_INLINE void transpose4(const In* in, int64_t in_stride, Out* out, int64_t out_stride) {
  using Real = std::conditional_t<std::is_same_v<In, double>, double, float>;
  using Four = typename VectorOf<Real>::four;
  typedef Integer<Real> Order __attribute__((vector_size(4 * sizeof(Real))));
  Four a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const In* row = in + i * in_stride;
    if constexpr (std::is_same_v<In, Real>)
      a[i] = *reinterpret_cast<const typename VectorOf<Real>::four_memory*>(row);
    else
      a[i] = Four{widen(row[0]), widen(row[1]), widen(row[2]), widen(row[3])};
  }
  const Four b0 = __builtin_shuffle(a[0], a[1], Order{0, 4, 1, 5});
  const Four b1 = __builtin_shuffle(a[2], a[3], Order{0, 4, 1, 5});
  const Four b2 = __builtin_shuffle(a[0], a[1], Order{2, 6, 3, 7});
  const Four b3 = __builtin_shuffle(a[2], a[3], Order{2, 6, 3, 7});
  a[0] = __builtin_shuffle(b0, b1, Order{0, 1, 4, 5});
  a[1] = __builtin_shuffle(b0, b1, Order{2, 3, 6, 7});
  a[2] = __builtin_shuffle(b2, b3, Order{0, 1, 4, 5});
  a[3] = __builtin_shuffle(b2, b3, Order{2, 3, 6, 7});
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Out* row = out + i * out_stride;
    if constexpr (std::is_same_v<Out, Real>)
      *reinterpret_cast<typename VectorOf<Real>::four_memory*>(row) = a[i];
    else
      row[0] = Out(a[i][0]), row[1] = Out(a[i][1]), row[2] = Out(a[i][2]), row[3] = Out(a[i][3]);
  }
}

// [rows, in_stride] -> [columns, out_stride]
template <class In, class Out>
void transpose(const In* in, int64_t in_stride, int64_t rows, int64_t columns, Out* out,
               int64_t out_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t c0 = 0; c0 < whole_columns; c0 += 16) {
    for (int64_t r0 = 0; r0 < whole_rows; r0 += 16) {
      const int64_t end = std::min(r0 + 16, whole_rows);
      // For the next call: rows are far apart, and the processor does not foresee them.
      for (int64_t r = r0; r < end; ++r) __builtin_prefetch(in + r * in_stride + c0 + kTile);
      for (int64_t c = c0; c < std::min(c0 + 16, whole_columns); c += 4)
        for (int64_t r = r0; r < end; r += 4)
          transpose4(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    }
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      out[c * out_stride + r] = Out(widen(in[r * in_stride + c]));
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
        for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c) {
          const Real* from = row + xs.pixel[c] * field.pixel_stride;
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
template <int N, bool Samples, bool WithIndex, class Real>
PYSEG_INLINE void pool_maximum(const Field<const Real>& field, const Axis<Real>& ys,
                               const Axis<Real>& xs, Real* out, Integer<Real>* best_index) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
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
        for (int c = xs.begin[j]; c < xs.begin[j + 1]; ++c, ++count) {
          const Real tx = Samples ? xs.weight[c] : Real(0);
          const int64_t right = tx > 0 ? field.pixel_stride : 0;
          const Real* from = row + xs.pixel[c] * field.pixel_stride;
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n, from += kLanes<Real>) {
            Vector<Real> value = load(from);
            if constexpr (Samples) {  // a neighbour of weight 0 is the pixel itself
              const Vector<Real> lower = load(from + down);
              const Vector<Real> top = value + broadcast(tx) * (load(from + right) - value);
              const Vector<Real> bottom =
                  lower + broadcast(tx) * (load(from + down + right) - lower);
              value = top + broadcast(ty) * (bottom - top);
            }
            const auto wins = (value > best[n]) | (value != value);
            best[n] = wins ? value : best[n];
            if constexpr (WithIndex) index[n] = wins ? Index<Real>{} + count : index[n];
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
    if (four && out)
      pool_maximum<4, Samples, false>(part, ys, xs, out + lane, index);
    else if (out)
      pool_maximum<1, Samples, false>(part, ys, xs, out + lane, index);
    else if (four)
      pool_maximum<4, Samples, true>(part, ys, xs, out, index + lane);
    else
      pool_maximum<1, Samples, true>(part, ys, xs, out, index + lane);
    lane += four ? 4 * kLanes<Real> : kLanes<Real>;
  }
}

template <class T, class Real>
Functions<T, Real> functions() {
  return {&transpose<T, Real>, &transpose<Real, T>,  &average<Real>,
          &spread<Real>,       &maximum<true, Real>, &maximum<false, Real>};
}
#undef PYSEG_BYTES
