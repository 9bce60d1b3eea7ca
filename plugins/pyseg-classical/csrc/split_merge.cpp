// Quadtree split and region adjacency graph merge (Horowitz and Pavlidis, JACM 1976).
#include "core.h"

namespace classical {

void Summary::add(const Summary& other) {
  area += other.area;
  for (size_t c = 0; c < sum.size(); ++c) {
    sum[c] += other.sum[c];
    squares[c] += other.squares[c];
  }
}

double Summary::deviation() const {
  double total = 0;
  for (size_t c = 0; c < sum.size(); ++c) {
    const double mean = sum[c] / area;
    total += std::max(0.0, squares[c] / area - mean * mean);
  }
  return std::sqrt(total / static_cast<double>(sum.size()));
}

double Summary::distance(const Summary& other) const {
  double total = 0;
  for (size_t c = 0; c < sum.size(); ++c) {
    const double gap = sum[c] / area - other.sum[c] / other.area;
    total += gap * gap;
  }
  return std::sqrt(total / static_cast<double>(sum.size()));
}

Quadtree::Quadtree(const Image& image, int32_t* labels) : image_(image), labels_(labels) {
  const int64_t channels = image.channels, row = (image.width + 1) * channels;
  sums_.assign((image.height + 1) * row, 0);
  squares_.assign((image.height + 1) * row, 0);
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t x = 0; x < image.width; ++x) {
      for (int64_t c = 0; c < channels; ++c) {
        const double value = image.values[(y * image.width + x) * channels + c];
        const int64_t at = (y + 1) * row + (x + 1) * channels + c;
        sums_[at] = value + sums_[at - row] + sums_[at - channels] - sums_[at - row - channels];
        squares_[at] = value * value + squares_[at - row] + squares_[at - channels] -
                       squares_[at - row - channels];
      }
    }
  }
}

int32_t Quadtree::split(int64_t smallest, const SplitTest& uneven) {
  int64_t side = 1;
  while (side < std::max(image_.height, image_.width)) side *= 2;
  visit(0, 0, side, smallest, uneven);
  return blocks_;
}

Summary Quadtree::summary(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
  const int64_t channels = image_.channels, row = (image_.width + 1) * channels;
  Summary found(channels);
  found.area = static_cast<double>((bottom - top) * (right - left));
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t a = top * row + left * channels + c, b = top * row + right * channels + c;
    const int64_t d = bottom * row + left * channels + c, e = bottom * row + right * channels + c;
    found.sum[c] = sums_[e] - sums_[b] - sums_[d] + sums_[a];
    found.squares[c] = squares_[e] - squares_[b] - squares_[d] + squares_[a];
  }
  return found;
}

double Quadtree::range(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
  double widest = 0;
  for (int64_t c = 0; c < image_.channels; ++c) {
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (int64_t y = top; y < bottom; ++y) {
      for (int64_t x = left; x < right; ++x) {
        const double value = image_.values[(y * image_.width + x) * image_.channels + c];
        low = std::min(low, value);
        high = std::max(high, value);
      }
    }
    widest = std::max(widest, high - low);
  }
  return widest;
}

void Quadtree::visit(int64_t y, int64_t x, int64_t side, int64_t smallest,
                     const SplitTest& uneven) {
  if (y >= image_.height || x >= image_.width) return;
  const int64_t bottom = std::min(image_.height, y + side);
  const int64_t right = std::min(image_.width, x + side);
  if (side > smallest && uneven(y, bottom, x, right)) {
    const int64_t half = side / 2;
    visit(y, x, half, smallest, uneven);
    visit(y, x + half, half, smallest, uneven);
    visit(y + half, x, half, smallest, uneven);
    visit(y + half, x + half, half, smallest, uneven);
    return;
  }
  for (int64_t row = y; row < bottom; ++row) {
    std::fill(labels_ + row * image_.width + x, labels_ + row * image_.width + right, blocks_);
  }
  ++blocks_;
}

namespace {

struct Pair {
  double distance;
  int32_t a, b;
  int32_t seen;  // of both, when the distance was right
  bool operator<(const Pair& other) const {
    if (distance != other.distance) return distance > other.distance;
    return a != other.a ? a > other.a : b > other.b;
  }
};

}  // namespace

void merge(const Image& image, int32_t blocks, const MergeTest& alike, int32_t* labels) {
  const int64_t height = image.height, width = image.width, channels = image.channels;
  const int32_t count = blocks;
  std::vector<Summary> regions(blocks, Summary(channels));
  for (int64_t p = 0; p < height * width; ++p) {
    Summary& region = regions[labels[p]];
    region.area += 1;
    for (int64_t c = 0; c < channels; ++c) {
      const double value = image.values[p * channels + c];
      region.sum[c] += value;
      region.squares[c] += value * value;
    }
  }
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
  for (int64_t p = 0; p < height * width; ++p) labels[p] = sets.find(labels[p]);
}

}  // namespace classical
