// The arguments of dense_crf and _dense_crf_backward, for CPU and CUDA alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/common.h"
#include "dense_crf.h"

namespace pyseg {

constexpr int64_t kMaxEntries = 512;  // of a pixel

// Beyond this the sum of a large image's messages would overflow; false for NaN too.
template <class Real>
PYSEG_HOST_DEVICE bool usable(Real weight) {
  return weight <= Real(1e15) && weight >= Real(-1e15);
}
constexpr const char* kUnusable =
    "weights and compatibility must be finite and at most 1e15 in magnitude";

enum class Normalization { none = 0, symmetric = 1, before = 2, after = 3 };

struct Settings {
  std::vector<Kernel> kernels;
  int iterations;
  bool classic_scale;  // of kernels that are not normalised: that of Adams et al.
  Normalization normalization;
  bool self_term;  // false: a pixel gets no message from itself
};

// The operator's arguments, checked and contiguous.
struct Arguments {
  Tensor unary, features, weights;
  std::optional<Tensor> compatibility;
  Settings settings;
};

inline Arguments check(const Tensor& unary, const Tensor& features, const Tensor& weights,
                       const std::optional<Tensor>& compatibility,
                       const std::vector<int64_t>& sizes, const std::vector<int64_t>& channels,
                       const std::vector<double>& sigmas, int64_t iterations, int64_t normalization,
                       bool self_term, int64_t passes, double spread, int64_t rings) {
  Settings settings;
  PYSEG_CHECK(unary.dim() == 4 && features.dim() == 4, "unary and features must have 4 dimensions");
  const int64_t classes = unary.size(1), height = unary.size(2), width = unary.size(3);
  PYSEG_CHECK(classes >= 1 && classes <= kMaxClasses, "unary must have 1 to ", kMaxClasses,
              " classes, got ", shape(unary));
  PYSEG_CHECK(height > 0 && width > 0, "unary is empty: ", shape(unary));
  PYSEG_CHECK(
      features.size(0) == unary.size(0) && features.size(2) == height && features.size(3) == width,
      "unary and features differ in size: ", shape(unary), " and ", shape(features));
  PYSEG_CHECK(iterations >= 0, "iterations must not be negative, got ", iterations);
  PYSEG_CHECK(passes >= 1 && passes <= 8 && spread > 0 && spread < 0.5 && rings >= 0 &&
                  rings <= 4 && normalization >= 0 && normalization <= 3,
              "passes, spread, rings or normalization out of range");
  PYSEG_CHECK(weights.dim() == 1 && weights.size(0) == int64_t(sizes.size()), "weights must be [",
              sizes.size(), "], got ", shape(weights));
  int64_t entries = 0;
  size_t at = 0;
  for (const int64_t size : sizes) {
    PYSEG_CHECK(size >= 1 && size <= kMaxFeatures && at + size <= channels.size() &&
                    channels.size() == sigmas.size(),
                "a kernel must have 1 to ", kMaxFeatures, " features, each with its sigma");
    Kernel kernel{};
    kernel.features = int(size);
    for (int64_t i = 0; i < size; ++i, ++at) {
      PYSEG_CHECK(channels[at] >= -2 && channels[at] < features.size(1), "channel ", channels[at],
                  " is not among the ", features.size(1), " features");
      PYSEG_CHECK(sigmas[at] > 0 && std::isfinite(sigmas[at]), "sigma must be positive, got ",
                  sigmas[at]);
      kernel.channels[i] = int(channels[at]);
      kernel.sigmas[i] = kernel.channels[i] < 0 ? std::max(sigmas[at], kLeastSigma) : sigmas[at];
    }
    choose_lattice(kernel, {int(passes), spread, int(rings)}, self_term, height, width);
    settings.kernels.push_back(kernel);
    entries += kernel.entries;
  }
  PYSEG_CHECK(entries <= kMaxEntries, "too many kernels: ", sizes.size());
  PYSEG_CHECK(height * width < (int64_t(1) << 31) / std::max<int64_t>(entries, 1), "an image of ",
              height, " x ", width, " pixels with ", entries,
              " lattice entries each exceeds 2^31 entries: split the image");
  settings.iterations = narrow("iterations", iterations);
  if (iterations == 0) settings.kernels.clear();  // nothing would use their lattices
  settings.normalization = Normalization(normalization);
  settings.self_term = self_term;
  settings.classic_scale = rings == 0 && passes == 1;
  if (compatibility)
    PYSEG_CHECK(compatibility->dim() == 2 && compatibility->size(0) == classes &&
                    compatibility->size(1) == classes,
                "compatibility must be [", classes, ", ", classes, "], got ",
                shape(*compatibility));
  const auto type = unary.scalar_type();
  PYSEG_CHECK(type == ScalarType::Float || type == ScalarType::Double,
              "unary must be float32 or float64");
  PYSEG_CHECK(type == features.scalar_type() && type == weights.scalar_type() &&
                  (!compatibility || type == compatibility->scalar_type()),
              "unary, features, weights and compatibility must have one dtype");
  const auto contiguous = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  return {contiguous(unary), contiguous(features), contiguous(weights),
          compatibility ? std::optional(contiguous(*compatibility)) : std::nullopt, settings};
}

template <class Real>
const Real* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<Real>() : nullptr;
}

}  // namespace pyseg
