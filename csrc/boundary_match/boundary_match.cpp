// Contour pixels of one map that lie near the same class's contour in another, on the CPU. Contours
// are thin, so looking around each of their pixels costs much less than a distance transform per
// class: most have a match within a pixel or two, and a row of the disc is one comparison of
// vectors.
#include "boundary_match.h"

#include <array>
#include <cstring>

#include "../confusion_matrix/count_cells.h"

namespace {

// A map of codes with a frame of `other` around it, so that nothing looks outside.
template <class Code>
struct Framed {
  int64_t height, width, frame, stride;
  std::vector<Code> codes;

  Framed(int64_t height, int64_t width, int64_t frame, Code other)
      : height(height),
        width(width),
        frame(frame),
        stride(width + 2 * frame + 64),  // a vector may be read beyond the frame
        codes((height + 2 * frame) * stride, other) {}

  Code* row(int64_t y) { return codes.data() + (y + frame) * stride + frame; }
  const Code* row(int64_t y) const { return codes.data() + (y + frame) * stride + frame; }
};

template <class P, class T, class Code>
PYSEG_MULTIVERSION bool encode_row(const P* __restrict prediction, const T* __restrict target,
                                   int64_t width, LabelCoder<P> columns, LabelCoder<T> rows,
                                   Code* __restrict predicted, Code* __restrict truth) {
  const Code void_code = Code(rows.num_classes), bad = Code(rows.num_classes + 1);
  int wrong = 0;
  for (int64_t x = 0; x < width; ++x) {
    const Code t = rows.template code<Code>(target[x]);
    const Code p = t == void_code ? void_code : columns.template code<Code>(prediction[x]);
    truth[x] = t, predicted[x] = p;
    wrong |= (t == bad) | (p == bad);
  }
  return wrong != 0;
}

// Keeps the codes of contour pixels; above and below are the row itself at the image's edges.
template <class Code>
PYSEG_MULTIVERSION void keep_contour(const Code* __restrict above, const Code* __restrict row,
                                     const Code* __restrict below, int64_t width, Code classes,
                                     Code other, Code* __restrict contour) {
  for (int64_t x = 0; x < width; ++x) {
    const Code code = row[x];
    const Code left = row[x > 0 ? x - 1 : 0], right = row[x + 1 < width ? x + 1 : x];
    const bool differs = code != above[x] || code != below[x] || code != left || code != right;
    contour[x] = differs && code < classes ? code : other;
  }
}

constexpr int kBytes = 16;

// As far as it can matter in an image of this size.
struct Disc {
  int64_t radius;                    // in rows
  int64_t frame;                     // what has to be around an image
  std::vector<int64_t> half_widths;  // [radius + 1], by the distance of the row
  // 1 bits in the lanes that belong to the row of the disc, from its left end on.
  std::vector<std::vector<std::array<uint8_t, kBytes>>> masks;

  Disc(int64_t squared_radius, int64_t height, int64_t width, int64_t code_bytes) {
    radius = half_width(squared_radius, 0, height - 1);
    for (int64_t dy = 0; dy <= radius; ++dy) {
      half_widths.push_back(half_width(squared_radius, dy, width - 1));
      const int64_t bytes = (2 * half_widths.back() + 1) * code_bytes;
      masks.emplace_back((bytes + kBytes - 1) / kBytes);
      for (int64_t i = 0; i < int64_t(masks.back().size()) * kBytes; ++i)
        masks.back()[i / kBytes][i % kBytes] = i < bytes ? 0xff : 0;
    }
    frame = std::max(radius, half_widths[0]);
  }
};

// The rows of a map that hold a class's contour; none at first.
struct Rows {
  int64_t first = int64_t(1) << 60, last = -first;  // none: far from any, and no difference overflows

