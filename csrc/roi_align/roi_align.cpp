// Pooling of regions of interest on the CPU: RoIAlign (average or maximum of samples) and RoIPool.
//
// Feature maps are laid out anew in blocks of 64 channels with the channels of a pixel together, so
// that a vector holds channels and the positions of a region serve all of them; only the tiles that
// some region needs. Samples of a bin that touch the same rows and columns are merged: a bin is
// then a weighted sum over a small rectangle of pixels, of which weights are products.
//
// Forward, threads share regions. Backward, they share maps of 64 channels: each belongs to one
// thread, which adds the regions up in the same order whatever the number of threads.
#include "roi_align.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/common.h"
#include "roi_align_simd.h"

namespace pyseg::regions {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// One feature map of one image, as tensors have it.
struct Map {
  int64_t level, image;
  int64_t height, width;
  double scale;
  const void* data;
  int64_t pixel_stride;       // 1, or in the layout channels_last the number of channels
  std::vector<char> touched;  // of each tile of kTile pixels in a row: whether a region needs it

  int64_t plane() const { return height * width; }
};

struct Problem {
  int64_t channels;
  int64_t bins_y, bins_x;
  int64_t sampling_ratio;
  bool aligned;
  RoiMode mode;
  std::vector<Map> maps;
  std::vector<int64_t> map_of;  // of each region
  std::vector<int64_t> order;   // of regions: those of a map together, neighbours near each other
  std::vector<int64_t> first;   // where a map's regions begin in `order`; one more than maps

  int64_t bins() const { return bins_y * bins_x; }
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
};

// Finds the pixels and weights of bins along an axis.
template <class Real>
struct Axis : Pixels<Real> {
  using Pixels<Real>::begin, Pixels<Real>::pixel, Pixels<Real>::weight;
  using Pixels<Real>::distinct, Pixels<Real>::slot;
  std::vector<int> place;  // of any pixel between the first and the last, in `distinct`

  void clear(int64_t bins) {
    begin.assign(1, 0), begin.reserve(bins + 1);
    pixel.clear(), weight.clear();
  }

  void add_weight(int at, Real w) {
    const size_t end = pixel.size();
    for (size_t i = end; i > size_t(begin.back()) && i + 2 > end; --i)
      if (pixel[i - 1] == at) {
        weight[i - 1] += w;
        return;
      }
    pixel.push_back(at), weight.push_back(w);
  }

  // Weights of a bin add up to the share of its samples that count.
  void average(const Bins<Real>& bins, int64_t count, int64_t size) {
    clear(count);
    const Real share = Real(1) / Real(std::max<int64_t>(bins.samples, 1));
    for (int64_t bin = 0; bin < count; ++bin) {
      int64_t sample, end;
      sample_range(bins, bin, -1, double(size), &sample, &end);
      const bool backward = bins.extent < 0;
      for (int64_t i = sample; i < end; ++i) {
        int low;
        Real t;
        const int64_t s = backward ? end - 1 - (i - sample) : i;
        if (!locate(sample_position(bins, bin, s), size, &low, &t)) continue;
        add_weight(low, (1 - t) * share);
        if (t > 0) add_weight(low + 1, t * share);
      }
      begin.push_back(int(pixel.size()));
    }
  }

  void find_distinct() {
    distinct.clear(), slot.clear();
    if (pixel.empty()) return;
    const auto [low, high] = std::minmax_element(pixel.begin(), pixel.end());
    place.assign(*high - *low + 1, 0);
    for (const int at : pixel) place[at - *low] = 1;
    for (int i = 0; i < int(place.size()); ++i)
      if (place[i]) place[i] = int(distinct.size()), distinct.push_back(*low + i);
    for (const int at : pixel) slot.push_back(place[at - *low]);
  }

  void samples(const Bins<Real>& bins, int64_t count, int64_t size) {
    clear(count);
    for (int64_t bin = 0; bin < count; ++bin) {
      int64_t sample, end;
      sample_range(bins, bin, -1, double(size), &sample, &end);
      for (; sample < end; ++sample) {
        int low;
        Real t;
        if (!locate(sample_position(bins, bin, sample), size, &low, &t)) continue;
        pixel.push_back(low), weight.push_back(t);
      }
      begin.push_back(int(pixel.size()));
    }
  }

