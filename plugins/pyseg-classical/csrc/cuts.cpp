// Global minimum cuts (after Stoer and Wagner, JACM 1997) and the clusters that they leave whole:
// highly connected subgraphs (Hartuv and Shamir, IPL 2000).
#include "core.h"

namespace classical {
namespace {

struct Arc {
  int32_t to;
  double weight;
};
using Graph = std::vector<std::vector<Arc>>;

// Cut of least weight of a connected graph of two nodes or more; side: the nodes on the one part. A
// cut of at most `floor`, below which none can be, ends the search.
//
// In a maximum adjacency order an edge's ends are connected at least as well as its later end was
// tied when the earlier one came. Where that reaches the best cut so far, no better one parts them,
// so all such edges are contracted at once (Nagamochi and Ibaraki, 1992), not only the last.
double smallest_cut(Graph graph, double floor, std::vector<char>& side) {
  std::vector<std::vector<int32_t>> members(graph.size());
  for (size_t n = 0; n < graph.size(); ++n) members[n] = {static_cast<int32_t>(n)};
  side.assign(graph.size(), 0);
  double best = std::numeric_limits<double>::infinity();
  std::vector<int32_t> chosen;
  const auto consider = [&](double weight, size_t node) {
    if (weight >= best) return;
    best = weight;
    chosen = members[node];
  };
  while (graph.size() > 1) {
    const auto count = static_cast<int32_t>(graph.size());
    for (int32_t n = 0; n < count; ++n) {
      double degree = 0;
      for (const Arc& arc : graph[n]) degree += arc.weight;
      consider(degree, n);
    }
    if (best <= floor) break;
    std::vector<double> tied(count, 0);
    std::vector<char> taken(count, 0);
    Sets sets(count);
    const auto unite = [&](int32_t a, int32_t b) {
      a = sets.find(a);
      b = sets.find(b);
      if (a != b) sets.join(a, b);
    };
    std::priority_queue<std::pair<double, int32_t>> queue;
    for (int32_t n = 0; n < count; ++n) queue.push({0, -n});
    int32_t last = -1, before = -1;
    while (!queue.empty()) {
      const auto [weight, negative] = queue.top();
      queue.pop();
      const int32_t n = -negative;
      if (taken[n] || weight != tied[n]) continue;
      taken[n] = 1;
      before = last;
      last = n;
      for (const Arc& arc : graph[n]) {
        if (taken[arc.to]) continue;
        tied[arc.to] += arc.weight;
        queue.push({tied[arc.to], -arc.to});
        if (tied[arc.to] >= best) unite(n, arc.to);
      }
    }
    unite(before, last);
    // the contracted graph
    std::vector<int32_t> number(count, -1), where(count, -1);
    int32_t groups = 0;
    for (int32_t n = 0; n < count; ++n) {
      const int32_t root = sets.find(n);
      if (number[root] < 0) number[root] = groups++;
    }
    std::vector<std::vector<int32_t>> inside(groups), joined(groups);
    for (int32_t n = 0; n < count; ++n) {
      const int32_t group = number[sets.find(n)];
      inside[group].push_back(n);
      joined[group].insert(joined[group].end(), members[n].begin(), members[n].end());
    }
    Graph smaller(groups);
    for (int32_t group = 0; group < groups; ++group) {
      auto& row = smaller[group];
      for (const int32_t n : inside[group]) {
        for (const Arc& arc : graph[n]) {
          const int32_t to = number[sets.find(arc.to)];
          if (to == group) continue;
          if (where[to] < 0) {
            where[to] = static_cast<int32_t>(row.size());
            row.push_back({to, 0});
          }
          row[where[to]].weight += arc.weight;
        }
      }
      for (const Arc& arc : row) where[arc.to] = -1;
    }
    graph = std::move(smaller);
    members = std::move(joined);
  }
  for (const int32_t n : chosen) side[n] = 1;
  return best;
}

// Component of every node, numbered in the order of their first nodes.
std::vector<int32_t> components(const Graph& graph, int32_t& count) {
  std::vector<int32_t> owner(graph.size(), -1), stack;
  count = 0;
  for (size_t start = 0; start < graph.size(); ++start) {
    if (owner[start] >= 0) continue;
    owner[start] = count;
    stack.push_back(static_cast<int32_t>(start));
    while (!stack.empty()) {
      const int32_t n = stack.back();
      stack.pop_back();
      for (const Arc& arc : graph[n]) {
        if (owner[arc.to] >= 0) continue;
        owner[arc.to] = count;
        stack.push_back(arc.to);
      }
    }
    ++count;
  }
  return owner;
}

Graph graph_of(int64_t nodes, int64_t count, const int64_t* edges, const double* weights) {
  Graph graph(nodes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t u = edges[2 * i], v = edges[2 * i + 1];
    require(u >= 0 && v >= 0 && u < nodes && v < nodes && u != v, "an edge's end is no node");
    const double weight = weights ? weights[i] : 1;
    graph[u].push_back({static_cast<int32_t>(v), weight});
    graph[v].push_back({static_cast<int32_t>(u), weight});
  }
  return graph;
}

// The nodes of a part in a graph of their own.
Graph induced(const Graph& graph, const std::vector<int32_t>& nodes, std::vector<int32_t>& place) {
  for (size_t i = 0; i < nodes.size(); ++i) place[nodes[i]] = static_cast<int32_t>(i);
  Graph part(nodes.size());
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const Arc& arc : graph[nodes[i]]) {
      if (place[arc.to] >= 0) part[i].push_back({place[arc.to], arc.weight});
    }
  }
  for (const int32_t n : nodes) place[n] = -1;
  return part;
}

