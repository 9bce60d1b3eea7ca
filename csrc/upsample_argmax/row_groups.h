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
#include <memory>
#include <vector>

#include "../common/common.h"
#include "upsample_argmax.h"
#include "upsample_argmax_simd.h"

namespace pyseg::upsampling {

// Calls run() with the loops for logits of a dtype, of the level in force; of double, which checks
// gradients, there are generic ones only.
template <class Out, class Run>
void with_functions(ScalarType type, Run run) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  switch (type) {
    case ScalarType::Float: run(PYSEG_AT_LEVEL(functions<float, Out>)()); break;
    case ScalarType::Double: run(generic::functions<double, Out>()); break;
    case ScalarType::Half: run(PYSEG_AT_LEVEL(functions<Half, Out>)()); break;
    case ScalarType::BFloat16: run(PYSEG_AT_LEVEL(functions<BFloat16, Out>)()); break;
    default: PYSEG_CHECK(false, "logits must be float16, bfloat16, float32 or float64");
  }
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
template <class T, class Out>
class RowGroups {
 public:
  RowGroups(const Functions<T, Out>& functions, const Tensor& logits,  // [N, C, h, w]
            int64_t out_height, int64_t out_width)
      : functions_(functions),
        logits_(logits),
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

  // Calls work(image, group, thread's own worker, its number) for every group of all images, in
  // runs of a few, as groups that follow each other share a row of logits.
  template <class Work>
  void for_each_group(Work work) const {
    constexpr int64_t kRun = 4;
    const int64_t runs = (count_ + kRun - 1) / kRun;
    const int64_t cost = kRun * logits_.size(1) * (out_width_ * kRows + 4 * logits_.size(3));
    std::vector<std::unique_ptr<Worker>> workers(torch::stable::get_num_threads());
    for_each(logits_.size(0) * runs, cost, [&](int64_t item, int64_t number) {
      if (!workers[number]) workers[number] = std::make_unique<Worker>(*this);
      const int64_t first = item % runs * kRun, end = std::min(count_, first + kRun);
      for (int64_t group = first; group < end; ++group)
        work(item / runs, group, *workers[number], number);
    });
  }

  // One thread's buffers. Groups that follow each other share a row of logits.
  class Worker {
   public:
    explicit Worker(const RowGroups& groups)
        : groups_(groups),
          functions_(groups.functions_),
          classes_(groups.logits_.size(1)),
          height_(groups.logits_.size(2)),
          width_(groups.logits_.size(3)),
          // `expand` reads a whole vector from any column
          stride_((width_ + 2 * kMostLanes - 1) / kMostLanes * kMostLanes),
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
        functions_.expand(top_.data(), bottom_.data(), stride_, classes_, &columns.low[x],
                          &columns.t[x], tile, value_.data(), slope_.data());
        functions_.classify(value_.data(), slope_.data(), kTile, classes_, ty, int(size), kTile,
                            found, kTile);
        for (int64_t r = 0; r < size; ++r)
          std::memcpy(labels + r * out_width + x, found + r * kTile, tile * sizeof(Out));
      }
    }

   private:
    // A row of logits, and its best classes. Returns whether it is tame.
    bool load(int64_t image, int64_t y, std::vector<T>& to, std::vector<Out>& best) {
      const Tensor& logits = groups_.logits_;
      const bool is_tame =
          functions_.load(logits.const_data_ptr(), image * logits.stride(0) + y * logits.stride(2),
                          logits.stride(1), logits.stride(3), classes_, width_, to.data(), stride_);
      const T zero[kRows] = {};
      if (is_tame)  // with ty = 0 the slope does not matter, but must be finite
        functions_.classify(to.data(), to.data(), stride_, classes_, zero, 1, stride_, best.data(),
                            stride_);
      return is_tame;
    }

    const RowGroups& groups_;
    const Functions<T, Out> functions_;
    const int64_t classes_, height_, width_, stride_;
    std::vector<T> top_, bottom_;  // the rows of logits above and below
    std::vector<Out> top_labels_, bottom_labels_;
    std::vector<T> value_, slope_;
    bool top_tame_ = true, bottom_tame_ = true;
    int64_t bottom_row_ = -1;  // counted over all images
  };

 private:
  const Functions<T, Out> functions_;
  const Tensor logits_;
  const Axis<T> rows_, columns_;
  const int64_t out_width_;
  int64_t count_;
  std::vector<int64_t> first_;  // output row of each group
};

}  // namespace pyseg::upsampling
