// The inner loops of panoptic_head over the pixels of a tile, in vectors of the compiler.
#include "../common/host_device.h"
#include "panoptic_head_simd.h"

#include "../common/level.h"              // after all others
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined

namespace pyseg::head::PYSEG_LEVEL {

#include "../common/vectors_simd.h"
#include "winner.inc"

using Floats = Vector<float>;
using Ints = Vector<int32_t>;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

static void stretch(const float* __restrict row, const int* __restrict low,
                    const int* __restrict high, const float* __restrict t, int count,
                    float* __restrict out) {
  for (int i = 0; i < count; ++i) {
    const float a = row[low[i]];
    out[i] = a + t[i] * (row[high[i]] - a);
  }
}

// Of one output row of a tile: the best stuff class and the largest thing logit.
static void best_classes(const float* __restrict top, const float* __restrict bottom,
                         int64_t stride, int classes, int stuff, float ty, int columns,
                         Best* __restrict best) {
  for (int x = 0; x < columns; x += kLanes<float>) {
    Floats largest = Floats{} + kLowest;
    Ints at = Ints{} - 1;
    for (int c = 0; c < stuff; ++c) {
      const Floats a = load(top + c * stride + x);
      const Floats v = a + ty * (load(bottom + c * stride + x) - a);
      const Ints greater = v > largest;
      largest = greater ? v : largest;
      at = greater ? Ints{} + c : at;
    }
    store(best->stuff + x, largest);
    store(best->stuff_at + x, at);
    largest = Floats{} + kLowest;
    for (int c = stuff; c < classes; ++c) {
      const Floats a = load(top + c * stride + x);
      const Floats v = a + ty * (load(bottom + c * stride + x) - a);
      largest = v > largest ? v : largest;
    }
    store(best->thing + x, largest);
  }
}

// Columns [from, to) of a tile are in the box of instance `index`.
static void add_instance(const float* __restrict top, const float* __restrict bottom, float ty,
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

static void choose(const Best* __restrict best, int columns, int stuff, int instances,
                   int32_t* __restrict out) {
  for (int x = 0; x < columns; x += kLanes<float>) {
    const Pixel<Floats, Ints> pixel{load(best->stuff + x),    load(best->thing + x),
                                    load(best->inside + x),   load(best->value + x),
                                    load(best->stuff_at + x), load(best->value_at + x),
                                    load(best->outside + x)};
    const Ints channel = winner(pixel, stuff, instances);
    if (columns - x >= kLanes<float>)
      store(out + x, channel);
    else
      for (int i = 0; i < columns - x; ++i) out[x + i] = channel[i];
  }
}

const Loops loops{stretch, best_classes, add_instance, choose};

}  // namespace pyseg::head::PYSEG_LEVEL
