// Deformable convolution on CUDA.
//
// Forward it is an implicit matrix product: a block of threads finds where the taps of 64 output
// pixels read, then gathers the columns, some channels of one tap at a time, into shared memory and
// multiplies them with the weights of 128 outputs there; no matrix of columns exists in global
// memory. Lanes hold neighbouring channels of an input whose pixels have their channels together,
// and the taps of some channels follow each other, so that what they read lies in the L1 cache.
//
// Backward the gradients of the columns, and the columns again, are matrices in global memory,
// between products of torch's; of as many images at a time as a bound on that memory allows. The
// gradient of the input is a sum per input pixel over what was sampled from it, in the order of
// output pixels, found by sorting: nothing is added atomically, and nothing synchronises.
#include "deform_conv2d.h"

#include <algorithm>
#include <array>

#include "../common/launch.h"
#include "../common/primitives.cuh"
#include "../common/transpose.cuh"
#include "matrix_tiles.cuh"

namespace {

using namespace pyseg;
using namespace pyseg::deformable;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;
constexpr int kPixels = 64;    // output pixels of a block
constexpr int kOutputs = 128;  // output channels of a block
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
#ifdef PYSEG_EMULATED                   // so that tests take several portions
constexpr int64_t kColumns = 1 << 12;   // the most elements of a matrix of columns
constexpr int64_t kTogether = 1 << 12;  // vectors of an input that a launch numbers
#else
constexpr int64_t kColumns = int64_t(1) << 26;  // 256 MB of float
constexpr int64_t kTogether = kMost;
#endif

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

template <class T, int Width>
struct alignas(Width * sizeof(T)) Pack {
  T v[Width];
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks(int64_t count) {
  PYSEG_CHECK(count <= kMost, "a tensor is too large for one launch: pass fewer images at once");
  return unsigned(count);
}
unsigned blocks_for(int64_t threads) { return blocks(ceil_div(threads, kThreads)); }

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

