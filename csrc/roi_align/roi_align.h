// Where the bins of regions of interest lie on a feature map, shared by the CPU and CUDA kernels.
//
// RoIPool: Girshick, "Fast R-CNN" (2015). RoIAlign: He et al., "Mask R-CNN" (2017). Levels of a
// pyramid: Lin et al., "Feature Pyramid Networks" (2017), equation 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/common.h"
#include "../common/host_device.h"

namespace pyseg {

// How the values of a bin become one. RoIAlign has samples in a bin, RoIPool whole pixels.
enum RoiMode { kAverageOfSamples = 0, kMaximumOfSamples = 1, kMaximumOfPixels = 2 };

// Larger coordinates, in pixels of the feature map, are cut to this: integers then do not overflow.
constexpr int64_t kFarthest = int64_t(1) << 30;

constexpr int64_t kMaxRoiLevels = 8;
// Along each side of a bin. Of a bin of ten pixels these are a hundredth of a pixel apart; more
// only take time, which grows with them, and on CUDA with their square.
constexpr int64_t kMaxSamplingRatio = 1024;

// Checks what the memory accesses rely on; Python has checked it in more words. Positions are
// `Real`: float, or double for levels of double.
template <class Real>
void check_regions(const std::vector<Tensor>& levels, const Tensor& boxes,
                   const std::vector<double>& scales, const std::vector<int64_t>& output_size,
                   int64_t sampling_ratio, int64_t mode, double canonical_size,
                   int64_t canonical_level) {
  for (const Tensor& level : levels) {
    PYSEG_CHECK(level.dim() == 4 && level.size(1) > 0 && level.size(2) > 0 && level.size(3) > 0,
                "levels must be [N, C, H, W] with channels and pixels, got ", shape(level));
    PYSEG_CHECK(level.size(0) == levels[0].size(0) && level.size(1) == levels[0].size(1) &&
                    level.scalar_type() == levels[0].scalar_type(),
                "levels must have the same images, channels and dtype, got ", shape(levels[0]),
                " and ", shape(level));
    narrow("the height of a level", level.size(2)), narrow("the width of a level", level.size(3));
    narrow("the number of images", level.size(0)), narrow("the number of channels", level.size(1));
  }
  PYSEG_CHECK(scales.size() == levels.size(), "scales must be one per level, got ", scales.size());
  for (const double scale : scales)
    PYSEG_CHECK(Real(scale) > Real(0) && std::isfinite(Real(scale)),
                "scales must be positive and finite, got ", scale);
  PYSEG_CHECK(output_size.size() == 2 && output_size[0] >= 1 && output_size[1] >= 1,
              "output_size must be two integers of at least 1");
  PYSEG_CHECK(output_size[0] < (int64_t(1) << 31) / output_size[1],
              "output_size must be fewer than 2^31 bins, got ", output_size[0], " x ",
              output_size[1]);
  PYSEG_CHECK(sampling_ratio <= kMaxSamplingRatio, "sampling_ratio must be at most ",
              kMaxSamplingRatio, ", got ", sampling_ratio);
  PYSEG_CHECK(mode >= kAverageOfSamples && mode <= kMaximumOfPixels, "mode must be 0, 1 or 2, got ",
              mode);
  PYSEG_CHECK(canonical_size > 0, "canonical_size must be positive, got ", canonical_size);
  narrow("canonical_level", canonical_level);
  PYSEG_CHECK(
      boxes.dim() == 2 && boxes.size(1) == 5 &&
          boxes.scalar_type() == (sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float),
      "boxes must be [K, 5] ", sizeof(Real) == 8 ? "float64" : "float32", ", got ", shape(boxes));
}

// What can be checked before it is known what `Real` is.
inline void check_levels(const std::vector<Tensor>& levels) {
  PYSEG_CHECK(!levels.empty() && int64_t(levels.size()) <= kMaxRoiLevels, "levels must be 1 to ",
              kMaxRoiLevels, " feature maps, got ", levels.size());
  PYSEG_CHECK(levels[0].dim() == 4, "levels must be [N, C, H, W], got ", shape(levels[0]));
}

inline void check_region_gradient(const Tensor& gradient, const std::vector<Tensor>& levels,
                                  const Tensor& boxes, const std::vector<int64_t>& output_size) {
  PYSEG_CHECK(gradient.dim() == 4 && gradient.size(0) == boxes.size(0) &&
                  gradient.size(1) == levels[0].size(1) && gradient.size(2) == output_size[0] &&
                  gradient.size(3) == output_size[1] &&
                  gradient.scalar_type() == levels[0].scalar_type(),
              "grad ", shape(gradient), " is not that of the output");
}

// The bins of RoIAlign along one axis.
template <class T>
struct Bins {
  T start, extent;  // of one bin, in pixels; positions count from the centre of pixel 0
  int64_t samples;  // in one bin; may be 0
};

template <class T>
PYSEG_HOST_DEVICE T cut(T x) {
  // NaN, as of infinity times a scale that is tiny, becomes a number too.
  return !(x >= T(-kFarthest)) ? T(-kFarthest) : x > T(kFarthest) ? T(kFarthest) : x;
}

template <class T>
PYSEG_HOST_DEVICE Bins<T> sampled_bins(T low, T high, T scale, bool aligned, int64_t sampling_ratio,
                                       int64_t bins) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = cut(low * scale) - offset, end = cut(high * scale) - offset;
  const T size = aligned || end - start > T(1) ? end - start : T(1);
  const T extent = size / T(bins);
  const int64_t samples = sampling_ratio > 0 ? sampling_ratio : int64_t(std::ceil(extent));
  return {start, extent, samples < 0 ? 0 : samples};
}

