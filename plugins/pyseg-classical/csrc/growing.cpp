// Seeded region growing (Adams and Bischof, PAMI 1994) with an adaptive threshold.
#include "core.h"

namespace classical {
namespace {

struct Region {
  std::vector<double> sum;
  double squares = 0;  // sum of |I|^2
  int64_t area = 0;
};

struct Candidate {
  double distance;  // to the mean of the region as it was
  int64_t turn;     // of equals the one that came first
  int32_t pixel, region;
  bool operator<(const Candidate& other) const {
    return distance != other.distance ? distance > other.distance : turn > other.turn;
  }
};

class Growing {
 public:
  Growing(const double* image, int64_t height, int64_t width, int64_t channels, int32_t* labels,
          double threshold, bool diagonal)
      : image_(image),
        height_(height),
        width_(width),
        channels_(channels),
        labels_(labels),
        threshold_(threshold),
        neighbours_(diagonal ? 8 : 4) {}

  // labels: regions 1..count at the seeds, 0 elsewhere.
  void seed(int64_t count) {
    regions_.assign(count + 1, Region{std::vector<double>(channels_), 0, 0});
    for (int64_t p = 0; p < height_ * width_; ++p) {
      if (labels_[p] > 0) take(p, labels_[p]);
    }
    for (int64_t p = 0; p < height_ * width_; ++p) {
      if (labels_[p] > 0) offer_around(p, labels_[p]);
    }
  }

  // One region after the other, each from the first pixel in `order` that is in none.
  void grow_in_order(const int64_t* order, int64_t count) {
    regions_.assign(1, Region{std::vector<double>(channels_), 0, 0});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = order[i];
      if (labels_[p] > 0) continue;
      const auto region = static_cast<int32_t>(regions_.size());
      regions_.push_back(Region{std::vector<double>(channels_), 0, 0});
      take(p, region);
      offer_around(p, region);
      grow(false);
    }
  }

  // Takes candidates, the most similar first, until none is left. With `all`, whatever the
  // threshold says.
  void grow(bool all) {
    while (!queue_.empty()) {
      const Candidate next = queue_.top();
      queue_.pop();
      if (labels_[next.pixel] > 0) continue;
      if (!all && distance(next.pixel, next.region) >= limit(next.region)) continue;
      take(next.pixel, next.region);
      offer_around(next.pixel, next.region);
    }
  }

  void offer_all() {
    for (int64_t p = 0; p < height_ * width_; ++p) {
      if (labels_[p] > 0) offer_around(p, labels_[p]);
    }
  }

 private:
  double distance(int64_t p, int32_t region) const {
    const Region& r = regions_[region];
    double sum = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      const double gap = image_[p * channels_ + c] - r.sum[c] / static_cast<double>(r.area);
      sum += gap * gap;
    }
    return std::sqrt(sum);
  }

  // (1 - sd / M) T, from 0 to T; M is the mean, of several channels its length.
  double limit(int32_t region) const {
    const Region& r = regions_[region];
    const auto area = static_cast<double>(r.area);
    double length = 0;
    for (const double sum : r.sum) length += (sum / area) * (sum / area);
    const double variance = std::max(0.0, r.squares / area - length);
    if (variance <= 1e-9 * length) return threshold_;
    const double mean = std::max(std::sqrt(length), 1e-6);
    return threshold_ * std::min(1.0, std::max(0.0, 1 - std::sqrt(variance) / mean));
  }

  void take(int64_t p, int32_t region) {
    Region& r = regions_[region];
    for (int64_t c = 0; c < channels_; ++c) {
      const double value = image_[p * channels_ + c];
      r.sum[c] += value;
      r.squares += value * value;
    }
    ++r.area;
    labels_[p] = region;
  }

  void offer_around(int64_t p, int32_t region) {
    static constexpr int kDx[8] = {1, -1, 0, 0, 1, -1, 1, -1};
    static constexpr int kDy[8] = {0, 0, 1, -1, 1, -1, -1, 1};
    const int64_t x = p % width_, y = p / width_;
    for (int d = 0; d < neighbours_; ++d) {
      const int64_t u = x + kDx[d], v = y + kDy[d];
      if (u < 0 || u >= width_ || v < 0 || v >= height_) continue;
      const int64_t q = v * width_ + u;
      if (labels_[q] != 0) continue;
      queue_.push({distance(q, region), turn_++, static_cast<int32_t>(q), region});
    }
  }

  const double* image_;
  int64_t height_, width_, channels_;
  int32_t* labels_;
  double threshold_;
  int neighbours_;
  std::vector<Region> regions_;
  std::priority_queue<Candidate> queue_;
  int64_t turn_ = 0;
};

void check(const Reals& image) {
  require(image.ndim() == 3 && image.shape(0) * image.shape(1) < (1LL << 31),
          "grow: an image [H, W, C]");
}

py::array_t<int32_t> grow_seeds(const Reals& image, const Ints& seeds, int64_t count,
                                double threshold, bool fill, bool diagonal) {
  check(image);
  require(seeds.ndim() == 2 && seeds.shape(0) == image.shape(0) && seeds.shape(1) == image.shape(1),
          "grow: seeds [H, W]");
  py::array_t<int32_t> labels({image.shape(0), image.shape(1)});
  int32_t* own = labels.mutable_data();
  for (int64_t p = 0; p < seeds.size(); ++p) {
    require(seeds.data()[p] >= 0 && seeds.data()[p] <= count, "grow: a seed above their number");
    own[p] = static_cast<int32_t>(seeds.data()[p]);
  }
  py::gil_scoped_release release;
  Growing growing(image.data(), image.shape(0), image.shape(1), image.shape(2), own, threshold,
                  diagonal);
  growing.seed(count);
  growing.grow(false);
  if (fill) {
    growing.offer_all();
    growing.grow(true);
  }
  return labels;
}

py::array_t<int32_t> grow_in_order(const Reals& image, const Ints& order, double threshold,
                                   bool diagonal) {
  check(image);
  const int64_t pixels = image.shape(0) * image.shape(1);
  for (int64_t i = 0; i < order.size(); ++i) {
    require(order.data()[i] >= 0 && order.data()[i] < pixels, "grow: a seed outside the image");
  }
  py::array_t<int32_t> labels({image.shape(0), image.shape(1)});
  std::fill_n(labels.mutable_data(), pixels, 0);
  int32_t* own = labels.mutable_data();
  py::gil_scoped_release release;
  Growing growing(image.data(), image.shape(0), image.shape(1), image.shape(2), own, threshold,
                  diagonal);
  growing.grow_in_order(order.data(), order.size());
  return labels;
}

}  // namespace

void bind_growing(py::module_& m) {
  m.def("grow_seeds", &grow_seeds);
  m.def("grow_in_order", &grow_in_order);
}

}  // namespace classical
