// Maximum s-t flow by two search trees (Boykov and Kolmogorov, PAMI 2004). One algorithm on two
// layouts: any graph as rows of arcs, and pixels, whose neighbours are found by adding an offset.
#include "core.h"

namespace classical {
namespace {

// Arcs of node n are first(n)..first(n + 1) - 1.
struct Rows {
  std::vector<int32_t> starts, heads, sisters;
  int32_t nodes() const { return static_cast<int32_t>(starts.size()) - 1; }
  int32_t first(int32_t n) const { return starts[n]; }
  int32_t head(int32_t, int32_t a) const { return heads[a]; }
  int32_t sister(int32_t, int32_t a) const { return sisters[a]; }
  int32_t tail(int32_t a) const { return heads[sisters[a]]; }
};

// Pixels with a frame of one pixel around, whose arcs have no capacity: no test of borders.
// Direction d and its opposite differ in the last bit.
template <int D>
struct Grid {
  int32_t count;
  int32_t offsets[D];
  Grid(int64_t height, int64_t width) : count(static_cast<int32_t>((height + 2) * (width + 2))) {
    const auto row = static_cast<int32_t>(width + 2);
    const int32_t all[8] = {1, -1, row, -row, row + 1, -row - 1, row - 1, -row + 1};
    std::copy(all, all + D, offsets);
  }
  int32_t nodes() const { return count; }
  int32_t first(int32_t n) const { return n * D; }
  int32_t head(int32_t n, int32_t a) const { return n + offsets[a - n * D]; }
  int32_t sister(int32_t n, int32_t a) const {
    const int32_t d = a - n * D;
    return (n + offsets[d]) * D + (d ^ 1);
  }
  int32_t tail(int32_t a) const { return a / D; }
};

template <class Layout>
class MaxFlow {
 public:
  // excess: capacity from the source minus capacity to the sink, what both have in common is flow
  // already. capacity: of every arc.
  MaxFlow(const Layout& layout, std::vector<double>& capacity, std::vector<double>& excess)
      : graph_(layout), rest_(capacity), terminal_(excess), nodes_(layout.nodes()) {}

  double run() {
    for (int32_t n = 0; n < graph_.nodes(); ++n) {
      if (terminal_[n] == 0) continue;
      Node& node = nodes_[n];
      node.parent = kTerminal;
      node.tree = terminal_[n] > 0 ? kSource : kSink;
      node.distance = 1;
      activate(n);
    }
    int32_t current = kNone;
    while (true) {
      int32_t n = current;
      if (n != kNone && nodes_[n].parent == kNone) n = kNone;
      if (n == kNone) n = next_active();
      if (n == kNone) break;
      ++time_;
      if (grow(n)) {
        current = n;  // it may have more paths
        augment();
        while (!orphans_.empty()) {
          const int32_t orphan = orphans_.front();
          orphans_.pop();
          if (nodes_[orphan].tree == kSource) {
            adopt<true>(orphan);
          } else {
            adopt<false>(orphan);
          }
        }
      } else {
        current = kNone;
      }
    }
    return flow_;
  }

  // On the source's side of the smallest minimum cut: what the source's tree holds.
  bool in_source(int32_t n) const { return nodes_[n].parent != kNone && nodes_[n].tree == kSource; }

 private:
  static constexpr int32_t kNone = -1, kTerminal = -2, kOrphan = -3;
  static constexpr int8_t kSource = 0, kSink = 1;
  struct Node {
    int32_t parent = kNone;  // arc from the node to its parent
    int32_t stamp = 0;       // when distance was right
    int32_t distance = 0;    // to the tree's root
    int8_t tree = kSource;
    bool queued = false;
  };

  void activate(int32_t n) {
    if (nodes_[n].queued) return;
    nodes_[n].queued = true;
    active_.push(n);
  }

  int32_t next_active() {
    while (!active_.empty()) {
      const int32_t n = active_.front();
      active_.pop();
      nodes_[n].queued = false;
      if (nodes_[n].parent != kNone) return n;
    }
    return kNone;
  }

