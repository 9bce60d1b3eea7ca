// The inner loops of boundary_match on the CPU: what boundary_match.cpp knows of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/inline.h"
#include "../common/simd_level.h"
#include "../confusion_matrix/confusion_matrix.h"
#include "contours.h"

namespace pyseg::contours {

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

constexpr int kBytes = 32;  // of the longest vector

// As far as it can matter in an image of this size.
struct Disc {
  int64_t radius;                    // in rows
  int64_t frame;                     // what has to be around an image
  std::vector<int64_t> half_widths;  // [radius + 1], by the distance of the row
  // 1 bits where the bytes belong to the row of the disc, from its left end on; 0 to a multiple of
  // kBytes.
  std::vector<std::vector<uint8_t>> masks;

  Disc(int64_t squared_radius, int64_t height, int64_t width, int64_t code_bytes) {
    radius = half_width(squared_radius, 0, height - 1);
    for (int64_t dy = 0; dy <= radius; ++dy) {
      half_widths.push_back(half_width(squared_radius, dy, width - 1));
      const int64_t bytes = (2 * half_widths.back() + 1) * code_bytes;
      masks.emplace_back(bytes, uint8_t(0xff)).resize((bytes + kBytes - 1) / kBytes * kBytes);
    }
    frame = std::max(radius, half_widths[0]);
  }
};

// The rows of a map that hold a class's contour; none at first.
struct Rows {
  int64_t first = int64_t(1) << 60, last = -first;  // far from any, and no difference overflows

  void add(const Rows& other) {
    first = std::min(first, other.first), last = std::max(last, other.last);
  }
};

// Pixels that are looked at together: 8 bytes of codes.
template <class Code>
constexpr int64_t kGroup = 8 / sizeof(Code);

// Whether one of a group has another code than `other`, which is all ones. It may reach into the
// frame, which holds no contour.
template <class Code>
PYSEG_INLINE bool has_contour(const Code* codes) {
  uint64_t group;
  std::memcpy(&group, codes, sizeof group);
  return group != ~uint64_t(0);
}

// encode_row: the codes of a row of both maps; returns whether a label is out of range.
// keep_contour: the codes of contour pixels, `other` elsewhere; above and below are the row itself
// at the image's edges. match_row: counts [C, 4], of which `first` and the one after it are added
// to; rows [C] of `to`.
PYSEG_DECLARE_LEVELS(template <class T, class Code>
                     bool encode_row(const T* prediction, const T* target, int64_t width,
                                     const LabelCoder<T>& labels, Code* predicted, Code* truth);
                     template <class Code>
                     void keep_contour(const Code* above, const Code* row, const Code* below,
                                       int64_t width, Code classes, Code other, Code* contour);
                     template <class Code>
                     void match_row(const Framed<Code>& from, const Framed<Code>& to, int64_t y,
                                    Code other, const Disc& disc, const Rows* rows, int first,
                                    int64_t* counts);)

}  // namespace pyseg::contours
