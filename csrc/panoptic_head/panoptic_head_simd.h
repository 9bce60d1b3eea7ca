// Loops of panoptic_head over the pixels of a tile. Included once per instruction set, inside a
// namespace of its own and with that set as the compiler's target: vectors of 16 lanes are lowered
// before functions are cloned, so PYSEG_MULTIVERSION would make scalar code of them.

#include "winner.inc"

inline void stretch(const float* __restrict row, const int* __restrict low,
                    const int* __restrict high, const float* __restrict t, int count,
                    float* __restrict out) {
  for (int i = 0; i < count; ++i) {
    const float a = row[low[i]];
    out[i] = a + t[i] * (row[high[i]] - a);
  }
}

// Of one output row of a tile: the best stuff class and the largest thing logit.
inline void best_classes(const float* __restrict top, const float* __restrict bottom,
                         int64_t stride, int classes, int stuff, float ty, int columns,
                         Best* __restrict best) {
  for (int x = 0; x < columns; x += kLanes) {
    Floats largest = Floats{} + kLowest;
    Ints at = Ints{} - 1;
    for (int c = 0; c < stuff; ++c) {
      const Floats a = *reinterpret_cast<const Unaligned*>(top + c * stride + x);
      const Floats v = a + ty * (*reinterpret_cast<const Unaligned*>(bottom + c * stride + x) - a);
      const Ints greater = v > largest;
      largest = greater ? v : largest;
      at = greater ? Ints{} + c : at;
    }
    *reinterpret_cast<Floats*>(best->stuff + x) = largest;
    *reinterpret_cast<Ints*>(best->stuff_at + x) = at;
    largest = Floats{} + kLowest;
    for (int c = stuff; c < classes; ++c) {
      const Floats a = *reinterpret_cast<const Unaligned*>(top + c * stride + x);
      const Floats v = a + ty * (*reinterpret_cast<const Unaligned*>(bottom + c * stride + x) - a);
      largest = v > largest ? v : largest;
    }
    *reinterpret_cast<Floats*>(best->thing + x) = largest;
  }
}

// Columns [from, to) of a tile are in the box of instance `index`.
inline void add_instance(const float* __restrict top, const float* __restrict bottom, float ty,
                         const float* __restrict mask_row, const int* __restrict low,
                         const int* __restrict high, const float* __restrict t, int from, int to,
                         int index, Best* __restrict best) {
  for (int x = from; x < to; ++x) {
    const float logit = top[x] + ty * (bottom[x] - top[x]);
    const float a = mask_row[low[x - from]];
    const float value = logit + (a + t[x - from] * (mask_row[high[x - from]] - a));
    const bool first = best->value_at[x] < 0;
    best->inside[x] = first || logit > best->inside[x] ? logit : best->inside[x];
    const bool greater = first || value > best->value[x];
    best->value[x] = greater ? value : best->value[x];
    best->value_at[x] = greater ? index : best->value_at[x];
  }
}

inline void choose(const Best* __restrict best, int columns, int stuff, int instances,
                   int32_t* __restrict out) {
  for (int x = 0; x < columns; x += kLanes) {
    const auto* const reals = reinterpret_cast<const Floats*>(best->stuff + x);
    const auto* const ints = reinterpret_cast<const Ints*>(best->stuff_at + x);
    constexpr int kNext = kTile / kLanes;  // from one array of Best to the next
    const Pixel<Floats, Ints> pixel{reals[0], reals[kNext], reals[2 * kNext], reals[3 * kNext],
                                    ints[0],  ints[kNext],  ints[2 * kNext]};
    const Ints channel = winner(pixel, stuff, instances);
    if (columns - x >= kLanes)
      *reinterpret_cast<UnalignedInts*>(out + x) = channel;
    else
      for (int i = 0; i < columns - x; ++i) out[x + i] = channel[i];
  }
}

constexpr Loops loops{stretch, best_classes, add_instance, choose};
