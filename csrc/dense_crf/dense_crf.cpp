// Dense CRF on the CPU: mean-field inference of Krähenbühl & Koltun, "Efficient inference in fully
// connected CRFs with Gaussian edge potentials" (2011), with permutohedral lattices, and regular
// grids for kernels over position alone.
//
// The image is cut into tiles whose number depends on its size only. A tile names the lattice
// vertices that its pixels touch by 16-bit numbers of its own and keeps their rows of classes
// together: they stay in the cache while one pass over its pixels slices all lattices, takes the
// softmax and splats into all lattices, so Q is only stored at the end, or in every pass where a
// pixel's own part of its message has to be taken out. Between two passes the tiles' rows are
// summed per vertex in the order of tiles and the lattices are blurred. So the result has the same
// bits for every number of threads.
#include "dense_crf.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/common.h"
#include "arguments.h"
#include "tile_passes.h"

namespace {

using namespace pyseg;
using namespace pyseg::crf;

constexpr int64_t kTileEntries = 1 << 16;  // rows of a tile are named by 16 bits
constexpr int64_t kPiece = 2048;  // lattice vertices that a thread takes at a time
constexpr int64_t kMaxVertices = int64_t(1) << 30;
constexpr uint64_t kNoName = ~uint64_t(0);

// double, which checks gradients, has one level.
template <class Real>
LevelFunctions<Real> level_functions() {
  if constexpr (sizeof(Real) == 4)
    return PYSEG_AT_LEVEL(functions<float>)();
  else
    return generic::functions<double>();
}

// A row of classes, padded so that few vectors hold it: in a lattice, whose size matters, and in
// the memory of a tile, whose alignment matters.
struct RowSize {
  int classes, padded, stride;

  template <class Real>
  static RowSize of(int classes, const LevelFunctions<Real>& functions) {
    int padded = classes <= 4 ? 4 : (classes + 15) / 16 * 16;
    if (sizeof(Real) == 4)
      for (const int few : {24, 20, 16, 8, 4})
        if (classes <= few) padded = few;
    const int lanes = functions.lanes;
    return {classes, padded, padded < lanes ? padded : (padded + lanes - 1) / lanes * lanes};
  }
};

// Calls work(begin, end) for pieces of a range of cheap items.
template <class Work>
void for_ranges(int64_t items, int64_t piece, int64_t cost, Work work) {
  for_each((items + piece - 1) / piece, std::min(items, piece) * cost,
           [&](int64_t i, int64_t) { work(i * piece, std::min(items, (i + 1) * piece)); });
}

// Vertex name -> number, by open addressing.
class VertexTable {
 public:
  explicit VertexTable(int64_t expected) {
    int bits = 8;
    while ((int64_t(1) << bits) < 2 * expected) ++bits;
    resize(bits);
  }
  void clear() {
    std::fill(slots_.begin(), slots_.end(), Slot{kNoName, -1});
    names_.clear();
  }
  const std::vector<uint64_t>& names() const { return names_; }
  // Where there is none, the vertex gets the next number, its place in names().
  PYSEG_INLINE int32_t insert(uint64_t name) {
    const Slot& slot = slots_[place(name)];
    if (__builtin_expect(slot.name == name, 1)) return slot.number;
    return insert_elsewhere(name);
  }
  // Where the table is large, for a name that is asked for later.
  void prefetch(uint64_t name) const { __builtin_prefetch(&slots_[place(name)]); }
  int32_t find(uint64_t name) const {  // -1: absent
    for (uint64_t at = place(name);; at = (at + 1) & mask_)
      if (slots_[at].name == name || slots_[at].name == kNoName) return slots_[at].number;
  }

 private:
  struct Slot {
    uint64_t name;
    int32_t number;
  };
  uint64_t place(uint64_t name) const { return (name * 0x9E3779B97F4A7C15u) >> shift_; }
  __attribute__((noinline)) int32_t insert_elsewhere(uint64_t name) {
    uint64_t at = place(name);
    for (; slots_[at].name != kNoName; at = (at + 1) & mask_)
      if (slots_[at].name == name) return slots_[at].number;
    if (2 * (names_.size() + 1) > slots_.size()) {
      grow();
      for (at = place(name); slots_[at].name != kNoName;) at = (at + 1) & mask_;
    }
    slots_[at] = {name, int32_t(names_.size())};
    names_.push_back(name);
    return slots_[at].number;
  }
  void resize(int bits) {
    slots_.assign(size_t(1) << bits, Slot{kNoName, -1});
    mask_ = (uint64_t(1) << bits) - 1;
    shift_ = 64 - bits;
  }
  void grow() {
    std::vector<Slot> old;
    old.swap(slots_);
    resize(65 - shift_);
    for (const Slot& slot : old) {
      if (slot.name == kNoName) continue;
      uint64_t at = place(slot.name);
      while (slots_[at].name != kNoName) at = (at + 1) & mask_;
      slots_[at] = slot;
    }
  }
  std::vector<Slot> slots_;
  uint64_t mask_ = 0;
  int shift_ = 64;
  std::vector<uint64_t> names_;
};

struct Tile {
  int x, y, width, height;
  int64_t first_pixel;
  int64_t first_row, rows;  // of all tiles' rows
};

std::vector<Tile> cut(int64_t height, int64_t width, int entries) {
  const int64_t tallest = std::max<int64_t>(
      1, std::min<int64_t>(kTileHeight, kTileEntries / (kTileWidth * std::max(entries, 1))));
  const int64_t down = (height + tallest - 1) / tallest;
  const int64_t across = (width + kTileWidth - 1) / kTileWidth;
  const int64_t groups = (width + 15) / 16;  // of pixels; a tile begins with a whole one
  std::vector<Tile> tiles;
  int64_t pixels = 0;
  for (int64_t i = 0; i < down; ++i)
    for (int64_t j = 0; j < across; ++j) {
      Tile tile{};
      tile.x = int(groups * j / across * 16);
      tile.width = int(std::min(width, groups * (j + 1) / across * 16)) - tile.x;
      tile.y = int(height * i / down), tile.height = int(height * (i + 1) / down) - tile.y;
      tile.first_pixel = pixels;
      pixels += int64_t(tile.width) * tile.height;
      tiles.push_back(tile);
    }
  return tiles;
}

// Rows that one thread works on.
template <class Real>
struct Scratch {
  Scratch(const std::vector<int64_t>& rows, int stride) {
    const auto elements = [&](int64_t count) { return (count * stride + 15) / 16 * 16; };
    int64_t all = 0;
    for (const int64_t count : rows) all += elements(count);
    memory = Buffer<Real>(all);
    Real* next = memory.get();
    for (const int64_t count : rows) parts.push_back(next), next += elements(count);
  }
  Buffer<Real> memory;
  std::vector<Real*> parts;  // each begins where a cache line does
};

// Messages are matrix^T times the blurred sums, -compatibility times a kernel's weight; rows of
// the matrix are `stride` apart. None is the identity.
template <class Real>
std::vector<Real> mixing_matrix(const Real* compatibility, int classes, int stride,
                                bool transposed) {
  std::vector<Real> matrix;
  if (!compatibility) return matrix;
  matrix.assign(classes * stride, 0);
  for (int i = 0; i < classes; ++i)
    for (int j = 0; j < classes; ++j)
      matrix[i * stride + j] = -compatibility[transposed ? i * classes + j : j * classes + i];
  return matrix;
}

// The lattices of one image, and mean-field inference on them.
template <class Real>
class Crf {
 public:
  struct History {                              // of all iterations, which `backward` needs
    std::vector<Buffer<Real>> sums;  // blurred, of occupied vertices: small next to Q
    std::vector<Buffer<Real>> q;     // [pixels, padded], only without self terms
  };

