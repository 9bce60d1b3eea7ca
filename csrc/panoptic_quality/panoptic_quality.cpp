// Panoptic quality of one image on the CPU: one pass over the two maps counts the pixels of every
// pair of segments, and the rules are then applied to that small table.
#include "panoptic_quality.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

#include "../common/common.h"

namespace {

using namespace pyseg;

constexpr int64_t kBlock = 1024;  // pixels that are compared at a time: these stay in the L1 cache
constexpr int64_t kDirect = int64_t(1) << 14;  // ids below are looked up in an array
constexpr int64_t kMaxCells = int64_t(1) << 26;

// Position of an id in a list, from 1 on; void is 0, and anything else is last.
class Positions {
 public:
  explicit Positions(const std::vector<int32_t>& ids) : other_(uint32_t(ids.size()) + 1) {
    const int64_t last = ids.empty() ? 0 : ids.back();  // they rise
    direct_.assign(std::min(last + 1, kDirect), other_);
    while ((size_t(1) << bits_) < 4 * ids.size()) ++bits_;
    slots_.assign(size_t(1) << bits_, {-1, other_});  // no listed id is negative
    direct_[0] = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < kDirect) {
        direct_[ids[i]] = uint32_t(i) + 1;
        continue;
      }
      size_t place = start(ids[i]);
      while (slots_[place].id != -1) place = next(place);
      slots_[place] = {ids[i], uint32_t(i) + 1};
    }
  }

  PYSEG_INLINE uint32_t operator()(int32_t id) const {
    if (uint32_t(id) < direct_.size()) return direct_[id];
    size_t place = start(id);
    while (slots_[place].id != id && slots_[place].id != -1) place = next(place);
    return slots_[place].position;
  }

 private:
  struct Slot {
    int32_t id;
    uint32_t position;
  };
  PYSEG_INLINE size_t start(int32_t id) const {
    return (uint32_t(id) * 2654435769u) >> (32 - bits_);
  }
  PYSEG_INLINE size_t next(size_t place) const { return (place + 1) & (slots_.size() - 1); }

  int bits_ = 2;
  uint32_t other_;
  std::vector<uint32_t> direct_;
  std::vector<Slot> slots_;
};

struct Maps {
  const int32_t* target;
  const int32_t* prediction;
  const uint8_t* target_boundary;  // both or neither
  const uint8_t* prediction_boundary;
};

struct Tables {
  int64_t width, others;  // columns; rows - 1
  int64_t* pairs;
  int64_t* boundary_pairs;
};

// changed[i]: whether pixel i is not like the one before it, which is there for i = 0 too.
template <bool Boundary>
PYSEG_MULTIVERSION void find_changes(Maps maps, int64_t n, uint8_t* __restrict changed) {
  const int32_t *t = maps.target, *p = maps.prediction;
  for (int64_t i = 0; i < n; ++i) changed[i] = (t[i] ^ t[i - 1]) | (p[i] ^ p[i - 1]) ? 1 : 0;
  if (!Boundary) return;
  const uint8_t *tb = maps.target_boundary, *pb = maps.prediction_boundary;
  for (int64_t i = 0; i < n; ++i) changed[i] |= uint8_t((tb[i] ^ tb[i - 1]) | (pb[i] ^ pb[i - 1]));
}

// Maps are mostly flat: only where a run of equal pixels ends is something looked up and counted.
template <bool Boundary>
void count_pairs(Maps maps, int64_t n, const Positions& rows, const Positions& columns,
                 Tables tables) {
  const int32_t *t = maps.target, *p = maps.prediction;
  const uint8_t *tb = maps.target_boundary, *pb = maps.prediction_boundary;
  const uint32_t other_row = uint32_t(tables.others), other_column = uint32_t(tables.width) - 1;
  int64_t start = 0;
  uint32_t row = rows(t[0]), column = columns(p[0]);
  const auto count_run = [&](int64_t end) {
    tables.pairs[row * tables.width + column] += end - start;
    if (Boundary) {
      const uint32_t boundary_row = row == 0 || tb[start] ? row : other_row;
      const uint32_t boundary_column = column == 0 || pb[start] ? column : other_column;
      tables.boundary_pairs[boundary_row * tables.width + boundary_column] += end - start;
    }
  };
  alignas(64) uint8_t changed[kBlock + 8];
  for (int64_t begin = 1; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    find_changes<Boundary>(
        {t + begin, p + begin, Boundary ? tb + begin : nullptr, Boundary ? pb + begin : nullptr},
        size, changed);
    std::memset(changed + size, 0, 8);
    for (int64_t i = 0; i < size; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, changed + i, 8);
      // The pixels that are compared next: otherwise counting and reading memory take turns.
      __builtin_prefetch(t + begin + kBlock + i);
      __builtin_prefetch(p + begin + kBlock + i);
      for (; eight; eight &= eight - 1) {
        const int64_t place = begin + i + __builtin_ctzll(eight) / 8;
        count_run(place);
        row = rows(t[place]), column = columns(p[place]);
        start = place;
      }
    }
  }
  count_run(n);
}