// Cluster of every node of a simple graph. A connected part of n nodes is one where its edge
// connectivity is above n / 2, which is the case exactly where its smallest degree is (Chartrand
// 1966: from a degree of n / 2 on the two are equal); a single node is one, too.
std::vector<int32_t> clusters_of(const Graph& graph) {
  std::vector<int32_t> owner(graph.size(), -1), place(graph.size(), -1);
  std::vector<std::vector<int32_t>> parts(1);
  for (size_t n = 0; n < graph.size(); ++n) parts[0].push_back(static_cast<int32_t>(n));
  int32_t clusters = 0;
  while (!parts.empty()) {
    const std::vector<int32_t> nodes = std::move(parts.back());
    parts.pop_back();
    const Graph part = induced(graph, nodes, place);
    int32_t pieces = 0;
    std::vector<int32_t> side = components(part, pieces);
    if (pieces <= 1) {
      size_t least = nodes.size();
      for (const auto& row : part) least = std::min(least, row.size());
      if (nodes.size() <= 1 || 2 * least > nodes.size()) {
        for (const int32_t n : nodes) owner[n] = clusters;
        ++clusters;
        continue;
      }
      std::vector<char> cut;
      smallest_cut(part, 1, cut);
      side.assign(cut.begin(), cut.end());
      pieces = 2;
    }
    std::vector<std::vector<int32_t>> split(pieces);
    for (size_t i = 0; i < nodes.size(); ++i) split[side[i]].push_back(nodes[i]);
    for (auto& piece : split) parts.push_back(std::move(piece));
  }
  return owner;
}

}  // namespace

double minimum_cut(int64_t nodes, int64_t count, const int64_t* edges, const double* weights,
                   bool* side) {
  const Graph graph = graph_of(nodes, count, edges, weights);
  int32_t parts = 0;
  const auto owner = components(graph, parts);
  if (parts > 1) {
    for (int64_t n = 0; n < nodes; ++n) side[n] = owner[n] == 0;
    return 0;
  }
  std::vector<char> found(nodes, 0);
  const double value = smallest_cut(graph, 0, found);
  std::copy(found.begin(), found.end(), side);
  return value;
}

void highly_connected(int64_t nodes, int64_t count, const int64_t* edges, int32_t* owner) {
  const auto found = clusters_of(graph_of(nodes, count, edges, nullptr));
  std::copy(found.begin(), found.end(), owner);
}

}  // namespace classical