  // Whether `n` channels, of an input or of columns, can be read at once wherever some begin.
  bool reads(int n) const { return group_channels % n == 0 && offset_channels % n == 0; }
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

// Where tap t of an offset group reads for pixel p of an output image.
template <class T, class Real>
__device__ Sample<Real> locate(const T* offset, const T* mask, const Shape& s, int64_t image,
                               int64_t p, int offset_group, int t) {
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

// Where the pixels of a block of the forward kernels lie: they follow each other, through images.
struct Pixels {
  int64_t first, image, p;  // the first one; its image, where in it
  __device__ Pixels(const Shape& s, int64_t tile)
      : first(tile * kPixels), image(first / s.out_plane), p(first % s.out_plane) {}
  // Of pixel i of the block; past the last one, that one again.
  __device__ void find(const Shape& s, int i, int64_t* its_image, int64_t* its_p) const {
    const int64_t last = s.pixels - 1 - first;
    *its_image = image, *its_p = p + (i < last ? i : last);
    while (*its_p >= s.out_plane) *its_p -= s.out_plane, ++*its_image;
  }
};

// Where the taps of a block's pixels read, some taps at a time: vectors of Width channels, counted
// from the input's first one.
template <class Real, int Taps>
struct Samples {
  Pack<unsigned, 4> from[Taps * kPixels];
  Pack<Real, 4> weight[Taps * kPixels];

  template <int Width, class T>
  __device__ void find(const T* offset, const T* mask, const Shape& s, const Pixels& pixels,
                       int offset_group, int first_tap, int taps) {
    const unsigned vectors = unsigned(s.channels / Width);
    for (int i = int(threadIdx.x); i < taps * kPixels; i += kThreads) {
      int64_t image, p;
      pixels.find(s, i % kPixels, &image, &p);
      const Sample<Real> sample =
          locate<T, Real>(offset, mask, s, image, p, offset_group, first_tap + i / kPixels);
      const unsigned before = unsigned(image) * unsigned(s.plane + 1);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        from[i].v[k] = (before + unsigned(sample.corners.index[k])) * vectors;
        weight[i].v[k] = sample.weight(k);
      }
    }
  }

  // What tap and pixel `i` read from the vector of channels that `input` is moved to.
  template <class T, int Width>
  __device__ void read(const Pack<T, Width>* input, int i, Real (&values)[Width]) const {
    const Pack<unsigned, 4> its_from = from[i];
    const Pack<Real, 4> its_weight = weight[i];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<T, Width> corner = input[its_from.v[k]];
#pragma unroll
      for (int j = 0; j < Width; ++j) values[j] += its_weight.v[k] * Real(corner.v[j]);
    }
  }
};

// Copies a tap's weights of `rows` channels and some outputs into shared memory, 0 beyond both.
template <int Width, int Depth, class Real, class T>
__device__ void copy_weights(const T* weight,  // [groups, taps, C / groups, O / groups]
                             const Shape& s, int group, int tap, int channel, int rows,
                             int first_output, Real* to, int stride) {
  constexpr int kLanes = kOutputs / Width, kRows = kThreads / kLanes;  // at once
  const int first = int(threadIdx.x) / kLanes, o = int(threadIdx.x) % kLanes * Width;
  if (first_output + o >= s.group_outputs) rows = 0;
  const int64_t row = (int64_t(group) * s.taps + tap) * s.group_channels + channel -
                      group * s.group_channels + first;
  int64_t at = row * s.group_outputs + first_output + o;  // beyond the weights in rows left out
  to += first * stride + o;
#pragma unroll(Depth / kRows <= 8 ? Depth / kRows : 4)
  for (int i = 0; i < Depth / kRows; ++i) {
    Pack<T, Width> part{};
    if (first + i * kRows < rows) part = *reinterpret_cast<const Pack<T, Width>*>(weight + at);
    at += kRows * int64_t(s.group_outputs);
    if constexpr (std::is_same_v<T, Real>) {
      *reinterpret_cast<Pack<T, Width>*>(to + i * kRows * stride) = part;
    } else {
#pragma unroll
      for (int j = 0; j < Width; ++j) to[i * kRows * stride + j] = Real(part.v[j]);
    }
  }
}

// Grid: tiles of outputs, group by group, then tiles of output pixels. Width: channels, and
// outputs, that are loaded together.
template <class T, class Real, int Width>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 2 : 1)
    forward_kernel(const T* __restrict__ input,  // [N, plane + 1, C]
                   const T* __restrict__ offset, const T* __restrict__ mask,
                   const T* __restrict__ weight,  // [groups, taps, C / groups, O / groups]
                   const T* __restrict__ bias, Shape s, T* __restrict__ output) {  // [N, O, plane]
  constexpr int kDepth = 128 / sizeof(Real);  // channels at a time: a line of the cache
  constexpr int kTaps = sizeof(Real) == 4 ? 9 : 4;
  constexpr int kLanes = kDepth / Width, kRows = kThreads / kLanes;  // of a pixel; pixels at once
  using Four = Pack<Real, 4>;
  // [channel, pixel], of which fours of pixels are exchanged within each channel's row, so that
  // neither those who write a pixel's channels wait for each other nor those who read four pixels.
  __shared__ __align__(32) Real columns[kDepth * kPixels];
  __shared__ __align__(32) Real weights[kDepth * kOutputs];
  __shared__ Samples<Real, kTaps> samples;
  const int tiles = (s.group_outputs + kOutputs - 1) / kOutputs, all_tiles = s.groups * tiles;
  const int group = int(blockIdx.x % all_tiles) / tiles;
  const int first_output = int(blockIdx.x % all_tiles) % tiles * kOutputs;
  const Pixels pixels(s, blockIdx.x / all_tiles);
  const int thread = int(threadIdx.x);
  const int across = thread % 16, down = thread / 16;  // which outputs, which pixels
  Real sums[8][4];
  for (auto& row : sums)
    for (Real& sum : row) sum = Real(0);

  const int group_end = (group + 1) * s.group_channels;
  for (int start = group * s.group_channels; start < group_end;) {
    const int offset_group = start / s.offset_channels;
    const int end = min(group_end, (offset_group + 1) * s.offset_channels);
    for (int first_tap = 0; first_tap < s.taps; first_tap += kTaps) {
      const int taps = min(kTaps, s.taps - first_tap);
      __syncthreads();
      samples.template find<Width>(offset, mask, s, pixels, offset_group, first_tap, taps);
      for (int c = start; c < end; c += kDepth) {
        for (int t = 0; t < taps; ++t) {
          __syncthreads();
          const int k = thread % kLanes * Width;
          const auto* const from = reinterpret_cast<const Pack<T, Width>*>(input) + (c + k) / Width;
#pragma unroll(Width == 1 ? 2 : kPixels / kRows)
          for (int i = 0; i < kPixels / kRows; ++i) {
            const int p = thread / kLanes + i * kRows;
            Real values[Width] = {};
            if (c + k < end) samples.read(from, t * kPixels + p, values);
            const int place = ((p / 4) ^ (k / 4 % 8)) * 4 + p % 4;
#pragma unroll
            for (int j = 0; j < Width; ++j) columns[(k + j) * kPixels + place] = values[j];
          }
          copy_weights<Width, kDepth>(weight, s, group, first_tap + t, c, end - c, first_output,
                                      weights, kOutputs);
          __syncthreads();
#pragma unroll 2
          for (int quad = 0; quad < kDepth / 4; ++quad) {
            const Real* const right_rows = columns + quad * 4 * kPixels + 4 * (down ^ (quad % 8));
            const Real* const left_rows = weights + quad * 4 * kOutputs + 4 * across;
#pragma unroll
            for (int depth = 0; depth < 4; ++depth) {
              const Four right = *reinterpret_cast<const Four*>(right_rows + depth * kPixels);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const Four left = *reinterpret_cast<const Four*>(left_rows + depth * kOutputs +
                                                                 half * (kOutputs / 2));
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                  for (int j = 0; j < 4; ++j) sums[4 * half + i][j] += left.v[i] * right.v[j];
              }
            }
          }
        }
      }
    }
    start = end;
  }

