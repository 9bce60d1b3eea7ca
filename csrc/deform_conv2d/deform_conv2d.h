// What deformable convolution is given, shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../common/common.h"
#include "corners.h"

namespace pyseg::deformable {

struct Problem {
  int64_t images, channels, height, width;
  int64_t outputs, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t groups, offset_groups;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  int64_t plane() const { return height * width; }
  int64_t out_plane() const { return out_height * out_width; }
  int64_t tap_count() const { return kernel_height * kernel_width; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t group_channels() const { return channels / groups; }
};

// Checks what the memory accesses rely on; Python has checked it in more words.
inline Problem describe(const Tensor& input, const Tensor& offset, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation) {
  PYSEG_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4,
              "input, offset and weight must have 4 dimensions, got ", shape(input), ", ",
              shape(offset), " and ", shape(weight));
  PYSEG_CHECK(stride.size() == 2, "stride must be two integers");
  PYSEG_CHECK(padding.size() == 2, "padding must be two integers");
  PYSEG_CHECK(dilation.size() == 2, "dilation must be two integers");
  Problem p;
  p.images = input.size(0), p.channels = input.size(1);
  p.height = input.size(2), p.width = input.size(3);
  p.outputs = weight.size(0), p.kernel_height = weight.size(2), p.kernel_width = weight.size(3);
  p.out_height = offset.size(2), p.out_width = offset.size(3);
  p.stride_y = stride[0], p.stride_x = stride[1];
  p.padding_y = padding[0], p.padding_x = padding[1];
  p.dilation_y = dilation[0], p.dilation_x = dilation[1];
  for (int axis = 0; axis < 2; ++axis) {
    PYSEG_CHECK(stride[axis] >= 1 && padding[axis] >= 0 && dilation[axis] >= 1,
                "stride and dilation must be at least 1, padding at least 0");
    // Positions are counted in 32 bits.
    const int64_t reach[] = {stride[axis], padding[axis], dilation[axis], weight.size(2 + axis),
                             offset.size(2 + axis)};
    for (const int64_t size : reach) narrow("stride, padding, dilation or a size", size);
    PYSEG_CHECK(reach[0] * reach[4] + reach[1] + reach[2] * reach[3] < int64_t(1) << 31,
                "stride, padding or dilation is too large: taps lie 2^31 pixels away");
  }
  PYSEG_CHECK(
      p.channels > 0 && p.plane() > 0 && p.outputs > 0 && p.tap_count() > 0 && weight.size(1) > 0,
      "input and weight must not be empty, got ", shape(input), " and ", shape(weight));
  PYSEG_CHECK(p.plane() < std::numeric_limits<int32_t>::max() - 2 * p.width,
              "input must have fewer than 2^31 pixels, got ", shape(input));
  p.groups = p.channels / weight.size(1);
  PYSEG_CHECK(p.groups * weight.size(1) == p.channels && p.outputs % p.groups == 0, "weight ",
              shape(weight), " does not fit input ", shape(input));
  p.offset_groups = offset.size(1) / (2 * p.tap_count());
  PYSEG_CHECK(p.offset_groups > 0 && offset.size(1) % (2 * p.tap_count()) == 0 &&
                  p.channels % p.offset_groups == 0 && offset.size(0) == p.images,
              "offset ", shape(offset), " does not fit input ", shape(input), " and weight ",
              shape(weight));
  if (mask)
    PYSEG_CHECK(mask->dim() == 4 && mask->size(0) == p.images &&
                    mask->size(1) == p.offset_groups * p.tap_count() &&
                    mask->size(2) == p.out_height && mask->size(3) == p.out_width,
                "mask ", shape(*mask), " does not fit offset ", shape(offset));
  if (bias)
    PYSEG_CHECK(bias->dim() == 1 && bias->size(0) == p.outputs, "bias ", shape(*bias),
                " does not fit weight ", shape(weight));
  for (const Tensor* other : {&offset, &weight, bias ? &*bias : &input, mask ? &*mask : &input})
    PYSEG_CHECK(other->scalar_type() == input.scalar_type(),
                "input, offset, weight, bias and mask must have the same dtype");
  return p;
}

inline void check_gradient(const Problem& p, const Tensor& grad, const Tensor& input) {
  PYSEG_CHECK(grad.dim() == 4 && grad.size(0) == p.images && grad.size(1) == p.outputs &&
                  grad.size(2) == p.out_height && grad.size(3) == p.out_width &&
                  grad.scalar_type() == input.scalar_type(),
              "grad ", shape(grad), " is not that of the output");
}

inline Tensor packed(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace pyseg::deformable
