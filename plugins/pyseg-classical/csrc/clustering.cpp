// k-means by Lloyd's iterations. Hamerly's bounds (SDM 2010) leave out distances that cannot matter,
// so the assignments are Lloyd's own.
#include "core.h"

namespace classical {
namespace {

constexpr int64_t kPart = 4096;  // points that are summed together, whatever the number of threads

double squared(const double* a, const double* b, int64_t dims) {
  double sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

struct Points {
  const double* values;  // [count, dims]
  int64_t count, dims, k;
  const double* at(int64_t i) const { return values + i * dims; }
};

// Distances of a block of points to all centres, then the nearest two. Points of a block lie side by
// side, so that one instruction serves several.
constexpr int64_t kBlock = 64;

CLASSICAL_CLONES void nearest(const double* block, const double* centres, int64_t dims, int64_t k,
                              double* best, double* second, double* label) {
  for (int64_t i = 0; i < kBlock; ++i) {
    best[i] = second[i] = std::numeric_limits<double>::infinity();
    label[i] = 0;
  }
  for (int64_t c = 0; c < k; ++c) {
    double distance[kBlock] = {};
    for (int64_t d = 0; d < dims; ++d) {
      const double centre = centres[c * dims + d];
      const double* row = block + d * kBlock;
      for (int64_t i = 0; i < kBlock; ++i) {
        const double gap = row[i] - centre;
        distance[i] += gap * gap;
      }
    }
    const auto number = static_cast<double>(c);
    for (int64_t i = 0; i < kBlock; ++i) {
      const double here = distance[i];
      const bool closer = here < best[i];
      const double next = closer ? best[i] : here;
      second[i] = next < second[i] ? next : second[i];
      label[i] = closer ? number : label[i];
      best[i] = closer ? here : best[i];
    }
  }
}

class Lloyd {
 public:
  Lloyd(const Points& points, std::vector<double> centres, int threads)
      : points_(points),
        centres_(std::move(centres)),
        threads_(threads),
        parts_((points.count + kPart - 1) / kPart),
        labels_(points.count, -1),
        upper_(points.count),
        lower_(points.count),
        move_(points.k) {}

  // Returns the number of iterations; the sums of squared distances are in inertia.
  int64_t run(int64_t most, double tolerance) {
    for (int64_t iteration = 1; iteration <= most; ++iteration) {
      const bool changed = assign(iteration == 1);
      const double shift = update();
      if (!changed) return iteration;  // as the last time, and so were the centres
      if (shift <= tolerance) {
        assign(false);
        return iteration;
      }
      if (iteration == most) assign(false);
    }
    return most;
  }

  double inertia() const {
    std::vector<double> sums(parts_);
    for_parts(parts_, threads_, [&](int64_t part) {
      for (int64_t i = part * kPart, end = last(part); i < end; ++i) {
        sums[part] += squared(points_.at(i), centre(labels_[i]), points_.dims);
      }
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  }

  const std::vector<int32_t>& labels() const { return labels_; }
  const std::vector<double>& centres() const { return centres_; }

 private:
  const double* centre(int64_t c) const { return centres_.data() + c * points_.dims; }
  int64_t last(int64_t part) const { return std::min(points_.count, (part + 1) * kPart); }

  // Every point to its nearest centre, of equals the first; true where a label changed.
  bool assign(bool first) {
    if (!first) measure_centres();
    std::vector<char> changed(parts_);
    for_parts(parts_, threads_, [&](int64_t part) { changed[part] = assign_part(part, first); });
    return std::find(changed.begin(), changed.end(), 1) != changed.end();
  }

  bool assign_part(int64_t part, bool first) {
    int64_t waiting[kBlock];
    int64_t held = 0;
    bool changed = false;
    for (int64_t i = part * kPart, end = last(part); i < end; ++i) {
      if (!first && stays(i)) continue;
      waiting[held++] = i;
      if (held == kBlock) {
        changed |= look(waiting, held);
        held = 0;
      }
    }
    if (held > 0) changed |= look(waiting, held);
    return changed;
  }

  // True where the bounds prove that no other centre is as near. Bounds are of distances, not their
  // squares, and have a margin for what rounding takes.
  bool stays(int64_t i) {
    const int32_t label = labels_[i];
    upper_[i] += move_[label];
    lower_[i] -= label == farthest_ ? second_move_ : move_[farthest_];
    const double bound = std::max(lower_[i], half_gap_[label]) * (1 - 1e-9);
    if (upper_[i] < bound) return true;
    upper_[i] = std::sqrt(squared(points_.at(i), centre(label), points_.dims));
    return upper_[i] * (1 + 1e-9) < bound;
  }

  bool look(const int64_t* waiting, int64_t held) {
    std::vector<double>& block = scratch();
    const int64_t dims = points_.dims;
    for (int64_t j = 0; j < kBlock; ++j) {  // what is missing of a block repeats its first point
      const double* point = points_.at(waiting[j < held ? j : 0]);
      for (int64_t d = 0; d < dims; ++d) block[d * kBlock + j] = point[d];
    }
    double best[kBlock], second[kBlock], label[kBlock];
    nearest(block.data(), centres_.data(), dims, points_.k, best, second, label);
    bool changed = false;
    for (int64_t j = 0; j < held; ++j) {
      const int64_t i = waiting[j];
      const auto found = static_cast<int32_t>(label[j]);
      changed |= labels_[i] != found;
      labels_[i] = found;
      upper_[i] = std::sqrt(best[j]);
      lower_[i] = std::sqrt(second[j]);
    }
    return changed;
  }

  std::vector<double>& scratch() const {
    thread_local std::vector<double> block;
    block.resize(points_.dims * kBlock);
    return block;
  }

  // Half the distance from each centre to the next one: a point nearer than that is its own.
  void measure_centres() {
    const int64_t k = points_.k;
    half_gap_.assign(k, std::numeric_limits<double>::infinity());
    for (int64_t a = 0; a < k; ++a) {
      for (int64_t b = 0; b < k; ++b) {
        if (a == b) continue;
        half_gap_[a] =
            std::min(half_gap_[a], std::sqrt(squared(centre(a), centre(b), points_.dims)) / 2);
      }
    }
    farthest_ = 0;
    for (int64_t c = 1; c < k; ++c) {
      if (move_[c] > move_[farthest_]) farthest_ = static_cast<int32_t>(c);
    }
    second_move_ = 0;
    for (int64_t c = 0; c < k; ++c) {
      if (c != farthest_) second_move_ = std::max(second_move_, move_[c]);
    }
  }

  // Centres to the means of their points; the sum of squares of how far they moved. Sums are made in
  // parts of fixed size and added in their order.
  double update() {
    const int64_t k = points_.k, dims = points_.dims, stride = k * (dims + 1);
    const int64_t groups = std::min<int64_t>(parts_, 64);
    std::vector<double> sums(groups * stride);
    for_parts(groups, threads_, [&](int64_t group) {
      double* own = sums.data() + group * stride;
      for (int64_t part = group; part < parts_; part += groups) {
        for (int64_t i = part * kPart, end = last(part); i < end; ++i) {
          double* row = own + labels_[i] * (dims + 1);
          const double* point = points_.at(i);
          for (int64_t d = 0; d < dims; ++d) row[d] += point[d];
          row[dims] += 1;
        }
      }
    });
    for (int64_t group = 1; group < groups; ++group) {
      for (int64_t j = 0; j < stride; ++j) sums[j] += sums[group * stride + j];
    }
    relocate(sums);
    double shift = 0;
    for (int64_t c = 0; c < k; ++c) {
      const double* row = sums.data() + c * (dims + 1);
      double moved = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const double mean = row[dims] > 0 ? row[d] / row[dims] : centre(c)[d];
        const double step = mean - centre(c)[d];
        moved += step * step;
        centres_[c * dims + d] = mean;
      }
      move_[c] = std::sqrt(moved);
      shift += moved;
    }
    return shift;
  }

  // A centre without points takes the point that is farthest from its own, as scikit-learn has it.
  void relocate(std::vector<double>& sums) {
    const int64_t dims = points_.dims;
    std::vector<int64_t> empty;
    for (int64_t c = 0; c < points_.k; ++c) {
      if (sums[c * (dims + 1) + dims] == 0) empty.push_back(c);
    }
    if (empty.empty()) return;
    std::vector<double> far(points_.count);
    std::vector<int64_t> order(points_.count);
    for (int64_t i = 0; i < points_.count; ++i) {
      far[i] = squared(points_.at(i), centre(labels_[i]), dims);
      order[i] = i;
    }
    std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(empty.size()),
                      order.end(), [&](int64_t a, int64_t b) {
                        return far[a] != far[b] ? far[a] > far[b] : a < b;
                      });
    for (size_t j = 0; j < empty.size(); ++j) {
      const int64_t i = order[j];
      if (far[i] == 0) return;  // fewer distinct points than centres
      double* from = sums.data() + labels_[i] * (dims + 1);
      double* to = sums.data() + empty[j] * (dims + 1);
      for (int64_t d = 0; d < dims; ++d) {
        from[d] -= points_.at(i)[d];
        to[d] = points_.at(i)[d];
      }
      from[dims] -= 1;
      to[dims] = 1;
    }
  }

  Points points_;
  std::vector<double> centres_;
  int threads_;
  int64_t parts_;
  std::vector<int32_t> labels_;
  std::vector<double> upper_, lower_;  // of the distance to the own centre, and to the second
  std::vector<double> move_, half_gap_;
  int32_t farthest_ = 0;  // the centre that moved most, and how far the next one did
  double second_move_ = 0;
};

py::tuple lloyd(const Reals& values, const Reals& centres, int64_t iterations, double tolerance,
                int threads) {
  require(values.ndim() == 2 && centres.ndim() == 2 && values.shape(1) == centres.shape(1) &&
              centres.shape(0) > 0 && values.shape(0) > 0 && values.shape(1) > 0,
          "lloyd: values [N, D] and centres [K, D]");
  const Points points{values.data(), values.shape(0), values.shape(1), centres.shape(0)};
  Lloyd method(points, {centres.data(), centres.data() + centres.size()}, threads);
  int64_t taken = 0;
  double inertia = 0;
  {
    py::gil_scoped_release release;
    taken = method.run(iterations, tolerance);
    inertia = method.inertia();
  }
  py::array_t<int32_t> labels(points.count);
  std::copy(method.labels().begin(), method.labels().end(), labels.mutable_data());
  py::array_t<double> found({points.k, points.dims});
  std::copy(method.centres().begin(), method.centres().end(), found.mutable_data());
  return py::make_tuple(labels, found, inertia, taken);
}

// Squared distances of all points to the nearest of the centres so far: nearest becomes the smaller
// of itself and that to `centre`.
void lower_to(const Reals& values, const Reals& centre, py::array_t<double>& nearest, int threads) {
  const int64_t count = values.shape(0), dims = values.shape(1);
  require(centre.size() == dims && nearest.size() == count, "lower_to: sizes do not fit");
  double* best = nearest.mutable_data();
  const double *rows = values.data(), *c = centre.data();
  py::gil_scoped_release release;
  for_parts((count + kPart - 1) / kPart, threads, [&](int64_t part) {
    for (int64_t i = part * kPart; i < std::min(count, (part + 1) * kPart); ++i) {
      best[i] = std::min(best[i], squared(rows + i * dims, c, dims));
    }
  });
}

}  // namespace

void bind_clustering(py::module_& m) {
  m.def("lloyd", &lloyd);
  m.def("lower_to", &lower_to);
}

}  // namespace classical
