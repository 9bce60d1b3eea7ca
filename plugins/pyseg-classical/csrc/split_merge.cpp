// Quadtree split and region adjacency graph merge (Horowitz and Pavlidis, JACM 1976).
#include "core.h"

#include <optional>

namespace classical {
namespace {

// Area, sums and sums of squares of every channel over a block, from tables of sums.
struct Summary {
  double area = 0;
  std::vector<double> sum, squares;
  explicit Summary(int64_t channels) : sum(channels), squares(channels) {}
  void add(const Summary& other) {
    area += other.area;
    for (size_t c = 0; c < sum.size(); ++c) {
      sum[c] += other.sum[c];
      squares[c] += other.squares[c];
    }
  }
  // Root of the variance, of several channels of its mean over them.
  double deviation() const {
    double total = 0;
    for (size_t c = 0; c < sum.size(); ++c) {
      const double mean = sum[c] / area;
      total += std::max(0.0, squares[c] / area - mean * mean);
    }
    return std::sqrt(total / static_cast<double>(sum.size()));
  }
  // Between the means; of several channels the root of the mean square.
  double distance(const Summary& other) const {
    double total = 0;
    for (size_t c = 0; c < sum.size(); ++c) {
      const double gap = sum[c] / area - other.sum[c] / other.area;
      total += gap * gap;
    }
    return std::sqrt(total / static_cast<double>(sum.size()));
  }
};

using SplitTest = std::function<bool(int64_t, int64_t, int64_t, int64_t)>;  // rows, columns: [a, b)

class Quadtree {
 public:
  Quadtree(const double* image, int64_t height, int64_t width, int64_t channels, int32_t* labels)
      : image_(image), height_(height), width_(width), channels_(channels), labels_(labels) {
    const int64_t row = (width + 1) * channels;
    sums_.assign((height + 1) * row, 0);
    squares_.assign((height + 1) * row, 0);
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t c = 0; c < channels; ++c) {
          const double value = image[(y * width + x) * channels + c];
          const int64_t at = (y + 1) * row + (x + 1) * channels + c;
          sums_[at] = value + sums_[at - row] + sums_[at - channels] - sums_[at - row - channels];
          squares_[at] = value * value + squares_[at - row] + squares_[at - channels] -
                         squares_[at - row - channels];
        }
      }
    }
  }

  // Blocks of a square of 2^k, as far as they are inside the image, until they are even or of the
  // smallest side. Labels are from 0.
  int32_t split(int64_t smallest, const SplitTest& uneven) {
    int64_t side = 1;
    while (side < std::max(height_, width_)) side *= 2;
    visit(0, 0, side, smallest, uneven);
    return blocks_;
  }

  Summary summary(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
    Summary found(channels_);
    found.area = static_cast<double>((bottom - top) * (right - left));
    const int64_t row = (width_ + 1) * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      const int64_t a = top * row + left * channels_ + c, b = top * row + right * channels_ + c;
      const int64_t d = bottom * row + left * channels_ + c, e = bottom * row + right * channels_ + c;
      found.sum[c] = sums_[e] - sums_[b] - sums_[d] + sums_[a];
      found.squares[c] = squares_[e] - squares_[b] - squares_[d] + squares_[a];
    }
    return found;
  }

  // Largest range of values of a channel.
  double range(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
    double widest = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      double low = std::numeric_limits<double>::infinity(), high = -low;
      for (int64_t y = top; y < bottom; ++y) {
        for (int64_t x = left; x < right; ++x) {
          const double value = image_[(y * width_ + x) * channels_ + c];
          low = std::min(low, value);
          high = std::max(high, value);
        }
      }
      widest = std::max(widest, high - low);
    }
    return widest;
  }

 private:
  void visit(int64_t y, int64_t x, int64_t side, int64_t smallest, const SplitTest& uneven) {
    if (y >= height_ || x >= width_) return;
    const int64_t bottom = std::min(height_, y + side), right = std::min(width_, x + side);
    if (side > smallest && uneven(y, bottom, x, right)) {
      const int64_t half = side / 2;
      visit(y, x, half, smallest, uneven);
      visit(y, x + half, half, smallest, uneven);
      visit(y + half, x, half, smallest, uneven);
      visit(y + half, x + half, half, smallest, uneven);
      return;
    }
    for (int64_t row = y; row < bottom; ++row) {
      std::fill(labels_ + row * width_ + x, labels_ + row * width_ + right, blocks_);
    }
    ++blocks_;
  }

  const double* image_;
  int64_t height_, width_, channels_;
  int32_t* labels_;
  int32_t blocks_ = 0;
  std::vector<double> sums_, squares_;
};

using MergeTest = std::function<bool(const Summary&, const Summary&)>;

struct Pair {
  double distance;
  int32_t a, b;
  int32_t seen;  // of both, when the distance was right
  bool operator<(const Pair& other) const {
    if (distance != other.distance) return distance > other.distance;
    return a != other.a ? a > other.a : b > other.b;
  }
};