#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (pixels.first + 4 * down + j >= s.pixels) break;
    int64_t image, p;
    pixels.find(s, 4 * down + j, &image, &p);
    const int64_t first = group * s.group_outputs + first_output + 4 * across;
    T* const to = output + (image * s.groups * s.group_outputs + first) * s.out_plane + p;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int o = i / 4 * (kOutputs / 2) + i % 4;
      if (first_output + 4 * across + o < s.group_outputs)
        to[o * s.out_plane] = T(sums[i][j] + (bias ? Real(bias[first + o]) : Real(0)));
    }
  }
}

// The same in half precision. The columns are rounded to it, and multiplied by tensor cores: each
// warp has 32 outputs and 32 pixels.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, 2)
    forward_tensor_kernel(const T* __restrict__ input,  // [N, plane + 1, C]
                          const T* __restrict__ offset, const T* __restrict__ mask,
                          const T* __restrict__ weight,  // [groups, taps, C / groups, O / groups]
                          const T* __restrict__ bias, Shape s,
                          T* __restrict__ output) {  // [N, O, plane]
#if defined(PYSEG_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  // Rows of an odd number of 16 bytes: those that ldmatrix reads together lie in different banks.
  constexpr int kDepth = 64, kColumnStride = kDepth + 8, kWeightStride = kOutputs + 8, kTaps = 9;
  constexpr int kLanes = kDepth / Width, kRows = kThreads / kLanes;  // of a pixel; pixels at once
  __shared__ __align__(32) T columns[kPixels * kColumnStride];       // [pixel, channel]
  __shared__ __align__(32) T weights[kDepth * kWeightStride];        // [channel, output]
  __shared__ Samples<float, kTaps> samples;
  const int tiles = (s.group_outputs + kOutputs - 1) / kOutputs, all_tiles = s.groups * tiles;
  const int group = int(blockIdx.x % all_tiles) / tiles;
  const int first_output = int(blockIdx.x % all_tiles) % tiles * kOutputs;
  const Pixels pixels(s, blockIdx.x / all_tiles);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_output = warp % 4 * 32, warp_pixel = warp / 4 * 32;
  // What this lane names of the matrices that are loaded together: of the weights those of outputs
  // 0 and 8 in channels 0, then 8; of the columns those of channels 0 and 8 in pixels 0, then 8.
  const T* const left_row =
      weights + (lane / 16 * 8 + lane % 8) * kWeightStride + warp_output + lane / 8 % 2 * 8;
  const T* const right_row =
      columns + (warp_pixel + lane / 16 * 8 + lane % 8) * kColumnStride + lane / 8 % 2 * 8;
  float sums[2][4][4] = {};  // of 16 outputs and 8 pixels each

  const int group_end = (group + 1) * s.group_channels;
  for (int start = group * s.group_channels; start < group_end;) {
    const int offset_group = start / s.offset_channels;
    const int end = min(group_end, (offset_group + 1) * s.offset_channels);
    for (int first_tap = 0; first_tap < s.taps; first_tap += kTaps) {
      const int taps = min(kTaps, s.taps - first_tap);
      __syncthreads();
      samples.template find<Width>(offset, mask, s, pixels, offset_group, first_tap, taps);
      for (int c = start; c < end; c += kDepth) {
        for (int t = 0; t < taps; ++t) {
          __syncthreads();
          const int k = thread % kLanes * Width;
          const auto* const from = reinterpret_cast<const Pack<T, Width>*>(input) + (c + k) / Width;
#pragma unroll 2
          for (int i = 0; i < kPixels / kRows; ++i) {
            const int p = thread / kLanes + i * kRows;
            float values[Width] = {};
            if (c + k < end) samples.read(from, t * kPixels + p, values);
            Pack<T, Width> rounded;
#pragma unroll
            for (int j = 0; j < Width; ++j) rounded.v[j] = T(values[j]);
            *reinterpret_cast<Pack<T, Width>*>(columns + p * kColumnStride + k) = rounded;
          }
          copy_weights<Width, kDepth>(weight, s, group, first_tap + t, c, end - c, first_output,
                                      weights, kWeightStride);
          __syncthreads();
#pragma unroll
          for (int depth = 0; depth < kDepth; depth += 16) {
            unsigned left[2][4], right[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              matrix_tiles::load<true>(left[i], left_row + depth * kWeightStride + 16 * i);
              matrix_tiles::load<false>(right[i], right_row + 16 * i * kColumnStride + depth);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j)
                matrix_tiles::multiply_add<T>(
                    sums[i][j], left[i],
                    reinterpret_cast<const unsigned (&)[2]>(right[j / 2][j % 2 * 2]));
          }
        }
      }
    }
    start = end;
  }

#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int its_pixel = warp_pixel + j / 2 * 8 + lane % 4 * 2 + j % 2;
    if (pixels.first + its_pixel >= s.pixels) continue;
    int64_t image, p;
    pixels.find(s, its_pixel, &image, &p);
    const int64_t first = group * s.group_outputs + first_output + warp_output + lane / 4;
    T* const to = output + (image * s.groups * s.group_outputs + first) * s.out_plane + p;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first_output + warp_output + lane / 4 + 8 * i < s.group_outputs)
        to[8 * i * s.out_plane] =
            T(sums[i / 2][j / 2][i % 2 * 2 + j % 2] + (bias ? float(bias[first + 8 * i]) : 0.0f));
  }
