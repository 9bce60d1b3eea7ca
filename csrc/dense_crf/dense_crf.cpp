// Dense CRF on the CPU: mean-field inference of Krähenbühl & Koltun, "Efficient inference in fully
// connected CRFs with Gaussian edge potentials" (2011), with permutohedral lattices.
//
// The image is cut into tiles whose number depends on its size only. A tile names the lattice
// vertices that its pixels touch by 16-bit numbers of its own and keeps their rows of classes
// together: they stay in the cache while one pass over its pixels slices all lattices, takes the
// softmax and splats into all lattices, so Q is only stored at the end. Between two passes the
// tiles' rows are summed per vertex in the order of tiles and the lattices are blurred. So the
// result has the same bits for every number of threads.
#include "dense_crf.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "../common/common.h"

namespace {

using namespace pyseg;

constexpr int kTileWidth = 128;
constexpr int kTileHeight = 64;
constexpr int64_t kTileEntries = 1 << 16;  // rows of a tile are named by 16 bits
constexpr int kMaxClasses = 256;
constexpr int kMaxBlocks = kMaxClasses / 16;
constexpr int64_t kPiece = 2048;  // lattice vertices that a thread takes at a time
constexpr uint64_t kNoName = ~uint64_t(0);

template <class Real>
struct TilePass {
  const Real* unary;     // the tile's corner in [C, H, W]
  Real* q;               // the same place of the result; null but in the last pass
  const Real* in;        // [tile rows, stride] messages at the vertices; null in the first pass
  Real* out;             // [tile rows, stride] sums at the vertices; null in the last pass
  const uint16_t* rows;  // [pixels, entries] vertices of each pixel
  const Real* slice;     // [pixels, entries] their weights
  const Real* splat;
  Real* buffer;  // [kTileWidth, stride] scratch
  bool* not_finite;
  int64_t plane, image_width;
  int classes, stride, entries, width, height;
};

template <class Real>
struct RowFunctions {
  void (*tile)(const TilePass<Real>&);
  void (*gather)(const Real*, const int32_t*, int64_t, Real*, int, int);
  void (*pack)(const Real*, int64_t, Real*, int, int);
  void (*combine)(const Real*, const int32_t*, const int32_t*, int64_t, int64_t, Real*, int, int);
  void (*blur)(const Real*, const int32_t*, Real, int64_t, int64_t, Real*, int, int);
  void (*mix)(Real*, const Real*, Real, int64_t, int64_t, int, int, int);
};

// Of points [D, kTileWidth]: weights and names of their vertices, [D + 1, kTileWidth].
template <class Real>
using Locate = void (*)(const Real*, const VertexNames&, int, Real*, uint64_t*);

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: everything is inlined
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PYSEG_THREE_TARGETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#include "dense_crf_simd.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#include "dense_crf_simd.h"
}
#pragma GCC pop_options
#endif
namespace generic {
#include "dense_crf_simd.h"
}

template <class Real>
RowFunctions<Real> row_functions(int width) {
#ifdef PYSEG_THREE_TARGETS
  const std::string level = simd_level();
  if (level.find("v4") != std::string::npos) return v4::functions_for<Real>(width);
  if (level.find("v3") != std::string::npos) return v3::functions_for<Real>(width);
#endif
  return generic::functions_for<Real>(width);
}

template <class Real>
Locate<Real> locate_function(int features) {
#ifdef PYSEG_THREE_TARGETS
  const std::string level = simd_level();
  if (level.find("v4") != std::string::npos) return v4::locate_for<Real>(features);
  if (level.find("v3") != std::string::npos) return v3::locate_for<Real>(features);
#endif
  return generic::locate_for<Real>(features);
}

// Classes of a row in a lattice, padded so that few vectors hold it.
template <class Real>
int row_width(int classes) {
  if (sizeof(Real) == 4)
    for (const int width : {4, 8, 16, 20, 24, 32})
      if (classes <= width) return width;
  return (classes + 15) / 16 * 16;
}

// Calls work(item, worker) for every item; which worker takes which is left to chance, so that
// threads that are held up take fewer.
template <class Work>
void for_each(int64_t items, Work work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, worker);
  });
}

