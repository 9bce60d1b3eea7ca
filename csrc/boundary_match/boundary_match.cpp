// Contour pixels of one map that lie near the same class's contour in another, on the CPU. Contours
// are thin, so looking around each of their pixels costs much less than a distance transform per
// class: most have a match within a pixel or two, and a row of the disc is one comparison of
// vectors.
#include "boundary_match.h"

#include <array>
#include <atomic>

#include "../confusion_matrix/count_cells.h"
#include "boundary_match_simd.h"

namespace pyseg::contours {
namespace {

// Discs of more rows than this are worth knowing the rows of each class before.
constexpr int64_t kFewRows = 16;

// Rows of an image that are worth handing to a thread at once.
int64_t rows_together(int64_t width) { return (int64_t(1) << 14) / width + 1; }

// Calls work(first row, end, worker) for all rows of an image.
template <class Work>
void for_rows(int64_t height, int64_t width, Work work) {
  const int64_t together = rows_together(width);
  for_each((height + together - 1) / together, 4 * std::min(height, together) * width,
           [&](int64_t item, int64_t worker) {
             work(item * together, std::min(height, (item + 1) * together), worker);
           });
}

// Adds the contour's pixels of a row.
template <class Code>
void note(const Framed<Code>& contour, int64_t y, Code other, std::vector<Rows>& rows) {
  const Code* const row = contour.row(y);
  for (int64_t x = 0; x < contour.width; x += kGroup<Code>) {
    if (!has_contour(row + x)) continue;
    for (int64_t k = x; k < x + kGroup<Code>; ++k)
      if (row[k] != other) rows[row[k]].add({y, y});
  }
}

// One image. Returns whether a label is out of range.
template <class T, class Code>
bool match_image(const T* prediction, const T* target, int64_t height, int64_t width,
                 const LabelCoder<T>& coder, const Disc& disc, int64_t* counts) {
  const auto encode_row = PYSEG_AT_LEVEL(encode_row<T, Code>);
  const auto keep_contour = PYSEG_AT_LEVEL(keep_contour<Code>);
  const auto match_row = PYSEG_AT_LEVEL(match_row<Code>);
  const Code other = Code(~Code(0));
  const int64_t classes = coder.num_classes, workers = torch::stable::get_num_threads();
  Framed<Code> predicted(height, width, 0, other), truth(height, width, 0, other);
  std::atomic<bool> wrong{false};
  for_rows(height, width, [&](int64_t begin, int64_t end, int64_t) {
    bool wrong_here = false;
    for (int64_t y = begin; y < end; ++y)
      wrong_here |= encode_row(prediction + y * width, target + y * width, width, coder,
                               predicted.row(y), truth.row(y));
    if (wrong_here) wrong = true;
  });
  if (wrong) return true;
  Framed<Code> predicted_contour(height, width, disc.frame, other);
  Framed<Code> true_contour(height, width, disc.frame, other);
  const bool asks_rows = disc.radius > kFewRows;
  // Of each class the rows of its contour, in both maps; of each worker what it saw.
  using BothRows = std::array<std::vector<Rows>, 2>;
  const Rows all{0, height - 1}, none;
  BothRows rows{std::vector<Rows>(classes, asks_rows ? none : all),
                std::vector<Rows>(classes, asks_rows ? none : all)};
  std::vector<BothRows> seen(asks_rows ? workers : 0, rows);
  for_rows(height, width, [&](int64_t begin, int64_t end, int64_t worker) {
    for (int64_t y = begin; y < end; ++y) {
      const int64_t above = std::max<int64_t>(y - 1, 0), below = std::min(y + 1, height - 1);
      keep_contour(predicted.row(above), predicted.row(y), predicted.row(below), width,
                   Code(classes), other, predicted_contour.row(y));
      keep_contour(truth.row(above), truth.row(y), truth.row(below), width, Code(classes), other,
                   true_contour.row(y));
      if (!asks_rows) continue;
      note(predicted_contour, y, other, seen[worker][0]);
      note(true_contour, y, other, seen[worker][1]);
    }
  });
  for (const BothRows& own : seen)
    for (int map = 0; map < 2; ++map)
      for (int64_t c = 0; c < classes; ++c) rows[map][c].add(own[map][c]);
  std::vector<std::vector<int64_t>> found(workers);
  for_rows(height, width, [&](int64_t begin, int64_t end, int64_t worker) {
    std::vector<int64_t>& own = found[worker];
    own.resize(classes * kMatchCounts);
    for (int64_t y = begin; y < end; ++y) {
      match_row(predicted_contour, true_contour, y, other, disc, rows[1].data(), kPredicted,
                own.data());
      match_row(true_contour, predicted_contour, y, other, disc, rows[0].data(), kTarget,
                own.data());
    }
  });
  for (const auto& own : found)  // sums of integers: who found what makes no difference
    for (size_t i = 0; i < own.size(); ++i) counts[i] += own[i];
  return false;
}

template <class L>
void boundary_match_typed(const Tensor& prediction, const Tensor& target, int64_t classes,
                          int64_t squared_radius, int64_t ignore, int64_t* counts) {
  const L* p = static_cast<const L*>(prediction.const_data_ptr());
  const L* t = static_cast<const L*>(target.const_data_ptr());
  const int64_t height = target.size(1), width = target.size(2), pixels = height * width;
  const LabelCoder<L> coder(classes, ignore);
  const bool few = classes <= 253;  // codes of void and of errors, and of no contour
  const Disc disc(squared_radius, height, width, few ? 1 : 2);
  for (int64_t image = 0; image < target.size(0); ++image) {
    const L *ip = p + image * pixels, *it = t + image * pixels;
    int64_t* to = counts + image * classes * kMatchCounts;
    const bool wrong = few ? match_image<L, uint8_t>(ip, it, height, width, coder, disc, to)
                           : match_image<L, uint16_t>(ip, it, height, width, coder, disc, to);
    if (!wrong) continue;
    const int64_t n = target.numel();
    for (int64_t i = 0; i < n; ++i)
      if (coder(t[i]) > coder.num_classes)
        report<L>("target", t, t, n, pixels, width, coder, ignore);
    report<L>("prediction", p, t, n, pixels, width, coder, ignore);
  }
}

std::tuple<Tensor, Tensor> boundary_match_cpu(const Tensor& prediction_labels,  // [N, H, W] integer
                                              const Tensor& target_labels,  // [N, H, W], same dtype
                                              int64_t num_classes, int64_t squared_radius,
                                              int64_t ignore_index) {
  check_labels(prediction_labels, target_labels, num_classes, squared_radius);
  const int64_t images = target_labels.size(0);
  Tensor counts = torch::stable::new_zeros(
      target_labels, {images, num_classes, int64_t(kMatchCounts)}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(target_labels, {images, 2}, ScalarType::Long);
  if (target_labels.numel() == 0) return {counts, invalid};
  const Tensor p = torch::stable::contiguous(prediction_labels);
  const Tensor t = torch::stable::contiguous(target_labels);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  switch (t.scalar_type()) {
    case ScalarType::Byte:
      boundary_match_typed<uint8_t>(p, t, num_classes, squared_radius, ignore_index, out);
      break;
    case ScalarType::Char:
      boundary_match_typed<int8_t>(p, t, num_classes, squared_radius, ignore_index, out);
      break;
    case ScalarType::Short:
      boundary_match_typed<int16_t>(p, t, num_classes, squared_radius, ignore_index, out);
      break;
    case ScalarType::Int:
      boundary_match_typed<int32_t>(p, t, num_classes, squared_radius, ignore_index, out);
      break;
    case ScalarType::Long:
      boundary_match_typed<int64_t>(p, t, num_classes, squared_radius, ignore_index, out);
      break;
    default: PYSEG_CHECK(false, "prediction and target must be uint8, int8, int16, int32 or int64");
  }
  return {counts, invalid};
}

}  // namespace
}  // namespace pyseg::contours

// (counts [N, C, 4]: contour pixels of the prediction, of them near the target's, and the other way
//  round; invalid [N, 2]: predictions and targets out of range)
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "boundary_match(Tensor prediction, Tensor target, int num_classes, int squared_radius, "
      "int ignore_index) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("boundary_match", TORCH_BOX(&pyseg::contours::boundary_match_cpu));
}
