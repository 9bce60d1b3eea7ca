// Deformable convolution on CUDA.
//
// Forward it is an implicit matrix product: a block of threads gathers the columns of 64 output
// pixels, some channels of one tap at a time, into shared memory and multiplies them with the
// weights of 128 outputs there; no matrix of columns exists in global memory. Lanes hold
// neighbouring channels of an input whose pixels have their channels together.
//
// Backward the gradients of the columns, and the columns again, are matrices in global memory,
// between products of torch's; of as many images at a time as a bound on that memory allows. The
// gradient of the input is a sum per input pixel over what was sampled from it, in the order of
// output pixels, found by sorting: nothing is added atomically, and nothing synchronises.
#include "deform_conv2d.h"

#include <algorithm>

#include "../common/launch.h"
#include "../common/primitives.cuh"

namespace {

using namespace pyseg;
using namespace pyseg::deformable;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;
constexpr int kPixels = 64;    // output pixels of a block
constexpr int kOutputs = 128;  // output channels of a block
constexpr int kStride = kPixels + 4;
// The most elements of a matrix of columns.
#ifdef PYSEG_EMULATED
constexpr int64_t kColumns = 1 << 12;  // so that tests take several portions
#else
constexpr int64_t kColumns = int64_t(1) << 28;
#endif

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks_for(int64_t threads) { return unsigned(ceil_div(threads, kThreads)); }

// [batch, rows, columns] -> [batch, columns + extra, rows], zeros in the extra rows. The matrices
// of the result are in another order: batch = (n, group) of `groups` becomes (group, n).
template <class T>
__global__ void transpose_kernel(const T* __restrict__ in, int rows, int64_t columns, int extra,
                                 int64_t batches, int groups, T* __restrict__ out) {
  __shared__ T tile[32][33];
  const int64_t out_rows = columns + extra, tiles = (out_rows + 31) / 32;
  const int64_t batch = blockIdx.x / tiles, first = blockIdx.x % tiles * 32;
  const int64_t out_batch = batch % groups * (batches / groups) + batch / groups;
  const int top = int(blockIdx.y) * 32, x = int(threadIdx.x) % 32;
  for (int y = int(threadIdx.x) / 32; y < 32; y += kThreads / 32) {
    const bool inside = top + y < rows && first + x < columns;
    tile[y][x] = inside ? in[(batch * rows + top + y) * columns + first + x] : T(0);
  }
  __syncthreads();
  for (int y = int(threadIdx.x) / 32; y < 32; y += kThreads / 32)
    if (first + y < out_rows && top + x < rows)
      out[(out_batch * out_rows + first + y) * rows + top + x] = tile[x][y];
}

template <class T>
void transpose(const T* in, int64_t batches, int64_t rows, int64_t columns, int extra,
               int64_t groups, T* out, cudaStream_t stream) {
  const dim3 grid(unsigned(batches * ceil_div(columns + extra, 32)), unsigned(ceil_div(rows, 32)));
  PYSEG_LAUNCH((transpose_kernel<T>), grid, kThreads, 0, stream, in, int(rows), columns, extra,
               batches, int(groups), out);
}

// [outputs, channels, taps] -> [groups, outputs, taps, channels], or with the outputs last.
template <class T>
__global__ void pack_kernel(const T* __restrict__ weight, int outputs, int channels, int taps,
                            int64_t total, bool outputs_last, T* __restrict__ packed) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  int64_t rest = at;
  int o, c, t;
  if (outputs_last) o = int(rest % outputs), rest /= outputs;
  c = int(rest % channels), rest /= channels;
  t = int(rest % taps), rest /= taps;
  if (!outputs_last) o = int(rest % outputs), rest /= outputs;
  packed[at] = weight[((rest * outputs + o) * channels + c) * taps + t];
}

// What the kernels know of a problem.
struct Shape {
  int channels, height, width, out_width, taps, kernel_width;
  int groups, offset_groups, group_channels, group_outputs, offset_channels;
  int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t plane, out_plane, pixels;  // pixels: of the output, in all images

