// Deformable convolution on the CPU.
//
// The input is laid out anew, in blocks of some channels with the channels of a pixel together, so
// that a vector holds channels and one position serves all of them. Of a tile of output pixels the
// columns (what the taps read) of a block are gathered and multiplied with the weights at once;
// they stay in the cache, and no matrix of columns of the image exists.
//
// Forward, threads share tiles. Backward, they share blocks: all that is added up, the gradients of
// a block of the input and of its weights, belongs to one thread and is added in the order of
// pixels. How the work is cut depends on the sizes only, so the result has the same bits for every
// number of threads.
#include "deform_conv2d.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/buffer.h"
#include "../common/common.h"
#include "deform_conv2d_simd.h"

namespace pyseg::deformable {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

PYSEG_FUNCTIONS_IN_FORCE

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Taps tap_geometry(const Problem& p) {
  return {int(p.tap_count()), int(p.kernel_width), int(p.dilation_y),
          int(p.dilation_x),  int(p.height),       int(p.width)};
}

// Channels of one weight group and one offset group.
struct Block {
  int64_t group, offset_group;
  int64_t first, width;  // channels
  int64_t depth;         // rows of the product: taps * width
};

// Blocks of about 256 columns, which with their weights fit the second-level cache.
std::vector<Block> cut(const Problem& p) {
  const int64_t taps = p.tap_count();
  const int64_t widest = std::clamp<int64_t>(round_up((256 + taps - 1) / taps, 16), 16, 256);
  const int64_t per_offset_group = p.channels / p.offset_groups;
  std::vector<Block> blocks;
  for (int64_t first = 0; first < p.channels;) {
    const int64_t group = first / p.group_channels(), offset_group = first / per_offset_group;
    const int64_t end =
        std::min((group + 1) * p.group_channels(), (offset_group + 1) * per_offset_group);
    const int64_t width = std::min(widest, end - first);
    blocks.push_back({group, offset_group, first, width, taps * width});
    first += width;
  }
  return blocks;
}

// Of a tile of output pixels, forward, in additions: sampling, and the product, whose vectors do
// several at once.
int64_t tile_cost(const Problem& p) {
  return kTile * p.channels * p.tap_count() * (4 + p.group_outputs() / 4);
}

// Where the taps' positions count from, at the pixels of a tile.
template <class Real>
void base_positions(const Problem& p, int64_t first, int count, Real* y, Real* x) {
  for (int i = 0; i < count; ++i) {
    y[i] = Real((first + i) / p.out_width * p.stride_y - p.padding_y);
    x[i] = Real((first + i) % p.out_width * p.stride_x - p.padding_x);
  }
}

// [channels, plane] -> [plane, channels], with zeros for one more pixel and a vector.
template <class T, class Stored>
void lay_out(Transpose<T, Stored> transpose, const T* in, int64_t channels, int64_t plane,
             Stored* out) {
  transpose(in, plane, channels, plane, out, channels, kLine);
  std::fill_n(out + plane * channels, channels + kPadding, Stored(0));
}

template <class Real>
struct SampleBuffer {
  Buffer<int32_t> indices;
  Buffer<Real> values;
  explicit SampleBuffer(int64_t taps) : indices(taps * 4 * kTile), values(taps * 7 * kTile) {}
  Samples<Real> at(int64_t group, int64_t taps) const {
    return {int(taps), indices.get() + group * taps * 4 * kTile,
            values.get() + group * taps * 7 * kTile};
  }
};

// A number as what is multiplied.
template <class Real, class Column>
Column as_column(Real x) {
  if constexpr (std::is_same_v<Column, uint16_t>)
    return BFloat16(x).x;
  else
    return x;
}

// Column: what the columns and the weights are multiplied as; uint16_t stands for bfloat16, of
// which two neighbours along the depth make one number of the product.
template <class T, class Real, class Column>
void forward(const Problem& p, const T* input, const T* offset, const T* weight, const T* bias,
             const T* mask, T* output) {
  constexpr int64_t kStep = sizeof(Real) / sizeof(Column);
  const Functions<T, Real> f = functions_in_force<T>();
  const std::vector<Block> blocks = cut(p);
  const int64_t taps = p.tap_count(), plane = p.plane(), out_plane = p.out_plane();
  const int64_t tiles = (out_plane + kTile - 1) / kTile;
  const int64_t per_group = p.group_outputs(), columns = round_up(per_group, kPadding);
  std::vector<int64_t> weights_at, block_at;  // of each block
  int64_t weights_size = 0, block_size = 0, deepest = 0;
  for (const Block& block : blocks) {
    weights_at.push_back(weights_size), block_at.push_back(block_size);
    weights_size += round_up(block.depth, kStep) * columns;
    block_size += round_up((plane + 1) * block.width + kPadding, 32);
    deepest = std::max(deepest, block.depth);
  }

  // [depth / kStep, columns, kStep] of each block
  const Buffer<Column> weights(weights_size);
  const int64_t count_of_blocks = int64_t(blocks.size());
  const auto lay_out_weights = [&](int64_t b) {
    const Block& block = blocks[b];
    Column* to = weights.get() + weights_at[b];
    std::fill_n(to, round_up(block.depth, kStep) * columns, Column(0));
    const int64_t first = block.first - block.group * p.group_channels();
    const int64_t row = p.group_channels() * taps;  // of an output's weights
    const T* from = weight + block.group * per_group * row + first * taps;
    for (int64_t start = 0; start < per_group; start += 16)  // whole lines of the cache
      for (int64_t c = 0; c < block.width; ++c)
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t k = t * block.width + c;
          Column* line = to + k / kStep * columns * kStep + k % kStep;
          for (int64_t o = start; o < std::min(per_group, start + 16); ++o)
            line[o * kStep] = as_column<Real, Column>(Real(from[o * row + c * taps + t]));
        }
  };