struct Segment {
  int64_t id, label, area, crowd;
};

std::vector<Segment> read_segments(const Tensor& tensor) {
  const Tensor table = torch::stable::contiguous(tensor);
  const int64_t* values = table.const_data_ptr<int64_t>();
  const int64_t columns = table.size(1);
  std::vector<Segment> segments(table.size(0));
  for (Segment& segment : segments) {
    segment = {values[0], values[1], columns > 2 ? values[2] : 0, columns > 2 ? values[3] : 0};
    values += columns;
  }
  return segments;
}

std::vector<int32_t> ids(const std::vector<Segment>& segments) {
  std::vector<int32_t> result;
  for (const Segment& segment : segments) result.push_back(int32_t(segment.id));
  return result;
}

// Sums of the columns 1 .. P of a table.
std::vector<int64_t> column_sums(const std::vector<int64_t>& table, int64_t width) {
  std::vector<int64_t> sums(width);
  for (size_t i = 0; i < table.size(); ++i) sums[i % width] += table[i];
  return sums;
}

std::vector<int64_t> row_sums(const std::vector<int64_t>& table, int64_t width) {
  std::vector<int64_t> sums(table.size() / width);
  for (size_t i = 0; i < table.size(); ++i) sums[i / width] += table[i];
  return sums;
}

void apply_rules(const std::vector<Segment>& targets, const std::vector<Segment>& predictions,
                 const std::vector<int64_t>& pairs, const std::vector<int64_t>& boundary_pairs,
                 int64_t* counts, int64_t* problems) {
  const int64_t T = int64_t(targets.size()), P = int64_t(predictions.size()), width = P + 2;
  const std::vector<int64_t> rows = row_sums(pairs, width), columns = column_sums(pairs, width);
  const std::vector<int64_t> boundary_rows = row_sums(boundary_pairs, width);
  const std::vector<int64_t> boundary_columns = column_sums(boundary_pairs, width);
  std::vector<bool> found(T), used(P);
  for (int64_t t = 0; t < T; ++t) {
    if (targets[t].crowd != kNoCrowd) continue;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t cell = (t + 1) * width + p + 1;
      if (pairs[cell] == 0 || targets[t].label != predictions[p].label) continue;
      const Overlap whole{pairs[cell], targets[t].area, columns[p + 1], pairs[p + 1]};
      if (whole.all() < whole.both) {
        ++problems[kImpossibleArea];
        continue;
      }
      bool match = whole.is_match();
      int64_t iou = whole.iou();
      if (!boundary_pairs.empty()) {
        const Overlap edge{boundary_pairs[cell], boundary_rows[t + 1], boundary_columns[p + 1],
                           boundary_pairs[p + 1]};
        match &= edge.is_match();
        iou = std::min(iou, edge.iou());
      }
      if (!match) continue;
      found[t] = used[p] = true;
      ++counts[targets[t].label * kCounts + kTruePositives];
      counts[targets[t].label * kCounts + kIouSum] += iou;
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    if (targets[t].crowd == kNoCrowd && !found[t])
      ++counts[targets[t].label * kCounts + kFalseNegatives];
    problems[kMissingTarget] += rows[t + 1] == 0;
    problems[kOtherArea] += rows[t + 1] != targets[t].area;
  }
  for (int64_t p = 0; p < P; ++p) {
    int64_t excused = pairs[p + 1];
    for (int64_t t = 0; t < T; ++t)
      if (targets[t].crowd == kCrowd && targets[t].label == predictions[p].label)
        excused += pairs[(t + 1) * width + p + 1];
    if (!used[p] && !is_excused(excused, columns[p + 1]))
      ++counts[predictions[p].label * kCounts + kFalsePositives];
    problems[kMissingPrediction] += columns[p + 1] == 0;
  }
  problems[kUnlistedTarget] = rows[T + 1];
  problems[kUnlistedPrediction] = columns[P + 1];
}

