// The best class of every output pixel, on the CPU, a few output rows at a time: shared by the ops
// that resize logits and want classes. Full-resolution logits never exist.
//
// Output rows that lie between the same two rows of the logits form a group of at most 8. Of each
// group: convert its two rows of logits, and then tile by tile along the row apply tx (once for all
// rows of the group) and look for the best class. A tile whose corners all have the same best class
// has it everywhere, and is filled.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/common.h"
#include "upsample_argmax.h"

namespace {

#ifdef PYSEG_X86_LEVELS
#define PYSEG_ARCH v4
#define PYSEG_TARGET __attribute__((target("arch=x86-64-v4")))
#define PYSEG_BYTES 64
#define PYSEG_ROWS 8
#include "classify.inc"
#define PYSEG_ARCH v3
#define PYSEG_TARGET __attribute__((target("arch=x86-64-v3")))
#define PYSEG_BYTES 32
#define PYSEG_ROWS 4
#include "classify.inc"
#endif
#define PYSEG_ARCH generic
#define PYSEG_TARGET
#define PYSEG_BYTES 16
#define PYSEG_ROWS 4
#include "classify.inc"

using namespace pyseg;

constexpr int kRows = 8;    // output rows of a group
constexpr int kTile = 32;   // output columns of a tile
constexpr int kLanes = 16;  // the most that a vector has

template <class T, class Out>
struct Kernels {
  decltype(&generic::expand<T>) expand = &generic::expand<T>;
  decltype(&generic::classify<T, Out>) classify = &generic::classify<T, Out>;

  Kernels() {
#ifdef PYSEG_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4"))
      expand = &v4::expand<T>, classify = &v4::classify<T, Out>;
    else if (__builtin_cpu_supports("x86-64-v3"))
      expand = &v3::expand<T>, classify = &v3::classify<T, Out>;
#endif
  }
};

PYSEG_INLINE float widen(float x) { return x; }
PYSEG_INLINE double widen(double x) { return x; }
PYSEG_INLINE float widen(torch::headeronly::BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  return __builtin_bit_cast(float, bits);
}
// Without branches and tables, so that it vectorises: the exponent moves from bias 15 to 127.
PYSEG_INLINE float widen(torch::headeronly::Half x) {
  const uint32_t bits = x.x, magnitude = (bits & 0x7fff) << 13;
  const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
  const uint32_t value = magnitude >= 0x0f800000u ? special : __builtin_bit_cast(uint32_t, finite);
  const uint32_t with_sign = value | (bits & 0x8000) << 16;
  return __builtin_bit_cast(float, with_sign);
}

// One row of every class, as T. Returns whether all of it is tame.
template <class In, class T>
PYSEG_MULTIVERSION bool load_rows(const In* __restrict in, int64_t class_stride,
                                  int64_t column_stride, int64_t classes, int64_t width,
                                  T* __restrict out, int64_t stride) {
  int wild = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const In* __restrict source = in + c * class_stride;
    T* __restrict row = out + c * stride;
    if (column_stride == 1)
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x]);
    else
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x * column_stride]);
    for (int64_t x = 0; x < width; ++x) wild |= tame(row[x]) ? 0 : 1;
  }
  return wild == 0;
}

// Where the output columns (or rows) lie between those of the logits; padded for whole tiles.
template <class T>
struct Axis {
  std::vector<int> low;
  std::vector<T> t;

  Axis(int64_t inputs, int64_t outputs) : low(outputs + kTile), t(outputs + kTile) {
    const T scale = T(inputs) / T(outputs);
    for (int64_t i = 0; i < outputs + kTile; ++i)
      source_index<T>(std::min(i, outputs - 1), scale, inputs, &low[i], &t[i]);
  }
};

// For logits that are not tame.
template <class T, class Out>
void classify_wild(const T* top, const T* bottom, int64_t stride, int64_t classes, int64_t width,
                   const Axis<T>& columns, T ty, int64_t out_width, Out* labels) {
  for (int64_t x = 0; x < out_width; ++x) {
    const int64_t left = columns.low[x], right = std::min<int64_t>(left + 1, width - 1);
    T best = 0;
    int64_t label = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const T *p = top + c * stride, *q = bottom + c * stride;
      const T v =
          blend(blend(p[left], p[right], columns.t[x]), blend(q[left], q[right], columns.t[x]), ty);
      if (c == 0 || wins(v, best)) best = v, label = c;
    }
    labels[x] = Out(label);
  }
}

// The groups of output rows of all images. Out must hold every class.
template <class In, class T, class Out>
class RowGroups {
 public:
  RowGroups(const Tensor& logits, int64_t out_height, int64_t out_width)  // [N, C, h, w]
      : logits_(logits),
        rows_(logits.size(2), out_height),
        columns_(logits.size(3), out_width),
        out_width_(out_width) {
    for (int64_t y = 0; y < out_height; ++y)
      if (first_.empty() || rows_.low[y] != rows_.low[first_.back()] || y - first_.back() == kRows)
        first_.push_back(y);
    count_ = int64_t(first_.size());
    first_.push_back(out_height);
  }