// Merges neighbours, the most similar first, as long as `alike` says so; its answer is asked again
// where either has changed. The root of every region is returned.
std::vector<int32_t> merge(const int32_t* labels, int64_t height, int64_t width,
                           std::vector<Summary> regions, const MergeTest& alike) {
  const auto count = static_cast<int32_t>(regions.size());
  std::vector<std::vector<int32_t>> neighbours(count);
  const auto touch = [&](int32_t a, int32_t b) {
    if (a == b) return;
    neighbours[a].push_back(b);
    neighbours[b].push_back(a);
  };
  for (int64_t p = 0; p < height * width; ++p) {
    if (p % width + 1 < width) touch(labels[p], labels[p + 1]);
    if (p + width < height * width) touch(labels[p], labels[p + width]);
  }
  std::priority_queue<Pair> queue;
  std::vector<int32_t> changes(count, 0);
  const auto offer = [&](int32_t a, int32_t b) {
    if (a > b) std::swap(a, b);
    queue.push({regions[a].distance(regions[b]), a, b, changes[a] + changes[b]});
  };
  for (int32_t a = 0; a < count; ++a) {
    auto& own = neighbours[a];
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    for (const int32_t b : own) {
      if (a < b) offer(a, b);
    }
  }
  Sets sets(count);
  while (!queue.empty()) {
    const Pair next = queue.top();
    queue.pop();
    if (sets.find(next.a) != next.a || sets.find(next.b) != next.b) continue;
    if (next.seen != changes[next.a] + changes[next.b]) continue;
    if (!alike(regions[next.a], regions[next.b])) continue;
    const int32_t root = sets.join(next.a, next.b), gone = root == next.a ? next.b : next.a;
    regions[root].add(regions[gone]);
    changes[root] += changes[gone] + 1;
    auto& own = neighbours[root];
    own.insert(own.end(), neighbours[gone].begin(), neighbours[gone].end());
    std::vector<int32_t>().swap(neighbours[gone]);
    for (auto& n : own) n = sets.find(n);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    own.erase(std::remove(own.begin(), own.end(), root), own.end());
    for (const int32_t n : own) offer(root, n);
  }
  std::vector<int32_t> roots(count);
  for (int32_t r = 0; r < count; ++r) roots[r] = sets.find(r);
  return roots;
}

// What a predicate in Python sees of a region.
py::dict described(const Summary& region) {
  py::array_t<double> mean(static_cast<py::ssize_t>(region.sum.size()));
  for (size_t c = 0; c < region.sum.size(); ++c) mean.mutable_data()[c] = region.sum[c] / region.area;
  py::dict found;
  found["area"] = static_cast<int64_t>(region.area);
  found["mean"] = mean;
  found["deviation"] = region.deviation();
  return found;
}

// split: "deviation", "range", or a function of a block [h, w, C] that says whether it is split.
// merging: "mean", "deviation", or a function of two regions' descriptions; None merges nothing.
py::array_t<int32_t> split_and_merge(const Reals& image, const py::object& split, double split_limit,
                                     int64_t smallest, const py::object& merging,
                                     double merge_limit) {
  require(image.ndim() == 3 && image.shape(0) * image.shape(1) < (1LL << 31) && smallest > 0,
          "split_and_merge: an image [H, W, C]");
  const int64_t height = image.shape(0), width = image.shape(1), channels = image.shape(2);
  py::array_t<int32_t> labels({height, width});
  int32_t* own = labels.mutable_data();
  Quadtree tree(image.data(), height, width, channels, own);
  SplitTest uneven;
  if (py::isinstance<py::str>(split)) {
    if (split.cast<std::string>() == "range") {
      uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
        return tree.range(a, b, c, d) > split_limit;
      };
    } else {
      uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
        return tree.summary(a, b, c, d).deviation() > split_limit;
      };
    }
  } else {
    uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      const auto rows = py::slice(a, b, 1), columns = py::slice(c, d, 1);
      return split(image[py::make_tuple(rows, columns)]).cast<bool>();
    };
  }
  // Only predicates in Python need its lock.
  std::optional<py::gil_scoped_release> release;
  if (py::isinstance<py::str>(split)) release.emplace();
  const int32_t blocks = tree.split(smallest, uneven);
  release.reset();
  if (merging.is_none()) return labels;
  std::vector<Summary> regions(blocks, Summary(channels));
  for (int64_t p = 0; p < height * width; ++p) {
    Summary& region = regions[own[p]];
    region.area += 1;
    for (int64_t c = 0; c < channels; ++c) {
      const double value = image.data()[p * channels + c];
      region.sum[c] += value;
      region.squares[c] += value * value;
    }
  }
  MergeTest alike;
  if (!py::isinstance<py::str>(merging)) {
    alike = [&](const Summary& a, const Summary& b) {
      return merging(described(a), described(b)).cast<bool>();
    };
  } else if (merging.cast<std::string>() == "deviation") {
    alike = [&](const Summary& a, const Summary& b) {
      Summary both = a;
      both.add(b);
      return both.deviation() < merge_limit;
    };
  } else {
    alike = [&](const Summary& a, const Summary& b) { return a.distance(b) < merge_limit; };
  }
  if (py::isinstance<py::str>(merging)) release.emplace();
  const auto roots = merge(own, height, width, std::move(regions), alike);
  for (int64_t p = 0; p < height * width; ++p) own[p] = roots[own[p]];
  release.reset();
  return labels;
}

}  // namespace

void bind_split_merge(py::module_& m) { m.def("split_and_merge", &split_and_merge); }

}  // namespace classical