  Crf(const Settings& settings, int64_t height, int64_t width)
      : settings_(settings), height_(height), width_(width), kernels_(settings.kernels.size()) {
    int rows = 0;  // of a pixel at most
    for (Kernel& kernel : settings_.kernels) {
      kernel.first_entry = entries_;
      if (!kernel.grid) entries_ += kernel.entries;
      rows += kernel.entries;
    }
    tiles_ = cut(height, width, rows);
  }

  void build(const Real* features);
  void infer(const Real* unary, const Real* weights, const Real* compatibility, int classes,
             Real* q, History* history = nullptr) const;
  void backward(const Real* unary, const Real* weights, const Real* compatibility, int classes,
                const Real* gradient, Real* unary_gradient, double* weight_gradients,
                double* compatibility_gradient) const;
  void messages(const Real* q, const Real* weights, int classes, Real* out) const;
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }

 private:
  struct Part {  // of one tile in one kernel's lattice, while it is built
    std::vector<uint64_t> names;
    std::vector<Real> ones;  // the splat of 1 at each
  };

  struct Axis {  // of a grid
    int cell, margin, vertices;
    std::vector<Real> slice, splat;  // [pixels, 2]
  };

  Axis lay(const Kernel& kernel, int axis, int64_t size) const;
  void place_grid(int kernel, int64_t tile);
  VertexNames name_vertices(const Kernel& kernel, const Real* features) const;
  void locate_tile(const Real* features, int64_t tile, std::vector<VertexTable>& tables);
  void merge(int kernel);
  void merge_grid(int kernel);
  void link(int kernel, VertexTable& table);
  void chain(int kernel, const std::vector<int32_t>& neighbours);
  void normalize();
  template <class Visit>
  void filter(const Real* partial, int padded, bool transposed,
              Visit visit, Real* values) const;
  void mix(int kernel, int64_t count, const std::vector<Real>& matrix, Real weight,
           const RowSize& row, Real* values) const;
  void add_gradients(int kernel, const Real* messages, const Real* sums, const Real* factors,
                     int64_t count, double scale, const Real* compatibility, Real weight,
                     int classes, int padded, double* weight_gradients,
                     double* compatibility_gradient) const;
  Buffer<Real> self_shares(const Real* weights) const;
  std::vector<Scratch<Real>> scratch(int row_sets, int stride) const;
  TilePass<Real> tile_pass(const Tile& tile, const Real* unary, const RowSize& row) const;
  // The largest number of a worker that gets a tile, and one more.
  int64_t workers() const {
    return std::min<int64_t>(tiles_.size(), torch::stable::get_num_threads());
  }
  int64_t tile_pixels() const { return height_ * width_ / int64_t(tiles_.size()); }
  // Of a tile: two additions per entry, and the softmax.
  int64_t pass_cost(int width) const { return tile_pixels() * width * (2 * entries_ + 8); }
  Real kernel_scale(const Kernel& kernel) const {
    return Real(pyseg::kernel_scale(kernel, settings_.classic_scale));
  }

  Settings settings_;
  const int64_t height_, width_;
  const int kernels_;
  const LevelFunctions<Real> functions_ = level_functions<Real>();
  int entries_ = 0;
  std::vector<Tile> tiles_;
  std::vector<std::vector<Axis>> grids_;     // [kernels] x and y, or none
  std::vector<GridPass<Real>> grid_passes_;  // [tiles, kernels with a grid]
  std::vector<VertexNames> names_;
  std::vector<std::vector<Part>> parts_;       // [kernels][tiles]
  Buffer<uint16_t> pixel_rows_;     // [pixels, entries], pixels in the order of tiles
  Buffer<Real> slice_, splat_;      // [pixels, entries]; no splat_: the same as slice_
  Buffer<Real> self_;               // [pixels, kernels] of Q in a pixel's own message
  Buffer<int32_t> row_vertex_;      // [rows of all tiles] vertex
  std::vector<int64_t> first_vertex_;          // [kernels + 1]; vertex 0 is the one that is absent
  std::vector<int64_t> occupied_;              // [kernels] those that pixels touch; they come first
  std::vector<std::vector<Chains>> chains_;    // [kernels][blurs that differ]
  std::vector<int32_t> starts_, vertex_rows_;  // rows of each vertex, in the order of tiles
};

template <class Real>
VertexNames Crf<Real>::name_vertices(const Kernel& kernel, const Real* features) const {
  const int d = kernel.features;
  double low[kMaxFeatures], high[kMaxFeatures];
  for (int i = 0; i < d; ++i) {
    const int channel = kernel.channels[i];
    low[i] = 0, high[i] = double(channel == -2 ? width_ : height_) - 1;
    if (channel >= 0) {
      const int64_t pixels = height_ * width_;
      PYSEG_CHECK(functions_.range_of(features + channel * pixels, pixels, low[i], high[i]),
                  "image or features hold NaN or infinity");
    }
    const double scale = feature_scale(i, kernel.sigmas[i], kernel.blur);
    low[i] *= scale, high[i] *= scale;
  }
  VertexNames names{};
  PYSEG_CHECK(pyseg::name_vertices(d, low, high, kernel.blur.rings, 64, names),
              "a sigma is too small: the features span too many cells of the lattice to be told "
              "apart; use a larger sigma or scale that feature down");
  return names;
}

template <class Real>
void Crf<Real>::locate_tile(const Real* features, int64_t index, std::vector<VertexTable>& tables) {
  Tile& tile = tiles_[index];
  uint16_t* const rows = pixel_rows_.get() + tile.first_pixel * entries_;
  Real* const weights = slice_.get() + tile.first_pixel * entries_;
  Real feature[kMaxFeatures * kTileWidth], weight[(kMaxFeatures + 1) * kTileWidth];
  uint64_t vertices[(kMaxFeatures + 1) * kTileWidth];
  tile.rows = 0;
  for (int l = 0; l < kernels_; ++l) {
    if (settings_.kernels[l].grid) {
      place_grid(l, index);
      continue;
    }
    const Kernel& kernel = settings_.kernels[l];
    const int d = kernel.features;
    const auto locate = functions_.locate[d - 1];
    Part& part = parts_[l][index];
    VertexTable& table = tables[l];
    table.clear();
    int64_t entry = kernel.first_entry;
    for (int y = tile.y; y < tile.y + tile.height; ++y) {
      for (int i = 0; i < d; ++i) {
        const int channel = kernel.channels[i];
        const Real scale = Real(feature_scale(i, kernel.sigmas[i], kernel.blur));
        Real* const to = feature + i * kTileWidth;
        if (channel >= 0) {
          const Real* const from = features + (channel * height_ + y) * width_ + tile.x;
          for (int x = 0; x < tile.width; ++x) to[x] = from[x] * scale;
        } else {
          for (int x = 0; x < tile.width; ++x) to[x] = Real(channel == -1 ? y : tile.x + x) * scale;
        }
      }
      locate(feature, names_[l], tile.width, weight, vertices);
      for (int x = 0; x < tile.width; ++x, entry += entries_)
        for (int k = 0; k <= d; ++k) {
          const uint64_t name = vertices[k * kTileWidth + x];
          const int32_t row = table.insert(name);
          rows[entry + k] = uint16_t(row + tile.rows);
          weights[entry + k] = weight[k * kTileWidth + x];
        }
    }
    part.names = table.names();
    part.ones.assign(part.names.size(), 0);
    const int64_t end = int64_t(tile.width) * tile.height * entries_;
    for (int64_t i = kernel.first_entry; i < end; i += entries_)
      for (int k = 0; k <= d; ++k) part.ones[rows[i + k] - tile.rows] += weights[i + k];
    tile.rows += part.names.size();
  }
}

