// k-means by Lloyd's iterations. Every iteration compares all points with all centres: side by side
// in vectors that is faster than bounds that spare comparisons (docs/speed.md).
#include <memory>

#include "core.h"

namespace classical {
namespace {

constexpr int64_t kPart = 4096;  // points that are summed together, whatever the number of threads
constexpr int64_t kLanes = 32;   // points that lie side by side

double squared(const double* a, const double* b, int64_t dims) {
  double sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// In arrays they lie at any multiple of their elements' size. Both depend on T: an alignment that
// does not is lost where the size of the vector does, and so is that of a type that is a parameter.
template <class T, int kBytes>
struct Vector {
  typedef T Lanes __attribute__((vector_size(kBytes)));
  typedef T Memory __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

// The nearest centre of every point of a block [dims, kLanes], of equals the first: the one with
// the least |c|^2 - 2 x c, as |x|^2 is common to all. Scaled is -2 c, [k, dims]; length is |c|^2.
// Without fused multiplication, so that every machine gives the same bits.
template <int kBytes>
inline __attribute__((always_inline)) void nearest_by(const double* block, const double* scaled,
                                                      const double* length, int64_t dims, int64_t k,
                                                      int64_t* label) {
  using Lanes = typename Vector<double, kBytes>::Lanes;
  using Numbers = typename Vector<int64_t, kBytes>::Lanes;
  using Row = typename Vector<double, kBytes>::Memory;
  using Labels = typename Vector<int64_t, kBytes>::Memory;
  constexpr int kVectors = 4, kWide = kVectors * kBytes / 8;  // so many registers at a time
  for (int64_t first = 0; first < kLanes; first += kWide) {
    const auto* x = reinterpret_cast<const Row*>(block + first);
    constexpr int64_t kRow = kLanes * 8 / kBytes;
    Lanes best[kVectors];
    Numbers owner[kVectors] = {};
    for (auto& lanes : best) lanes = Lanes{} + std::numeric_limits<double>::infinity();
    const auto consider = [&](int64_t c, const Lanes& a, const Lanes& b, const Lanes& e,
                              const Lanes& f) __attribute__((always_inline)) {
      const Lanes here[kVectors] = {a, b, e, f};
      for (int v = 0; v < kVectors; ++v) {
        const Numbers closer = here[v] < best[v];
        best[v] = closer ? here[v] : best[v];
        owner[v] = closer ? Numbers{} + c : owner[v];
      }
    };
    int64_t c = 0;
    for (; c + 1 < k; c += 2) {  // two centres for every point that is read
      Lanes a = Lanes{} + length[c], b = a, e = a, f = a;
      Lanes g = Lanes{} + length[c + 1], h = g, i = g, j = g;
      const double *one = scaled + c * dims, *other = one + dims;
      for (int64_t d = 0; d < dims; ++d) {
        const Row* row = x + d * kRow;
        const Lanes left = Lanes{} + one[d], right = Lanes{} + other[d];
        a += row[0] * left, g += row[0] * right;
        b += row[1] * left, h += row[1] * right;
        e += row[2] * left, i += row[2] * right;
        f += row[3] * left, j += row[3] * right;
      }
      consider(c, a, b, e, f);
      consider(c + 1, g, h, i, j);
    }
    for (; c < k; ++c) {
      Lanes a = Lanes{} + length[c], b = a, e = a, f = a;
      for (int64_t d = 0; d < dims; ++d) {
        const Row* row = x + d * kRow;
        const Lanes centre = Lanes{} + scaled[c * dims + d];
        a += row[0] * centre;
        b += row[1] * centre;
        e += row[2] * centre;
        f += row[3] * centre;
      }
      consider(c, a, b, e, f);
    }
    auto* out = reinterpret_cast<Labels*>(label + first);
    for (int v = 0; v < kVectors; ++v) out[v] = owner[v];
  }
}

using Nearest = void (*)(const double*, const double*, const double*, int64_t, int64_t, int64_t*);
#define CLASSICAL_NEAREST(bytes, target)                                                       \
  target void nearest_##bytes(const double* block, const double* scaled, const double* length, \
                              int64_t dims, int64_t k, int64_t* label) {                       \
    nearest_by<bytes>(block, scaled, length, dims, k, label);                                  \
  }
CLASSICAL_NEAREST(16, )
#if defined(__x86_64__)
CLASSICAL_NEAREST(32, __attribute__((target("avx2"))))
CLASSICAL_NEAREST(64, __attribute__((target("avx512f"))))
#endif

// For the widest vectors that the processor has.
Nearest nearest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return nearest_64;
  if (__builtin_cpu_supports("avx2")) return nearest_32;
#endif
  return nearest_16;
}

class Lloyd {
 public:
  Lloyd(const Points& points, const double* centres, int64_t k, double tolerance, int threads)
      : points_(points),
        k_(k),
        threads_(threads),
        parts_((points.count + kPart - 1) / kPart),
        middle_(points.dims),
        blocks_(new double[parts_ * kPart * points.dims]),
        scaled_(k * points.dims),
        length_(k),
        groups_(std::min<int64_t>(parts_, 64)),
        stride_(k * (points.dims + 1)),
        sums_(groups_ * stride_) {
    found_.labels.assign(parts_ * kPart, -1);
    found_.centres.assign(centres, centres + k * points.dims);
    limit_ = tolerance * prepare();
  }

