// The methods for Python: arrays in and out, without its lock meanwhile.
#include "core.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>

namespace {

namespace py = pybind11;
using namespace classical;

using Reals = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Mask = py::array_t<bool, py::array::c_style>;
using Labels = py::array_t<int32_t>;
using Unlocked = py::gil_scoped_release;

Points points_of(const Reals& values) {
  require(values.ndim() == 2 && values.size() > 0, "features must be [N, D]");
  return {values.data(), values.shape(0), values.shape(1)};
}

Image image_of(const Reals& image) {
  require(image.ndim() == 3 && image.shape(0) * image.shape(1) < (1LL << 29),
          "an image must be [H, W, C], of less than 2^29 pixels");
  return {image.data(), image.shape(0), image.shape(1), image.shape(2)};
}

void require_map(const py::array& map, const Image& image) {
  require(map.ndim() == 2 && map.shape(0) == image.height && map.shape(1) == image.width,
          "a map must have the image's size");
}

int64_t edges_of(const Ints& edges) {
  require(edges.size() == 0 || (edges.ndim() == 2 && edges.shape(1) == 2), "edges must be [E, 2]");
  return edges.size() / 2;
}

template <class Value>
py::array_t<Value> array_of(const std::vector<Value>& values, std::vector<py::ssize_t> shape) {
  py::array_t<Value> made(std::move(shape));
  std::copy(values.begin(), values.end(), made.mutable_data());
  return made;
}

// labels [H, W], as work(labels) writes them.
template <class Work>
Labels labelled(const Image& image, const Work& work) {
  Labels labels({image.height, image.width});
  int32_t* own = labels.mutable_data();
  Unlocked release;
  work(own);
  return labels;
}

py::tuple py_lloyd(const Reals& values, const Reals& centres, int64_t iterations, double tolerance,
                   int threads) {
  const Points points = points_of(values), starts = points_of(centres);
  require(points.dims == starts.dims, "centres must be [K, D]");
  Clusters found;
  {
    Unlocked release;
    found = lloyd(points, starts.values, starts.count, iterations, tolerance, threads);
  }
  return py::make_tuple(array_of(found.labels, {points.count}),
                        array_of(found.centres, {starts.count, points.dims}), found.inertia,
                        found.iterations);
}

void py_lower_to(const Reals& values, const Reals& centre, py::array_t<double>& nearest,
                 int threads) {
  const Points points = points_of(values);
  require(centre.size() == points.dims && nearest.size() == points.count,
          "lower_to: sizes do not fit");
  double* best = nearest.mutable_data();
  Unlocked release;
  lower_to(points, centre.data(), best, threads);
}

Labels py_grow_seeds(const Reals& values, const Ints& seeds, int64_t count, double threshold,
                     bool fill, bool diagonal) {
  const Image image = image_of(values);
  require_map(seeds, image);
  return labelled(image, [&](int32_t* labels) {
    for (int64_t p = 0; p < image.pixels(); ++p) {
      require(seeds.data()[p] >= 0 && seeds.data()[p] <= count, "a seed above their number");
      labels[p] = static_cast<int32_t>(seeds.data()[p]);
    }
    grow_seeds(image, count, threshold, fill, diagonal, labels);
  });
}

Labels py_grow_in_order(const Reals& values, const Ints& order, double threshold, bool diagonal) {
  const Image image = image_of(values);
  return labelled(image, [&](int32_t* labels) {
    for (int64_t i = 0; i < order.size(); ++i) {
      require(order.data()[i] >= 0 && order.data()[i] < image.pixels(), "a seed outside the image");
    }
    grow_in_order(image, order.data(), order.size(), threshold, diagonal, labels);
  });
}

// What a predicate in Python sees of a region.
py::dict described(const Summary& region) {
  std::vector<double> mean(region.sum);
  for (double& value : mean) value /= region.area;
  py::dict found;
  found["area"] = static_cast<int64_t>(region.area);
  found["mean"] = array_of(mean, {static_cast<py::ssize_t>(mean.size())});
  found["deviation"] = region.deviation();
  return found;
}

// split: "deviation", "range", or a function of a block [h, w, C] that says whether it is split.
// merging: "mean", "deviation", or a function of two regions' descriptions; None merges nothing.
Labels py_split_and_merge(const Reals& values, const py::object& split, double split_limit,
                          int64_t smallest, const py::object& merging, double merge_limit) {
  const Image image = image_of(values);
  require(smallest > 0, "smallest must be 1 or more");
  Labels labels({image.height, image.width});
  int32_t* own = labels.mutable_data();
  Quadtree tree(image, own);
  SplitTest uneven;
  if (!py::isinstance<py::str>(split)) {
    uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      const auto rows = py::slice(a, b, 1), columns = py::slice(c, d, 1);
      return split(values[py::make_tuple(rows, columns)]).cast<bool>();
    };
  } else if (split.cast<std::string>() == "range") {
    uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      return tree.range(a, b, c, d) > split_limit;
    };
  } else {
    uneven = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      return tree.summary(a, b, c, d).deviation() > split_limit;
    };
  }
  // Only predicates in Python need its lock.
  std::optional<Unlocked> release;
  if (py::isinstance<py::str>(split)) release.emplace();
  const int32_t blocks = tree.split(smallest, uneven);
  release.reset();
  if (merging.is_none()) return labels;
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
  merge(image, blocks, alike, own);
  release.reset();
  return labels;
}