// An axis of a grid: each pixel's weights, normalised, of the vertices before and after it.
template <class Real>
typename Crf<Real>::Axis Crf<Real>::lay(const Kernel& kernel, int axis, int64_t size) const {
  const int cell = kernel.cell[axis], margin = kernel.margin(), passes = kernel.blur.passes;
  const double spread = kernel.spread[axis], scale = axis_scale(kernel, axis);
  Axis laid{cell, margin, int((size - 1) / cell) + 2 + 2 * margin, {}, {}};
  std::vector<double> sums(laid.vertices), blurred(laid.vertices);
  const auto after = [&](int64_t at) { return double(at % cell) / cell; };
  for (int64_t at = 0; at < size; ++at) {
    sums[at / cell + margin] += 1 - after(at);
    sums[at / cell + margin + 1] += after(at);
  }
  for (int pass = 0; pass < passes; ++pass) {
    for (int v = 0; v < laid.vertices; ++v)
      blurred[v] = (1 - 2 * spread) * sums[v] +
                   spread * ((v ? sums[v - 1] : 0) + (v + 1 < laid.vertices ? sums[v + 1] : 0));
    sums.swap(blurred);
  }
  for (int64_t at = 0; at < size; ++at) {
    const double* const around = sums.data() + at / cell + margin;
    const double sum = scale * ((1 - after(at)) * around[0] + after(at) * around[1]);
    double slice = 1, splat = 1;
    switch (settings_.normalization) {
      case Normalization::none: break;
      case Normalization::symmetric: slice = splat = 1 / std::sqrt(sum); break;
      case Normalization::before: splat = 1 / sum; break;
      case Normalization::after: slice = 1 / sum; break;
    }
    for (const double weight : {1 - after(at), after(at)}) {
      laid.slice.push_back(Real(slice * weight));
      laid.splat.push_back(Real(splat * weight));
    }
  }
  return laid;
}

// The rows of a tile in a grid: all vertices around its pixels.
template <class Real>
void Crf<Real>::place_grid(int l, int64_t index) {
  Tile& tile = tiles_[index];
  const Axis &x = grids_[l][0], &y = grids_[l][1];
  const int wide = (tile.x + tile.width - 1) / x.cell - tile.x / x.cell + 2;
  const int high = (tile.y + tile.height - 1) / y.cell - tile.y / y.cell + 2;
  Part& part = parts_[l][index];
  for (int i = 0; i < high; ++i)
    for (int j = 0; j < wide; ++j)
      part.names.push_back(uint64_t(tile.y / y.cell + y.margin + i) * x.vertices +
                           (tile.x / x.cell + x.margin + j));
  part.ones.assign(part.names.size(), 0);  // `lay` normalises
  const auto has_grid = [](const Kernel& kernel) { return kernel.grid; };
  const auto first = settings_.kernels.begin();
  const int64_t before = std::count_if(first, first + l, has_grid);
  grid_passes_[index * (grid_passes_.size() / tiles_.size()) + before] = {
      {x.slice.data() + 2 * tile.x, y.slice.data() + 2 * tile.y},
      {x.splat.data() + 2 * tile.x, y.splat.data() + 2 * tile.y},
      {x.cell, y.cell},
      {tile.x % x.cell, tile.y % y.cell},
      wide,
      int(tile.rows)};
  tile.rows += part.names.size();
}

// Gives the vertices of a kernel their numbers, from 0, in the order in which tiles name them.
template <class Real>
void Crf<Real>::merge(int l) {
  if (settings_.kernels[l].grid) return merge_grid(l);
  int64_t most = 0;
  for (const Part& part : parts_[l]) most += part.names.size();
  VertexTable table(settings_.kernels[l].blur.rings ? 2 * most : most);
  for (size_t t = 0; t < tiles_.size(); ++t) {
    int64_t row = tiles_[t].first_row;
    for (int before = 0; before < l; ++before) row += parts_[before][t].names.size();
    for (const uint64_t name : parts_[l][t].names) row_vertex_[row++] = table.insert(name);
  }
  occupied_[l] = table.names().size();
  link(l, table);
}

// The vertices of a grid are numbered row by row, those of the margin among them.
template <class Real>
void Crf<Real>::merge_grid(int l) {
  for (size_t t = 0; t < tiles_.size(); ++t) {
    int64_t row = tiles_[t].first_row;
    for (int before = 0; before < l; ++before) row += parts_[before][t].names.size();
    for (const uint64_t name : parts_[l][t].names) row_vertex_[row++] = int32_t(name);
  }
  const int wide = grids_[l][0].vertices, high = grids_[l][1].vertices;
  const int64_t count = int64_t(wide) * high;
  occupied_[l] = first_vertex_[l + 1] = count;
  const int x_axis = settings_.kernels[l].channels[1] == -2;
  chains_[l].resize(2);
  for (const bool along_x : {true, false}) {
    Chains& chains = chains_[l][along_x ? x_axis : 1 - x_axis];
    const int length = along_x ? wide : high, step = along_x ? 1 : wide;
    for (int i = 0; i < (along_x ? high : wide); ++i) {
      for (int j = 0; j < length; ++j)
        chains.links.emplace_back(i * (along_x ? wide : 1) + j * step + 1, true, true);
      chains.links.emplace_back();
    }
  }
}

