// Panoptic quality of one image on the CPU: one pass over the two maps counts the pixels of every
// pair of segments, and the rules are then applied to that small table.
#include "panoptic_quality.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/common.h"
#include "panoptic_quality_simd.h"

namespace pyseg::panoptic {
namespace {

constexpr int64_t kAhead = 1024;  // pixels from what is counted to what is fetched meanwhile
constexpr int64_t kPiece = int64_t(1) << 15;   // pixels that are worth handing to a thread
constexpr int64_t kDirect = int64_t(1) << 16;  // ids below are looked up in an array
constexpr int64_t kMaxCells = int64_t(1) << 26;
constexpr int64_t kMaxArea = int64_t(1) << 42;  // what `fraction` can take of two

// Position of an id in a list, from 1 on, times a stride; void is 0, and anything else is last.
class Positions {
 public:
  Positions(const std::vector<int32_t>& ids, int64_t stride, bool direct)
      : other_((int64_t(ids.size()) + 1) * stride) {
    if (direct) {
      limit_ = ids.empty() ? 1 : uint32_t(ids.back()) + 1;  // they rise
      direct_.assign(limit_ + 1, other_);
      direct_[0] = 0;
      for (size_t i = 0; i < ids.size(); ++i) direct_[ids[i]] = (int64_t(i) + 1) * stride;
      return;
    }
    while ((size_t(1) << bits_) < 8 * ids.size()) ++bits_;
    slots_.assign(size_t(1) << bits_, {-1, other_});  // no listed id is negative
    const Hashed hash = hashed();
    slots_[hash.start(0)] = {0, 0};
    for (size_t i = 0; i < ids.size(); ++i) {
      size_t place = hash.start(ids[i]);
      while (slots_[place].id != -1) place = hash.next(place);
      slots_[place] = {ids[i], (int64_t(i) + 1) * stride};
    }
  }

  // No branch: what segment comes next is not predictable.
  struct Direct {
    const int64_t* positions;
    uint32_t limit;
    PYSEG_INLINE int64_t operator()(int32_t id) const {
      return positions[std::min(uint32_t(id), limit)];
    }
  };
  Direct direct() const { return {direct_.data(), limit_}; }

  struct Slot {
    int32_t id;
    int64_t position;
  };
  struct Hashed {
    const Slot* slots;
    int bits;
    PYSEG_INLINE size_t start(int32_t id) const {
      return (uint32_t(id) * 2654435769u) >> (32 - bits);
    }
    PYSEG_INLINE size_t next(size_t place) const { return (place + 1) & ((size_t(1) << bits) - 1); }
    PYSEG_INLINE int64_t operator()(int32_t id) const {
      size_t place = start(id);
      while (slots[place].id != id && slots[place].id != -1) place = next(place);
      return slots[place].position;
    }
  };
  Hashed hashed() const { return {slots_.data(), bits_}; }