#endif
}

// Whether a problem is large enough for tensor cores, and the device has those for both types.
bool has_tensor_cores(const Shape& s) {
  if (std::min(s.group_channels, s.offset_channels) < 32 || s.group_outputs < 16) return false;
  int device = 0, major = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 8;
}

template <class T>
void forward(const Problem& p, const Tensor& input, const Tensor& offset, const Tensor& weight,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, Tensor& output,
             cudaStream_t stream) {
  using Real = typename RealOf<T>::type;
  const Shape all(p, p.images);
  Tensor laid_out = torch::stable::new_empty(input, {p.images, p.plane() + 1, p.channels});
  transpose(data<T>(input), p.images, p.channels, p.plane(), 1, 1, mutable_data<T>(laid_out),
            stream);
  Tensor matrix = torch::stable::new_empty(weight, weight.sizes());
  PYSEG_LAUNCH((pack_kernel<T>), blocks_for(weight.numel()), kThreads, 0, stream, data<T>(weight),
               all.group_outputs, all.group_channels, all.taps, weight.numel(), true,
               mutable_data<T>(matrix));
  const auto run = [&](auto kernel, int width) {
    const int64_t image = (p.plane() + 1) * p.channels;
    PYSEG_CHECK(image / width < int64_t(1) << 32, "an image of ", image,
                " elements is too large: split its channels");
    const int64_t together = std::clamp<int64_t>(kTogether / (image / width), 1, p.images);
    for (int64_t start = 0; start < p.images; start += together) {
      const Shape s(p, std::min(together, p.images - start));
      const int64_t samples = p.offset_groups * p.tap_count() * p.out_plane();
      const int64_t tiles = p.groups * ceil_div(s.group_outputs, kOutputs);
      PYSEG_LAUNCH(kernel, blocks(ceil_div(s.pixels, kPixels) * tiles), kThreads, 0, stream,
                   data<T>(laid_out) + start * image, data<T>(offset) + start * 2 * samples,
                   mask ? data<T>(mask) + start * samples : nullptr, data<T>(matrix), data<T>(bias),
                   s, mutable_data<T>(output) + start * p.outputs * p.out_plane());
    }
  };
  if constexpr (sizeof(T) == 2) {
    if (has_tensor_cores(all)) {
      if (all.reads(8) && all.group_outputs % 8 == 0)
        run(&forward_tensor_kernel<T, 8>, 8);
      else
        run(&forward_tensor_kernel<T, 1>, 1);
      return;
    }
  }
  if constexpr (sizeof(T) == 4) {
    if (all.reads(4) && all.group_outputs % 4 == 0) {
      run(&forward_kernel<T, Real, 4>, 4);
      return;
    }
  }
  run(&forward_kernel<T, Real, 1>, 1);
}