py::tuple py_max_flow(const Reals& source, const Reals& sink, const Ints& arcs,
                      const Reals& forward, const Reals& backward) {
  const int64_t nodes = source.size(), count = edges_of(arcs);
  require(sink.size() == nodes && forward.size() == count && backward.size() == count &&
              nodes < (1 << 30) && count < (1 << 30),
          "max_flow: sizes do not fit");
  Mask side(nodes);
  bool* sides = side.mutable_data();
  double flow = 0;
  {
    Unlocked release;
    flow = max_flow(nodes, source.data(), sink.data(), count, arcs.data(), forward.data(),
                    backward.data(), sides);
  }
  return py::make_tuple(flow, side);
}

py::tuple py_grid_max_flow(const Reals& source, const Reals& sink, const Reals& weights) {
  require(source.ndim() == 2 && sink.ndim() == 2 && weights.ndim() == 3 &&
              source.size() == sink.size() && weights.size() == weights.shape(0) * source.size() &&
              source.size() < (1 << 27),
          "grid_max_flow: sizes do not fit");
  const int64_t height = source.shape(0), width = source.shape(1), planes = weights.shape(0);
  require(planes == 2 || planes == 4 || planes == 8, "grid_max_flow: 2, 4 or 8 planes of weights");
  Mask side({height, width});
  bool* sides = side.mutable_data();
  double flow = 0;
  {
    Unlocked release;
    flow = grid_max_flow(height, width, planes, source.data(), sink.data(), weights.data(), sides);
  }
  return py::make_tuple(flow, side);
}

py::tuple py_minimum_cut(int64_t nodes, const Ints& edges, const Reals& weights) {
  const int64_t count = edges_of(edges);
  require(nodes > 1 && count == weights.size(), "minimum_cut: sizes do not fit");
  Mask side(nodes);
  bool* out = side.mutable_data();
  double value = 0;
  {
    Unlocked release;
    value = minimum_cut(nodes, count, edges.data(), weights.data(), out);
  }
  return py::make_tuple(value, side);
}

Labels py_highly_connected(int64_t nodes, const Ints& edges) {
  const int64_t count = edges_of(edges);
  Labels owner(nodes);
  int32_t* own = owner.mutable_data();
  Unlocked release;
  highly_connected(nodes, count, edges.data(), own);
  return owner;
}

Labels py_felzenszwalb(const Reals& values, double scale, int64_t min_size) {
  const Image image = image_of(values);
  return labelled(image, [&](int32_t* own) { felzenszwalb(image, scale, min_size, own); });
}

Labels py_spanning_tree(const Reals& values, int64_t parts, double least, int64_t min_size) {
  const Image image = image_of(values);
  return labelled(image, [&](int32_t* own) { spanning_tree(image, parts, least, min_size, own); });
}

py::tuple py_affinity(const Reals& values, const Ints& regions, int64_t count, double radius,
                      double feature, double space, int threads) {
  const Image image = image_of(values);
  require_map(regions, image);
  py::array_t<double> degree(count);
  double* total = degree.mutable_data();
  Affinity found;
  {
    Unlocked release;
    found = affinity(image, regions.data(), count, radius, feature, space, threads, total);
  }
  const auto edges = static_cast<py::ssize_t>(found.weights.size());
  return py::make_tuple(array_of(found.pairs, {edges, 2}), array_of(found.weights, {edges}),
                        degree);
}

py::tuple py_match(const Mask& ours, const Mask& theirs, double radius) {
  require(ours.ndim() == 2 && theirs.ndim() == 2 && ours.shape(0) == theirs.shape(0) &&
              ours.shape(1) == theirs.shape(1),
          "match: two maps [H, W]");
  const int64_t height = ours.shape(0), width = ours.shape(1);
  Mask a({height, width}), b({height, width});
  bool *one = a.mutable_data(), *other = b.mutable_data();
  std::fill_n(one, ours.size(), false);
  std::fill_n(other, ours.size(), false);
  {
    Unlocked release;
    match(ours.data(), theirs.data(), height, width, radius, one, other);
  }
  return py::make_tuple(a, b);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled methods of pyseg-classical; their modules in Python check and explain.";
  m.def("lloyd", &py_lloyd);
  m.def("lower_to", &py_lower_to);
  m.def("grow_seeds", &py_grow_seeds);
  m.def("grow_in_order", &py_grow_in_order);
  m.def("split_and_merge", &py_split_and_merge);
  m.def("max_flow", &py_max_flow);
  m.def("grid_max_flow", &py_grid_max_flow);
  m.def("minimum_cut", &py_minimum_cut);
  m.def("highly_connected", &py_highly_connected);
  m.def("felzenszwalb", &py_felzenszwalb);
  m.def("spanning_tree", &py_spanning_tree);
  m.def("affinity", &py_affinity);
  m.def("match", &py_match);
}