// Calls work(begin, end) for pieces of a range of cheap items.
template <class Work>
void for_ranges(int64_t items, int64_t piece, Work work) {
  for_each((items + piece - 1) / piece,
           [&](int64_t i, int64_t) { work(i * piece, std::min(items, (i + 1) * piece)); });
}

// Asks for huge pages, where that means anything: touching small ones for the first time takes
// longer than what is done to the memory here.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
  std::unique_ptr<T[]> memory(new T[n]);
  prefer_huge_pages(memory.get(), n * sizeof(T));
  return memory;
}

// Vertex name -> number, by open addressing.
class VertexTable {
 public:
  explicit VertexTable(int64_t expected) {
    int bits = 8;
    while ((int64_t(1) << bits) < 4 * expected) ++bits;
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
    if (4 * (names_.size() + 1) > slots_.size()) {
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

// One kernel: a Gaussian of `features` channels. Channel -2 is x, -1 is y (pixels), others are
// planes of the features tensor.
struct Kernel {
  int features;
  int first_entry;  // of a pixel's entries, where this kernel's d + 1 begin
  int channels[kMaxFeatures];
  double sigmas[kMaxFeatures];
  Blur blur;
};

enum class Normalization { none = 0, symmetric = 1, before = 2, after = 3 };

struct Settings {
  std::vector<Kernel> kernels;
  int iterations;
  bool classic_scale;  // of kernels that are not normalised: that of Adams et al.
  Normalization normalization;
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

// The lattices of one image, and mean-field inference on them.
template <class Real>
class Crf {
 public:
  Crf(const Settings& settings, int64_t height, int64_t width)
      : settings_(settings), height_(height), width_(width), kernels_(settings.kernels.size()) {
    for (const Kernel& kernel : settings.kernels) entries_ += kernel.features + 1;
    tiles_ = cut(height, width, entries_);
  }

  void build(const Real* features);
  void infer(const Real* unary, const Real* weights, const Real* compatibility, int classes,
             Real* q) const;

 private:
  struct Part {  // of one tile in one kernel's lattice, while it is built
    std::vector<uint64_t> names;
    std::vector<Real> ones;  // the splat of 1 at each
  };

  VertexNames name_vertices(const Kernel& kernel, const Real* features) const;
  void locate_tile(const Real* features, int64_t tile, std::vector<VertexTable>& tables);
  void merge(int kernel);
  void link(int kernel, VertexTable& table);
  void normalize();
  void filter(const Real* partial, const RowFunctions<Real>& functions, int width, Real* values,
              Real* spare) const;
  Real kernel_scale(const Kernel& kernel) const;

  const Settings settings_;
  const int64_t height_, width_;
  const int kernels_;
  int entries_ = 0;
  std::vector<Tile> tiles_;
  std::vector<VertexNames> names_;
  std::vector<Locate<Real>> locate_;           // [kernels]
  std::vector<std::vector<Part>> parts_;       // [kernels][tiles]
  std::unique_ptr<uint16_t[]> pixel_rows_;     // [pixels, entries], pixels in the order of tiles
  std::unique_ptr<Real[]> slice_, splat_;      // [pixels, entries]; no splat_: the same as slice_
  std::unique_ptr<int32_t[]> row_vertex_;      // [rows of all tiles] vertex
  std::vector<int64_t> first_vertex_;          // [kernels + 1]; vertex 0 is the one that is absent
  std::vector<std::vector<int32_t>> links_;    // [kernels][axes, vertices, 2] neighbours
  std::vector<int32_t> starts_, vertex_rows_;  // rows of each vertex, in the order of tiles
};

// The smallest and largest of n values; false where one is not finite.
template <class Real>
PYSEG_MULTIVERSION bool range_of(const Real* values, int64_t n, double& low, double& high) {
  Real least = values[0], most = values[0], bad = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : bad)
  for (int64_t i = 0; i < n; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
    bad += values[i] * Real(0);
  }
  low = least, high = most;
  return bad == 0;
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
      PYSEG_CHECK(range_of(features + channel * pixels, pixels, low[i], high[i]),
                  "image or features hold NaN or infinity");
    }
    const double scale = feature_scale(i, kernel.sigmas[i], kernel.blur);
    low[i] *= scale, high[i] *= scale;
  }
  VertexNames names{};
  names.features = d;
  int bits = 0;
  while ((1 << bits) < d + 1) ++bits;
  names.remainder = (uint64_t(1) << bits) - 1;
  for (int axis = 0; axis < d; ++axis) {  // the same sums as in `locate`
    double least = axis ? -axis * high[axis - 1] : 0, most = axis ? -axis * low[axis - 1] : 0;
    for (int i = axis; i < d; ++i) least += low[i], most += high[i];
    const double margin = 2 + kernel.blur.rings;
    const double range = most - least + 2 * margin + 2;
    int needed = 1;
    while (std::ldexp(1.0, needed) < range) ++needed;
    names.low[axis] = int(std::max(-1e9, std::floor(least - margin)));
    if (bits < 64) names.unit[axis] = uint64_t(1) << bits;
    names.all += names.unit[axis];
    bits += needed;
    PYSEG_CHECK(bits < 64 && std::abs(least) < 4e6 && std::abs(most) < 4e6,
                "a sigma is too small: the features span ", range,
                " cells of the lattice or more, too many to be told apart; use a larger sigma or "
                "scale that feature down");
  }
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
    const Kernel& kernel = settings_.kernels[l];
    const int d = kernel.features;
    const Locate<Real> locate = locate_[l];
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

// Gives the vertices of a kernel their numbers, from 0, in the order in which tiles name them.
template <class Real>
void Crf<Real>::merge(int l) {
  int64_t most = 0;
  for (const Part& part : parts_[l]) most += part.names.size();
  VertexTable table(most);
  for (size_t t = 0; t < tiles_.size(); ++t) {
    int64_t row = tiles_[t].first_row;
    for (int before = 0; before < l; ++before) row += parts_[before][t].names.size();
    for (const uint64_t name : parts_[l][t].names) {
      row_vertex_[row++] = table.insert(name);
    }
  }
  link(l, table);
}

// Adds the empty vertices through which mass passes between occupied ones, and finds neighbours.
template <class Real>
void Crf<Real>::link(int l, VertexTable& table) {
  const int axes = settings_.kernels[l].features + 1;
  const VertexNames& naming = names_[l];
  const std::vector<uint64_t>& names = table.names();
  for (int ring = 0, begin = 0; ring < settings_.kernels[l].blur.rings; ++ring) {
    const int end = int(names.size());
    for (int v = begin; v < end; ++v)
      for (int axis = 0; axis < axes; ++axis) {
        table.insert(naming.after(names[v], axis));
        table.insert(naming.before(names[v], axis));
      }
    begin = end;
  }
  const int64_t count = names.size();
  std::vector<int32_t>& links = links_[l];
  links.assign(count * axes * 2, -1);
  for (int axis = 0; axis < axes; ++axis)
    for (int64_t v = 0; v < count; ++v) {
      const int32_t next = table.find(naming.after(names[v], axis));
      if (next < 0) continue;
      links[(axis * count + v) * 2] = next;
      links[(axis * count + next) * 2 + 1] = int32_t(v);
    }
  first_vertex_[l + 1] = count;
}

template <class Real>
void Crf<Real>::build(const Real* features) {
  const int64_t pixels = height_ * width_;
  pixel_rows_ = uninitialised<uint16_t>(pixels * entries_);
  slice_ = uninitialised<Real>(pixels * entries_);
  parts_.assign(kernels_, std::vector<Part>(tiles_.size()));
  names_.resize(kernels_);
  for (int l = 0; l < kernels_; ++l) {
    names_[l] = name_vertices(settings_.kernels[l], features);
    locate_.push_back(locate_function<Real>(settings_.kernels[l].features));
  }
  std::vector<std::vector<VertexTable>> tables(
      torch::stable::get_num_threads(), std::vector<VertexTable>(kernels_, VertexTable(1024)));
  for_each(tiles_.size(),
           [&](int64_t tile, int64_t worker) { locate_tile(features, tile, tables[worker]); });
  int64_t rows = 0;
  for (Tile& tile : tiles_) {
    tile.first_row = rows;
    rows += tile.rows;
  }
  row_vertex_ = uninitialised<int32_t>(rows);
  first_vertex_.assign(kernels_ + 1, 0);
  links_.resize(kernels_);
  for_each(kernels_, [&](int64_t l, int64_t) { merge(int(l)); });
  first_vertex_[0] = 1;
  for (int l = 0; l < kernels_; ++l) first_vertex_[l + 1] += first_vertex_[l];
  const int64_t vertices = first_vertex_[kernels_];
  starts_.assign(vertices + 1, 0);
  vertex_rows_.resize(rows);
  for_each(kernels_, [&](int64_t l, int64_t) {
    const int32_t base = int32_t(first_vertex_[l]);
    for (int32_t& link : links_[l]) link = link < 0 ? 0 : link + base;
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

// Sums the tiles' rows of each vertex and blurs them; the result is in `values`. Both buffers are
// [vertices, width] and hold zeros in row 0.
template <class Real>
void Crf<Real>::filter(const Real* partial, const RowFunctions<Real>& functions, int width,
                       Real* values, Real* spare) const {
  const int n = width / 16;
  for (int l = 0; l < kernels_; ++l) {
    const Blur& blur = settings_.kernels[l].blur;
    const Real side = Real(blur.spread / (1 - 2 * blur.spread));
    const int axes = settings_.kernels[l].features + 1, steps = blur.passes * axes;
    const int64_t base = first_vertex_[l], count = first_vertex_[l + 1] - base;
    Real *from = steps % 2 ? spare : values, *to = steps % 2 ? values : spare;
    for_ranges(count, kPiece, [&](int64_t begin, int64_t end) {
      functions.combine(partial, starts_.data(), vertex_rows_.data(), base + begin, base + end,
                        from, n, width);
    });
    for (int step = 0; step < steps; ++step) {
      const int32_t* const links = links_[l].data() + step % axes * count * 2;
      for_ranges(count, kPiece, [&](int64_t begin, int64_t end) {
        functions.blur(from, links + begin * 2, side, base + begin, base + end, to, n, width);
      });
      std::swap(from, to);
    }
  }
}

// The row sums of each kernel go into the weights of the pixels' entries.
template <class Real>
void Crf<Real>::normalize() {
  const Normalization how = settings_.normalization;
  if (how == Normalization::none || kernels_ == 0) return;
  const int width = row_width<Real>(1);
  const int64_t vertices = first_vertex_[kernels_];
  std::vector<Real> partial(vertex_rows_.size() * width), values(vertices * width),
      spare(vertices * width);
  for_each(tiles_.size(), [&](int64_t t, int64_t) {
    Real* row = partial.data() + tiles_[t].first_row * width;
    for (int l = 0; l < kernels_; ++l)
      for (const Real one : parts_[l][t].ones) *row = one, row += width;
  });
  filter(partial.data(), row_functions<Real>(width), width, values.data(), spare.data());
  if (how != Normalization::symmetric) splat_ = uninitialised<Real>(height_ * width_ * entries_);
  for_each(tiles_.size(), [&](int64_t t, int64_t) {
    const Tile& tile = tiles_[t];
    std::vector<Real> sums(tile.rows);
    for (int64_t i = 0; i < tile.rows; ++i)
      sums[i] = values[int64_t(row_vertex_[tile.first_row + i]) * width];
    const int64_t begin = tile.first_pixel * entries_;
    const int64_t end = begin + int64_t(tile.width) * tile.height * entries_;
    if (splat_) std::copy(slice_.get() + begin, slice_.get() + end, splat_.get() + begin);
    Real* const weights = how == Normalization::before ? splat_.get() : slice_.get();
    for (int l = 0; l < kernels_; ++l) {
      const Kernel& kernel = settings_.kernels[l];
      const Real scale = kernel_scale(kernel);
      for (int64_t i = begin + kernel.first_entry; i < end; i += entries_) {
        Real sum = 0;
        for (int k = 0; k <= kernel.features; ++k) sum += weights[i + k] * sums[pixel_rows_[i + k]];
        sum = sum * scale + Real(1e-20);
        const Real factor = Real(1) / (how == Normalization::symmetric ? std::sqrt(sum) : sum);
        for (int k = 0; k <= kernel.features; ++k) weights[i + k] *= factor;
      }
    }
  });
}

// What makes the lattice's kernel 1 at distance 0, as exp(0) is. The classic value is that of
// Adams et al.; ours keeps the integral over space, which is what a dense image sums.
template <class Real>
Real Crf<Real>::kernel_scale(const Kernel& kernel) const {
  const double d = kernel.features;
  const Blur& blur = kernel.blur;
  if (settings_.classic_scale) return Real(1 / (1 + std::exp2(-d)));
  return Real(std::pow(2 * M_PI * blur.variance(), d / 2) * std::sqrt(d + 1) *
              std::pow(1 - 2 * blur.spread, blur.passes * (d + 1)));
}

template <class Real>
void Crf<Real>::infer(const Real* unary, const Real* weights, const Real* compatibility,
                      int classes, Real* q) const {
  const int width = row_width<Real>(classes), stride = (width + 15) / 16 * 16, n = width / 16;
  const RowFunctions<Real> functions = row_functions<Real>(width);
  const int64_t vertices = kernels_ ? first_vertex_[kernels_] : 0, rows = vertex_rows_.size();
  const int iterations = kernels_ ? settings_.iterations : 0;
  const auto partial = uninitialised<Real>(rows * width);
  const auto values = uninitialised<Real>(vertices * width);
  const auto spare = uninitialised<Real>(vertices * width);
  if (vertices) std::fill_n(values.get(), width, Real(0)), std::fill_n(spare.get(), width, Real(0));
  // Messages are mix^T times the blurred sums: the kernel's weight, times -compatibility.
  std::vector<Real> mix;
  if (compatibility) {
    mix.assign(classes * stride, 0);
    for (int to = 0; to < classes; ++to)
      for (int from = 0; from < classes; ++from)
        mix[from * stride + to] = -compatibility[to * classes + from];
  }
  int64_t most_rows = 0;
  for (const Tile& tile : tiles_) most_rows = std::max(most_rows, tile.rows);
  struct Scratch {
    std::vector<Real> memory;
    Real *in, *out, *buffer;
  };
  std::vector<Scratch> scratch(torch::stable::get_num_threads());
  for (Scratch& one : scratch) {
    one.memory.resize((2 * most_rows + kTileWidth) * stride + 16);
    one.in = one.memory.data();
    while (reinterpret_cast<uintptr_t>(one.in) % 64) ++one.in;  // a vector in one cache line
    one.out = one.in + most_rows * stride;
    one.buffer = one.out + most_rows * stride;
  }
  std::atomic<bool> not_finite{false};
  for (int step = 0; step <= iterations; ++step) {
    const bool first = step == 0, last = step == iterations;
    for_each(tiles_.size(), [&](int64_t t, int64_t worker) {
      const Tile& tile = tiles_[t];
      const Scratch& own = scratch[worker];
      const int64_t corner = tile.y * width_ + tile.x, entry = tile.first_pixel * entries_;
      if (!first)
        functions.gather(values.get(), row_vertex_.get() + tile.first_row, tile.rows, own.in, n,
                         width);
      if (!last) std::fill_n(own.out, tile.rows * stride, Real(0));
      bool bad = false;
      TilePass<Real> pass{};
      pass.unary = unary + corner;
      pass.q = last ? q + corner : nullptr;
      pass.in = first ? nullptr : own.in;
      pass.out = last ? nullptr : own.out;
      pass.rows = pixel_rows_.get() + entry;
      pass.slice = slice_.get() + entry;
      pass.splat = (splat_ ? splat_ : slice_).get() + entry;
      pass.buffer = own.buffer;
      pass.not_finite = &bad;
      pass.plane = height_ * width_, pass.image_width = width_;
      pass.classes = classes, pass.stride = stride, pass.entries = entries_;
      pass.width = tile.width, pass.height = tile.height;
      functions.tile(pass);
      if (bad) not_finite = true;
      if (!last)
        functions.pack(own.out, tile.rows, partial.get() + tile.first_row * width, n, width);
    });
    PYSEG_CHECK(!not_finite,
                "unary holds NaN or infinity; it must be -log(probability): clamp the "
                "probabilities, for example p.clamp_min(1e-6).log().neg()");
    if (last) break;
    filter(partial.get(), functions, width, values.get(), spare.get());
    for (int l = 0; l < kernels_; ++l) {
      const Real factor = weights[l] * kernel_scale(settings_.kernels[l]);
      const int64_t base = first_vertex_[l];
      for_ranges(first_vertex_[l + 1] - base, kPiece, [&](int64_t begin, int64_t end) {
        functions.mix(values.get(), mix.empty() ? nullptr : mix.data(), factor, base + begin,
                      base + end, n, width, classes);
      });
    }
  }
}

template <class Real>
void dense_crf_typed(const Tensor& unary, const Tensor& features, const Tensor& weights,
                     const std::optional<Tensor>& compatibility, const Settings& settings,
                     Tensor& q) {
  const int64_t images = unary.size(0), classes = unary.size(1),
                plane = unary.size(2) * unary.size(3);
  for (int64_t i = 0; i < images; ++i) {
    Crf<Real> crf(settings, unary.size(2), unary.size(3));
    crf.build(features.const_data_ptr<Real>() + i * features.size(1) * plane);
    crf.infer(unary.const_data_ptr<Real>() + i * classes * plane, weights.const_data_ptr<Real>(),
              compatibility ? compatibility->const_data_ptr<Real>() : nullptr, int(classes),
              q.mutable_data_ptr<Real>() + i * classes * plane);
  }
}

Tensor dense_crf_cpu(const Tensor& unary,     // [N, C, H, W] -log(probability), float or double
                     const Tensor& features,  // [N, F, H, W] of the same dtype
                     const Tensor& weights,   // [kernels]
                     const std::optional<Tensor>& compatibility,  // [C, C] penalties; none: Potts
                     std::vector<int64_t> sizes,     // [kernels] features of each kernel
                     std::vector<int64_t> channels,  // of all kernels: -2 x, -1 y, or a plane
                     std::vector<double> sigmas,     // as many
                     int64_t iterations, int64_t normalization, int64_t passes, double spread,
                     int64_t rings) {
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
    kernel.features = int(size), kernel.first_entry = int(entries);
    for (int64_t i = 0; i < size; ++i, ++at) {
      PYSEG_CHECK(channels[at] >= -2 && channels[at] < features.size(1), "channel ", channels[at],
                  " is not among the ", features.size(1), " features");
      PYSEG_CHECK(sigmas[at] > 0 && std::isfinite(sigmas[at]), "sigma must be positive, got ",
                  sigmas[at]);
      kernel.channels[i] = int(channels[at]), kernel.sigmas[i] = sigmas[at];
    }
    const bool positional = *std::max_element(kernel.channels, kernel.channels + size) < 0;
    kernel.blur = blur_of(positional, {int(passes), spread, int(rings)});
    settings.kernels.push_back(kernel);
    entries += size + 1;
  }
  PYSEG_CHECK(entries * kTileWidth <= kTileEntries, "too many kernels: ", sizes.size());
  PYSEG_CHECK(height * width < (int64_t(1) << 31) / std::max<int64_t>(entries, 1), "an image of ",
              height, " x ", width, " pixels with ", entries,
              " lattice entries each exceeds 2^31 entries: split the image");
  settings.iterations = int(iterations);
  settings.normalization = Normalization(normalization);
  settings.classic_scale = rings == 0 && passes == 1;
  const Tensor u = torch::stable::contiguous(unary), f = torch::stable::contiguous(features);
  const Tensor w = torch::stable::contiguous(weights);
  std::optional<Tensor> m;
  if (compatibility) {
    PYSEG_CHECK(compatibility->dim() == 2 && compatibility->size(0) == classes &&
                    compatibility->size(1) == classes,
                "compatibility must be [", classes, ", ", classes, "], got ",
                shape(*compatibility));
    m = torch::stable::contiguous(*compatibility);
  }
  Tensor q = torch::stable::new_empty(u, {unary.size(0), classes, height, width});
  prefer_huge_pages(q.mutable_data_ptr(), q.numel() * q.element_size());
  const auto type = unary.scalar_type();
  PYSEG_CHECK(type == features.scalar_type() && type == weights.scalar_type() &&
                  (!m || type == m->scalar_type()),
              "unary, features, weights and compatibility must have one dtype");
  if (type == ScalarType::Float) {
    dense_crf_typed<float>(u, f, w, m, settings, q);
  } else {
    PYSEG_CHECK(type == ScalarType::Double, "unary must be float32 or float64");
    dense_crf_typed<double>(u, f, w, m, settings, q);
  }
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "dense_crf(Tensor unary, Tensor features, Tensor weights, Tensor? compatibility, int[] sizes,"
      " int[] channels, float[] sigmas, int iterations, int normalization, int passes, float "
      "spread,"
      " int rings) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu)); }
