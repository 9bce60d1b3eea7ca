// Contour pixels of one map that lie near the same class's contour in another, on CUDA. The first
// kernel writes the contours of both maps, the second looks around every contour pixel. All sums
// are of integers; nothing synchronises.
#include "boundary_match.h"

#include <algorithm>

#include "../common/launch.h"

namespace {

using namespace pyseg;
using Sum = unsigned long long;

constexpr int kThreads = 256;
constexpr int kSharedBytes = 48 << 10;  // what a kernel may have without asking
constexpr uint16_t kNone = 0xffff;      // no contour

struct Size {
  int64_t height, width, pixels;  // of an image
};

template <class T>
struct Codes {
  const T* prediction;
  const T* target;
  LabelCoder<T> coder;

  // Of place i: (prediction, target), the prediction void where the target is.
  __device__ uint2 at(int64_t i) const {
    const uint32_t truth = coder(target[i]);
    return make_uint2(truth == coder.num_classes ? truth : coder(prediction[i]), truth);
  }
};

// Grid: x walks over the pixels of all images.
template <class T>
__global__ void find_contours_kernel(Codes<T> codes, Size size, int64_t total,
                                     uint16_t* contours,  // [2, N, H, W]: prediction, target
                                     Sum* invalid) {      // [N, 2]
  const uint32_t classes = codes.coder.num_classes;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t place = i % size.pixels, y = place / size.width, x = place % size.width;
    const uint2 own = codes.at(i);
    bool predicted = false, truth = false;
    const auto look = [&](int64_t neighbour) {
      const uint2 other = codes.at(neighbour);
      predicted |= other.x != own.x, truth |= other.y != own.y;
    };
    if (y > 0) look(i - size.width);
    if (y + 1 < size.height) look(i + size.width);
    if (x > 0) look(i - 1);
    if (x + 1 < size.width) look(i + 1);
    contours[i] = predicted && own.x < classes ? uint16_t(own.x) : kNone;
    contours[total + i] = truth && own.y < classes ? uint16_t(own.y) : kNone;
    if (own.y > classes)
      atomicAdd(invalid + i / size.pixels * 2 + 1, Sum(1));
    else if (own.x > classes)
      atomicAdd(invalid + i / size.pixels * 2, Sum(1));
  }
}

// Grid: x walks over the pixels of an image, y is the image. Shared: counts, where they fit.
__global__ void match_kernel(const uint16_t* contours, Size size, int64_t total,
                             int64_t first_image, int64_t squared_radius, int classes, bool shared,
                             Sum* counts) {  // [N, C, 4]
  PYSEG_DYNAMIC_SHARED(uint32_t, block_counts);
  const int cells = classes * kMatchCounts;
  if (shared) {
    for (int i = threadIdx.x; i < cells; i += kThreads) block_counts[i] = 0;
    __syncthreads();
  }
  const int64_t image = first_image + blockIdx.y;
  Sum* image_counts = counts + image * cells;
  const int64_t radius = half_width(squared_radius, 0, size.height - 1);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size.pixels; i += step) {
    const int64_t y = i / size.width, x = i % size.width;
    for (int side = 0; side < 2; ++side) {
      const uint16_t code = contours[side * total + image * size.pixels + i];
      if (code == kNone) continue;
      const uint16_t* other = contours + (1 - side) * total + image * size.pixels;
      bool found = false;
      for (int64_t k = 0; k <= 2 * radius && !found; ++k) {  // rows 0, 1, -1, 2, -2, ...
        const int64_t dy = k % 2 ? (k + 1) / 2 : -k / 2;
        if (y + dy < 0 || y + dy >= size.height) continue;
        const int64_t reach = half_width(squared_radius, dy, size.width - 1);
        const int64_t left = x - reach > 0 ? x - reach : 0;
        const int64_t right = x + reach < size.width ? x + reach : size.width - 1;
        for (int64_t column = left; column <= right && !found; ++column)
          found = other[(y + dy) * size.width + column] == code;
      }
      const int cell = int(code) * kMatchCounts + 2 * side;
      if (shared) {
        atomicAdd(block_counts + cell, 1u);
        if (found) atomicAdd(block_counts + cell + 1, 1u);
      } else {
        atomicAdd(image_counts + cell, Sum(1));
        if (found) atomicAdd(image_counts + cell + 1, Sum(1));
      }
    }
  }
  if (shared) {
    __syncthreads();
    for (int i = threadIdx.x; i < cells; i += kThreads)
      if (block_counts[i]) atomicAdd(image_counts + i, Sum(block_counts[i]));
  }
}

