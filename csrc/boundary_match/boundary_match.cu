// Contour pixels of one map that lie near the same class's contour in another, on CUDA. The first
// kernel writes the contours of both maps, the second looks around every contour pixel. All sums
// are of integers; nothing synchronises.
#include "boundary_match.h"

#include <algorithm>

#include "../common/zeros.cuh"

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
  const T* __restrict__ prediction;
  const T* __restrict__ target;
  LabelCoder<T> coder;

  // Of place i: (prediction, target), the prediction void where the target is.
  __device__ uint2 at(int64_t i) const {
    const uint32_t truth = coder(target[i]);
    return make_uint2(truth == coder.num_classes ? truth : coder(prediction[i]), truth);
  }
};

// Grid: x walks over the pixels of all images.
template <class T>
__global__ void __launch_bounds__(kThreads)
    find_contours_kernel(Codes<T> codes, Size size, int64_t total,
                         uint16_t* __restrict__ contours,  // [2, N, H, W]: prediction, target
                         Sum* __restrict__ invalid) {      // [N, 2]
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

// As half_width, from the square root, which may be one off.
__device__ int half_width_by_root(int64_t squared_radius, int64_t dy, int most) {
  const int64_t rest = squared_radius - dy * dy;
  if (rest < 0) return -1;
  int64_t width = int64_t(sqrt(double(rest)));
  while (width * width > rest) --width;
  while ((width + 1) * (width + 1) <= rest) ++width;
  return int(width < most ? width : most);
}

// Grid: x walks over the pixels of an image, y is the image. Shared: how far to look to either side
// in a row, by its distance; then counts, where they fit.
__global__ void __launch_bounds__(kThreads)
    match_kernel(const uint16_t* __restrict__ contours, Size size, int64_t total,
                 int64_t first_image, int64_t squared_radius, int radius, int classes, bool shared,
                 Sum* __restrict__ counts) {  // [N, C, 4]
  PYSEG_DYNAMIC_SHARED(int, reaches);         // [radius + 1]
  uint32_t* const block_counts = reinterpret_cast<uint32_t*>(reaches + radius + 1);
  const int cells = classes * kMatchCounts;
  const int width = int(size.width), height = int(size.height);
  for (int dy = threadIdx.x; dy <= radius; dy += kThreads)
    reaches[dy] = half_width_by_root(squared_radius, dy, width - 1);
  if (shared)
    for (int i = threadIdx.x; i < cells; i += kThreads) block_counts[i] = 0;
  __syncthreads();
  const int64_t image = first_image + blockIdx.y;
  Sum* image_counts = counts + image * cells;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size.pixels; i += step) {
    uint16_t codes[2];
#pragma unroll
    for (int side = 0; side < 2; ++side)
      codes[side] = contours[side * total + image * size.pixels + i];
    if (codes[0] == kNone && codes[1] == kNone) continue;
    const int y = int(i / size.width), x = int(i % size.width);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint16_t code = codes[side];
      if (code == kNone) continue;
      const uint16_t* const other = contours + (1 - side) * total + image * size.pixels;
      bool found = false;
      for (int k = 0; k <= 2 * radius && !found; ++k) {  // rows 0, 1, -1, 2, -2, ...
        const int dy = k % 2 ? (k + 1) / 2 : -k / 2;
        if (y + dy < 0 || y + dy >= height) continue;
        const int reach = reaches[dy < 0 ? -dy : dy];
        const int left = max(x - reach, 0), right = min(x + reach, width - 1);
        const uint16_t* const row = other + int64_t(y + dy) * width;
        for (int column = left; column <= right && !found; ++column) found = row[column] == code;
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
  const int radius = int(half_width(squared_radius, 0, size.height - 1));
  const int64_t reach_bytes = (int64_t(radius) + 1) * int64_t(sizeof(int));
  const int64_t count_bytes = classes * kMatchCounts * int64_t(sizeof(uint32_t));
  const bool shared = reach_bytes + count_bytes <= kSharedBytes;
  const size_t shared_bytes = size_t(reach_bytes + (shared ? count_bytes : 0));
  const int64_t resident = resident_blocks(match_kernel, kThreads, shared_bytes) / images;
  const int64_t per_image =
      std::min<int64_t>((size.pixels + kThreads - 1) / kThreads, std::max<int64_t>(1, resident));
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(per_image), unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH(match_kernel, grid, kThreads, shared_bytes, stream, maps, size, total, first,
                 squared_radius, radius, int(classes), shared, sums);
  }
}

std::tuple<Tensor, Tensor> boundary_match_cuda(const Tensor& prediction_labels,
                                               const Tensor& target_labels, int64_t num_classes,
                                               int64_t squared_radius, int64_t ignore_index) {
  const DeviceScope device(target_labels, prediction_labels);
  check_labels(prediction_labels, target_labels, num_classes, squared_radius);
  const int64_t images = target_labels.size(0);
  auto [counts, invalid] = zeros(
      target_labels, {{images, num_classes, int64_t(kMatchCounts)}, {images, 2}}, device.stream);
  if (target_labels.numel() == 0) return {counts, invalid};
  const Tensor p = torch::stable::contiguous(prediction_labels);
  const Tensor t = torch::stable::contiguous(target_labels);
  Tensor contours = torch::stable::new_empty(t, {2, t.numel()}, ScalarType::Short);
  const auto run = [&, &counts = counts, &invalid = invalid](auto zero) {
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