 private:
  int bits_ = 3;
  uint32_t limit_ = 0;
  int64_t other_;
  std::vector<int64_t> direct_;
  std::vector<Slot> slots_;
};

struct Loops {
  int64_t (*mark_changes)(const Maps&, int64_t, uint64_t*);
  void (*list_bits)(const uint64_t*, int64_t, const int32_t*, const int32_t*, int32_t*);
};

struct Tables {
  int64_t last_row, last_column;  // cells before them: what is not listed
  int64_t* pairs;
  int64_t* boundary_pairs;
};

// Maps are mostly flat: only where a run of equal pixels ends is something looked up and counted.
template <bool Boundary, class Lookup>
void count_pairs(const Maps& maps, int64_t n, const Lookup rows, const Lookup columns,
                 const Loops& loops, const Tables& tables) {
  const int32_t *const t = maps.target, *const p = maps.prediction;
  const uint8_t *const tb = maps.target_boundary, *const pb = maps.prediction_boundary;
  int64_t *const pairs = tables.pairs, *const boundary_pairs = tables.boundary_pairs;
  const int64_t other_row = tables.last_row, other_column = tables.last_column;
  const auto count = [=](int64_t at, int64_t pixels) __attribute__((always_inline)) {
    const int64_t row = rows(t[at]), column = columns(p[at]);
    pairs[row + column] += pixels;
    if (Boundary) {
      const int64_t boundary_row = row == 0 || tb[at] ? row : other_row;
      const int64_t boundary_column = column == 0 || pb[at] ? column : other_column;
      boundary_pairs[boundary_row + boundary_column] += pixels;
    }
  };
  int64_t start = 0;
  uint64_t words[kBlock / 64];
  int32_t places[kBlock + 8];
  for (int64_t begin = 1; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    const int64_t found = loops.mark_changes(
        {t + begin, p + begin, Boundary ? tb + begin : nullptr, Boundary ? pb + begin : nullptr},
        end - begin, words);
    if (2 * found > kBlock) {
      count(start, begin - start);
      start = begin;
      for (; start + 16 < end; start += 16) {
        __builtin_prefetch(t + start + kAhead);
        __builtin_prefetch(p + start + kAhead);
        for (int k = 0; k < 16; ++k) count(start + k, 1);
      }
      for (; start + 1 < end; ++start) count(start, 1);
      continue;
    }
    loops.list_bits(words, (end - begin + 63) / 64, t + begin + kAhead, p + begin + kAhead, places);
    for (int64_t k = 0; k < found; ++k) {
      const int64_t place = begin + places[k];
      count(start, place - start);
      start = place;
    }
  }
  count(start, n - start);
}

template <bool Boundary>
void count_range(Maps maps, int64_t begin, int64_t end, const Positions& rows,
                 const Positions& columns, bool direct, const Loops& loops, const Tables& tables) {
  maps.target += begin, maps.prediction += begin;
  if (Boundary) maps.target_boundary += begin, maps.prediction_boundary += begin;
  if (direct)
    count_pairs<Boundary>(maps, end - begin, rows.direct(), columns.direct(), loops, tables);
  else
    count_pairs<Boundary>(maps, end - begin, rows.hashed(), columns.hashed(), loops, tables);
}

struct Segment {
  int64_t id, label, area, crowd;
};

std::vector<Segment> read_segments(const Tensor& tensor, int64_t num_classes) {
  const Tensor table = torch::stable::contiguous(tensor);
  const int64_t* values = table.const_data_ptr<int64_t>();
  const int64_t columns = table.size(1);
  std::vector<Segment> segments(table.size(0));
  int64_t previous = 0;
  for (Segment& segment : segments) {
    segment = {values[0], values[1], columns > 2 ? values[2] : 0, columns > 2 ? values[3] : 0};
    values += columns;
    PYSEG_CHECK(segment.id > previous && segment.id < int64_t(1) << 31,
                "ids of segments must rise, from 1 to 2^31 - 1, got ", segment.id);
    PYSEG_CHECK(segment.label >= 0 && segment.label < num_classes, "segment ", segment.id,
                " has class ", segment.label, "; there are ", num_classes, " classes, from 0 on");
    PYSEG_CHECK(segment.area >= 0 && segment.area < kMaxArea, "segment ", segment.id,
                " has an area of ", segment.area);
    previous = segment.id;
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
  check_maps(prediction, target, prediction_segments, target_segments, num_classes,
             prediction_boundary, target_boundary);
  Tensor counts =
      torch::stable::new_zeros(target, {num_classes, int64_t(kCounts)}, ScalarType::Long);
  Tensor problems = torch::stable::new_zeros(target, {int64_t(kProblems)}, ScalarType::Long);
  const std::vector<Segment> targets = read_segments(target_segments, num_classes);
  const std::vector<Segment> predictions = read_segments(prediction_segments, num_classes);
  const int64_t height = int64_t(targets.size()) + 2, width = int64_t(predictions.size()) + 2;
  const bool direct = (targets.empty() || targets.back().id < kDirect) &&
                      (predictions.empty() || predictions.back().id < kDirect);  // ids rise
  const Positions rows(ids(targets), width, direct), columns(ids(predictions), 1, direct);
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
  const Loops loops{
      boundary ? PYSEG_AT_LEVEL(mark_changes<true>) : PYSEG_AT_LEVEL(mark_changes<false>),
      PYSEG_AT_LEVEL(list_bits)};
  struct Counts {
    std::vector<int64_t> pairs, boundary_pairs;
  };
  std::vector<Counts> workers(torch::stable::get_num_threads());
  const int64_t pixels = t.numel(), piece = std::max<int64_t>(kPiece, 4 * height * width);
  const int64_t pieces = (pixels + piece - 1) / piece;
  for_each(pieces, 4 * std::min(piece, pixels), [&](int64_t item, int64_t worker) {
    Counts& own = workers[worker];
    own.pairs.resize(pairs.size()), own.boundary_pairs.resize(boundary_pairs.size());
    const Tables tables{(height - 1) * width, width - 1, own.pairs.data(),
                        own.boundary_pairs.data()};
    const auto count = boundary ? count_range<true> : count_range<false>;
    count(maps, item * piece, std::min(pixels, (item + 1) * piece), rows, columns, direct, loops,
          tables);
  });
  for (const Counts& own : workers) {  // sums of integers: who counted what makes no difference
    for (size_t i = 0; i < own.pairs.size(); ++i) pairs[i] += own.pairs[i];
    for (size_t i = 0; i < own.boundary_pairs.size(); ++i)
      boundary_pairs[i] += own.boundary_pairs[i];
  }
  apply_rules(targets, predictions, pairs, boundary_pairs, counts.mutable_data_ptr<int64_t>(),
              problems.mutable_data_ptr<int64_t>());
  return {counts, problems};
}

}  // namespace
}  // namespace pyseg::panoptic

// (counts [C, 4]: true positives, false positives, false negatives, sum of IoUs in 2^-40;
//  problems [6], see enum Problem)
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "panoptic_quality(Tensor prediction, Tensor target, Tensor prediction_segments, "
      "Tensor target_segments, int num_classes, Tensor? prediction_boundary, "
      "Tensor? target_boundary) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("panoptic_quality", TORCH_BOX(&pyseg::panoptic::panoptic_quality_cpu));
}