template <class T>
void launch(const Tensor& prediction, const Tensor& target, int64_t classes, int64_t squared_radius,
            int64_t ignore, Tensor& contours, Tensor& counts, Tensor& invalid,
            cudaStream_t stream) {
  const int64_t images = target.size(0), total = target.numel();
  const Size size{target.size(1), target.size(2), target.size(1) * target.size(2)};
  const Codes<T> codes{static_cast<const T*>(prediction.const_data_ptr()),
                       static_cast<const T*>(target.const_data_ptr()),
                       LabelCoder<T>(classes, ignore)};
  uint16_t* maps = static_cast<uint16_t*>(contours.mutable_data_ptr());
  Sum* sums = static_cast<Sum*>(counts.mutable_data_ptr());
  const unsigned blocks = unsigned(std::min<int64_t>(65535, (total + kThreads - 1) / kThreads));
  PYSEG_LAUNCH((find_contours_kernel<T>), blocks, kThreads, 0, stream, codes, size, total, maps,
               static_cast<Sum*>(invalid.mutable_data_ptr()));
  const int64_t bytes = classes * kMatchCounts * int64_t(sizeof(uint32_t));
  const bool shared = bytes <= kSharedBytes;
  const int64_t per_image = std::min<int64_t>((size.pixels + kThreads - 1) / kThreads,
                                              std::max<int64_t>(1, 1056 / images));
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(per_image), unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH(match_kernel, grid, kThreads, shared ? size_t(bytes) : 0, stream, maps, size,
                 total, first, squared_radius, int(classes), shared, sums);
  }
}

std::tuple<Tensor, Tensor> boundary_match_cuda(const Tensor& prediction_labels,
                                               const Tensor& target_labels, int64_t num_classes,
                                               int64_t squared_radius, int64_t ignore_index) {
  const DeviceScope device(target_labels, prediction_labels);
  check_labels(prediction_labels, target_labels, num_classes, squared_radius);
  const int64_t images = target_labels.size(0);
  Tensor counts = torch::stable::new_zeros(
      target_labels, {images, num_classes, int64_t(kMatchCounts)}, ScalarType::Long);
  Tensor invalid = torch::stable::new_zeros(target_labels, {images, 2}, ScalarType::Long);
  if (target_labels.numel() == 0) return {counts, invalid};
  const Tensor p = torch::stable::contiguous(prediction_labels);
  const Tensor t = torch::stable::contiguous(target_labels);
  Tensor contours = torch::stable::new_empty(t, {2, t.numel()}, ScalarType::Short);
  const auto run = [&](auto zero) {
    launch<decltype(zero)>(p, t, num_classes, squared_radius, ignore_index, contours, counts,
                           invalid, device.stream);
  };
  switch (t.scalar_type()) {
    case ScalarType::Byte: run(uint8_t(0)); break;
    case ScalarType::Char: run(int8_t(0)); break;
    case ScalarType::Short: run(int16_t(0)); break;
    case ScalarType::Int: run(int32_t(0)); break;
    case ScalarType::Long: run(int64_t(0)); break;
    default:
      throw std::invalid_argument(
          "prediction and target must be uint8, int8, int16, int32 or int64");
  }
  return {counts, invalid};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("boundary_match", TORCH_BOX(&boundary_match_cuda)); }