// The input pixels that every tap reads, and with which weights: entry ((image, offset group, p,
// t), corner). A key counts (image, offset group, input pixel).
template <class T, class Real>
__global__ void locate_kernel(const T* __restrict__ offset, const T* __restrict__ mask, Shape s,
                              int64_t total, Pack<uint32_t, 4>* __restrict__ keys,
                              Pack<uint32_t, 4>* __restrict__ entries,
                              Pack<Real, 4>* __restrict__ weights) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int64_t p = at % s.out_plane;
  const int t = int(at / s.out_plane % s.taps);
  const int64_t group = at / s.out_plane / s.taps;  // (image, offset group)
  const Sample<Real> sample =
      locate<T, Real>(offset, mask, s, group / s.offset_groups, p, int(group % s.offset_groups), t);
  const int64_t entry = (group * s.out_plane + p) * s.taps + t;
  Pack<uint32_t, 4> its_keys, its_entries;
  Pack<Real, 4> its_weights;
  for (int i = 0; i < 4; ++i) {
    its_keys.v[i] = uint32_t(group * (s.plane + 1) + sample.corners.index[i]);
    its_entries.v[i] = uint32_t(4 * entry + i);
    its_weights.v[i] = sample.weight(i);
  }
  keys[entry] = its_keys, entries[entry] = its_entries, weights[entry] = its_weights;
}

// A warp per (image, offset group, output pixel, tap): the columns again, and the gradients of
// offset and mask. A lane reads Width channels at once.
template <class T, class Real, int Width>
__global__ void columns_kernel(const T* __restrict__ input,  // [N, plane + 1, C]
                               const T* __restrict__ offset, const T* __restrict__ mask,
                               const T* __restrict__ column_gradients,  // [groups, pixels, taps, c]
                               Shape s, int64_t total, T* __restrict__ columns,
                               T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  using Vector = Pack<T, Width>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= total) return;  // the whole warp
  const int t = int(at % s.taps);
  const int64_t p = at / s.taps % s.out_plane, group = at / s.taps / s.out_plane;
  const int64_t image = group / s.offset_groups, pixel = image * s.out_plane + p;
  const int offset_group = int(group % s.offset_groups);
  const Sample<Real> sample = locate<T, Real>(offset, mask, s, image, p, offset_group, t);
  const T* corner[4];
  Real weight[4], dots[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    corner[k] = input + (image * (s.plane + 1) + sample.corners.index[k]) * s.channels;
    weight[k] = sample.weight(k);
  }
  for (int i = lane * Width; i < s.offset_channels; i += 32 * Width) {
    const int c = offset_group * s.offset_channels + i;
    const int64_t where =
        ((int64_t(c / s.group_channels) * s.pixels + pixel) * s.taps + t) * s.group_channels +
        c % s.group_channels;
    const Vector gradient = *reinterpret_cast<const Vector*>(column_gradients + where);
    Real column[Width] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Vector value = *reinterpret_cast<const Vector*>(corner[k] + c);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        dots[k] += Real(gradient.v[j]) * Real(value.v[j]);
        column[j] += weight[k] * Real(value.v[j]);
      }
    }
    Vector rounded;
