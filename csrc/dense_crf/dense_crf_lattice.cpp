// Building the lattices of an image for the dense CRF on the CPU: which vertices its pixels touch
// and with what weights, which of them are neighbours, and what normalises their sums.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "crf_cpu.h"

namespace pyseg::crf {

constexpr int64_t kTileEntries = 1 << 16;  // rows of a tile are named by 16 bits
constexpr int64_t kMaxVertices = int64_t(1) << 30;

// Vertex name -> number of so many bits, by open addressing. A slot holds both, so that four times
// as many slots are in a cache as with a number beside the name; of a name that is too long for
// that, the highest bits are looked up among the names.
template <int NumberBits>
class VertexTable {
 public:
  VertexTable(int64_t expected, int name_bits) : whole_(name_bits <= 64 - NumberBits) {
    int bits = 8;
    while ((int64_t(1) << bits) < 2 * expected) ++bits;
    resize(bits);
  }
  void clear() {
    std::fill(slots_.begin(), slots_.end(), kEmpty);
    names_.clear();
  }
  const std::vector<uint64_t>& names() const { return names_; }
  // Where there is none, the vertex gets the next number, its place in names().
  PYSEG_INLINE int32_t insert(uint64_t name) {
    const uint64_t number = slots_[place(name)] ^ (name << NumberBits);
    if (__builtin_expect(is(number, name), 1)) return int32_t(number);
    return insert_elsewhere(name);
  }
  // Where the table is large, for a name that is asked for later.
  void prefetch(uint64_t name) const { __builtin_prefetch(&slots_[place(name)]); }
  int32_t find(uint64_t name) const {  // -1: absent
    for (uint64_t at = place(name);; at = (at + 1) & mask_) {
      if (slots_[at] == kEmpty) return -1;
      const uint64_t number = slots_[at] ^ (name << NumberBits);
      if (is(number, name)) return int32_t(number);
    }
  }
  // Of the names so far: whether one may be among them, by a bit of its hash.
  void sketch() {
    bits_.assign((slots_.size() >> 4) + 1, 0);
    for (const uint64_t name : names_) bits_[bit(name) >> 6] |= uint64_t(1) << (bit(name) & 63);
  }
  bool may_hold(uint64_t name) const { return bits_[bit(name) >> 6] >> (bit(name) & 63) & 1; }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t(0), kNone = kEmpty >> (64 - NumberBits);
  bool is(uint64_t number, uint64_t name) const {
    return number < kNone && (whole_ || names_[number] == name);
  }
  static uint64_t hash(uint64_t name) { return name * 0x9E3779B97F4A7C15u; }
  uint64_t bit(uint64_t name) const { return hash(name) >> (shift_ - 2); }
  uint64_t place(uint64_t name) const { return hash(name) >> shift_; }
  __attribute__((noinline)) int32_t insert_elsewhere(uint64_t name) {
    uint64_t at = place(name);
    for (; slots_[at] != kEmpty; at = (at + 1) & mask_) {
      const uint64_t number = slots_[at] ^ (name << NumberBits);
      if (is(number, name)) return int32_t(number);
    }
    if (2 * (names_.size() + 1) > slots_.size()) {
      resize(65 - shift_);
      for (size_t number = 0; number < names_.size(); ++number) put(names_[number], number);
    }
    put(name, names_.size());
    names_.push_back(name);
    return int32_t(names_.size() - 1);
  }
  void put(uint64_t name, uint64_t number) {
    uint64_t at = place(name);
    while (slots_[at] != kEmpty) at = (at + 1) & mask_;
    slots_[at] = name << NumberBits | number;
  }
  void resize(int bits) {
    slots_.assign(size_t(1) << bits, kEmpty);
    mask_ = (uint64_t(1) << bits) - 1;
    shift_ = 64 - bits;
  }
  const bool whole_;
  std::vector<uint64_t> slots_, names_, bits_;
  uint64_t mask_ = 0;
  int shift_ = 64;
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

template <class Real>
Crf<Real>::Crf(const Settings& settings, int64_t height, int64_t width)
    : settings_(settings), height_(height), width_(width), kernels_(settings.kernels.size()) {
  int rows = 0;  // of a pixel at most
  for (Kernel& kernel : settings_.kernels) {
    kernel.first_entry = entries_;
    if (!kernel.grid) entries_ += kernel.entries;
    rows += kernel.entries;
  }
  tiles_ = cut(height, width, rows);
}
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
void Crf<Real>::locate_tile(const Real* features, int64_t index, std::vector<TileTable>& tables) {
  Tile& tile = tiles_[index];
  uint16_t* const rows = pixel_rows_.get() + tile.first_pixel * entries_;
  Real* const weights = slice_.get() + tile.first_pixel * entries_;
  Real feature[kMaxFeatures * kTileWidth] = {};  // read in whole vectors
  Real weight[(kMaxFeatures + 1) * kTileWidth];
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
    TileTable& table = tables[l];
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
  WholeTable table(settings_.kernels[l].blur.rings ? 2 * most : most, names_[l].bits);
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
void Crf<Real>::link(int l, WholeTable& table) {
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
  table.sketch();
  for_each(axes, 2 * count, [&](int64_t axis, int64_t) {
    int32_t* const along = neighbours.data() + axis * count * 2;
    for (int64_t v = 0; v < known; ++v) {
      const int32_t* const beside = added.data() + 2 * (v * axes + axis);
      along[2 * v] = beside[0], along[2 * v + 1] = beside[1];
      along[2 * beside[0] + 1] = along[2 * beside[1]] = int32_t(v);
    }
    for (int64_t v = known; v < count; ++v) {
      if (along[2 * v] >= 0) continue;
      const uint64_t after = naming.after(names[v], int(axis));
      if (!table.may_hold(after)) continue;
      const int32_t next = table.find(after);
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
  std::vector<TileTable> empty;
  for (const VertexNames& names : names_) empty.emplace_back(1024, names.bits);
  std::vector<std::vector<TileTable>> tables(workers(), empty);
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
    if (splat_.get())
      std::copy_n(slice_.get() + begin, int64_t(tile.width) * tile.height * entries_,
                  splat_.get() + begin);
    Real* const weights = how == Normalization::before ? splat_.get() : slice_.get();
    for (int l = 0; l < kernels_; ++l) {
      const Kernel& kernel = settings_.kernels[l];
      if (kernel.grid) continue;
      const Real scale = kernel_scale(kernel);
      const SelfTerm<Real> self_term_of(kernel, scale);
      Real* self = self_term ? nullptr : self_.get() + tile.first_pixel * kernels_ + l;
      // Line by line, so that roots and quotients are taken in vectors.
      Real factors[kTileWidth];
      Real* weight = weights + begin + kernel.first_entry;
      const uint16_t* row = pixel_rows_.get() + begin + kernel.first_entry;
      for (int y = 0; y < tile.height; ++y) {
        for (int x = 0; x < tile.width; ++x) {
          Real sum = 0;
          for (int k = 0; k <= kernel.features; ++k)
            sum += weight[x * entries_ + k] * sums[row[x * entries_ + k]];
          factors[x] = sum * scale + Real(1e-20);
        }
        if (!self_term)
          for (int x = 0; x < tile.width; ++x, self += kernels_) {
            const Real own = self_term_of(weight + x * entries_), sum = factors[x] - own;
            const bool alone = sum < Real(kAlone) * own;
            *self = alone ? 0 : how == Normalization::none ? own : own / sum;
            factors[x] = alone ? std::numeric_limits<Real>::infinity() : sum;
          }
        if (how == Normalization::none)
          for (int x = 0; x < tile.width; ++x) factors[x] = std::isinf(factors[x]) ? 0 : 1;
        else if (how == Normalization::symmetric)
          for (int x = 0; x < tile.width; ++x) factors[x] = Real(1) / std::sqrt(factors[x]);
        else
          for (int x = 0; x < tile.width; ++x) factors[x] = Real(1) / factors[x];
        for (int x = 0; x < tile.width; ++x, weight += entries_, row += entries_)
          for (int k = 0; k <= kernel.features; ++k) weight[k] *= factors[x];
      }
    }
  });
}

template Crf<float>::Crf(const Settings&, int64_t, int64_t);
template void Crf<float>::build(const float*);
template Crf<double>::Crf(const Settings&, int64_t, int64_t);
template void Crf<double>::build(const double*);

}  // namespace pyseg::crf