// Adds the empty vertices through which mass passes between occupied ones, and finds neighbours.
template <class Real>
void Crf<Real>::link(int l, VertexTable& table) {
  constexpr int kAhead = 4;
  const int axes = settings_.kernels[l].axes;
  const VertexNames& naming = names_[l];
  const std::vector<uint64_t>& names = table.names();
  std::vector<int32_t> added;  // [vertices within all rings but the last, axes, 2] after and before
  for (int ring = 0; ring < settings_.kernels[l].blur.rings; ++ring) {
    const int64_t begin = added.size() / (2 * axes), end = names.size();
    for (int64_t v = begin; v < end; ++v)
      for (int axis = 0; axis < axes; ++axis) {
        if (v + kAhead < end) {
          table.prefetch(naming.after(names[v + kAhead], axis));
          table.prefetch(naming.before(names[v + kAhead], axis));
        }
        added.push_back(table.insert(naming.after(names[v], axis)));
        added.push_back(table.insert(naming.before(names[v], axis)));
      }
  }
  const int64_t count = names.size(), known = added.size() / (2 * axes);
  std::vector<int32_t> neighbours(axes * count * 2, -1);
  for_each(axes, 2 * count, [&](int64_t axis, int64_t) {
    int32_t* const along = neighbours.data() + axis * count * 2;
    for (int64_t v = 0; v < known; ++v) {
      const int32_t* const beside = added.data() + 2 * (v * axes + axis);
      along[2 * v] = beside[0], along[2 * v + 1] = beside[1];
      along[2 * beside[0] + 1] = along[2 * beside[1]] = int32_t(v);
    }
    for (int64_t v = known; v < count; ++v) {
      if (v + kAhead < count) table.prefetch(naming.after(names[v + kAhead], int(axis)));
      if (along[2 * v] >= 0) continue;
      const int32_t next = table.find(naming.after(names[v], int(axis)));
      if (next < 0) continue;
      along[2 * v] = next;
      along[2 * next + 1] = int32_t(v);
    }
  });
  first_vertex_[l + 1] = count;
  chain(l, neighbours);
}

// Lists the chains of every blur. Mass reaches an empty vertex in some blur, and from another on it
// cannot come back to an occupied one any more; only between these two the vertex takes part.
template <class Real>
void Crf<Real>::chain(int l, const std::vector<int32_t>& neighbours) {
  const Kernel& kernel = settings_.kernels[l];
  const int axes = kernel.axes, blurs = axes * kernel.blur.passes;
  const int64_t count = first_vertex_[l + 1], occupied = occupied_[l];
  const auto along = [&](int blur) { return neighbours.data() + blur % axes * count * 2; };
  // Before which blurs it holds something that matters; [-1] is of absent vertices.
  struct Time {
    uint8_t from, to;
  };
  std::vector<Time> times(1 + count, {uint8_t(axes), uint8_t(blurs - axes)});
  Time* const time = times.data() + 1;
  time[-1] = {255, 0};
  std::fill_n(time, occupied, Time{0, uint8_t(blurs)});
  for (int blur = 0; blur + 1 < axes; ++blur)
    for (int64_t v = occupied; v < count; ++v) {
      const int32_t* const beside = along(blur) + 2 * v;
      const int earliest = std::min(time[beside[0]].from, time[beside[1]].from);
      if (earliest <= blur) time[v].from = std::min(time[v].from, uint8_t(blur + 1));
    }
  for (int blur = blurs - 1; blur > blurs - axes; --blur)
    for (int64_t v = occupied; v < count; ++v) {
      const int32_t* const beside = along(blur) + 2 * v;
      const int latest = std::max(time[beside[0]].to, time[beside[1]].to);
      if (latest > blur) time[v].to = std::max(time[v].to, uint8_t(blur));
    }
  for (int64_t v = occupied; v < count; ++v)
    if (time[v].from > time[v].to) time[v] = time[-1];
  chains_[l].resize(axes * std::min(3, kernel.blur.passes));
  for_each(chains_[l].size(), 2 * count, [&](int64_t number, int64_t) {
    // The first, the last and any other time along an axis.
    const int blur = number < 2 * axes ? int(number) : blurs - 3 * axes + int(number);
    const int32_t* const beside = along(blur);
    const auto takes_part = [&](int64_t v) {
      return time[v].from <= blur + 1 && time[v].to >= blur;
    };
    std::vector<Link>& links = chains_[l][number].links;
    links.reserve(2 * count);
    for (int64_t v = 0; v < count; ++v) {
      if (!takes_part(v) || takes_part(beside[2 * v + 1])) continue;
      for (int64_t w = v; takes_part(w); w = beside[2 * w])
        links.emplace_back(w + 1, time[w].from <= blur, time[w].to > blur);
      links.emplace_back();
    }
  });
}

template <class Real>
void Crf<Real>::build(const Real* features) {
  const int64_t pixels = height_ * width_;
  pixel_rows_ = Buffer<uint16_t>(pixels * entries_);
  slice_ = Buffer<Real>(pixels * entries_);
  parts_.assign(kernels_, std::vector<Part>(tiles_.size()));
  names_.resize(kernels_);
  grids_.resize(kernels_);
  grid_passes_.resize(tiles_.size() *
                      std::count_if(settings_.kernels.begin(), settings_.kernels.end(),
                                    [](const Kernel& kernel) { return kernel.grid; }));
  for (int l = 0; l < kernels_; ++l) {
    const Kernel& kernel = settings_.kernels[l];
    if (!kernel.grid) {
      names_[l] = name_vertices(kernel, features);
      continue;
    }
    const int x = kernel.channels[1] == -2;  // the axis that is x
    grids_[l] = {lay(kernel, x, width_), lay(kernel, 1 - x, height_)};
  }
  std::vector<std::vector<VertexTable>> tables(
      workers(), std::vector<VertexTable>(kernels_, VertexTable(1024)));
  for_each(tiles_.size(), 32 * tile_pixels() * entries_,
           [&](int64_t tile, int64_t worker) { locate_tile(features, tile, tables[worker]); });
  int64_t rows = 0;
  for (Tile& tile : tiles_) {
    tile.first_row = rows;
    rows += tile.rows;
  }
  row_vertex_ = Buffer<int32_t>(rows);
  first_vertex_.assign(kernels_ + 1, 0);
  occupied_.resize(kernels_);
  chains_.resize(kernels_);
  for (int l = 0; l < kernels_; ++l) merge(l);
  first_vertex_[0] = 1;
  for (int l = 0; l < kernels_; ++l) first_vertex_[l + 1] += first_vertex_[l];
  const int64_t vertices = first_vertex_[kernels_];
  PYSEG_CHECK(vertices < kMaxVertices, "more than 2^30 lattice vertices: split the image");
  starts_.assign(vertices + 1, 0);
  vertex_rows_.resize(rows);
  for_each(kernels_, 8 * std::max(rows, vertices), [&](int64_t l, int64_t) {
    const int32_t base = int32_t(first_vertex_[l]);
    for (Chains& chains : chains_[l]) {
      chains.pieces.assign(1, 0);
      for (int64_t i = 0; i < int64_t(chains.links.size()); ++i) {
        chains.links[i].move(base - 1);
        if (chains.links[i].vertex() == 0 && i + 1 - chains.pieces.back() >= kPiece)
          chains.pieces.push_back(i + 1);
      }
      if (chains.pieces.back() < int64_t(chains.links.size()))
        chains.pieces.push_back(chains.links.size());
    }
    const auto each_row = [&](auto visit) {
      for (size_t t = 0; t < tiles_.size(); ++t) {
        int64_t row = tiles_[t].first_row;
        for (int before = 0; before < l; ++before) row += parts_[before][t].names.size();
        for (size_t i = 0; i < parts_[l][t].names.size(); ++i) visit(row + i);
      }
    };
    each_row([&](int64_t row) {
      row_vertex_[row] += base;
      ++starts_[row_vertex_[row]];
    });
  });
  for (int64_t v = 0, sum = 0; v <= vertices; ++v) {
    const int32_t count = starts_[v];
    starts_[v] = int32_t(sum);
    sum += count;
  }
  std::vector<int32_t> next(starts_);
  for (int64_t row = 0; row < rows; ++row) vertex_rows_[next[row_vertex_[row]]++] = int32_t(row);
  normalize();
  parts_.clear();
}

