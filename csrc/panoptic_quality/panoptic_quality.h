// The rules of panoptic quality (Kirillov et al. 2019, as panopticapi applies them) for one pair of
// segments, shared by the CPU and the CUDA kernel. Everything is an integer: comparisons are exact,
// and sums do not depend on their order.
//
// A table counts the pixels of every pair (target, prediction). Rows are 0 = void, then the listed
// target segments, then T + 1 = anything else; columns are the same of the prediction.
#pragma once

#include <cstdint>

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