  const int64_t stride = round_up(deepest, kPadding) + kPadding;  // of a row of columns
  struct Workspace {
    SampleBuffer<Real> samples;
    Buffer<Column> columns;
    Buffer<Real> sums;
    Real y[kTile], x[kTile];
  };
  std::vector<std::unique_ptr<Workspace>> workspaces(torch::stable::get_num_threads());
  // As many images at a time as fit 64 MB, or one.
  const int64_t together =
      std::clamp<int64_t>((int64_t(64) << 20) / (block_size * int64_t(sizeof(Column))), 1,
                          std::max<int64_t>(1, p.images));
  const Buffer<Column> laid_out(block_size * together);
  // What each group's sums begin with.
  const Buffer<Real> biases(p.groups * columns);
  std::fill_n(biases.get(), p.groups * columns, Real(0));
  for (int64_t o = 0; bias && o < p.outputs; ++o)
    biases.get()[o / per_group * columns + o % per_group] = Real(bias[o]);
  for (int64_t start = 0; start < p.images; start += together) {
    const int64_t images = std::min(together, p.images - start);
    // Where threads wait for each other, they wait for the slowest: so the weights come along.
    const int64_t prepared = start == 0 ? count_of_blocks : 0;
    const int64_t items = prepared + images * count_of_blocks;
    const int64_t cost = ((prepared ? 2 * weights_size : 0) + images * block_size) / items;
    for_each(items, cost, [&](int64_t job, int64_t) {
      if (job < prepared) return lay_out_weights(job);
      const int64_t image = (job - prepared) / count_of_blocks;
      const int64_t b = job % count_of_blocks;
      const T* from = input + ((start + image) * p.channels + blocks[b].first) * plane;
      Column* to = laid_out.get() + image * block_size + block_at[b];
      if constexpr (kStep == 1)
        lay_out(f.transpose_in, from, blocks[b].width, plane, to);
      else
        lay_out(f.transpose_bits, reinterpret_cast<const uint16_t*>(from), blocks[b].width, plane,
                to);
    });
    for_each(images * tiles, tile_cost(p), [&](int64_t job, int64_t worker) {
      if (!workspaces[worker])
        workspaces[worker].reset(new Workspace{SampleBuffer<Real>(p.offset_groups * taps),
                                               Buffer<Column>(kTile * stride),
                                               Buffer<Real>(kTile * columns)});
      Workspace& w = *workspaces[worker];
      const int64_t image = job / tiles, n = start + image;
      const int64_t first = job % tiles * kTile;
      const int count = int(std::min<int64_t>(kTile, out_plane - first));
      const int64_t rows = round_up(count, kRowGroup);
      base_positions(p, first, count, w.y, w.x);
      for (int64_t g = 0; g < p.offset_groups; ++g) {
        const int64_t at = (n * p.offset_groups + g) * taps;
        f.locate(offset + at * 2 * out_plane + first,
                 mask ? mask + at * out_plane + first : nullptr, out_plane, tap_geometry(p), w.y,
                 w.x, count, w.samples.at(g, taps));
      }
      for (size_t b = 0; b < blocks.size(); ++b) {
        const Block& block = blocks[b];
        const bool begins = b == 0 || blocks[b - 1].group != block.group;
        const bool ends = b + 1 == blocks.size() || blocks[b + 1].group != block.group;
        const int64_t first_output = block.group * per_group;
        const Real* start_of_sums = begins ? biases.get() + block.group * columns : w.sums.get();
        const int64_t start_stride = begins ? 0 : columns;
        const Column* from = laid_out.get() + image * block_size + block_at[b];
        const Samples<Real> samples = w.samples.at(block.offset_group, taps);
        const Column* right = weights.get() + weights_at[b];
        if constexpr (kStep == 1) {
          f.gather(from, block.width, samples, count, w.columns.get(), stride);
          f.multiply(rows, columns, block.depth, w.columns.get(), stride, 1, right, columns,
                     start_of_sums, start_stride, w.sums.get(), columns);
        } else {
          f.gather_pairs(from, block.width, samples, count, w.columns.get(), stride);
          const int64_t depth = round_up(block.depth, kStep);
          for (int i = 0; i < count; ++i)
            std::fill(w.columns.get() + i * stride + block.depth,
                      w.columns.get() + i * stride + depth, Column(0));
          f.multiply_pairs(rows, columns, depth / kStep,
                           reinterpret_cast<const float*>(w.columns.get()), stride / kStep, 1,
                           reinterpret_cast<const float*>(right), columns, start_of_sums,
                           start_stride, w.sums.get(), columns);
        }
        if (ends)
          f.transpose_out(w.sums.get(), columns, count, per_group,
                          output + (n * p.outputs + first_output) * out_plane + first, out_plane,
                          kLine);
      }
    });
  }
}