  int64_t count() const { return count_; }  // of an image
  int64_t first_row(int64_t group) const { return first_[group]; }
  int64_t rows(int64_t group) const { return first_[group + 1] - first_[group]; }

  // How many groups are worth a thread.
  int64_t grain() const {
    const int64_t work = logits_.size(1) * (out_width_ * kRows + 4 * logits_.size(3));
    return std::max<int64_t>(1, (int64_t(1) << 18) / work);
  }

  // One thread's buffers. Groups that follow each other share a row of logits.
  class Worker {
   public:
    explicit Worker(const RowGroups& groups)
        : groups_(groups),
          classes_(groups.logits_.size(1)),
          height_(groups.logits_.size(2)),
          width_(groups.logits_.size(3)),
          // `expand` reads a whole vector from any column
          stride_((width_ + 2 * kLanes - 1) / kLanes * kLanes),
          top_(classes_ * stride_),
          bottom_(classes_ * stride_),
          top_labels_(stride_),
          bottom_labels_(stride_),
          value_(classes_ * kTile),
          slope_(classes_ * kTile) {}

    void classify(int64_t image, int64_t group,
                  Out* labels) {  // [rows(group), W]
      const auto& columns = groups_.columns_;
      const int64_t y = groups_.first_row(group), size = groups_.rows(group);
      const int64_t out_width = groups_.out_width_;
      const int64_t upper = groups_.rows_.low[y], lower = std::min(upper + 1, height_ - 1);
      if (bottom_row_ == image * height_ + upper) {
        top_.swap(bottom_), top_labels_.swap(bottom_labels_);
        top_tame_ = bottom_tame_;
      } else {
        top_tame_ = load(image, upper, top_, top_labels_);
      }
      bottom_tame_ = load(image, lower, bottom_, bottom_labels_);
      bottom_row_ = image * height_ + lower;
      const T* t = groups_.rows_.t.data() + y;
      if (!top_tame_ || !bottom_tame_) {
        for (int64_t r = 0; r < size; ++r)
          classify_wild(top_.data(), bottom_.data(), stride_, classes_, width_, columns, t[r],
                        out_width, labels + r * out_width);
        return;
      }
      T ty[kRows];
      for (int64_t r = 0; r < kRows; ++r) ty[r] = t[std::min(r, size - 1)];
      for (int64_t x = 0; x < out_width; x += kTile) {
        const int64_t tile = std::min<int64_t>(kTile, out_width - x);
        const int64_t left = columns.low[x];
        const int64_t right = std::min<int64_t>(columns.low[x + tile - 1] + 1, width_ - 1);
        const Out label = top_labels_[left];
        bool uniform = true;
        for (int64_t i = left; i <= right; ++i)
          uniform &= top_labels_[i] == label && bottom_labels_[i] == label;
        if (uniform) {
          for (int64_t r = 0; r < size; ++r) std::fill_n(labels + r * out_width + x, tile, label);
          continue;
        }
        Out found[kRows * kTile];
        kernels_.expand(top_.data(), bottom_.data(), stride_, classes_, &columns.low[x],
                        &columns.t[x], tile, value_.data(), slope_.data(), kTile);
        kernels_.classify(value_.data(), slope_.data(), kTile, classes_, ty, int(size), kTile,
                          found, kTile);
        for (int64_t r = 0; r < size; ++r)
          std::memcpy(labels + r * out_width + x, found + r * kTile, tile * sizeof(Out));
      }
    }

   private:
    // A row of logits, and its best classes. Returns whether it is tame.
    bool load(int64_t image, int64_t y, std::vector<T>& to, std::vector<Out>& best) {
      const Tensor& logits = groups_.logits_;
      const In* row = static_cast<const In*>(logits.const_data_ptr()) + image * logits.stride(0) +
                      y * logits.stride(2);
      const bool is_tame = load_rows<In, T>(row, logits.stride(1), logits.stride(3), classes_,
                                            width_, to.data(), stride_);
      const T zero[kRows] = {};
      if (is_tame)  // with ty = 0 the slope does not matter, but must be finite
        kernels_.classify(to.data(), to.data(), stride_, classes_, zero, 1, stride_, best.data(),
                          stride_);
      return is_tame;
    }

    const RowGroups& groups_;
    const Kernels<T, Out> kernels_;
    const int64_t classes_, height_, width_, stride_;
    std::vector<T> top_, bottom_;  // the rows of logits above and below
    std::vector<Out> top_labels_, bottom_labels_;
    std::vector<T> value_, slope_;
    bool top_tame_ = true, bottom_tame_ = true;
    int64_t bottom_row_ = -1;  // counted over all images
  };

 private:
  const Tensor logits_;
  const Axis<T> rows_, columns_;
  const int64_t out_width_;
  int64_t count_;
  std::vector<int64_t> first_;  // output row of each group
};

}  // namespace