#pragma unroll
    for (int j = 0; j < Width; ++j) rounded.v[j] = T(column[j]);
    *reinterpret_cast<Vector*>(columns + where) = rounded;
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

struct Span {
  int begin, end;
};

// Where the sorted keys that are equal begin and end; those that there are none of keep (0, 0).
__global__ void spans_kernel(const uint32_t* __restrict__ keys, int64_t count,
                             Span* __restrict__ spans) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t key = keys[i];
  if (i == 0 || keys[i - 1] != key) spans[key].begin = int(i);
  if (i + 1 == count || keys[i + 1] != key) spans[key].end = int(i) + 1;
}

// A warp per (image, offset group, input pixel), a lane per Width channels.
template <class T, class Real, int Width>
__global__ void input_gradient_kernel(const Span* __restrict__ spans,
                                      const uint32_t* __restrict__ entries,
                                      const Real* __restrict__ weights,
                                      const T* __restrict__ column_gradients, Shape s,
                                      int64_t total, T* __restrict__ gradient) {  // [N, plane, C]
  using Vector = Pack<T, Width>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = int(threadIdx.x) % 32;
  if (at >= total) return;  // the whole warp
  const int64_t group = at / s.plane, pixel = at % s.plane, image = group / s.offset_groups;
  const Span span = spans[group * (s.plane + 1) + pixel];
  // Of entries (image, offset group, p, t, corner) to rows (image, p, t).
  const uint32_t skipped = uint32_t((group - image) * s.out_plane * s.taps);
  for (int i = 0; i < s.offset_channels; i += 32 * Width) {
    const int in_group = i + lane * Width;
    const int c = int(group % s.offset_groups) * s.offset_channels +
                  (in_group < s.offset_channels ? in_group : 0);
    const T* const from = column_gradients +
                          int64_t(c / s.group_channels) * s.pixels * s.taps * s.group_channels +
                          c % s.group_channels;
    Real sums[Width] = {};
    for (int first = span.begin; first < span.end; first += 32) {
      const int count = min(32, span.end - first);
      uint32_t row = 0;
      Real weight = Real(0);
      if (lane < count) {
        const uint32_t entry = entries[first + lane];
        row = entry / 4 - skipped, weight = weights[entry];
      }
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const uint32_t its_row = __shfl_sync(~0u, row, j);
        const Real its_weight = __shfl_sync(~0u, weight, j);
        const Vector value =
            *reinterpret_cast<const Vector*>(from + int64_t(its_row) * s.group_channels);
#pragma unroll
        for (int k = 0; k < Width; ++k) sums[k] += its_weight * Real(value.v[k]);
      }
    }
    if (in_group >= s.offset_channels) continue;
    Vector rounded;
#pragma unroll
    for (int k = 0; k < Width; ++k) rounded.v[k] = T(sums[k]);
    *reinterpret_cast<Vector*>(gradient + (image * s.plane + pixel) * s.channels + c) = rounded;
  }
}

// sums[o, c, t] (+)= part[group, t, c, o], as T after the last portion.
template <class T, class Real>
__global__ void add_weights_kernel(const T* __restrict__ part, Shape s, int64_t total, bool first,
                                   bool last, Real* __restrict__ sums, T* __restrict__ result) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int t = int(at % s.taps), c = int(at / s.taps % s.group_channels);
  const int64_t output = at / s.taps / s.group_channels;
  const int64_t group = output / s.group_outputs, o = output % s.group_outputs;
  const Real sum = (first ? Real(0) : sums[at]) +
                   Real(part[((group * s.taps + t) * s.group_channels + c) * s.group_outputs + o]);
  if (last)
    result[at] = T(sum);
  else
    sums[at] = sum;
}