  explicit Shape(const Problem& p, int64_t images)
      : channels(int(p.channels)),
        height(int(p.height)),
        width(int(p.width)),
        out_width(int(p.out_width)),
        taps(int(p.tap_count())),
        kernel_width(int(p.kernel_width)),
        groups(int(p.groups)),
        offset_groups(int(p.offset_groups)),
        group_channels(int(p.group_channels())),
        group_outputs(int(p.group_outputs())),
        offset_channels(int(p.channels / p.offset_groups)),
        stride_y(int(p.stride_y)),
        stride_x(int(p.stride_x)),
        padding_y(int(p.padding_y)),
        padding_x(int(p.padding_x)),
        dilation_y(int(p.dilation_y)),
        dilation_x(int(p.dilation_x)),
        plane(p.plane()),
        out_plane(p.out_plane()),
        pixels(images * p.out_plane()) {}
};

template <class Real>
struct Sample {
  Corners<Real> corners;
  Real scale;
  __device__ Real weight(int corner) const {
    const Real y = corner < 2 ? 1 - corners.ty : corners.ty;
    const Real x = corner % 2 == 0 ? 1 - corners.tx : corners.tx;
    return scale * y * x;
  }
};

// Where tap t of an offset group reads for output pixel `pixel`, counted over the images.
template <class T, class Real>
__device__ Sample<Real> locate(const T* offset, const T* mask, const Shape& s, int64_t pixel,
                               int offset_group, int t) {
  const int64_t image = pixel / s.out_plane, p = pixel % s.out_plane;
  const int64_t at = (image * s.offset_groups + offset_group) * s.taps + t;
  const Real y =
      Real(int(p / s.out_width) * s.stride_y - s.padding_y + t / s.kernel_width * s.dilation_y);
  const Real x =
      Real(int(p % s.out_width) * s.stride_x - s.padding_x + t % s.kernel_width * s.dilation_x);
  Sample<Real> sample;
  sample.corners =
      corners(y + Real(offset[2 * at * s.out_plane + p]),
              x + Real(offset[(2 * at + 1) * s.out_plane + p]), s.height, s.width, int(s.plane));
  sample.scale = mask ? Real(mask[at * s.out_plane + p]) : Real(1);
  return sample;
}