// Sums the tiles' rows of each vertex of a pixel into `values` [vertices, padded], whose row 0 holds
// zeros, calls visit(kernel) and blurs them. Blurs along different axes do not commute where
// vertices are absent: the transposed filter takes them in reverse order.
template <class Real>
template <class Visit>
void Crf<Real>::filter(const Real* partial, int padded, bool transposed, Visit visit, Real* values) const {
  for (int l = 0; l < kernels_; ++l) {
    const Kernel& kernel = settings_.kernels[l];
    const int64_t base = first_vertex_[l];
    for_ranges(occupied_[l], kPiece, 2 * padded, [&](int64_t begin, int64_t end) {
      functions_.combine(partial, starts_.data(), vertex_rows_.data(), base + begin, base + end,
                        padded, values);
    });
    visit(l);
    const int axes = kernel.axes, blurs = axes * kernel.blur.passes;
    const int lists = int(chains_[l].size());
    for (int step = 0; step < blurs; ++step) {
      const int blur = transposed ? blurs - 1 - step : step, axis = kernel.axis_of(blur);
      const int list = kernel.grid            ? axis
                       : blur < axes          ? blur
                       : blur >= blurs - axes ? lists - blurs + blur
                                              : axes + axis;
      const Chains& chains = chains_[l][list];
      const Link* const links = chains.links.data();
      const int64_t pieces = int64_t(chains.pieces.size()) - 1;
      const int64_t cost = 3 * padded * int64_t(chains.links.size()) / std::max<int64_t>(pieces, 1);
      for_each(pieces, cost, [&](int64_t i, int64_t) {
        // A piece ends with the end of a chain.
        functions_.blur(values, links + chains.pieces[i], links + chains.pieces[i + 1] - 1,
                       transposed, Real(kernel.side(axis)), padded);
      });
    }
  }
}

// The row sums of each kernel, less the self terms where those are left out, go into the weights of
// the pixels' entries.
template <class Real>
void Crf<Real>::normalize() {
  const Normalization how = settings_.normalization;
  const bool self_term = settings_.self_term;
  if ((how == Normalization::none && self_term) || kernels_ == 0) return;
  const int padded = RowSize::of(1, functions_).padded;
  const int64_t vertices = first_vertex_[kernels_];
  std::vector<Real> partial(vertex_rows_.size() * padded), values(vertices * padded);
  const int64_t tile_rows = int64_t(vertex_rows_.size()) / int64_t(tiles_.size());
  for_each(tiles_.size(), padded * tile_rows, [&](int64_t t, int64_t) {
    Real* row = partial.data() + tiles_[t].first_row * padded;
    for (int l = 0; l < kernels_; ++l)
      for (const Real one : parts_[l][t].ones) *row = one, row += padded;
  });
  filter(partial.data(), padded, false, [](int) {}, values.data());
  if (how == Normalization::before || how == Normalization::after)
    splat_ = Buffer<Real>(height_ * width_ * entries_);
  if (!self_term) self_ = Buffer<Real>(height_ * width_ * kernels_);
  for_each(tiles_.size(), 4 * tile_pixels() * entries_, [&](int64_t t, int64_t) {
    const Tile& tile = tiles_[t];
    std::vector<Real> sums(tile.rows);
    for (int64_t i = 0; i < tile.rows; ++i)
      sums[i] = values[int64_t(row_vertex_[tile.first_row + i]) * padded];
    const int64_t begin = tile.first_pixel * entries_;
    const int64_t end = begin + int64_t(tile.width) * tile.height * entries_;
    if (splat_.get()) std::copy(slice_.get() + begin, slice_.get() + end, splat_.get() + begin);
    Real* const weights = how == Normalization::before ? splat_.get() : slice_.get();
    for (int l = 0; l < kernels_; ++l) {
      const Kernel& kernel = settings_.kernels[l];
      if (kernel.grid) continue;
      const Real scale = kernel_scale(kernel);
      const SelfTerm<Real> self_term_of(kernel, scale);
      Real* self = self_term ? nullptr : self_.get() + tile.first_pixel * kernels_ + l;
      for (int64_t i = begin + kernel.first_entry; i < end; i += entries_) {
        Real sum = 0;
        for (int k = 0; k <= kernel.features; ++k) sum += weights[i + k] * sums[pixel_rows_[i + k]];
        sum = sum * scale + Real(1e-20);
        bool alone = false;
        if (!self_term) {
          const Real own = self_term_of(weights + i);
          sum -= own;
          alone = sum < Real(kAlone) * own;
          *self = how == Normalization::none ? own : alone ? 0 : own / sum;
          self += kernels_;
        }
        if (how == Normalization::none) continue;
        const Real factor =
            alone ? 0 : Real(1) / (how == Normalization::symmetric ? std::sqrt(sum) : sum);
        for (int k = 0; k <= kernel.features; ++k) weights[i + k] *= factor;
      }
    }
  });
}

// Turns blurred sums of one kernel, or their gradients, into messages.
template <class Real>
void Crf<Real>::mix(int l, int64_t count, const std::vector<Real>& matrix, Real weight,
                    const RowSize& row, Real* values) const {
  const Real factor = weight * kernel_scale(settings_.kernels[l]);
  const int64_t cost = row.padded * (matrix.empty() ? 1 : row.classes);
  for_ranges(count, kPiece, cost, [&](int64_t begin, int64_t end) {
    functions_.mix(values + begin * row.padded, matrix.empty() ? nullptr : matrix.data(), factor,
                   end - begin, row.padded, row.stride, row.classes);
  });
}

// For each thread: `row_sets` times the rows of the largest tile, then the buffer of a TilePass.
template <class Real>
std::vector<Scratch<Real>> Crf<Real>::scratch(int row_sets, int stride) const {
  int64_t rows = 0;
  for (const Tile& tile : tiles_) rows = std::max(rows, tile.rows);
  std::vector<int64_t> sizes(row_sets, rows);
  sizes.push_back(kBufferRows);
  std::vector<Scratch<Real>> scratches;
  for (int64_t i = 0; i < workers(); ++i) {
    scratches.emplace_back(sizes, stride);
    std::fill_n(scratches.back().parts.back(), kBufferRows * stride, Real(0));
  }
  return scratches;
}

// Of a pixel's own Q in its message, before the compatibility, for these weights of the kernels.
template <class Real>
Buffer<Real> Crf<Real>::self_shares(const Real* weights) const {
  if (!self_.get()) return {};
  Buffer<Real> shares(height_ * width_);
  for_ranges(height_ * width_, 1 << 14, 2 * kernels_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      shares[i] = 0;
      for (int l = 0; l < kernels_; ++l) shares[i] += weights[l] * self_[i * kernels_ + l];
    }
  });
  return shares;
}