// A block per output.
template <class T, class Real>
__global__ void bias_kernel(const T* __restrict__ grad, int64_t images, int64_t outputs,
                            int64_t plane, T* __restrict__ sums) {
  __shared__ typename BlockReduce<Real, kThreads>::TempStorage storage;
  Real sum = Real(0);
  for (int64_t image = 0; image < images; ++image) {
    const T* const from = grad + (image * outputs + blockIdx.x) * plane;
    for (int64_t i = threadIdx.x; i < plane; i += kThreads) sum += Real(from[i]);
  }
  const Real total = BlockReduce<Real, kThreads>(storage).Sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = T(total);
}

// out = a b, of batches of matrices. Autocast would turn the operands of `matmul` into another
// dtype than the kernels read; it leaves out-variants alone.
void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

struct Gradients {
  Tensor input, offset, weight, bias, mask;
};

void check_sizes(const Problem& p) {
  PYSEG_CHECK(4 * p.offset_groups * p.out_plane() * p.tap_count() <= kMost &&
                  p.offset_groups * (p.plane() + 1) <= kMost,
              "the gradients of an image of ", p.height, " x ", p.width, " pixels with ",
              p.offset_groups * p.tap_count(), " offsets for each of ", p.out_plane(),
              " outputs are more than 2^31 numbers: split the image");
}