// Grid: x counts tiles of output pixels, y tiles of outputs, group by group.
template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ input,  // [N, plane + 1, C]
                   const T* __restrict__ offset, const T* __restrict__ mask,
                   const T* __restrict__ weight,  // [groups, taps, C / groups, O / groups]
                   const T* __restrict__ bias, Shape s, T* __restrict__ output) {  // [N, O, plane]
  constexpr int kDepth = 128 / sizeof(Real);  // channels at a time: a line of the cache
  __shared__ __align__(32) Real columns[kDepth * kStride];
  __shared__ __align__(32) Real weights[kDepth * kOutputs];
  __shared__ int corner_index[4 * kPixels];
  __shared__ Real corner_weight[4 * kPixels];
  const int tiles = (s.group_outputs + kOutputs - 1) / kOutputs;
  const int group = int(blockIdx.y) / tiles, first_output = int(blockIdx.y) % tiles * kOutputs;
  const int64_t first_pixel = int64_t(blockIdx.x) * kPixels;
  const int thread = int(threadIdx.x);
  const int across = thread % 16, down = thread / 16;  // which outputs, which pixels
  Real sums[8][4];
  for (auto& row : sums)
    for (Real& sum : row) sum = Real(0);

  const int group_end = (group + 1) * s.group_channels;
  for (int start = group * s.group_channels; start < group_end;) {
    const int offset_group = start / s.offset_channels;
    const int end = min(group_end, (offset_group + 1) * s.offset_channels);
    for (int t = 0; t < s.taps; ++t) {
      __syncthreads();
      if (thread < kPixels) {
        const int64_t pixel = min(first_pixel + thread, s.pixels - 1);
        const Sample<Real> sample = locate<T, Real>(offset, mask, s, pixel, offset_group, t);
        for (int i = 0; i < 4; ++i) {
          corner_index[i * kPixels + thread] = sample.corners.index[i];
          corner_weight[i * kPixels + thread] = sample.weight(i);
        }
      }
      for (int c = start; c < end; c += kDepth) {
        __syncthreads();
        const int k = thread % kDepth;
        for (int p = thread / kDepth; p < kPixels; p += kThreads / kDepth) {
          const int64_t image = min(first_pixel + p, s.pixels - 1) / s.out_plane;
          const T* from = input + image * (s.plane + 1) * s.channels + c + k;
          Real value = Real(0);
          if (c + k < end)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              value += corner_weight[i * kPixels + p] *
                       Real(from[int64_t(corner_index[i * kPixels + p]) * s.channels]);
          columns[k * kStride + p] = value;
        }
        const T* matrix = weight + ((int64_t(group) * s.taps + t) * s.group_channels + c -
                                    group * s.group_channels) *
                                       s.group_outputs;
        for (int i = thread; i < kDepth * kOutputs; i += kThreads) {
          const int row = i / kOutputs, o = first_output + i % kOutputs;
          const bool inside = c + row < end && o < s.group_outputs;
          weights[i] = inside ? Real(matrix[int64_t(row) * s.group_outputs + o]) : Real(0);
        }
        __syncthreads();
#pragma unroll 8
        for (int depth = 0; depth < kDepth; ++depth) {
          const Four<Real> right =
              *reinterpret_cast<const Four<Real>*>(columns + depth * kStride + 4 * down);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Four<Real> left = *reinterpret_cast<const Four<Real>*>(
                weights + depth * kOutputs + half * (kOutputs / 2) + 4 * across);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) sums[4 * half + i][j] += left.v[i] * right.v[j];
          }
        }
      }
    }
    start = end;
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int o = first_output + i / 4 * (kOutputs / 2) + 4 * across + i % 4;
    if (o >= s.group_outputs) continue;
    const int64_t channel = int64_t(group) * s.group_outputs + o;
    const Real start = bias ? Real(bias[channel]) : Real(0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t pixel = first_pixel + 4 * down + j;
      if (pixel < s.pixels)
        output[(pixel / s.out_plane * s.groups * s.group_outputs + channel) * s.out_plane +
               pixel % s.out_plane] = T(start + sums[i][j]);
    }
  }
}

template <class T>
void forward(const Problem& p, const Tensor& input, const Tensor& offset, const Tensor& weight,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, Tensor& output,
             cudaStream_t stream) {
  using Real = typename RealOf<T>::type;
  const Shape s(p, p.images);
  Tensor laid_out = torch::stable::new_empty(input, {p.images, p.plane() + 1, p.channels});
  transpose(data<T>(input), p.images, p.channels, p.plane(), 1, 1, mutable_data<T>(laid_out),
            stream);
  Tensor matrix = torch::stable::new_empty(weight, weight.sizes());
  PYSEG_LAUNCH((pack_kernel<T>), blocks_for(weight.numel()), kThreads, 0, stream, data<T>(weight),
               s.group_outputs, s.group_channels, s.taps, weight.numel(), true,
               mutable_data<T>(matrix));
  const dim3 grid(unsigned(ceil_div(s.pixels, kPixels)),
                  unsigned(p.groups * ceil_div(s.group_outputs, kOutputs)));
  PYSEG_LAUNCH((forward_kernel<T, Real>), grid, kThreads, 0, stream, data<T>(laid_out),
               data<T>(offset), data<T>(mask), data<T>(matrix), data<T>(bias), s,
               mutable_data<T>(output));
}

// The input pixels that every tap reads, and with which weights: entry ((image, offset group, p,
// t), corner). A key counts (image, offset group, input pixel).
template <class T, class Real>
__global__ void locate_kernel(const T* __restrict__ offset, const T* __restrict__ mask, Shape s,
                              int64_t total, uint64_t* __restrict__ keys,
                              uint32_t* __restrict__ entries, Real* __restrict__ weights) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int64_t p = at % s.out_plane;
  const int t = int(at / s.out_plane % s.taps);
  const int64_t group = at / s.out_plane / s.taps;  // (image, offset group)
  const Sample<Real> sample = locate<T, Real>(
      offset, mask, s, group / s.offset_groups * s.out_plane + p, int(group % s.offset_groups), t);
  const int64_t entry = ((group * s.out_plane + p) * s.taps + t) * 4;
  for (int i = 0; i < 4; ++i) {
    keys[entry + i] = uint64_t(group * (s.plane + 1) + sample.corners.index[i]);
    entries[entry + i] = uint32_t(entry + i);
    weights[entry + i] = sample.weight(i);
  }
}