// What all passes over a tile have in common.
template <class Real>
TilePass<Real> Crf<Real>::tile_pass(const Tile& tile, const Real* unary,
                                    const RowSize& row) const {
  const int64_t entry = tile.first_pixel * entries_;
  TilePass<Real> pass{};
  pass.unary = unary + tile.y * width_ + tile.x;
  pass.rows = pixel_rows_.get() + entry;
  pass.slice = slice_.get() + entry;
  pass.splat = (splat_.get() ? splat_ : slice_).get() + entry;
  pass.plane = height_ * width_, pass.image_width = width_;
  pass.classes = row.classes, pass.padded = row.padded, pass.stride = row.stride;
  pass.entries = entries_;
  pass.width = tile.width, pass.height = tile.height;
  const int64_t grids = grid_passes_.size() / tiles_.size();
  pass.grids = {grid_passes_.data() + (&tile - tiles_.data()) * grids, int(grids)};
  return pass;
}

template <class Real>
void Crf<Real>::infer(const Real* unary, const Real* weights, const Real* compatibility,
                      int classes, Real* q, History* history) const {
  const RowSize row = RowSize::of(classes, functions_);
  const int padded = row.padded, stride = row.stride;
  const int64_t vertices = kernels_ ? first_vertex_[kernels_] : 0, rows = vertex_rows_.size();
  const int iterations = kernels_ ? settings_.iterations : 0;
  const int64_t occupied = std::accumulate(occupied_.begin(), occupied_.end(), int64_t(0));
  const Buffer<Real> partial(rows * padded);
  const Buffer<Real> values(vertices * padded);
  if (vertices) std::fill_n(values.get(), padded, Real(0));
  const std::vector<Real> matrix = mixing_matrix(compatibility, classes, stride, false);
  const Buffer<Real> shares = self_shares(weights);
  const Real* const self = shares.get();  // null with the self terms
  const int64_t row_elements = self ? height_ * width_ * padded : 0;
  const Buffer<Real> own_rows(history ? 0 : row_elements);
  Real* before = own_rows.get();
  const auto scratches = scratch(2, stride);
  std::atomic<bool> not_finite{false};
  for (int step = 0; step <= iterations; ++step) {
    const bool first = step == 0, last = step == iterations;
    if (last && !q) break;
    if (history && self) history->q.push_back(Buffer<Real>(row_elements));
    Real* const after = history && self ? history->q.back().get() : before;
    for_each(tiles_.size(), pass_cost(padded), [&](int64_t t, int64_t worker) {
      const Tile& tile = tiles_[t];
      const std::vector<Real*>& own = scratches[worker].parts;
      if (!first)
        functions_.gather(values.get(), row_vertex_.get() + tile.first_row, tile.rows, padded, stride,
                          own[0]);
      Real* const sums = partial.get() + tile.first_row * padded;  // of this tile
      Real* const out = stride == padded ? sums : own[1];
      if (!last) std::fill_n(out, tile.rows * stride, Real(0));
      bool bad = false;
      TilePass<Real> pass = tile_pass(tile, unary, row);
      pass.q = last ? q + tile.y * width_ + tile.x : nullptr;
      pass.in = first ? nullptr : own[0];
      pass.out = last ? nullptr : out;
      if (self) {
        pass.self = self + tile.first_pixel;
        pass.matrix = matrix.empty() ? nullptr : matrix.data();
        pass.before = before + tile.first_pixel * padded;
        pass.after = after + tile.first_pixel * padded;
      }
      pass.buffer = own[2];
      pass.not_finite = first ? &bad : nullptr;
      functions_.tile(pass);
      if (bad) not_finite = true;
      if (!last && out != sums) functions_.pack(out, tile.rows, padded, stride, sums);
    });
    PYSEG_CHECK(!not_finite,
                "unary holds NaN or infinity; it must be -log(probability): clamp the "
                "probabilities, for example p.clamp_min(1e-6).log().neg()");
    if (last) break;
    before = after;
    filter(partial.get(), padded, false, [](int) {}, values.get());
    if (history) history->sums.push_back(Buffer<Real>(occupied * padded));
    Real* kept = history ? history->sums.back().get() : nullptr;
    for (int l = 0; l < kernels_; ++l) {
      Real* const own = values.get() + first_vertex_[l] * padded;
      if (history) kept = std::copy_n(own, occupied_[l] * padded, kept);
      mix(l, occupied_[l], matrix, weights[l], row, own);
    }
  }
}

// Of any Q [C, H, W], what a step adds to the logits in the Potts model: its sum, over the kernels,
// of their weight times the filtered Q. Not of grids, and with the self terms.
template <class Real>
void Crf<Real>::messages(const Real* q, const Real* weights, int classes, Real* out) const {
  const RowSize row = RowSize::of(classes, functions_);
  const int padded = row.padded, stride = row.stride;
  const int64_t vertices = first_vertex_[kernels_];
  const int64_t cost = tile_pixels() * padded * (entries_ + 4);
  const Buffer<Real> partial(int64_t(vertex_rows_.size()) * padded), values(vertices * padded);
  std::fill_n(values.get(), padded, Real(0));
  const auto scratches = scratch(1, stride);
  const auto each_tile = [&](auto visit) {
    for_each(tiles_.size(), cost, [&](int64_t t, int64_t worker) {
      const Tile& tile = tiles_[t];
      TilePass<Real> pass = tile_pass(tile, q, row);
      pass.buffer = scratches[worker].parts[1];
      visit(tile, pass, scratches[worker].parts[0]);
    });
  };
  each_tile([&](const Tile& tile, TilePass<Real>& pass, Real* rows) {
    std::fill_n(rows, tile.rows * stride, Real(0));
    pass.out = rows;
    functions_.splat_tile(pass);
    functions_.pack(rows, tile.rows, padded, stride, partial.get() + tile.first_row * padded);
  });
  filter(partial.get(), padded, false, [](int) {}, values.get());
  for (int l = 0; l < kernels_; ++l)
    mix(l, occupied_[l], {}, weights[l], row, values.get() + first_vertex_[l] * padded);
  each_tile([&](const Tile& tile, TilePass<Real>& pass, Real* rows) {
    functions_.gather(values.get(), row_vertex_.get() + tile.first_row, tile.rows, padded, stride,
                      rows);
    pass.in = rows;
    pass.q = out + tile.y * width_ + tile.x;
    functions_.slice_tile(pass);
  });
}