  void pixels(Real low, Real high, Real scale, int64_t count, int64_t size) {
    clear(count);
    for (int64_t bin = 0; bin < count; ++bin) {
      int first, end;
      pixel_range(low, high, scale, count, bin, size, &first, &end);
      for (int i = first; i < end; ++i) pixel.push_back(i);
      begin.push_back(int(pixel.size()));
    }
  }
};

template <class Real>
void find_bins(const Problem& p, const Map& map, const Real* box, Axis<Real>& y, Axis<Real>& x) {
  const Real scale = Real(map.scale);
  if (p.mode == kMaximumOfPixels) {
    y.pixels(box[1], box[3], scale, p.bins_y, map.height);
    x.pixels(box[0], box[2], scale, p.bins_x, map.width);
    return;
  }
  const auto bins_y = sampled_bins(box[1], box[3], scale, p.aligned, p.sampling_ratio, p.bins_y);
  const auto bins_x = sampled_bins(box[0], box[2], scale, p.aligned, p.sampling_ratio, p.bins_x);
  if (p.mode == kAverageOfSamples)
    y.average(bins_y, p.bins_y, map.height), x.average(bins_x, p.bins_x, map.width);
  else
    y.samples(bins_y, p.bins_y, map.height), x.samples(bins_x, p.bins_x, map.width);
}

PYSEG_FUNCTIONS_IN_FORCE

template <bool Samples, class Real>
void spread_maximum(const Real* gradient, const Integer<Real>* best_index, const Axis<Real>& ys,
                    const Axis<Real>& xs, int64_t channels, const Field<Real>& field) {
  const int64_t rows = int64_t(ys.begin.size()) - 1, columns = int64_t(xs.begin.size()) - 1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j, gradient += kBlock, best_index += kBlock) {
      const Integer<Real> count = xs.begin[j + 1] - xs.begin[j];
      for (int64_t channel = 0; channel < channels; ++channel) {
        if (best_index[channel] < 0) continue;
        const int r = int(ys.begin[i] + best_index[channel] / count);
        const int c = int(xs.begin[j] + best_index[channel] % count);
        Real* to = field.at(ys.pixel[r], xs.pixel[c]) + channel;
        const Real g = gradient[channel];
        if constexpr (Samples) {
          const Real ty = ys.weight[r], tx = xs.weight[c];
          to[0] += (1 - ty) * (1 - tx) * g;
          if (tx > 0) to[field.pixel_stride] += (1 - ty) * tx * g;
          if (ty > 0) to[field.row_stride] += ty * (1 - tx) * g;
          if (ty > 0 && tx > 0) to[field.row_stride + field.pixel_stride] += ty * tx * g;
        } else {
          to[0] += g;
        }
      }
    }
  }
}

// Where the channels of a block are not a multiple of a vector, the field has room for whole ones.
int64_t padded(int64_t channels) { return (channels + kPadding - 1) / kPadding * kPadding; }

// The tiles that a region can reach.
template <class Real>
void touch(Map& map, const Real* box, int64_t (&centre)[2]) {
  int64_t low[2], high[2];
  const int64_t size[2] = {map.width, map.height};
  for (int axis = 0; axis < 2; ++axis) {
    const Real a = cut(box[axis] * Real(map.scale)), b = cut(box[axis + 2] * Real(map.scale));
    // Positions are rounded, and the more the farther out a box begins: see `sample_range`.
    const int64_t margin = 2 + int64_t(1e-6 * (std::fabs(double(a)) + std::fabs(double(b))));
    const int64_t first = int64_t(std::floor(std::min(a, b))) - margin;
    const int64_t last = std::max(int64_t(std::ceil(std::max(a, b))), first + 2) + margin;
    low[axis] = std::clamp<int64_t>(first, 0, size[axis] - 1);
    high[axis] = std::clamp<int64_t>(last, 0, size[axis] - 1);
    centre[axis] = (low[axis] + high[axis]) / 2;
  }
  for (int64_t y = low[1]; y <= high[1]; ++y) {
    const int64_t begin = (y * map.width + low[0]) / kTile;
    const int64_t end = (y * map.width + high[0]) / kTile + 1;
    std::fill(map.touched.begin() + begin, map.touched.begin() + end, char(1));
  }
}