std::tuple<Tensor, Tensor> panoptic_quality_cpu(
    const Tensor& prediction,           // [H, W] int32 segment ids, 0 = void
    const Tensor& target,               // [H, W] int32
    const Tensor& prediction_segments,  // [P, 2] int64 id, class; ids rise
    const Tensor& target_segments,      // [T, 4] int64 id, class, area, Crowd; ids rise
    int64_t num_classes,
    const std::optional<Tensor>& prediction_boundary,  // [H, W] bool: then boundary PQ
    const std::optional<Tensor>& target_boundary) {
  Tensor counts =
      torch::stable::new_zeros(target, {num_classes, int64_t(kCounts)}, ScalarType::Long);
  Tensor problems = torch::stable::new_zeros(target, {int64_t(kProblems)}, ScalarType::Long);
  const std::vector<Segment> targets = read_segments(target_segments);
  const std::vector<Segment> predictions = read_segments(prediction_segments);
  const Positions rows(ids(targets)), columns(ids(predictions));
  const int64_t height = int64_t(targets.size()) + 2, width = int64_t(predictions.size()) + 2;
  PYSEG_CHECK(height * width <= kMaxCells, "an image may have at most ", kMaxCells,
              " pairs of segments, got ", targets.size(), " x ", predictions.size());
  const Tensor p = torch::stable::contiguous(prediction), t = torch::stable::contiguous(target);
  const bool boundary = prediction_boundary.has_value();
  Tensor pb, tb;
  if (boundary) {
    pb = torch::stable::contiguous(*prediction_boundary);
    tb = torch::stable::contiguous(*target_boundary);
  }
  const Maps maps{static_cast<const int32_t*>(t.const_data_ptr()),
                  static_cast<const int32_t*>(p.const_data_ptr()),
                  boundary ? static_cast<const uint8_t*>(tb.const_data_ptr()) : nullptr,
                  boundary ? static_cast<const uint8_t*>(pb.const_data_ptr()) : nullptr};
  std::vector<int64_t> pairs(height * width), boundary_pairs(boundary ? height * width : 0);
  const int64_t grain = std::max<int64_t>(int64_t(1) << 16, 4 * height * width);
  std::mutex mutex;
  torch::stable::parallel_for(0, t.numel(), grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(pairs.size()), boundary_local(boundary_pairs.size());
    const Tables tables{width, height - 1, local.data(), boundary_local.data()};
    Maps part{maps.target + begin, maps.prediction + begin, nullptr, nullptr};
    if (boundary) {
      part.target_boundary = maps.target_boundary + begin;
      part.prediction_boundary = maps.prediction_boundary + begin;
      count_pairs<true>(part, end - begin, rows, columns, tables);
    } else {
      count_pairs<false>(part, end - begin, rows, columns, tables);
    }
    const std::lock_guard<std::mutex> lock(mutex);  // sums of integers: any order, same bits
    for (size_t i = 0; i < pairs.size(); ++i) pairs[i] += local[i];
    for (size_t i = 0; i < boundary_pairs.size(); ++i) boundary_pairs[i] += boundary_local[i];
  });
  apply_rules(targets, predictions, pairs, boundary_pairs, counts.mutable_data_ptr<int64_t>(),
              problems.mutable_data_ptr<int64_t>());
  return {counts, problems};
}

}  // namespace

// (counts [C, 4]: true positives, false positives, false negatives, sum of IoUs in 2^-40;
//  problems [6], see enum Problem)
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "panoptic_quality(Tensor prediction, Tensor target, Tensor prediction_segments, "
      "Tensor target_segments, int num_classes, Tensor? prediction_boundary, "
      "Tensor? target_boundary) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("panoptic_quality", TORCH_BOX(&panoptic_quality_cpu));
}