  void add(const Rows& other) {
    first = std::min(first, other.first), last = std::max(last, other.last);
  }
};

// Discs of more rows than this are worth knowing the rows of each class before.
constexpr int64_t kFewRows = 16;

// Calls visit(x, code) for the contour's pixels of a row.
template <class Code, class Visit>
PYSEG_INLINE void each_contour_pixel(const Code* row, int64_t width, Code other, Visit visit) {
  constexpr int64_t kGroup = 8 / sizeof(Code);
  uint64_t empty;
  std::memset(&empty, 0xff, sizeof empty);  // `other` in all places
  for (int64_t x = 0; x < width; x += kGroup) {
    uint64_t group;  // may reach into the frame, which holds no contour
    std::memcpy(&group, row + x, sizeof group);
    if (group == empty) continue;
    for (int64_t k = x; k < x + kGroup; ++k)
      if (row[k] != other) visit(k, row[k]);
  }
}

template <class Code>
PYSEG_INLINE bool row_has(const Code* row, Code code,
                          const std::vector<std::array<uint8_t, kBytes>>& masks) {
  typedef Code Vector __attribute__((vector_size(kBytes), aligned(alignof(Code)), may_alias));
  typedef uint64_t Pair __attribute__((vector_size(kBytes)));
  Pair found = {};
  for (const auto& mask : masks) {
    Pair inside;
    std::memcpy(&inside, mask.data(), kBytes);
    found |= Pair(*reinterpret_cast<const Vector*>(row) == code) & inside;
    row += kBytes / sizeof(Code);
  }
  return (found[0] | found[1]) != 0;
}

// Rows from the nearest on, so that most searches end early.
template <class Code>
PYSEG_INLINE bool is_near(const Framed<Code>& contour, int64_t y, int64_t x, Code code,
                          const Disc& disc, const Rows& rows) {
  if (contour.row(y)[x] == code) return true;
  const int64_t nearest = std::max<int64_t>({0, rows.first - y, y - rows.last});
  const int64_t farthest = std::min(disc.radius, std::max(y - rows.first, rows.last - y));
  for (int64_t dy = nearest; dy <= farthest; ++dy) {
    const int64_t left = x - disc.half_widths[dy];
    if ((y - dy >= rows.first && row_has(contour.row(y - dy) + left, code, disc.masks[dy])) ||
        (y + dy <= rows.last && row_has(contour.row(y + dy) + left, code, disc.masks[dy])))
      return true;
  }
  return false;
}

// counts: [C, 4], of which `first` and the one after it are added to. rows: [C] of `to`.
template <class Code>
PYSEG_MULTIVERSION void match_row(const Framed<Code>& from, const Framed<Code>& to, int64_t y,
                                  Code other, const Disc& disc, const Rows* rows, int first,
                                  int64_t* counts) {
  each_contour_pixel(from.row(y), from.width, other, [&](int64_t x, Code code) __attribute__((always_inline)) {
    ++counts[int64_t(code) * kMatchCounts + first];
    counts[int64_t(code) * kMatchCounts + first + 1] += is_near(to, y, x, code, disc, rows[code]);
  });
}

// One image. Returns whether a label is out of range.
template <class P, class T, class Code>
bool match_image(const P* prediction, const T* target, int64_t height, int64_t width,
                 const LabelCoder<P>& columns, const LabelCoder<T>& rows, const Disc& disc,
                 int64_t* counts) {
  const Code other = Code(~Code(0));
  const int64_t classes = rows.num_classes, grain = (int64_t(1) << 16) / width + 1;
  Framed<Code> predicted(height, width, 0, other), truth(height, width, 0, other);
  std::mutex mutex;
  bool wrong = false;
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    bool wrong_here = false;
    for (int64_t y = begin; y < end; ++y)
      wrong_here |= encode_row(prediction + y * width, target + y * width, width, columns, rows,
                               predicted.row(y), truth.row(y));
    const std::lock_guard<std::mutex> lock(mutex);
    wrong |= wrong_here;
  });
  if (wrong) return true;
  Framed<Code> predicted_contour(height, width, disc.frame, other);
  Framed<Code> true_contour(height, width, disc.frame, other);
  std::vector<Rows> predicted_rows(classes, Rows{0, height - 1}), true_rows(predicted_rows);
  const bool asks_rows = disc.radius > kFewRows;
  if (asks_rows) predicted_rows.assign(classes, Rows()), true_rows.assign(classes, Rows());
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    std::vector<Rows> local[2] = {std::vector<Rows>(asks_rows ? classes : 0),
                                  std::vector<Rows>(asks_rows ? classes : 0)};
    const auto note = [&](const Framed<Code>& contour, int64_t y, std::vector<Rows>& rows) {
      each_contour_pixel(contour.row(y), width, other,
                         [&](int64_t, Code code) { rows[code].add({y, y}); });
    };
    for (int64_t y = begin; y < end; ++y) {
      const int64_t above = std::max<int64_t>(y - 1, 0), below = std::min(y + 1, height - 1);
      keep_contour(predicted.row(above), predicted.row(y), predicted.row(below), width,
                   Code(classes), other, predicted_contour.row(y));
      keep_contour(truth.row(above), truth.row(y), truth.row(below), width, Code(classes), other,
                   true_contour.row(y));
      if (asks_rows) note(predicted_contour, y, local[0]), note(true_contour, y, local[1]);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < local[0].size(); ++i)
      predicted_rows[i].add(local[0][i]), true_rows[i].add(local[1][i]);
  });
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(classes * kMatchCounts);
    for (int64_t y = begin; y < end; ++y) {
      match_row(predicted_contour, true_contour, y, other, disc, true_rows.data(), kPredicted,
                local.data());
      match_row(true_contour, predicted_contour, y, other, disc, predicted_rows.data(), kTarget,
                local.data());
    }
    const std::lock_guard<std::mutex> lock(mutex);  // sums of integers: any order, same bits
    for (size_t i = 0; i < local.size(); ++i) counts[i] += local[i];
  });
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
    const bool wrong =
        few ? match_image<L, L, uint8_t>(ip, it, height, width, coder, coder, disc, to)
               : match_image<L, L, uint16_t>(ip, it, height, width, coder, coder, disc, to);
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

// (counts [N, C, 4]: contour pixels of the prediction, of them near the target's, and the other way
//  round; invalid [N, 2]: predictions and targets out of range)
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "boundary_match(Tensor prediction, Tensor target, int num_classes, int squared_radius, "
      "int ignore_index) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("boundary_match", TORCH_BOX(&boundary_match_cpu));
}