  // Grows the tree from n; true where it meets the other, with the arc in meeting_.
  bool grow(int32_t n) {
    const bool source = nodes_[n].tree == kSource;
    const int32_t last = graph_.first(n + 1);
    for (int32_t a = graph_.first(n); a < last; ++a) {
      const int32_t back = graph_.sister(n, a);
      if (rest_[source ? a : back] <= 0) continue;
      const int32_t m = graph_.head(n, a);
      Node& other = nodes_[m];
      if (other.parent == kNone) {
        other.tree = nodes_[n].tree;
        other.parent = back;
        other.stamp = nodes_[n].stamp;
        other.distance = nodes_[n].distance + 1;
        activate(m);
      } else if (other.tree != nodes_[n].tree) {
        meeting_ = source ? a : back;
        meeting_tail_ = source ? n : m;
        return true;
      } else if (other.stamp <= nodes_[n].stamp && other.distance > nodes_[n].distance) {
        other.parent = back;  // a shorter way to the root
        other.stamp = nodes_[n].stamp;
        other.distance = nodes_[n].distance + 1;
      }
    }
    return false;
  }

  void augment() {
    const int32_t from = meeting_tail_, to = graph_.head(from, meeting_);
    double least = rest_[meeting_];
    int32_t n = from;
    for (int32_t a; (a = nodes_[n].parent) != kTerminal; n = graph_.head(n, a)) {
      least = std::min(least, rest_[graph_.sister(n, a)]);
    }
    least = std::min(least, terminal_[n]);
    n = to;
    for (int32_t a; (a = nodes_[n].parent) != kTerminal; n = graph_.head(n, a)) {
      least = std::min(least, rest_[a]);
    }
    least = std::min(least, -terminal_[n]);

    rest_[meeting_] -= least;
    rest_[graph_.sister(from, meeting_)] += least;
    n = from;
    for (int32_t a; (a = nodes_[n].parent) != kTerminal;) {
      const int32_t down = graph_.sister(n, a), up = graph_.head(n, a);
      rest_[a] += least;
      rest_[down] -= least;
      if (rest_[down] <= 0) orphan(n);
      n = up;
    }
    terminal_[n] -= least;
    if (terminal_[n] <= 0) orphan(n);
    n = to;
    for (int32_t a; (a = nodes_[n].parent) != kTerminal;) {
      const int32_t up = graph_.head(n, a);
      rest_[graph_.sister(n, a)] += least;
      rest_[a] -= least;
      if (rest_[a] <= 0) orphan(n);
      n = up;
    }
    terminal_[n] += least;
    if (terminal_[n] >= 0) orphan(n);
    flow_ += least;
  }

  void orphan(int32_t n) {
    nodes_[n].parent = kOrphan;
    orphans_.push(n);
  }

  // A new parent for an orphan in its tree, the nearest to the root; or the node becomes free.
  template <bool Source>
  void adopt(int32_t n) {
    constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
    constexpr int8_t tree = Source ? kSource : kSink;
    int32_t best = kNone, shortest = kFar;
    const int32_t begin = graph_.first(n), last = graph_.first(n + 1);
    for (int32_t a = begin; a < last; ++a) {
      if (rest_[Source ? graph_.sister(n, a) : a] <= 0) continue;
      const int32_t m = graph_.head(n, a);
      if (nodes_[m].tree != tree || nodes_[m].parent == kNone) continue;
      const int32_t distance = depth(m);
      if (distance == kFar) continue;
      if (distance < shortest) {
        best = a;
        shortest = distance;
      }
      // what the way taught is kept
      int32_t length = distance;
      for (int32_t k = m; nodes_[k].stamp != time_; k = graph_.head(k, nodes_[k].parent)) {
        nodes_[k].stamp = time_;
        nodes_[k].distance = length--;
      }
    }
    if (best != kNone) {
      nodes_[n].parent = best;
      nodes_[n].stamp = time_;
      nodes_[n].distance = shortest + 1;
      return;
    }
    for (int32_t a = begin; a < last; ++a) {
      const int32_t m = graph_.head(n, a);
      Node& other = nodes_[m];
      if (other.tree != tree || other.parent == kNone) continue;
      if (rest_[Source ? graph_.sister(n, a) : a] > 0) activate(m);
      if (other.parent >= 0 && graph_.head(m, other.parent) == n) orphan(m);
    }
    nodes_[n].parent = kNone;
  }