// A warp per (image, offset group, output pixel, tap): the columns again, and the gradients of
// offset and mask.
template <class T, class Real>
__global__ void columns_kernel(const T* __restrict__ input,  // [N, plane + 1, C]
                               const T* __restrict__ offset, const T* __restrict__ mask,
                               const T* __restrict__ column_gradients,  // [groups, pixels, taps, c]
                               Shape s, int64_t total, T* __restrict__ columns,
                               T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= total) return;  // the whole warp
  const int t = int(at % s.taps);
  const int64_t p = at / s.taps % s.out_plane, group = at / s.taps / s.out_plane;
  const int64_t image = group / s.offset_groups, pixel = image * s.out_plane + p;
  const int offset_group = int(group % s.offset_groups);
  const Sample<Real> sample = locate<T, Real>(offset, mask, s, pixel, offset_group, t);
  const T* from = input + image * (s.plane + 1) * s.channels;
  Real dots[4] = {};
  for (int i = lane; i < s.offset_channels; i += 32) {
    const int c = offset_group * s.offset_channels + i;
    const int64_t where =
        ((int64_t(c / s.group_channels) * s.pixels + pixel) * s.taps + t) * s.group_channels +
        c % s.group_channels;
    const Real gradient = Real(column_gradients[where]);
    Real column = Real(0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Real value = Real(from[int64_t(sample.corners.index[k]) * s.channels + c]);
      dots[k] += gradient * value;
      column += sample.weight(k) * value;
    }
    columns[where] = T(column);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    for (int bit = 16; bit > 0; bit /= 2) dots[k] += __shfl_xor_sync(~0u, dots[k], bit);
  if (lane) return;
  const Real ty = sample.corners.ty, tx = sample.corners.tx;
  const Real top = dots[0] + tx * (dots[1] - dots[0]);
  const Real bottom = dots[2] + tx * (dots[3] - dots[2]);
  const Real left = dots[0] + ty * (dots[2] - dots[0]);
  const Real right = dots[1] + ty * (dots[3] - dots[1]);
  const int64_t out = (group * s.taps + t) * s.out_plane + p;
  const int64_t twice = (group * s.taps + t) * 2 * s.out_plane + p;
  grad_offset[twice] = T(sample.scale * (bottom - top));
  grad_offset[twice + s.out_plane] = T(sample.scale * (right - left));
  if (grad_mask) grad_mask[out] = T(top + ty * (bottom - top));
}

// The first of the sorted keys that is not less.
__device__ int64_t lower_bound(const uint64_t* keys, int64_t n, uint64_t key) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (keys[low + half] < key)
      low += half + 1, n -= half + 1;
    else
      n = half;
  }
  return low;
}

// A warp per (image, offset group, input pixel).
template <class T, class Real>
__global__ void input_gradient_kernel(const uint64_t* __restrict__ keys,
                                      const uint32_t* __restrict__ entries, int64_t count,
                                      const Real* __restrict__ weights,
                                      const T* __restrict__ column_gradients, Shape s,
                                      int64_t total, T* __restrict__ gradient) {  // [N, plane, C]
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= total) return;
  const int64_t group = at / s.plane, pixel = at % s.plane, image = group / s.offset_groups;
  const uint64_t key = uint64_t(group * (s.plane + 1) + pixel);
  const int64_t begin = lower_bound(keys, count, key);
  const int64_t end = begin + lower_bound(keys + begin, count - begin, key + 1);
  for (int i = lane; i < s.offset_channels; i += 32) {
    const int c = int(group % s.offset_groups) * s.offset_channels + i;
    const T* from = column_gradients +
                    int64_t(c / s.group_channels) * s.pixels * s.taps * s.group_channels +
                    c % s.group_channels;
    Real sum = Real(0);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t entry = entries[j], sample = entry / 4;  // (image, offset group, p, t)
      const int64_t row = sample - (group - image) * s.out_plane * s.taps;  // (image, p, t)
      sum += weights[entry] * Real(from[row * s.group_channels]);
    }
    gradient[(image * s.plane + pixel) * s.channels + c] = T(sum);
  }
}