// Else a level is contiguous; then its strides say little: of a dimension of 1 they may be
// anything.
bool channels_last(const Tensor& level) {
  const int64_t channels = level.size(1);
  return channels > 1 && level.stride(1) == 1 && level.stride(3) == channels &&
         level.stride(2) == channels * level.size(3);
}

template <class Real>
Problem make_problem(const std::vector<Tensor>& levels, const Tensor& boxes,
                     const std::vector<double>& scales, const std::vector<int64_t>& output_size,
                     int64_t sampling_ratio, bool aligned, int64_t mode, double canonical_size,
                     int64_t canonical_level) {
  Problem p;
  const int64_t images = levels[0].size(0), regions = boxes.size(0);
  p.channels = levels[0].size(1);
  p.bins_y = output_size[0], p.bins_x = output_size[1];
  p.sampling_ratio = sampling_ratio, p.aligned = aligned, p.mode = RoiMode(mode);
  for (size_t l = 0; l < levels.size(); ++l) {
    const Tensor& level = levels[l];
    for (int64_t image = 0; image < images; ++image) {
      Map map{int64_t(l), image, level.size(2), level.size(3), scales[l], nullptr, 0, {}};
      map.data = static_cast<const char*>(level.const_data_ptr()) +
                 image * level.stride(0) * level.element_size();
      map.pixel_stride = channels_last(level) ? p.channels : 1;
      map.touched.resize((map.plane() + kTile - 1) / kTile);
      p.maps.push_back(std::move(map));
    }
  }
  const Real* box = static_cast<const Real*>(boxes.const_data_ptr());
  std::vector<int> exponents;
  for (const double scale : scales) exponents.push_back(int(std::lround(-std::log2(scale))));
  p.map_of.resize(regions), p.order.resize(regions);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> keys(regions);
  for (int64_t k = 0; k < regions; ++k, box += 5) {
    for (int i = 0; i < 5; ++i)
      PYSEG_CHECK(box[i] == box[i], "boxes must not be NaN, but box ", k, " is");
    PYSEG_CHECK(box[0] >= 0 && box[0] < Real(images) && box[0] == std::floor(box[0]),
                "boxes[:, 0] must be the index of one of ", images, " images, but box ", k, " has ",
                box[0]);
    const int level = box_level(box + 1, int(levels.size()), exponents.data(), Real(canonical_size),
                                int(canonical_level));
    const int64_t at = level * images + int64_t(box[0]);
    int64_t centre[2];
    touch(p.maps[at], box + 1, centre);
    p.map_of[k] = at;
    keys[k] = {at, centre[1] / 8, centre[0]};
  }
  std::iota(p.order.begin(), p.order.end(), 0);
  std::stable_sort(p.order.begin(), p.order.end(),
                   [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (int64_t map = 0, k = 0; map <= int64_t(p.maps.size()); ++map) {
    while (k < regions && p.map_of[p.order[k]] < map) ++k;
    p.first.push_back(k);
  }
  return p;
}

int64_t block_width(const Problem& p, int64_t block) {
  return std::min(kBlock, p.channels - block * kBlock);
}

// Of a region in additions, roughly: where the number of samples follows from the box, it is taken
// to be small.
int64_t region_cost(const Problem& p, int64_t block) {
  const int64_t samples = std::clamp<int64_t>(p.sampling_ratio, 2, 64);
  return p.bins() * (4 * samples * samples + 8) * block_width(p, block) / 2;
}

// Backward, of a block of channels of a map: all its regions, and its pixels.
int64_t map_cost(const Problem& p, int64_t pixels) {
  const int64_t maps = std::max<int64_t>(1, int64_t(p.maps.size()));
  return int64_t(p.order.size()) / maps * region_cost(p, 0) + pixels * block_width(p, 0);
}

// The maps' tiles that are needed, of one block of channels at a time: that stays in the cache.
template <class T, class Real>
class Fields {
 public:
  explicit Fields(const Problem& p) : problem_(p) {
    int64_t size = 0;
    for (size_t m = 0; m < p.maps.size(); ++m) {
      const Map& map = p.maps[m];
      at_.push_back(size);
      if (direct(map)) continue;
      size += map.plane() * padded(std::min(kBlock, p.channels));
      for (size_t t = 0; t < map.touched.size(); ++t)
        if (map.touched[t]) tiles_.push_back({int64_t(m), int64_t(t)});
    }
    data_ = Buffer<Real>(size);
  }

  void lay_out(int64_t block) const {
    constexpr int64_t kTiles = 8;
    const int64_t count = int64_t(tiles_.size());
    const int64_t cost = kTiles * kTile * block_width(problem_, block);
    for_each((count + kTiles - 1) / kTiles, cost, [&](int64_t piece, int64_t) {
      const int64_t end = std::min(count, (piece + 1) * kTiles);
      for (int64_t i = piece * kTiles; i < end; ++i) lay_out(block, tiles_[i]);
    });
  }

  // Of the block that was laid out last.
  Field<const Real> field(int64_t m, int64_t block) const {
    const Map& map = problem_.maps[m];
    if (direct(map))
      return {static_cast<const Real*>(map.data) + block * kBlock, map.pixel_stride,
              map.pixel_stride * map.width};
    const int64_t stride = padded(block_width(problem_, block));
    return {data_.get() + at_[m], stride, stride * map.width};
  }

 private:
  // Whether the tensor already is as needed.
  bool direct(const Map& map) const {
    return std::is_same_v<T, Real> && map.pixel_stride != 1 && problem_.channels % kPadding == 0;
  }

  struct Tile {
    int64_t map, index;
  };

  void lay_out(int64_t block, const Tile& tile) const {
    const Map& map = problem_.maps[tile.map];
    const int64_t first = tile.index * kTile, count = std::min(kTile, map.plane() - first);
    const int64_t channels = block_width(problem_, block), stride = padded(channels);
    const T* from = static_cast<const T*>(map.data);
    Real* to = data_.get() + at_[tile.map] + first * stride;
    if (map.pixel_stride == 1) {
      functions_.lay_out(from + block * kBlock * map.plane() + first, map.plane(), channels, count,
                         to, stride, kTile);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T* pixel = from + (first + i) * map.pixel_stride + block * kBlock;
        for (int64_t c = 0; c < channels; ++c) to[i * stride + c] = Real(pixel[c]);
      }
    }
  }

  const Problem& problem_;
  const Functions<T, Real> functions_ = functions_in_force<T>();
  std::vector<Tile> tiles_;
  std::vector<int64_t> at_;
  Buffer<Real> data_;
};

template <class T, class Real>
void forward(const Problem& p, const Real* boxes, T* out) {
  const Functions<T, Real> f = functions_in_force<T>();
  const auto pool = p.mode == kAverageOfSamples   ? nullptr
                    : p.mode == kMaximumOfSamples ? f.maximum_of_samples
                                                  : f.maximum_of_pixels;
  const Fields<T, Real> fields(p);
  const int64_t workers = torch::stable::get_num_threads();
  std::vector<Axis<Real>> axes(2 * workers);
  const Buffer<Real> pooled(workers * p.bins() * kBlock);
  for (int64_t block = 0; block < p.blocks(); ++block) {
    const int64_t channels = block_width(p, block);
    fields.lay_out(block);
    for_each(int64_t(p.order.size()), region_cost(p, block), [&](int64_t i, int64_t worker) {
      const int64_t k = p.order[i], m = p.map_of[k];
      Axis<Real>&ys = axes[2 * worker], &xs = axes[2 * worker + 1];
      find_bins(p, p.maps[m], boxes + 5 * k + 1, ys, xs);
      Real* bins = pooled.get() + worker * p.bins() * kBlock;
      const Field<const Real> field = fields.field(m, block);
      if (pool)
        pool(field, ys, xs, padded(channels), bins, nullptr);
      else
        f.average(field, ys, xs, padded(channels), bins);
      f.lay_back(bins, kBlock, p.bins(), channels,
                 out + (k * p.channels + block * kBlock) * p.bins(), p.bins(), kTile);
    });
  }
}

template <class T, class Real>
void backward(const Problem& p, const Real* boxes, const T* gradient,
              const std::vector<T*>& outputs) {  // of each level: [images, channels, height, width]
  const Functions<T, Real> f = functions_in_force<T>();
  std::unique_ptr<Fields<T, Real>> fields;
  if (p.mode != kAverageOfSamples) fields = std::make_unique<Fields<T, Real>>(p);
  int64_t largest = 0, widest = 0;
  for (const Map& map : p.maps) {
    largest = std::max(largest, map.plane()), widest = std::max(widest, map.width);
  }
  struct Scratch {
    Axis<Real> ys, xs;
    Buffer<Real> field, bins, line;
    Buffer<Integer<Real>> index;
  };
  std::vector<Scratch> all(torch::stable::get_num_threads());
  const auto work = [&](int64_t m, int64_t block, int64_t worker) {
    const Map& map = p.maps[m];
    const int64_t channels = block_width(p, block), lanes = padded(channels);
    Scratch& s = all[worker];
    if (!s.field.get()) {
      s.field = Buffer<Real>(largest * kBlock), s.bins = Buffer<Real>(p.bins() * kBlock);
      s.line = Buffer<Real>(widest * kBlock);
      s.index = Buffer<Integer<Real>>(fields ? p.bins() * kBlock : 0);
    }
    const int64_t tiles = int64_t(map.touched.size());
    const auto pixels = [&](int64_t tile) { return std::min(kTile, map.plane() - tile * kTile); };
    for (int64_t tile = 0; tile < tiles; ++tile)
      if (map.touched[tile])
        std::memset(s.field.get() + tile * kTile * lanes, 0, pixels(tile) * lanes * sizeof(Real));
    const Field<Real> field{s.field.get(), lanes, lanes * map.width};
    for (int64_t i = p.first[m]; i < p.first[m + 1]; ++i) {
      const int64_t k = p.order[i];
      find_bins(p, map, boxes + 5 * k + 1, s.ys, s.xs);
      if (channels < lanes) std::memset(s.bins.get(), 0, p.bins() * kBlock * sizeof(Real));
      f.lay_out(gradient + (k * p.channels + block * kBlock) * p.bins(), p.bins(), channels,
                p.bins(), s.bins.get(), kBlock, kTile);
      if (p.mode == kAverageOfSamples) {
        s.xs.find_distinct();
        f.spread(s.bins.get(), s.ys, s.xs, lanes, s.line.get(), field);
      } else if (p.mode == kMaximumOfSamples) {
        f.maximum_of_samples(fields->field(m, block), s.ys, s.xs, lanes, nullptr, s.index.get());
        spread_maximum<true>(s.bins.get(), s.index.get(), s.ys, s.xs, channels, field);
      } else {
        f.maximum_of_pixels(fields->field(m, block), s.ys, s.xs, lanes, nullptr, s.index.get());
        spread_maximum<false>(s.bins.get(), s.index.get(), s.ys, s.xs, channels, field);
      }
    }
    T* out = outputs[map.level] + (map.image * p.channels + block * kBlock) * map.plane();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTile;
      if (map.touched[tile])
        f.lay_back(s.field.get() + first * lanes, lanes, pixels(tile), channels, out + first,
                   map.plane(), kTile);
      else
        for (int64_t c = 0; c < channels; ++c)
          std::memset(out + c * map.plane() + first, 0, pixels(tile) * sizeof(T));
    }
  };
  const int64_t maps = int64_t(p.maps.size()), blocks = p.blocks();
  if (!fields) {
    for_each(maps * blocks, map_cost(p, largest),
             [&](int64_t item, int64_t worker) { work(item / blocks, item % blocks, worker); });
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {  // of which there is one at a time in `fields`
    fields->lay_out(block);
    for_each(maps, map_cost(p, largest),
             [&](int64_t m, int64_t worker) { work(m, block, worker); });
  }
}

// Levels that are neither contiguous nor channels_last are copied.
std::vector<Tensor> arranged(const std::vector<Tensor>& levels) {
  std::vector<Tensor> result;
  for (const Tensor& level : levels)
    result.push_back(channels_last(level) ? level : torch::stable::contiguous(level));
  return result;
}

template <class Run>
void dispatch(ScalarType type, Run run) {
  switch (type) {
    case ScalarType::Float: run(float(), float()); break;
    case ScalarType::Double: run(double(), double()); break;
    case ScalarType::Half: run(Half(), float()); break;
    case ScalarType::BFloat16: run(BFloat16(), float()); break;
    default: throw std::invalid_argument("levels must be float16, bfloat16, float32 or float64");
  }
}

Tensor roi_align_cpu(const std::vector<Tensor>& levels,  // [N, C, H, W] each
                     const Tensor& boxes,                // [K, 5]
                     const std::vector<double>& scales, const std::vector<int64_t>& output_size,
                     int64_t sampling_ratio, bool aligned, int64_t mode, double canonical_size,
                     int64_t canonical_level) {
  check_levels(levels);
  Tensor out;
  dispatch(levels[0].scalar_type(), [&]<class T, class Real>(T, Real) {
    check_regions<Real>(levels, boxes, scales, output_size, sampling_ratio, mode, canonical_size,
                        canonical_level);
    out = torch::stable::new_empty(
        levels[0], {boxes.size(0), levels[0].size(1), output_size[0], output_size[1]});
    const std::vector<Tensor> maps = arranged(levels);
    const Tensor regions = torch::stable::contiguous(boxes);
    const Problem p = make_problem<Real>(maps, regions, scales, output_size, sampling_ratio,
                                         aligned, mode, canonical_size, canonical_level);
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * sizeof(T));
    forward<T, Real>(p, static_cast<const Real*>(regions.const_data_ptr()),
                     static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::vector<Tensor> roi_align_backward_cpu(const Tensor& gradient,  // [K, C, bins, bins]
                                           const std::vector<Tensor>& levels, const Tensor& boxes,
                                           const std::vector<double>& scales,
                                           const std::vector<int64_t>& output_size,
                                           int64_t sampling_ratio, bool aligned, int64_t mode,
                                           double canonical_size, int64_t canonical_level) {
  check_levels(levels);
  std::vector<Tensor> results;
  dispatch(levels[0].scalar_type(), [&]<class T, class Real>(T, Real) {
    check_regions<Real>(levels, boxes, scales, output_size, sampling_ratio, mode, canonical_size,
                        canonical_level);
    check_region_gradient(gradient, levels, boxes, output_size);
    const std::vector<Tensor> maps = arranged(levels);
    const Tensor regions = torch::stable::contiguous(boxes);
    const Tensor g = torch::stable::contiguous(gradient);
    for (const Tensor& level : levels)
      results.push_back(torch::stable::new_empty(level, level.sizes()));
    const Problem p = make_problem<Real>(maps, regions, scales, output_size, sampling_ratio,
                                         aligned, mode, canonical_size, canonical_level);
    std::vector<T*> outputs;
    for (Tensor& result : results) {
      outputs.push_back(static_cast<T*>(result.mutable_data_ptr()));
      prefer_huge_pages(outputs.back(), result.numel() * sizeof(T));
    }
    backward<T, Real>(p, static_cast<const Real*>(regions.const_data_ptr()),
                      static_cast<const T*>(g.const_data_ptr()), outputs);
  });
  return results;
}

}  // namespace
}  // namespace pyseg::regions

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "roi_align(Tensor[] levels, Tensor boxes, float[] scales, int[] output_size, "
      "int sampling_ratio, bool aligned, int mode, float canonical_size, int canonical_level) "
      "-> Tensor");
  m.def(
      "_roi_align_backward(Tensor grad, Tensor[] levels, Tensor boxes, float[] scales, "
      "int[] output_size, int sampling_ratio, bool aligned, int mode, float canonical_size, "
      "int canonical_level) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&pyseg::regions::roi_align_cpu));
  m.impl("_roi_align_backward", TORCH_BOX(&pyseg::regions::roi_align_backward_cpu));
}
