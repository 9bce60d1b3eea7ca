// Graphs of pixels: Felzenszwalb and Huttenlocher's regions, minimum spanning trees, and affinities
// of pixels or of regions for spectral cuts.
#include "core.h"

namespace classical {
namespace {

struct Edge {
  float weight;
  int32_t a, b;
  bool operator<(const Edge& other) const {
    if (weight != other.weight) return weight < other.weight;
    return a != other.a ? a < other.a : b < other.b;
  }
};

// Euclidean distances of all pairs of neighbours, the smallest first.
std::vector<Edge> sorted_edges(const Image& image, bool diagonal) {
  const auto [values, height, width, channels] = image;
  std::vector<Edge> edges;
  edges.reserve(height * width * (diagonal ? 4 : 2));
  const auto add = [&edges, values = values, depth = channels](int64_t p, int64_t q) {
    double sum = 0;
    for (int64_t c = 0; c < depth; ++c) {
      const double gap = values[p * depth + c] - values[q * depth + c];
      sum += gap * gap;
    }
    edges.push_back(
        {static_cast<float>(std::sqrt(sum)), static_cast<int32_t>(p), static_cast<int32_t>(q)});
  };
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t p = y * width + x;
      if (x + 1 < width) add(p, p + 1);
      if (y + 1 < height) add(p, p + width);
      if (!diagonal) continue;
      if (x + 1 < width && y + 1 < height) add(p, p + width + 1);
      if (x > 0 && y + 1 < height) add(p, p + width - 1);
    }
  }
  std::sort(edges.begin(), edges.end());
  return edges;
}

void write_roots(Sets& sets, int32_t* labels, int64_t count) {
  for (int64_t p = 0; p < count; ++p) labels[p] = sets.find(static_cast<int32_t>(p));
}

}  // namespace

// Two regions merge where the edge between them is at most the largest inside either plus
// scale / size (IJCV 2004); then those below min_size join along the smallest edges.
void felzenszwalb(const Image& image, double scale, int64_t min_size, int32_t* labels) {
  const int64_t pixels = image.pixels();
  const auto edges = sorted_edges(image, true);
  Sets sets(pixels);
  std::vector<double> limit(pixels, scale);
  for (const Edge& edge : edges) {
    const int32_t a = sets.find(edge.a), b = sets.find(edge.b);
    if (a == b || edge.weight > limit[a] || edge.weight > limit[b]) continue;
    const int32_t root = sets.join(a, b);
    limit[root] = edge.weight + scale / sets.size(root);
  }
  for (const Edge& edge : edges) {
    const int32_t a = sets.find(edge.a), b = sets.find(edge.b);
    if (a != b && (sets.size(a) < min_size || sets.size(b) < min_size)) sets.join(a, b);
  }
  write_roots(sets, labels, pixels);
}

// The minimum spanning tree without its largest edges: those, at most parts - 1, that join two
// sides of at least min_size when the tree grows from its smallest edge.
void spanning_tree(const Image& image, int64_t parts, double least, int64_t min_size,
                   int32_t* labels) {
  const int64_t pixels = image.pixels();
  std::vector<Edge> tree;
  std::vector<int64_t> joints;  // places in the tree of those edges
  Sets sets(pixels);
  for (const Edge& edge : sorted_edges(image, true)) {
    const int32_t a = sets.find(edge.a), b = sets.find(edge.b);
    if (a == b) continue;
    if (edge.weight > least && sets.size(a) >= min_size && sets.size(b) >= min_size) {
      joints.push_back(static_cast<int64_t>(tree.size()));
    }
    sets.join(a, b);
    tree.push_back(edge);
  }
  const auto cut = std::min<int64_t>(static_cast<int64_t>(joints.size()), parts - 1);
  for (int64_t i = 0; i < cut; ++i) tree[joints[joints.size() - 1 - i]].a = -1;
  sets = Sets(pixels);
  for (const Edge& edge : tree) {
    if (edge.a >= 0) sets.join(sets.find(edge.a), sets.find(edge.b));
  }
  write_roots(sets, labels, pixels);
}

namespace {

struct Tie {
  int32_t to;
  double weight;
};

}  // namespace

Affinity affinity(const Image& features, const int64_t* regions, int64_t count, double radius,
                  double feature, double space, int threads, double* total) {
  const int64_t height = features.height, width = features.width, depth = features.channels;
  const double* values = features.values;
  const int64_t* owner = regions;
  for (int64_t p = 0; p < height * width; ++p) {
    require(owner[p] >= 0 && owner[p] < count, "affinity: a region out of range");
  }
  struct Offset {
    int64_t y, x;
    double weight;
  };
  std::vector<Offset> offsets;
  const auto reach = static_cast<int64_t>(std::ceil(radius));
  for (int64_t y = 0; y <= reach; ++y) {
    for (int64_t x = y == 0 ? 1 : -reach; x <= reach; ++x) {
      const auto far = static_cast<double>(x * x + y * y);
      if (far < radius * radius) offsets.push_back({y, x, std::exp(-far / space)});
    }
  }
  constexpr int64_t kBands = 8;  // whatever the number of threads, for the order of the sums
  std::vector<std::vector<std::vector<Tie>>> ties(kBands);
  std::vector<std::vector<double>> degrees(kBands);
  Affinity found;
  for_parts(kBands, threads, [&](int64_t band) {
    auto& own = ties[band];
    auto& sums = degrees[band];
    own.resize(count);
    sums.assign(count, 0);
    for (int64_t y = height * band / kBands; y < height * (band + 1) / kBands; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t p = y * width + x;
        sums[owner[p]] += 1;
        for (const Offset& offset : offsets) {
          const int64_t v = y + offset.y, u = x + offset.x;
          if (v >= height || u < 0 || u >= width) continue;
          const int64_t q = v * width + u;
          double gap = 0;
          for (int64_t c = 0; c < depth; ++c) {
            const double d = values[p * depth + c] - values[q * depth + c];
            gap += d * d;
          }
          const double weight = offset.weight * std::exp(-gap / feature);
          const auto a = static_cast<int32_t>(owner[p]), b = static_cast<int32_t>(owner[q]);
          sums[a] += weight;
          sums[b] += weight;
          if (a == b) continue;
          const int32_t low = std::min(a, b), high = std::max(a, b);
          auto& row = own[low];
          auto tie =
              std::find_if(row.begin(), row.end(), [&](const Tie& t) { return t.to == high; });
          if (tie == row.end()) {
            row.push_back({high, weight});
          } else {
            tie->weight += weight;
          }
        }
      }
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    total[r] = 0;
    std::vector<Tie> row;
    for (int64_t band = 0; band < kBands; ++band) {
      total[r] += degrees[band][r];
      row.insert(row.end(), ties[band][r].begin(), ties[band][r].end());
    }
    std::stable_sort(row.begin(), row.end(),
                     [](const Tie& s, const Tie& t) { return s.to < t.to; });
    for (size_t i = 0; i < row.size(); ++i) {
      if (i > 0 && row[i].to == row[i - 1].to) {
        found.weights.back() += row[i].weight;
        continue;
      }
      found.pairs.push_back(static_cast<int32_t>(r));
      found.pairs.push_back(row[i].to);
      found.weights.push_back(row[i].weight);
    }
  }
  return found;
}

}  // namespace classical
