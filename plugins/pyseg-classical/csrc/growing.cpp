// Seeded region growing (Adams and Bischof, PAMI 1994) with an adaptive threshold.
#include <cstring>

#include "core.h"

namespace classical {
namespace {

struct Candidate {
  uint64_t distance;  // to the mean of the region as it was; the bits, which are in its order
  uint64_t rest;      // its turn, as of equals the first comes first; pixel * 8 + the step to it
  // Without a branch, as the processor would guess it wrongly every other time.
  bool operator<(const Candidate& other) const {
    return (distance < other.distance) | ((distance == other.distance) & (rest < other.rest));
  }
};

// The smallest first. Candidates whose distances have their leading bits in common share a heap:
// one heap of all would be too deep. 32 heaps for each power of two from 2^-16 to 2^16; what is
// outside is in the first or last. std::push_heap and std::pop_heap take 1.2 to 1.35 times as long.
class Queue {
 public:
  Queue() : heaps_(kHeaps) {}

  void push(double distance, int32_t pixel, int step) {
    uint64_t bits = 0;
    std::memcpy(&bits, &distance, sizeof bits);
    const int64_t place = static_cast<int64_t>(bits >> 47) - (1023 - 16) * kSteps;
    const int64_t inside = std::min<int64_t>(std::max<int64_t>(place, 0), kHeaps - 1);
    const Candidate added{bits, turn_++ << 32 | (static_cast<uint64_t>(pixel) * 8 + step)};
    auto& heap = heaps_[inside];
    heap.push_back(added);
    size_t at = heap.size() - 1;
    for (size_t parent; at > 0 && added < heap[parent = (at - 1) / 2]; at = parent) {
      heap[at] = heap[parent];
    }
    heap[at] = added;
    lowest_ = std::min(lowest_, inside);
    ++size_;
  }

  bool empty() const { return size_ == 0; }

  Candidate pop() {
    while (heaps_[lowest_].empty()) ++lowest_;
    auto& heap = heaps_[lowest_];
    const Candidate next = heap.front(), last = heap.back();
    heap.pop_back();
    const size_t size = heap.size();
    if (size > 0) {
      size_t at = 0;
      for (size_t child = 1; child < size; child = 2 * at + 1) {
        if (child + 1 < size) child += heap[child + 1] < heap[child];
        if (last < heap[child]) break;
        heap[at] = heap[child];
        at = child;
      }
      heap[at] = last;
    }
    if (--size_ == 0) {
      lowest_ = kHeaps - 1;
      turn_ = 0;
    }
    return next;
  }

 private:
  static constexpr int64_t kSteps = 32, kHeaps = 32 * kSteps;
  std::vector<std::vector<Candidate>> heaps_;
  int64_t lowest_ = kHeaps - 1, size_ = 0;
  uint64_t turn_ = 0;  // stays below 2^32: a pixel offers at most 8
};

// Channels: how many; 0 = known at run time only.
template <int Channels>
class Growing {
 public:
  // The image gets a frame of pixels that count as taken, so that borders need no test.
  Growing(const Image& image, double threshold, bool diagonal)
      : height_(image.height),
        width_(image.width),
        depth_(Channels ? Channels : image.channels),
        row_(image.width + 2),
        threshold_(threshold),
        neighbours_(diagonal ? 8 : 4),
        values_((image.height + 2) * row_ * depth_),
        labels_((image.height + 2) * row_, -1) {
    require(labels_.size() < (1ULL << 29), "an image of less than 2^29 pixels, with a frame");
    const auto row = static_cast<int32_t>(row_);
    const int32_t steps[8] = {1, -1, row, -row, row + 1, -row - 1, -row + 1, row - 1};
    std::copy(steps, steps + 8, steps_);
    for (int64_t y = 0; y < height_; ++y) {
      const double* from = image.values + y * width_ * depth_;
      std::copy(from, from + width_ * depth_, values_.begin() + at(y, 0) * depth_);
      std::fill_n(labels_.begin() + at(y, 0), width_, 0);
    }
  }

  void from_seeds(const int32_t* labels, int64_t count, bool fill) {
    regions_.resize(count + 1);
    sums_.resize((count + 1) * depth_);
    means_.resize((count + 1) * depth_);
    each([&](int64_t p, int64_t own) {
      if (labels[own] > 0) take(static_cast<int32_t>(p), labels[own]);
    });
    offer_all();
    grow(false);
    if (!fill) return;
    offer_all();
    grow(true);
  }