// Runs `infer` once more, keeping the blurred sums of each iteration, then goes through the
// iterations backwards and recomputes each Q from them.
template <class Real>
void Crf<Real>::backward(const Real* unary, const Real* weights, const Real* compatibility,
                         int classes, const Real* gradient, Real* unary_gradient,
                         double* weight_gradients, double* compatibility_gradient) const {
  const RowSize row = RowSize::of(classes, functions_);
  const int padded = row.padded, stride = row.stride;
  const int64_t vertices = kernels_ ? first_vertex_[kernels_] : 0, rows = vertex_rows_.size();
  const int iterations = kernels_ ? settings_.iterations : 0;
  History history;
  infer(unary, weights, compatibility, classes, nullptr, &history);
  const Buffer<Real> shares = self_shares(weights);
  const Real* const self = shares.get();  // null with the self terms
  const Buffer<Real> slopes(self ? height_ * width_ * padded : 0);
  const Buffer<Real> partial(rows * padded);
  const Buffer<Real> messages(vertices * padded);
  const Buffer<Real> gradients(vertices * padded);
  for (Real* const buffer : {messages.get(), gradients.get()})
    if (vertices) std::fill_n(buffer, padded, Real(0));
  const auto matrix = mixing_matrix(compatibility, classes, stride, false);
  const auto transposed = mixing_matrix(compatibility, classes, stride, true);
  const auto scratches = scratch(3, stride);
  for (int step = iterations; step >= 0; --step) {
    const bool first = step == 0, last = step == iterations;
    const Real* kept = first ? nullptr : history.sums[step - 1].get();
    const Real* const q = first || !self ? nullptr : history.q[step - 1].get();
    for (int l = 0; l < kernels_ && !first; ++l, kept += occupied_[l - 1] * padded) {
      Real* const own = messages.get() + first_vertex_[l] * padded;
      std::copy_n(kept, occupied_[l] * padded, own);
      mix(l, occupied_[l], matrix, weights[l], row, own);
    }
    for_each(tiles_.size(), 2 * pass_cost(padded), [&](int64_t t, int64_t worker) {
      const Tile& tile = tiles_[t];
      const std::vector<Real*>& own = scratches[worker].parts;
      const int32_t* const vertex = row_vertex_.get() + tile.first_row;
      Real* const sums = partial.get() + tile.first_row * padded;
      Real* const out = stride == padded ? sums : own[1];
      if (!first) {
        functions_.gather(messages.get(), vertex, tile.rows, padded, stride, own[0]);
        std::fill_n(out, tile.rows * stride, Real(0));
      }
      if (!last) functions_.gather(gradients.get(), vertex, tile.rows, padded, stride, own[2]);
      const int64_t corner = tile.y * width_ + tile.x;
      TileBackward<Real> backward{};
      backward.pass = tile_pass(tile, unary, row);
      backward.pass.in = first ? nullptr : own[0];
      backward.pass.out = first ? nullptr : out;
      if (self) {
        backward.pass.self = self + tile.first_pixel;
        backward.pass.matrix = matrix.empty() ? nullptr : matrix.data();
        backward.pass.before = first ? nullptr : q + tile.first_pixel * padded;
        backward.kept = slopes.get() + tile.first_pixel * padded;
        backward.transposed = transposed.empty() ? nullptr : transposed.data();
      }
      backward.pass.buffer = own[3];
      backward.gradient = last ? gradient + corner : nullptr;
      backward.back = last ? nullptr : own[2];
      backward.unary_gradient = unary_gradient + corner;
      functions_.tile_backward(backward);
      if (!first && out != sums) functions_.pack(out, tile.rows, padded, stride, sums);
    });
    if (first) break;
    for (int l = 0; l < kernels_ && self; ++l)
      add_gradients(l, slopes.get(), q, self_.get() + l, height_ * width_, -1, compatibility,
                    weights[l], classes, padded, weight_gradients, compatibility_gradient);
    kept = history.sums[step - 1].get();
    const auto visit = [&](int l) {
      Real* const own = gradients.get() + first_vertex_[l] * padded;
      add_gradients(l, own, kept, nullptr, occupied_[l], kernel_scale(settings_.kernels[l]),
                    compatibility, weights[l], classes, padded, weight_gradients,
                    compatibility_gradient);
      kept += occupied_[l] * padded;
      mix(l, occupied_[l], transposed, weights[l], row, own);
    };
    filter(partial.get(), padded, true, visit, gradients.get());
  }
}