template <class T>
PYSEG_HOST_DEVICE T sample_position(const Bins<T>& bins, int64_t bin, int64_t sample) {
  return bins.start + T(bin) * bins.extent + (T(sample) + T(0.5)) * bins.extent / T(bins.samples);
}

// The samples of a bin that may lie between two positions: all others certainly do not. A huge
// region has few of its many samples on the map.
template <class T>
PYSEG_HOST_DEVICE void sample_range(const Bins<T>& bins, int64_t bin, double from, double to,
                                    int64_t* begin, int64_t* end) {
  *begin = 0, *end = bins.samples;
  if (bins.samples <= 4 || bins.extent == T(0)) return;
  const double step = double(bins.extent) / double(bins.samples);
  const double first = double(bins.start) + double(bin) * double(bins.extent);
  // Positions are rounded, and the more the farther out they are.
  const double margin = 1 + 1e-6 * (std::fabs(first) + std::fabs(double(bins.extent)));
  const double one = (from - margin - first) / step, other = (to + margin - first) / step;
  const double low = (one < other ? one : other) - 1, high = (one < other ? other : one) + 1;
  const double count = double(bins.samples);
  *begin = int64_t(low < 0 ? 0 : low > count ? count : low);
  *end = int64_t(high < 0 ? 0 : high > count ? count : std::ceil(high));
}

// The pixel before a position and the distance from it. False where the sample does not count: more
// than a pixel outside the map. On the border pixel, and outside, its value is the border's.
template <class T>
PYSEG_HOST_DEVICE bool locate(T position, int64_t size, int* low, T* t) {
  if (!(position >= T(-1) && position <= T(size))) return false;
  const T inside = position > T(0) ? position : T(0);
  const int floor = int(inside);
  *low = floor < int(size) - 1 ? floor : int(size) - 1;
  *t = floor < int(size) - 1 ? inside - T(floor) : T(0);
  return true;
}

// The pixels [begin, end) of a bin of RoIPool, whose region is rounded to whole pixels.
template <class T>
PYSEG_HOST_DEVICE void pixel_range(T low, T high, T scale, int64_t bins, int64_t bin, int64_t size,
                                   int* begin, int* end) {
  const T first = std::round(cut(low * scale)), last = std::round(cut(high * scale));
  const T extent = (last - first + 1 > T(1) ? last - first + 1 : T(1)) / T(bins);
  const int64_t b = int64_t(first) + int64_t(std::floor(T(bin) * extent));
  const int64_t e = int64_t(first) + int64_t(std::ceil(T(bin + 1) * extent));
  *begin = int(b < 0 ? 0 : b > size ? size : b);
  *end = int(e < 0 ? 0 : e > size ? size : e);
}

// Which of the levels of a pyramid, from fine to coarse, a box belongs to: of those that are not
// coarser than its size asks for the coarsest, and the first for a box without a size (its area is
// negative or NaN). `exponents`: a level's map is 2^exponent times smaller than the image.
template <class T>
PYSEG_HOST_DEVICE int box_level(const T* box, int levels, const int* exponents, T canonical_size,
                                int canonical_level) {
  const T area = (box[2] - box[0]) * (box[3] - box[1]);
  const T wanted =
      std::floor(T(canonical_level) + std::log2(std::sqrt(area) / canonical_size) + T(1e-6));
  int level = 0;
  while (level + 1 < levels && wanted >= T(exponents[level + 1])) ++level;
  return level;
}

}  // namespace pyseg