// sums[o, c, t] += part[group, t, c, o]
template <class T, class Real>
__global__ void add_weights_kernel(const T* __restrict__ part, Shape s, int64_t total,
                                   Real* __restrict__ sums) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int t = int(at % s.taps), c = int(at / s.taps % s.group_channels);
  const int64_t output = at / s.taps / s.group_channels;
  const int64_t group = output / s.group_outputs, o = output % s.group_outputs;
  sums[at] += Real(part[((group * s.taps + t) * s.group_channels + c) * s.group_outputs + o]);
}

// A block per output.
template <class T, class Real>
__global__ void bias_kernel(const T* __restrict__ grad, int64_t images, int64_t outputs,
                            int64_t plane, T* __restrict__ sums) {
  __shared__ typename BlockReduce<Real, kThreads>::TempStorage storage;
  Real sum = Real(0);
  for (int64_t i = threadIdx.x; i < images * plane; i += kThreads)
    sum += Real(grad[(i / plane * outputs + blockIdx.x) * plane + i % plane]);
  const Real total = BlockReduce<Real, kThreads>(storage).Sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = T(total);
}

struct Gradients {
  Tensor input, offset, weight, bias, mask;
};

template <class T>
void backward(const Problem& p, const Tensor& grad, const Tensor& input, const Tensor& offset,
              const Tensor& weight, const std::optional<Tensor>& mask, Gradients& out,
              cudaStream_t stream) {
  using Real = typename RealOf<T>::type;
  const auto real = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t taps = p.tap_count(), plane = p.plane(), out_plane = p.out_plane();
  const int64_t depth = taps * p.group_channels(),
                image_samples = p.offset_groups * out_plane * taps;
  PYSEG_LAUNCH((bias_kernel<T, Real>), unsigned(p.outputs), kThreads, 0, stream, data<T>(grad),
               p.images, p.outputs, out_plane, mutable_data<T>(out.bias));
  Tensor matrix = torch::stable::new_empty(weight, {p.groups, p.group_outputs(), depth});
  PYSEG_LAUNCH((pack_kernel<T>), blocks_for(weight.numel()), kThreads, 0, stream, data<T>(weight),
               int(p.group_outputs()), int(p.group_channels()), int(taps), weight.numel(), false,
               mutable_data<T>(matrix));
  Tensor weight_sums = torch::stable::new_zeros(weight, weight.sizes(), real);
  const int64_t together =
      std::clamp<int64_t>(std::min(kColumns / (p.channels * taps * out_plane),
                                   std::numeric_limits<int32_t>::max() / (4 * image_samples)),
                          1, p.images);
  for (int64_t start = 0; start < p.images; start += together) {
    const int64_t images = std::min(together, p.images - start);
    const Shape s(p, images);
    const T* offsets = data<T>(offset) + start * 2 * image_samples;
    const T* masks = mask ? data<T>(mask) + start * image_samples : nullptr;
    Tensor laid_out = torch::stable::new_empty(input, {images, plane + 1, p.channels});
    transpose(data<T>(input) + start * p.channels * plane, images, p.channels, plane, 1, 1,
              mutable_data<T>(laid_out), stream);
    Tensor gradient_rows = torch::stable::new_empty(grad, {p.groups, s.pixels, p.group_outputs()});
    transpose(data<T>(grad) + start * p.outputs * out_plane, images * p.groups, p.group_outputs(),
              out_plane, 0, p.groups, mutable_data<T>(gradient_rows), stream);
    const Tensor column_gradients = torch::stable::matmul(gradient_rows, matrix);

    const int64_t samples = images * image_samples;
    Tensor columns = torch::stable::new_empty(input, {p.groups, s.pixels, depth});
    PYSEG_LAUNCH((columns_kernel<T, Real>), blocks_for(samples * 32), kThreads, 0, stream,
                 data<T>(laid_out), offsets, masks, data<T>(column_gradients), s, samples,
                 mutable_data<T>(columns), mutable_data<T>(out.offset) + start * 2 * image_samples,
                 mask ? mutable_data<T>(out.mask) + start * image_samples : nullptr);
    const Tensor part =
        torch::stable::matmul(torch::stable::transpose(columns, 1, 2), gradient_rows);
    PYSEG_LAUNCH((add_weights_kernel<T, Real>), blocks_for(weight.numel()), kThreads, 0, stream,
                 data<T>(part), s, weight.numel(), mutable_data<Real>(weight_sums));

    const int64_t count = samples * 4;
    const auto scratch = [&](int64_t bytes) {
      return torch::stable::new_empty(input, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
    };
    Tensor keys = scratch(count * 8), sorted_keys = scratch(count * 8);
    Tensor entries = scratch(count * 4), sorted_entries = scratch(count * 4);
    Tensor weights = scratch(count * int64_t(sizeof(Real)));
    PYSEG_LAUNCH((locate_kernel<T, Real>), blocks_for(samples), kThreads, 0, stream, offsets, masks,
                 s, samples, mutable_data<uint64_t>(keys), mutable_data<uint32_t>(entries),
                 mutable_data<Real>(weights));
    int bits = 1;
    while ((images * p.offset_groups * (plane + 1)) >> bits) ++bits;
    std::vector<Tensor> temporaries;
    sort_pairs(
        [&](size_t bytes) -> void* {
          temporaries.push_back(scratch(int64_t(bytes)));
          return temporaries.back().mutable_data_ptr();
        },
        data<uint64_t>(keys), mutable_data<uint64_t>(sorted_keys), data<uint32_t>(entries),
        mutable_data<uint32_t>(sorted_entries), count, stream, 0, bits);
    Tensor input_gradient = torch::stable::new_empty(input, {images, plane, p.channels});
    const int64_t inputs = images * p.offset_groups * plane;
    PYSEG_LAUNCH((input_gradient_kernel<T, Real>), blocks_for(inputs * 32), kThreads, 0, stream,
                 data<uint64_t>(sorted_keys), data<uint32_t>(sorted_entries), count,
                 data<Real>(weights), data<T>(column_gradients), s, inputs,
                 mutable_data<T>(input_gradient));
    transpose(data<T>(input_gradient), images, plane, p.channels, 0, 1,
              mutable_data<T>(out.input) + start * p.channels * plane, stream);
  }
  torch::stable::copy_(out.weight, weight_sums);
}

template <class Run>
void for_type(const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: run(float()); break;
    case ScalarType::Double: run(double()); break;
    case ScalarType::Half: run(Half()); break;
    case ScalarType::BFloat16: run(BFloat16()); break;
    default: throw std::invalid_argument("input must be float16, bfloat16, float32 or float64");
  }
}

Tensor deform_conv2d_cuda(const Tensor& input, const Tensor& offset, const Tensor& weight,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation) {
  const Problem p = describe(input, offset, weight, bias, mask, stride, padding, dilation);
  const DeviceScope device(input);
  Tensor output = torch::stable::new_empty(input, {p.images, p.outputs, p.out_height, p.out_width});
  if (output.numel() == 0) return output;
  for_type(input, [&]<class T>(T) {
    forward<T>(p, packed(input), packed(offset), packed(weight), packed(bias), packed(mask), output,
               device.stream);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cuda(
    const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation) {
  const Problem p = describe(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_gradient(p, grad, input);
  const DeviceScope device(input);
  const auto like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes());
  };
  Gradients out{like(input), like(offset), torch::stable::new_zeros(weight, weight.sizes()),
                torch::stable::new_zeros(weight, {p.outputs}),
                mask ? like(*mask) : torch::stable::new_empty(input, {0})};
  if (grad.numel() != 0)
    for_type(input, [&]<class T>(T) {
      backward<T>(p, packed(grad), packed(input), packed(offset), packed(weight), packed(mask), out,
                  device.stream);
    });
  return {out.input, out.offset, out.weight, out.bias, out.mask};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d_cuda));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward_cuda));
}
