// The rules of panoptic quality (Kirillov et al. 2019, as panopticapi applies them) for one pair of
// segments, shared by the CPU and the CUDA kernel. Everything is an integer: comparisons are exact,
// and sums do not depend on their order.
//
// A table counts the pixels of every pair (target, prediction). Rows are 0 = void, then the listed
// target segments, then T + 1 = anything else; columns are the same of the prediction.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/common.h"
#include "../common/host_device.h"

namespace pyseg {

constexpr int kFractionBits = 40;  // of a sum of IoUs: 1e-12, room for 8 million segments a class

enum Crowd : int64_t {
  kNoCrowd = 0,
  kCrowd = 1,          // a prediction that lies in it and has its class is no false positive
  kForgottenCrowd = 2  // a crowd that excuses nothing: panopticapi keeps the last one per class
};

enum Count { kTruePositives, kFalsePositives, kFalseNegatives, kIouSum, kCounts };

enum Problem {
  kUnlistedPrediction,  // pixels whose id is not listed
  kUnlistedTarget,
  kMissingPrediction,  // listed segments without pixels
  kMissingTarget,
  kOtherArea,       // target segments whose area is not the listed one
  kImpossibleArea,  // pairs whose IoU the listed area would make larger than 1
  kProblems
};

// Checks what the memory accesses rely on; Python has checked it in more words.
inline void check_maps(const Tensor& prediction, const Tensor& target,
                       const Tensor& prediction_segments, const Tensor& target_segments,
                       int64_t num_classes, const std::optional<Tensor>& prediction_boundary,
                       const std::optional<Tensor>& target_boundary) {
  PYSEG_CHECK(prediction.dim() == 2 && shape(prediction) == shape(target) &&
                  prediction.scalar_type() == ScalarType::Int &&
                  target.scalar_type() == ScalarType::Int,
              "prediction and target must both be [H, W] int32, got ", shape(prediction), " and ",
              shape(target));
  PYSEG_CHECK(prediction_segments.dim() == 2 && prediction_segments.size(1) == 2 &&
                  prediction_segments.scalar_type() == ScalarType::Long,
              "prediction_segments must be [P, 2] int64, got ", shape(prediction_segments));
  PYSEG_CHECK(target_segments.dim() == 2 && target_segments.size(1) == 4 &&
                  target_segments.scalar_type() == ScalarType::Long,
              "target_segments must be [T, 4] int64, got ", shape(target_segments));
  PYSEG_CHECK(num_classes >= 0, "num_classes must not be negative, got ", num_classes);
  PYSEG_CHECK(prediction_boundary.has_value() == target_boundary.has_value(),
              "give both prediction_boundary and target_boundary, or neither");
  for (const auto* boundary : {&prediction_boundary, &target_boundary})
    PYSEG_CHECK(!*boundary || (shape(**boundary) == shape(target) &&
                               (*boundary)->scalar_type() == ScalarType::Bool),
                "boundaries must be bool and of the size ", shape(target));
}

// round(2^40 part / whole) for part <= whole < 2^43
PYSEG_HOST_DEVICE int64_t fraction(int64_t part, int64_t whole) {
  constexpr int kHalf = kFractionBits / 2;
  const int64_t high = (part << kHalf) / whole, rest = (part << kHalf) % whole;
  return (high << kHalf) + ((rest << kHalf) + whole / 2) / whole;
}

// The areas of a pair: of its intersection, of both segments, of the prediction's part in void.
struct Overlap {
  int64_t both, target, prediction, in_void;

  PYSEG_HOST_DEVICE int64_t all() const { return target + prediction - both - in_void; }
  PYSEG_HOST_DEVICE bool is_match() const { return 2 * both > all(); }
  PYSEG_HOST_DEVICE int64_t iou() const { return both == 0 ? 0 : fraction(both, all()); }
};

// Most of a false positive may not be void or crowd.
PYSEG_HOST_DEVICE bool is_excused(int64_t excused, int64_t area) { return 2 * excused > area; }

}  // namespace pyseg