// Of one kernel's weight and of the compatibility, by the products of the gradients of messages
// with the sums that the messages were made of; `messages` and `sums` are of occupied vertices or,
// with `factors`, of pixels.
template <class Real>
void Crf<Real>::add_gradients(int l, const Real* messages, const Real* sums, const Real* factors,
                              int64_t count, double scale, const Real* compatibility, Real weight,
                              int classes, int padded, double* weight_gradients,
                              double* compatibility_gradient) const {
  constexpr int64_t kParts = 16, kExact = 1024;  // so many products are summed in Real
  const int64_t size = compatibility ? classes * classes : 1;
  std::vector<double> products(kParts * size, 0.0);
  for_each(kParts, count / kParts * (compatibility ? size : classes), [&](int64_t part, int64_t) {
    std::vector<Real> few(size);
    for (int64_t begin = count * part / kParts, end = count * (part + 1) / kParts; begin < end;
         begin += kExact) {
      std::fill(few.begin(), few.end(), Real(0));
      functions_.add_products(messages + begin * padded, sums + begin * padded,
                   factors ? factors + begin * kernels_ : nullptr, kernels_,
                   std::min(kExact, end - begin), padded, classes, compatibility != nullptr,
                   few.data());
      for (int64_t i = 0; i < size; ++i) products[part * size + i] += few[i];
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < kParts; ++part) sum += products[part * size + i];
    weight_gradients[l] += scale * sum * (compatibility ? -double(compatibility[i]) : 1);
    if (compatibility) compatibility_gradient[i] -= scale * weight * sum;
  }
}

template <class Real>
bool all_usable(const Tensor& tensor) {
  const Real* const values = tensor.const_data_ptr<Real>();
  return std::all_of(values, values + tensor.numel(), usable<Real>);
}

void check_values(const Arguments& a) {
  for (const Tensor* const tensor : {&a.weights, a.compatibility ? &*a.compatibility : &a.weights})
    PYSEG_CHECK(a.unary.scalar_type() == ScalarType::Float ? all_usable<float>(*tensor)
                                                           : all_usable<double>(*tensor),
                kUnusable);
}

template <class Real>
void infer(const Arguments& a, Tensor& q) {
  const int64_t classes = a.unary.size(1), plane = a.unary.size(2) * a.unary.size(3);
  for (int64_t i = 0; i < a.unary.size(0); ++i) {
    Crf<Real> crf(a.settings, a.unary.size(2), a.unary.size(3));
    crf.build(a.features.const_data_ptr<Real>() + i * a.features.size(1) * plane);
    crf.infer(a.unary.const_data_ptr<Real>() + i * classes * plane,
              a.weights.const_data_ptr<Real>(), data<Real>(a.compatibility), int(classes),
              q.mutable_data_ptr<Real>() + i * classes * plane);
  }
}

template <class Real>
void backward(const Arguments& a, const Tensor& gradient, Tensor& unary, Tensor& weights,
              Tensor& compatibility) {
  const int64_t classes = a.unary.size(1), plane = a.unary.size(2) * a.unary.size(3);
  std::vector<double> of_weights(weights.numel()), of_compatibility(compatibility.numel());
  for (int64_t i = 0; i < a.unary.size(0); ++i) {
    Crf<Real> crf(a.settings, a.unary.size(2), a.unary.size(3));
    crf.build(a.features.const_data_ptr<Real>() + i * a.features.size(1) * plane);
    crf.backward(a.unary.const_data_ptr<Real>() + i * classes * plane,
                 a.weights.const_data_ptr<Real>(), data<Real>(a.compatibility), int(classes),
                 gradient.const_data_ptr<Real>() + i * classes * plane,
                 unary.mutable_data_ptr<Real>() + i * classes * plane, of_weights.data(),
                 of_compatibility.data());
  }
  std::copy(of_weights.begin(), of_weights.end(), weights.mutable_data_ptr<Real>());
  std::copy(of_compatibility.begin(), of_compatibility.end(),
            compatibility.mutable_data_ptr<Real>());
}

Tensor dense_crf_cpu(const Tensor& unary,     // [N, C, H, W] -log(probability), float or double
                     const Tensor& features,  // [N, F, H, W] of the same dtype
                     const Tensor& weights,   // [kernels]
                     const std::optional<Tensor>& compatibility,  // [C, C] penalties; none: Potts
                     std::vector<int64_t> sizes,     // [kernels] features of each kernel
                     std::vector<int64_t> channels,  // of all kernels: -2 x, -1 y, or a plane
                     std::vector<double> sigmas,     // as many
                     int64_t iterations, int64_t normalization, bool self_term, int64_t passes,
                     double spread, int64_t rings) {
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  check_values(a);
  Tensor q = torch::stable::new_empty(a.unary, a.unary.sizes());
  prefer_huge_pages(q.mutable_data_ptr(), q.numel() * q.element_size());
  if (unary.scalar_type() == ScalarType::Float)
    infer<float>(a, q);
  else
    infer<double>(a, q);
  return q;
}

std::tuple<Tensor, Tensor, Tensor> dense_crf_backward_cpu(
    const Tensor& gradient, const Tensor& unary, const Tensor& features, const Tensor& weights,
    const std::optional<Tensor>& compatibility, std::vector<int64_t> sizes,
    std::vector<int64_t> channels, std::vector<double> sigmas, int64_t iterations,
    int64_t normalization, bool self_term, int64_t passes, double spread, int64_t rings) {
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  check_values(a);
  PYSEG_CHECK(shape(gradient) == shape(unary) && gradient.scalar_type() == unary.scalar_type(),
              "the gradient must be ", shape(unary), " of unary's dtype, got ", shape(gradient));
  const Tensor g = torch::stable::contiguous(gradient);
  Tensor of_unary = torch::stable::new_empty(a.unary, a.unary.sizes());
  prefer_huge_pages(of_unary.mutable_data_ptr(), of_unary.numel() * of_unary.element_size());
  Tensor of_weights = torch::stable::new_empty(a.weights, a.weights.sizes());
  const int64_t labels = compatibility ? unary.size(1) : 0;
  Tensor of_compatibility = torch::stable::new_empty(a.weights, {labels, labels});
  if (unary.scalar_type() == ScalarType::Float)
    backward<float>(a, g, of_unary, of_weights, of_compatibility);
  else
    backward<double>(a, g, of_unary, of_weights, of_compatibility);
  return {of_unary, of_weights, of_compatibility};
}

// Lattices that are kept between calls, for callers who take single steps. Python owns the numbers.
struct KeptLattice {
  Crf<float> crf;
  std::vector<float> weights;
};

class KeptLattices {
 public:
  int64_t add(std::shared_ptr<const KeptLattice> lattice) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lattices_.emplace(++last_, std::move(lattice));
    return last_;
  }
  std::shared_ptr<const KeptLattice> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lattices_.find(number);
    PYSEG_CHECK(found != lattices_.end(), "there is no lattice ", number, ", or not any more");
    return found->second;
  }
  void remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lattices_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const KeptLattice>> lattices_;
  int64_t last_ = 0;
};

KeptLattices& kept_lattices() {
  static KeptLattices lattices;
  return lattices;
}

int64_t dense_crf_lattice_cpu(const Tensor& features,  // [1, F, H, W] float
                              const Tensor& weights, std::vector<int64_t> sizes,
                              std::vector<int64_t> channels, std::vector<double> sigmas,
                              int64_t normalization, int64_t passes, double spread) {
  const Arguments a = check(features, features, weights, std::nullopt, sizes, channels, sigmas, 1,
                            normalization, true, passes, spread, 0);
  PYSEG_CHECK(features.size(0) == 1 && features.scalar_type() == ScalarType::Float,
              "features must be [1, F, H, W] float32, got ", shape(features));
  check_values(a);
  const float* const from = a.weights.const_data_ptr<float>();
  auto lattice = std::make_shared<KeptLattice>(
      KeptLattice{Crf<float>(a.settings, features.size(2), features.size(3)),
                  std::vector<float>(from, from + a.weights.numel())});
  lattice->crf.build(a.features.const_data_ptr<float>());
  return kept_lattices().add(std::move(lattice));
}

Tensor dense_crf_messages_cpu(const Tensor& q, int64_t number) {  // [1, C, H, W]
  const auto lattice = kept_lattices().find(number);
  const int64_t height = lattice->crf.height(), width = lattice->crf.width();
  PYSEG_CHECK(q.scalar_type() == ScalarType::Float && q.dim() == 4 && q.size(0) == 1 &&
                  q.size(1) >= 1 && q.size(1) <= kMaxClasses && q.size(2) == height &&
                  q.size(3) == width,
              "q must be [1, C, ", height, ", ", width, "] float32, got ", shape(q));
  const Tensor from = torch::stable::contiguous(q);
  Tensor out = torch::stable::new_empty(from, from.sizes());
  lattice->crf.messages(from.const_data_ptr<float>(), lattice->weights.data(), int(q.size(1)),
                        out.mutable_data_ptr<float>());
  return out;
}

void dense_crf_release(int64_t number) { kept_lattices().remove(number); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // Builds lattices of one image and keeps them under a number until they are released.
  m.def(
      "_dense_crf_lattice(Tensor features, Tensor weights, int[] sizes, int[] channels, float[] "
      "sigmas, int normalization, int passes, float spread) -> int");
  m.def("_dense_crf_messages(Tensor q, int lattice) -> Tensor");
  m.def("_dense_crf_release(int lattice) -> ()");
  m.def(
      "dense_crf(Tensor unary, Tensor features, Tensor weights, Tensor? compatibility, int[] sizes,"
      " int[] channels, float[] sigmas, int iterations, int normalization, bool self_term, int "
      "passes, float spread, int rings) -> Tensor");
  // Gradients of unary, weights and compatibility, [0, 0] where there is none.
  m.def(
      "dense_crf_backward(Tensor gradient, Tensor unary, Tensor features, Tensor weights, Tensor? "
      "compatibility, int[] sizes, int[] channels, float[] sigmas, int iterations, int "
      "normalization, bool self_term, int passes, float spread, int rings) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu));
  m.impl("dense_crf_backward", TORCH_BOX(&dense_crf_backward_cpu));
  m.impl("_dense_crf_lattice", TORCH_BOX(&dense_crf_lattice_cpu));
  m.impl("_dense_crf_messages", TORCH_BOX(&dense_crf_messages_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CompositeExplicitAutograd, m) {
  m.impl("_dense_crf_release", TORCH_BOX(&dense_crf_release));
}