  Clusters run(int64_t most) {
    for (found_.iterations = 1;; ++found_.iterations) {
      const bool changed = assign();
      const double shift = update();
      if (!changed) break;  // as the last time, and so were the centres
      if (shift <= limit_ || found_.iterations == most) {
        assign();
        break;
      }
    }
    found_.inertia = inertia();
    found_.labels.resize(points_.count);
    return std::move(found_);
  }

 private:
  const double* centre(int64_t c) const { return found_.centres.data() + c * points_.dims; }
  int64_t last(int64_t part) const { return std::min(points_.count, (part + 1) * kPart); }

  // Copies the points, less their mean, into blocks, filled up with zeros; returns the mean
  // variance of the features.
  double prepare() {
    const int64_t dims = points_.dims;
    std::vector<double> sums(parts_ * dims), squares(parts_);
    for_parts(parts_, threads_, [&](int64_t part) {
      double* own = sums.data() + part * dims;
      for (int64_t i = part * kPart; i < last(part); ++i) {
        for (int64_t d = 0; d < dims; ++d) own[d] += points_.at(i)[d];
      }
    });
    for (int64_t part = 0; part < parts_; ++part) {
      for (int64_t d = 0; d < dims; ++d) middle_[d] += sums[part * dims + d];
    }
    for (double& mean : middle_) mean /= static_cast<double>(points_.count);
    for_parts(parts_, threads_, [&](int64_t part) {
      double lanes[kLanes] = {};
      for (int64_t first = part * kPart; first < (part + 1) * kPart; first += kLanes) {
        double* block = blocks_.get() + first * dims;
        const int64_t held = std::min(kLanes, std::max<int64_t>(points_.count - first, 0));
        if (held < kLanes) std::fill_n(block, dims * kLanes, 0.0);
        for (int64_t d = 0; d < dims; ++d) {
          for (int64_t j = 0; j < held; ++j) {
            const double gap = points_.at(first + j)[d] - middle_[d];
            block[d * kLanes + j] = gap;
            lanes[j] += gap * gap;
          }
        }
      }
      for (const double sum : lanes) squares[part] += sum;
    });
    double variance = 0;
    for (const double sum : squares) variance += sum;
    return variance / static_cast<double>(points_.count * dims);
  }

  // Every point to its nearest centre; true where a label changed.
  bool assign() {
    const int64_t dims = points_.dims;
    for (int64_t c = 0; c < k_; ++c) {
      length_[c] = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const double place = centre(c)[d] - middle_[d];
        scaled_[c * dims + d] = -2 * place;
        length_[c] += place * place;
      }
    }
    std::vector<char> changed(groups_);
    for_parts(groups_, threads_, [&](int64_t group) {
      for (int64_t part = group; part < parts_; part += groups_) {
        for (int64_t first = part * kPart; first < last(part); first += kLanes) {
          if (assign_block(first, sums_.data() + group * stride_)) changed[group] = 1;
        }
      }
    });
    return std::find(changed.begin(), changed.end(), 1) != changed.end();
  }

  bool assign_block(int64_t first, double* sums) {
    int64_t label[kLanes];
    nearest_(blocks_.get() + first * points_.dims, scaled_.data(), length_.data(), points_.dims, k_,
             label);
    int32_t* own = found_.labels.data() + first;
    int64_t changed = 0;
    for (int64_t j = 0; j < kLanes; ++j) changed |= own[j] ^ label[j];
    if (!changed) return false;
    for (int64_t j = 0; j < kLanes; ++j) {
      if (own[j] == label[j]) continue;
      if (first + j < points_.count) {
        const double* point = points_.at(first + j);
        if (own[j] >= 0) add(sums, own[j], point, -1);
        add(sums, label[j], point, 1);
      }
      own[j] = static_cast<int32_t>(label[j]);
    }
    return true;
  }