template <class T>
void backward(const Problem& p, const Tensor& grad, const Tensor& input, const Tensor& offset,
              const Tensor& weight, const std::optional<Tensor>& mask, Gradients& out,
              cudaStream_t stream) {
  using Real = typename RealOf<T>::type;
  const auto real = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t taps = p.tap_count(), plane = p.plane(), out_plane = p.out_plane();
  const int64_t depth = taps * p.group_channels(),
                image_samples = p.offset_groups * out_plane * taps;
  PYSEG_LAUNCH((bias_kernel<T, Real>), blocks(p.outputs), kThreads, 0, stream, data<T>(grad),
               p.images, p.outputs, out_plane, mutable_data<T>(out.bias));
  Tensor matrix = torch::stable::new_empty(weight, {p.groups, p.group_outputs(), depth});
  PYSEG_LAUNCH((pack_kernel<T>), blocks_for(weight.numel()), kThreads, 0, stream, data<T>(weight),
               int(p.group_outputs()), int(p.group_channels()), int(taps), weight.numel(), false,
               mutable_data<T>(matrix));
  const int64_t together = std::clamp<int64_t>(
      std::min({kColumns / (p.channels * taps * out_plane), kMost / (4 * image_samples),
                kMost / (p.offset_groups * (plane + 1))}),
      1, p.images);
  Tensor weight_sums =
      torch::stable::new_empty(weight, {together < p.images ? weight.numel() : 0}, real);
  for (int64_t start = 0; start < p.images; start += together) {
    const int64_t images = std::min(together, p.images - start);
    const Shape s(p, images);
    const bool fours = sizeof(T) <= 4 && s.reads(4);
    const T* offsets = data<T>(offset) + start * 2 * image_samples;
    const T* masks = mask ? data<T>(mask) + start * image_samples : nullptr;
    Tensor laid_out = torch::stable::new_empty(input, {images, plane + 1, p.channels});
    transpose(data<T>(input) + start * p.channels * plane, images, p.channels, plane, 1, 1,
              mutable_data<T>(laid_out), stream);
    Tensor gradient_rows = torch::stable::new_empty(grad, {p.groups, s.pixels, p.group_outputs()});
    transpose(data<T>(grad) + start * p.outputs * out_plane, images * p.groups, p.group_outputs(),
              out_plane, 0, p.groups, mutable_data<T>(gradient_rows), stream);
    Tensor column_gradients = torch::stable::new_empty(grad, {p.groups, s.pixels, depth});
    multiply(gradient_rows, matrix, column_gradients);

    const int64_t samples = images * image_samples;
    Tensor columns = torch::stable::new_empty(input, {p.groups, s.pixels, depth});
    const auto fill_columns = [&](auto kernel) {
      PYSEG_LAUNCH(kernel, blocks_for(samples * 32), kThreads, 0, stream, data<T>(laid_out),
                   offsets, masks, data<T>(column_gradients), s, samples, mutable_data<T>(columns),
                   mutable_data<T>(out.offset) + start * 2 * image_samples,
                   mask ? mutable_data<T>(out.mask) + start * image_samples : nullptr);
    };
    Tensor part = torch::stable::new_empty(weight, {p.groups, depth, p.group_outputs()});

    const int64_t count = samples * 4, keys_count = images * p.offset_groups * (plane + 1);
    const auto scratch = [&](int64_t bytes) {
      return torch::stable::new_empty(input, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
    };
    Tensor keys = scratch(count * 4), sorted_keys = scratch(count * 4);
    Tensor entries = scratch(count * 4), sorted_entries = scratch(count * 4);
    Tensor weights = scratch(count * int64_t(sizeof(Real)));
    Tensor spans = scratch(keys_count * int64_t(sizeof(Span)));
    PYSEG_LAUNCH((locate_kernel<T, Real>), blocks_for(samples), kThreads, 0, stream, offsets, masks,
                 s, samples, (mutable_data<Pack<uint32_t, 4>>(keys)),
                 (mutable_data<Pack<uint32_t, 4>>(entries)),
                 (mutable_data<Pack<Real, 4>>(weights)));
    int bits = 1;
    while (keys_count >> bits) ++bits;
    std::vector<Tensor> temporaries;
    sort_pairs(
        [&](size_t bytes) -> void* {
          temporaries.push_back(scratch(int64_t(bytes)));
          return temporaries.back().mutable_data_ptr();
        },
        data<uint32_t>(keys), mutable_data<uint32_t>(sorted_keys), data<uint32_t>(entries),
        mutable_data<uint32_t>(sorted_entries), count, stream, 0, bits);
    STD_CUDA_CHECK(cudaMemsetAsync(spans.mutable_data_ptr(), 0, keys_count * sizeof(Span), stream));
    PYSEG_LAUNCH(spans_kernel, blocks_for(count), kThreads, 0, stream, data<uint32_t>(sorted_keys),
                 count, mutable_data<Span>(spans));
    Tensor input_gradient = torch::stable::new_empty(input, {images, plane, p.channels});
    const int64_t inputs = images * p.offset_groups * plane;
    const auto fill_input = [&](auto kernel) {
      PYSEG_LAUNCH(kernel, blocks_for(inputs * 32), kThreads, 0, stream, data<Span>(spans),
                   data<uint32_t>(sorted_entries), data<Real>(weights), data<T>(column_gradients),
                   s, inputs, mutable_data<T>(input_gradient));
    };
    if constexpr (sizeof(T) <= 4) {
      if (fours)
        fill_columns(&columns_kernel<T, Real, 4>), fill_input(&input_gradient_kernel<T, Real, 4>);
    }
    if (!fours)
      fill_columns(&columns_kernel<T, Real, 1>), fill_input(&input_gradient_kernel<T, Real, 1>);
    multiply(torch::stable::transpose(columns, 1, 2), gradient_rows, part);
    PYSEG_LAUNCH((add_weights_kernel<T, Real>), blocks_for(weight.numel()), kThreads, 0, stream,
                 data<T>(part), s, weight.numel(), start == 0, start + together >= p.images,
                 mutable_data<Real>(weight_sums), mutable_data<T>(out.weight));
    transpose(data<T>(input_gradient), images, plane, p.channels, 0, 1,
              mutable_data<T>(out.input) + start * p.channels * plane, stream);
  }
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
  const DeviceScope device(input, offset, weight, bias, mask);
  const Problem p = describe(input, offset, weight, bias, mask, stride, padding, dilation);
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
  const DeviceScope device(input, grad, offset, weight, mask);
  const Problem p = describe(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_gradient(p, grad, input);
  check_sizes(p);
  const bool some = grad.numel() != 0;
  const auto like = [&](const Tensor& tensor) {
    return some ? torch::stable::new_empty(tensor, tensor.sizes())
                : torch::stable::new_zeros(tensor, tensor.sizes());
  };
  Gradients out{like(input), like(offset), like(weight),
                some ? torch::stable::new_empty(weight, {p.outputs})
                     : torch::stable::new_zeros(weight, {p.outputs}),
                mask ? like(*mask) : torch::stable::new_empty(input, {0})};
  if (some)
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
