// The largest set of pairs of boundary pixels, one of each map, that are near one another (Hopcroft
// and Karp, 1973). Near pairs are tried first.
#include "core.h"

namespace classical {
namespace {

class Matching {
 public:
  Matching(const bool* ours, const bool* theirs, int64_t height, int64_t width, double radius)
      : height_(height), width_(width), number_(height * width, -1) {
    for (int64_t p = 0; p < height * width; ++p) {
      if (ours[p]) ours_.push_back(static_cast<int32_t>(p));
      if (theirs[p]) {
        number_[p] = static_cast<int32_t>(theirs_.size());
        theirs_.push_back(static_cast<int32_t>(p));
      }
    }
    const auto reach = static_cast<int64_t>(radius);
    for (int64_t y = -reach; y <= reach; ++y) {
      for (int64_t x = -reach; x <= reach; ++x) {
        if (static_cast<double>(x * x + y * y) <= radius * radius) offsets_.emplace_back(y, x);
      }
    }
    std::stable_sort(offsets_.begin(), offsets_.end(), [](const auto& a, const auto& b) {
      return a.first * a.first + a.second * a.second < b.first * b.first + b.second * b.second;
    });
    mate_.assign(ours_.size(), -1);
    owner_.assign(theirs_.size(), -1);
  }

  void run() {
    for (const auto& [y, x] : offsets_) {
      for (size_t a = 0; a < ours_.size(); ++a) {
        if (mate_[a] >= 0) continue;
        const int32_t b = other(a, y, x);
        if (b >= 0 && owner_[b] < 0) {
          mate_[a] = b;
          owner_[b] = static_cast<int32_t>(a);
        }
      }
    }
    while (layer()) {
      next_.assign(ours_.size(), 0);
      for (size_t a = 0; a < ours_.size(); ++a) {
        if (mate_[a] < 0) extend(static_cast<int32_t>(a));
      }
    }
  }

  void write(bool* ours, bool* theirs) const {
    for (size_t a = 0; a < ours_.size(); ++a) {
      if (mate_[a] < 0) continue;
      ours[ours_[a]] = true;
      theirs[theirs_[mate_[a]]] = true;
    }
  }

 private:
  int32_t other(size_t a, int64_t y, int64_t x) const {
    const int64_t v = ours_[a] / width_ + y, u = ours_[a] % width_ + x;
    return v < 0 || v >= height_ || u < 0 || u >= width_ ? -1 : number_[v * width_ + u];
  }

  // Layers of the shortest alternating paths from pixels without a mate; false where none ends.
  bool layer() {
    depth_.assign(ours_.size(), -1);
    std::vector<int32_t> queue;
    for (size_t a = 0; a < ours_.size(); ++a) {
      if (mate_[a] >= 0) continue;
      depth_[a] = 0;
      queue.push_back(static_cast<int32_t>(a));
    }
    bool ends = false;
    for (size_t i = 0; i < queue.size(); ++i) {
      const int32_t a = queue[i];
      if (ends && depth_[a] >= length_) break;
      for (const auto& [y, x] : offsets_) {
        const int32_t b = other(a, y, x);
        if (b < 0) continue;
        const int32_t c = owner_[b];
        if (c < 0) {
          if (!ends) length_ = depth_[a] + 1;
          ends = true;
        } else if (depth_[c] < 0) {
          depth_[c] = depth_[a] + 1;
          queue.push_back(c);
        }
      }
    }
    return ends;
  }

  // A path along the layers from `start`, without recursion: paths may be long.
  bool extend(int32_t start) {
    std::vector<int32_t> path{start};
    while (!path.empty()) {
      const int32_t a = path.back();
      bool deeper = false;
      while (next_[a] < offsets_.size()) {
        const auto& [y, x] = offsets_[next_[a]];
        const int32_t b = other(a, y, x);
        if (b >= 0) {
          const int32_t c = owner_[b];
          if (c < 0) {
            for (const int32_t step : path) {
              const auto& [v, u] = offsets_[next_[step]];
              const int32_t mate = other(step, v, u);
              mate_[step] = mate;
              owner_[mate] = step;
              next_[step] = offsets_.size();  // in this phase it is on no other path
            }
            return true;
          }
          if (depth_[c] == depth_[a] + 1 && depth_[c] < length_ && next_[c] < offsets_.size()) {
            path.push_back(c);
            deeper = true;
            break;
          }
        }
        ++next_[a];
      }
      if (deeper) continue;
      path.pop_back();
      if (!path.empty()) ++next_[path.back()];
    }
    return false;
  }

  int64_t height_, width_;
  std::vector<int32_t> number_;  // of their pixel at a place
  std::vector<int32_t> ours_, theirs_, mate_, owner_, depth_;
  std::vector<std::pair<int64_t, int64_t>> offsets_;
  std::vector<size_t> next_;
  int32_t length_ = 0;
};

}  // namespace

void match(const bool* ours, const bool* theirs, int64_t height, int64_t width, double radius,
           bool* one, bool* other) {
  Matching matching(ours, theirs, height, width, radius);
  matching.run();
  matching.write(one, other);
}

}  // namespace classical