  void add(double* sums, int64_t c, const double* point, double sign) const {
    double* row = sums + c * (points_.dims + 1);
    for (int64_t d = 0; d < points_.dims; ++d) row[d] += sign * point[d];
    row[points_.dims] += sign;
  }

  // Centres to the means of their points; the sum of squares of how far they moved.
  double update() {
    const int64_t dims = points_.dims;
    std::vector<double> sums(sums_.begin(), sums_.begin() + stride_);
    for (int64_t group = 1; group < groups_; ++group) {
      for (int64_t j = 0; j < stride_; ++j) sums[j] += sums_[group * stride_ + j];
    }
    relocate(sums);
    double shift = 0;
    for (int64_t c = 0; c < k_; ++c) {
      const double* row = sums.data() + c * (dims + 1);
      for (int64_t d = 0; d < dims; ++d) {
        double& place = found_.centres[c * dims + d];
        const double mean = row[dims] > 0 ? row[d] / row[dims] : place;
        shift += (mean - place) * (mean - place);
        place = mean;
      }
    }
    return shift;
  }

  // A centre without points takes the point that is farthest from its own, as scikit-learn has it.
  void relocate(std::vector<double>& sums) {
    const int64_t dims = points_.dims;
    std::vector<int64_t> empty;
    for (int64_t c = 0; c < k_; ++c) {
      if (sums[c * (dims + 1) + dims] == 0) empty.push_back(c);
    }
    if (empty.empty()) return;
    std::vector<double> far(points_.count);
    std::vector<int64_t> order(points_.count);
    for (int64_t i = 0; i < points_.count; ++i) {
      far[i] = squared(points_.at(i), centre(found_.labels[i]), dims);
      order[i] = i;
    }
    std::partial_sort(
        order.begin(), order.begin() + static_cast<int64_t>(empty.size()), order.end(),
        [&](int64_t a, int64_t b) { return far[a] != far[b] ? far[a] > far[b] : a < b; });
    for (size_t j = 0; j < empty.size(); ++j) {
      const int64_t i = order[j];
      if (far[i] == 0) return;  // fewer distinct points than centres
      double* from = sums.data() + found_.labels[i] * (dims + 1);
      double* to = sums.data() + empty[j] * (dims + 1);
      for (int64_t d = 0; d < dims; ++d) {
        from[d] -= points_.at(i)[d];
        to[d] = points_.at(i)[d];
      }
      from[dims] -= 1;
      to[dims] = 1;
    }
  }

  double inertia() const {
    std::vector<double> sums(parts_);
    for_parts(parts_, threads_, [&](int64_t part) {
      for (int64_t i = part * kPart; i < last(part); ++i) {
        sums[part] += squared(points_.at(i), centre(found_.labels[i]), points_.dims);
      }
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  }

  const Nearest nearest_ = nearest();
  Points points_;
  int64_t k_;
  int threads_;
  int64_t parts_;
  std::vector<double> middle_;           // [dims] the points' mean: near it, rounding is least
  std::unique_ptr<double[]> blocks_;     // points less it, [parts * kPart / kLanes, dims, kLanes]
  std::vector<double> scaled_, length_;  // see `nearest`
  double limit_ = 0;                     // sum of the centres' squared moves at which it ends
  // Sums and numbers of the points of every centre. Each group has every so manieth part and
  // changes its sums where labels change; they are added in the order of the groups, so that the
  // number of threads changes nothing.
  int64_t groups_, stride_;
  std::vector<double> sums_;
  Clusters found_;
};

}  // namespace

Clusters lloyd(const Points& points, const double* centres, int64_t k, int64_t iterations,
               double tolerance, int threads) {
  return Lloyd(points, centres, k, tolerance, threads).run(iterations);
}

void lower_to(const Points& points, const double* centre, double* nearest, int threads) {
  for_parts((points.count + kPart - 1) / kPart, threads, [&](int64_t part) {
    for (int64_t i = part * kPart; i < std::min(points.count, (part + 1) * kPart); ++i) {
      nearest[i] = std::min(nearest[i], squared(points.at(i), centre, points.dims));
    }
  });
}

}  // namespace classical