  void in_order(const int64_t* order, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const auto p = static_cast<int32_t>(at(order[i] / width_, order[i] % width_));
      if (labels_[p] > 0) continue;
      const auto region = static_cast<int32_t>(std::max<size_t>(regions_.size(), 1));
      regions_.resize(region + 1);
      sums_.resize(regions_.size() * depth_);
      means_.resize(regions_.size() * depth_);
      take(p, region);
      offer_around(p);
      grow(false);
    }
  }

  void write(int32_t* labels) const {
    each([&](int64_t p, int64_t own) { labels[own] = labels_[p]; });
  }

 private:
  struct Region {
    double squares = 0;  // sum of |I|^2
    double area = 0, limit = 0;
  };

  int64_t at(int64_t y, int64_t x) const { return (y + 1) * row_ + x + 1; }

  template <class Body>
  void each(const Body& body) const {
    for (int64_t y = 0; y < height_; ++y) {
      for (int64_t x = 0; x < width_; ++x) body(at(y, x), y * width_ + x);
    }
  }

  void offer_all() {
    each([&](int64_t p, int64_t) {
      if (labels_[p] > 0) offer_around(static_cast<int32_t>(p));
    });
  }

  // Takes candidates, the most similar first, until none is left. With `all`, whatever the
  // threshold says.
  void grow(bool all) {
    while (!queue_.empty()) {
      const Candidate next = queue_.pop();
      const auto step = static_cast<uint32_t>(next.rest);
      const auto pixel = static_cast<int32_t>(step / 8);
      if (labels_[pixel] != 0) continue;
      const int32_t region = labels_[pixel - steps_[step % 8]];
      if (!all && distance(pixel, region) >= regions_[region].limit) continue;
      take(pixel, region);
      offer_around(pixel);
    }
  }

  double distance(int64_t p, int64_t region) const {
    const int64_t depth = Channels ? Channels : depth_;
    const double *values = values_.data() + p * depth, *mean = means_.data() + region * depth;
    if (Channels == 1) return std::abs(values[0] - mean[0]);
    double sum = 0;
    for (int64_t c = 0; c < depth; ++c) sum += (values[c] - mean[c]) * (values[c] - mean[c]);
    return std::sqrt(sum);
  }

  // The limit becomes (1 - sd / M) T, from 0 to T; M is the mean, of several channels its length.
  void take(int32_t p, int32_t number) {
    const int64_t depth = Channels ? Channels : depth_;
    Region& region = regions_[number];
    region.area += 1;
    double length = 0;
    for (int64_t c = 0; c < depth; ++c) {
      const double value = values_[p * depth + c];
      double &sum = sums_[number * depth + c], &mean = means_[number * depth + c];
      sum += value;
      region.squares += value * value;
      mean = sum / region.area;
      length += mean * mean;
    }
    const double variance = std::max(0.0, region.squares / region.area - length);
    region.limit = threshold_;
    if (variance > 1e-9 * length) {
      const double mean = std::max(std::sqrt(length), 1e-6);
      region.limit *= std::min(1.0, std::max(0.0, 1 - std::sqrt(variance) / mean));
    }
    labels_[p] = number;
  }

  void offer_around(int32_t p) {
    const int32_t region = labels_[p];
    for (int d = 0; d < neighbours_; ++d) {
      const int32_t q = p + steps_[d];
      if (labels_[q] == 0) queue_.push(distance(q, region), q, d);
    }
  }

  int64_t height_, width_, depth_, row_;
  double threshold_;
  int neighbours_;
  int32_t steps_[8];
  std::vector<double> values_;   // [height + 2, width + 2, channels]
  std::vector<int32_t> labels_;  // 0 = in no region, -1 = frame
  std::vector<Region> regions_;  // from 1
  std::vector<double> sums_, means_;
  Queue queue_;
};

template <class Work>
void with_channels(const Image& image, double threshold, bool diagonal, const Work& work) {
  if (image.channels == 1) {
    work(Growing<1>(image, threshold, diagonal));
  } else if (image.channels == 3) {
    work(Growing<3>(image, threshold, diagonal));
  } else {
    work(Growing<0>(image, threshold, diagonal));
  }
}

}  // namespace

void grow_seeds(const Image& image, int64_t count, double threshold, bool fill, bool diagonal,
                int32_t* labels) {
  with_channels(image, threshold, diagonal, [&](auto growing) {
    growing.from_seeds(labels, count, fill);
    growing.write(labels);
  });
}

void grow_in_order(const Image& image, const int64_t* order, int64_t count, double threshold,
                   bool diagonal, int32_t* labels) {
  with_channels(image, threshold, diagonal, [&](auto growing) {
    growing.in_order(order, count);
    growing.write(labels);
  });
}

}  // namespace classical