template <class T>
struct Outputs {
  T *input, *offset, *weight, *bias, *mask;  // mask may be null
};

template <class T, class Real>
void backward(const Problem& p, const T* grad, const T* input, const T* offset, const T* weight,
              const T* mask, const Outputs<T>& out) {
  const Functions<T, Real> f = functions_in_force<T>();
  const std::vector<Block> blocks = cut(p);
  const int64_t count_of_blocks = int64_t(blocks.size());
  const int64_t taps = p.tap_count(), plane = p.plane(), out_plane = p.out_plane();
  const int64_t tiles = (out_plane + kTile - 1) / kTile;
  const int64_t per_group = p.group_outputs(), padded = round_up(per_group, kRowGroup);

  // The gradient of each group's outputs with a pixel's outputs together: [groups, images,
  // out_plane, padded], and as many rows more as a group of rows may read.
  const int64_t image_size = out_plane * padded;
  const Buffer<Real> gradient(p.groups * p.images * image_size + kRowGroup * padded);
  const auto lay_out_gradient = [&](int64_t job) {
    const int64_t image = job / tiles, first = job % tiles * kTile;  // group, image
    const int64_t end = std::min(out_plane, first + kTile);
    const T* from =
        grad + (image % p.images * p.outputs + image / p.images * per_group) * out_plane;
    Real* to = gradient.get() + image * image_size;
    f.transpose_in(from + first, out_plane, per_group, end - first, to + first * padded, padded,
                   kTile);
    for (int64_t i = first; i < end; ++i)
      std::fill(to + i * padded + per_group, to + (i + 1) * padded, Real(0));
  };
  std::fill_n(gradient.get() + p.groups * p.images * image_size, kRowGroup * padded, Real(0));

  const auto add_up_bias = [&](int64_t o) {
    Real sums[16] = {};
    for (int64_t n = 0; n < p.images; ++n) {
      const T* from = grad + (n * p.outputs + o) * out_plane;
      int64_t i = 0;
      for (; i + 16 <= out_plane; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += Real(from[i + j]);
      for (; i < out_plane; ++i) sums[0] += Real(from[i]);
    }
    out.bias[o] = T(std::accumulate(sums, sums + 16, Real(0)));
  };
  const int64_t rows = p.groups * p.images * tiles;
  for_each(
      rows + p.outputs, 2 * p.outputs * p.images * out_plane / (rows + p.outputs),
      [&](int64_t job, int64_t) { job < rows ? lay_out_gradient(job) : add_up_bias(job - rows); });

  // Several jobs per block where there are few blocks, each with its own images.
  const int64_t parts =
      std::clamp<int64_t>(16 / count_of_blocks, 1, std::max<int64_t>(1, p.images));
  std::vector<Buffer<Real>> weight_gradients(parts * count_of_blocks);  // [padded, columns]
  // Of offsets and mask, per block: [images, taps, 3, out_plane]
  const int64_t offset_size = taps * 3 * out_plane;
  const Buffer<Real> offset_gradients(count_of_blocks * p.images * offset_size);
  const int64_t part_cost =
      3 * p.images * tiles * tile_cost(p) / std::max<int64_t>(1, parts * count_of_blocks);
  for_each(parts * count_of_blocks, part_cost, [&](int64_t job, int64_t) {
    const int64_t b = job % count_of_blocks, part = job / count_of_blocks;
    const Block& block = blocks[b];
    const int64_t columns = round_up(block.depth, kPadding), stride = columns + kPadding;
    const int64_t first_channel = block.first - block.group * p.group_channels();
    const Buffer<Real> weights(per_group * columns);
    for (int64_t o = 0; o < per_group; ++o) {
      Real* to = weights.get() + o * columns;
      const T* from =
          weight + ((block.group * per_group + o) * p.group_channels() + first_channel) * taps;
      std::fill_n(to, columns, Real(0));
      for (int64_t c = 0; c < block.width; ++c)
        for (int64_t t = 0; t < taps; ++t) to[t * block.width + c] = Real(from[c * taps + t]);
    }
    Buffer<Real>& weight_gradient = weight_gradients[job];
    weight_gradient = Buffer<Real>(padded * columns);
    std::fill_n(weight_gradient.get(), padded * columns, Real(0));
    const int64_t block_size = (plane + 1) * block.width + kPadding;
    const Buffer<Real> laid_out(block_size), input_gradient(block_size);
    const SampleBuffer<Real> sample_buffer(taps);
    const Samples<Real> samples = sample_buffer.at(0, taps);
    const Buffer<Real> column(kTile * stride), column_gradient(kTile * stride);
    const Buffer<Real> products(taps * 4 * kTile), zeros(columns);
    std::fill_n(zeros.get(), columns, Real(0));
    Real y[kTile], x[kTile];
    for (int64_t n = part * p.images / parts; n < (part + 1) * p.images / parts; ++n) {
      const int64_t plane_at = (n * p.channels + block.first) * plane;
      lay_out(f.transpose_in, input + plane_at, block.width, plane, laid_out.get());
      std::fill_n(input_gradient.get(), block_size, Real(0));
      const Real* image_gradient = gradient.get() + (block.group * p.images + n) * image_size;
      const int64_t at = (n * p.offset_groups + block.offset_group) * taps * out_plane;
      for (int64_t first = 0; first < out_plane; first += kBackwardTile) {
        const int count = int(std::min<int64_t>(kBackwardTile, out_plane - first));
        base_positions(p, first, count, y, x);
        f.locate(offset + 2 * at + first, mask ? mask + at + first : nullptr, out_plane,
                 tap_geometry(p), y, x, count, samples);
        const Real* tile_gradient = image_gradient + first * padded;
        f.multiply(round_up(count, kRowGroup), columns, per_group, tile_gradient, padded, 1,
                   weights.get(), columns, zeros.get(), 0, column_gradient.get(), stride);
        f.scatter(laid_out.get(), block.width, samples, count, column_gradient.get(), column.get(),
                  stride, input_gradient.get(), products.get());
        f.offset_gradients(samples, count, products.get(),
                           offset_gradients.get() + (b * p.images + n) * offset_size + first,
                           out_plane);
        f.multiply(padded, columns, count, tile_gradient, 1, padded, column.get(), stride,
                   weight_gradient.get(), columns, weight_gradient.get(), columns);
      }
      f.transpose_out(input_gradient.get(), block.width, plane, block.width, out.input + plane_at,
                      plane, kLine);
    }
  });

  const auto add_up_weights = [&](int64_t output) {
    const int64_t group = output / per_group;
    for (int64_t b = 0; b < count_of_blocks; ++b) {
      const Block& block = blocks[b];
      if (block.group != group) continue;
      const int64_t columns = round_up(block.depth, kPadding);
      const int64_t row = output % per_group * columns;
      T* to = out.weight +
              (output * p.group_channels() + block.first - group * p.group_channels()) * taps;
      for (int64_t c = 0; c < block.width; ++c)
        for (int64_t t = 0; t < taps; ++t) {
          Real sum = 0;
          for (int64_t part = 0; part < parts; ++part)
            sum += weight_gradients[part * count_of_blocks + b].get()[row + t * block.width + c];
          to[c * taps + t] = T(sum);
        }
    }
  };
  const auto add_up_offsets = [&](int64_t job) {
    const int64_t t = job % taps, g = job / taps % p.offset_groups;
    const int64_t n = job / taps / p.offset_groups;
    for (int j = 0; j < (mask ? 3 : 2); ++j) {
      T* to = j < 2 ? out.offset + (job * 2 + j) * out_plane : out.mask + job * out_plane;
      constexpr int64_t kPiece = 256;
      for (int64_t first = 0; first < out_plane; first += kPiece) {
        const int64_t count = std::min(kPiece, out_plane - first);
        Real sums[kPiece] = {};
        for (int64_t b = 0; b < count_of_blocks; ++b) {
          if (blocks[b].offset_group != g) continue;
          const Real* from = offset_gradients.get() + (b * p.images + n) * offset_size +
                             (t * 3 + j) * out_plane + first;
          for (int64_t i = 0; i < count; ++i) sums[i] += from[i];
        }
        for (int64_t i = 0; i < count; ++i) to[first + i] = T(sums[i]);
      }
    }
  };
  const int64_t per_offset_group = std::max<int64_t>(1, count_of_blocks / p.offset_groups);
  const int64_t sums = p.images * p.offset_groups * taps;
  const int64_t sums_cost =
      sums * 3 * out_plane * per_offset_group + parts * p.outputs * p.group_channels() * taps;
  for_each(sums + p.outputs, sums_cost / (sums + p.outputs), [&](int64_t job, int64_t) {
    job < sums ? add_up_offsets(job) : add_up_weights(job - sums);
  });
}

Tensor deform_conv2d_cpu(const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
                         const std::optional<Tensor>& bias_, const std::optional<Tensor>& mask_,
                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation) {
  const Problem p = describe(input_, offset_, weight_, bias_, mask_, stride, padding, dilation);
  const Tensor input = packed(input_), offset = packed(offset_);
  const Tensor weight = packed(weight_);
  const auto bias = packed(bias_), mask = packed(mask_);
  Tensor output =
      torch::stable::new_empty(input_, {p.images, p.outputs, p.out_height, p.out_width});
  const auto run = [&]<class T, class Real, class Column>(T, Real, Column) {
    forward<T, Real, Column>(p, data<T>(input), data<T>(offset), data<T>(weight), data<T>(bias),
                             data<T>(mask), mutable_data<T>(output));
  };
  switch (input_.scalar_type()) {
    case ScalarType::Float: run(float(), float(), float()); break;
    case ScalarType::Double: run(double(), double(), double()); break;
    case ScalarType::Half: run(Half(), float(), float()); break;
    case ScalarType::BFloat16:
      if (functions_in_force<BFloat16>().multiply_pairs)
        run(BFloat16(), float(), uint16_t());
      else
        run(BFloat16(), float(), float());
      break;
    default: throw std::invalid_argument("input must be float16, bfloat16, float32 or float64");
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cpu(
    const Tensor& grad_, const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
    const std::optional<Tensor>& mask_, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation) {
  const Problem p =
      describe(input_, offset_, weight_, std::nullopt, mask_, stride, padding, dilation);
  check_gradient(p, grad_, input_);
  const Tensor grad = packed(grad_), input = packed(input_), offset = packed(offset_);
  const Tensor weight = packed(weight_);
  const auto mask = packed(mask_);
  const auto like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes());
  };
  Tensor grad_input = like(input_), grad_offset = like(offset_), grad_weight = like(weight_);
  Tensor grad_bias = torch::stable::new_empty(weight_, {p.outputs});
  Tensor grad_mask = mask ? like(*mask) : torch::stable::new_empty(input_, {0});
  const auto run = [&]<class T, class Real>(T, Real) {
    backward<T, Real>(
        p, data<T>(grad), data<T>(input), data<T>(offset), data<T>(weight), data<T>(mask),
        {mutable_data<T>(grad_input), mutable_data<T>(grad_offset), mutable_data<T>(grad_weight),
         mutable_data<T>(grad_bias), mutable_data<T>(grad_mask)});
  };
  switch (input_.scalar_type()) {
    case ScalarType::Float: run(float(), float()); break;
    case ScalarType::Double: run(double(), double()); break;
    case ScalarType::Half: run(Half(), float()); break;
    case ScalarType::BFloat16: run(BFloat16(), float()); break;
    default: throw std::invalid_argument("input must be float16, bfloat16, float32 or float64");
  }
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace pyseg::deformable

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, "
      "Tensor? mask, int[] stride, int[] padding, int[] dilation) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&pyseg::deformable::deform_conv2d_cpu));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&pyseg::deformable::deform_conv2d_backward_cpu));
}