  // Steps to the terminal; the largest number where the way ends at an orphan.
  int32_t depth(int32_t n) {
    for (int32_t steps = 1;; ++steps) {
      Node& node = nodes_[n];
      if (node.stamp == time_) return steps - 1 + node.distance;
      if (node.parent == kOrphan) return std::numeric_limits<int32_t>::max();
      if (node.parent == kTerminal) {
        node.stamp = time_;
        node.distance = 1;
        return steps;
      }
      n = graph_.head(n, node.parent);
    }
  }

  const Layout& graph_;
  std::vector<double>&rest_, &terminal_;
  std::vector<Node> nodes_;
  std::queue<int32_t> active_, orphans_;
  int32_t time_ = 0, meeting_ = kNone, meeting_tail_ = kNone;
  double flow_ = 0;
};

// What is left of the capacities from the source and to the sink after the flow through both.
double settle(double source, double sink, double& excess) {
  excess = source - sink;
  return std::min(source, sink);
}

template <int D>
double solve_grid(int64_t height, int64_t width, int64_t planes, const double* source,
                  const double* sink, const double* w, bool* sides) {
  const Grid<D> grid(height, width);
  const int64_t pixels = height * width;
  const bool symmetric = planes == D / 2;
  std::vector<double> capacity(static_cast<size_t>(grid.count) * D), excess(grid.count);
  const int dx[8] = {1, -1, 0, 0, 1, -1, -1, 1}, dy[8] = {0, 0, 1, -1, 1, -1, 1, -1};
  double flow = 0;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t pixel = y * width + x;
      const auto node = static_cast<int32_t>((y + 1) * (width + 2) + x + 1);
      flow += settle(source[pixel], sink[pixel], excess[node]);
      for (int d = 0; d < D; ++d) {
        const int64_t u = x + dx[d], v = y + dy[d];
        if (u < 0 || u >= width || v < 0 || v >= height) continue;
        // a symmetric weight stands at the pixel that sees the other in an even direction
        capacity[static_cast<size_t>(node) * D + d] =
            !symmetric ? w[d * pixels + pixel]
                       : w[(d / 2) * pixels + (d % 2 ? v * width + u : pixel)];
      }
    }
  }
  MaxFlow<Grid<D>> solver(grid, capacity, excess);
  flow += solver.run();
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const auto node = static_cast<int32_t>((y + 1) * (width + 2) + x + 1);
      sides[y * width + x] = solver.in_source(node);
    }
  }
  return flow;
}

}  // namespace

double max_flow(int64_t nodes, const double* source, const double* sink, int64_t count,
                const int64_t* ends, const double* forward, const double* backward, bool* sides) {
  Rows rows;
  rows.starts.assign(nodes + 1, 0);
  for (int64_t i = 0; i < 2 * count; ++i) {
    require(ends[i] >= 0 && ends[i] < nodes, "max_flow: an arc's end is no node");
    ++rows.starts[ends[i] + 1];
  }
  for (int64_t n = 0; n < nodes; ++n) rows.starts[n + 1] += rows.starts[n];
  std::vector<int32_t> next(rows.starts.begin(), rows.starts.end() - 1);
  rows.heads.resize(2 * count);
  rows.sisters.resize(2 * count);
  std::vector<double> capacity(2 * count), excess(nodes);
  for (int64_t i = 0; i < count; ++i) {
    const auto u = static_cast<int32_t>(ends[2 * i]), v = static_cast<int32_t>(ends[2 * i + 1]);
    const int32_t a = next[u]++, b = next[v]++;
    rows.heads[a] = v;
    rows.heads[b] = u;
    rows.sisters[a] = b;
    rows.sisters[b] = a;
    capacity[a] = forward[i];
    capacity[b] = backward[i];
  }
  double flow = 0;
  for (int64_t n = 0; n < nodes; ++n) flow += settle(source[n], sink[n], excess[n]);
  MaxFlow<Rows> solver(rows, capacity, excess);
  flow += solver.run();
  for (int64_t n = 0; n < nodes; ++n) sides[n] = solver.in_source(static_cast<int32_t>(n));
  return flow;
}

double grid_max_flow(int64_t height, int64_t width, int64_t planes, const double* source,
                     const double* sink, const double* weights, bool* sides) {
  return planes == 2 ? solve_grid<4>(height, width, planes, source, sink, weights, sides)
                     : solve_grid<8>(height, width, planes, source, sink, weights, sides);
}

}  // namespace classical
