// The lattices of one image on the CPU, and mean-field inference on them: what building
// (dense_crf_lattice.cpp) and inference (dense_crf.cpp) share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/common.h"
#include "arguments.h"
#include "dense_crf.h"
#include "dense_crf_simd.h"

namespace pyseg::crf {

constexpr int64_t kPiece = 2048;  // lattice vertices that a thread takes at a time

PYSEG_FUNCTIONS_IN_FORCE

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

template <int NumberBits>
class VertexTable;
using TileTable = VertexTable<17>;   // of a tile: at most 2^16
using WholeTable = VertexTable<31>;  // of an image

struct Tile {
  int x, y, width, height;
  int64_t first_pixel;
  int64_t first_row, rows;  // of all tiles' rows
};

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

// The lattices of one image, and mean-field inference on them.
template <class Real>
class Crf {
 public:
  struct History {                   // of all iterations, which `backward` needs
    std::vector<Buffer<Real>> sums;  // blurred, of occupied vertices: small next to Q
    std::vector<Buffer<Real>> q;     // [pixels, padded], only without self terms
  };

  Crf(const Settings& settings, int64_t height, int64_t width);

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
  void locate_tile(const Real* features, int64_t tile, std::vector<TileTable>& tables);
  void merge(int kernel);
  void merge_grid(int kernel);
  void link(int kernel, WholeTable& table);
  void chain(int kernel, const std::vector<int32_t>& neighbours);
  void normalize();
  template <class Visit>
  void filter(const Real* partial, int padded, bool transposed, Visit visit, Real* values) const;
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
  int64_t workers() const { return std::min<int64_t>(tiles_.size(), num_threads()); }
  int64_t tile_pixels() const { return height_ * width_ / int64_t(tiles_.size()); }
  // Of a tile: two additions per entry, and the softmax.
  int64_t pass_cost(int width) const { return tile_pixels() * width * (2 * entries_ + 8); }
  Real kernel_scale(const Kernel& kernel) const {
    return Real(pyseg::kernel_scale(kernel, settings_.classic_scale));
  }

  Settings settings_;
  const int64_t height_, width_;
  const int kernels_;
  const LevelFunctions<Real> functions_ = functions_in_force<Real>();
  int entries_ = 0;
  std::vector<Tile> tiles_;
  std::vector<std::vector<Axis>> grids_;     // [kernels] x and y, or none
  std::vector<GridPass<Real>> grid_passes_;  // [tiles, kernels with a grid]
  std::vector<VertexNames> names_;
  std::vector<std::vector<Part>> parts_;       // [kernels][tiles]
  Buffer<uint16_t> pixel_rows_;                // [pixels, entries], pixels in the order of tiles
  Buffer<Real> slice_, splat_;                 // [pixels, entries]; no splat_: the same as slice_
  Buffer<Real> self_;                          // [pixels, kernels] of Q in a pixel's own message
  Buffer<int32_t> row_vertex_;                 // [rows of all tiles] vertex
  std::vector<int64_t> first_vertex_;          // [kernels + 1]; vertex 0 is the one that is absent
  std::vector<int64_t> occupied_;              // [kernels] those that pixels touch; they come first
  std::vector<std::vector<Chains>> chains_;    // [kernels][blurs that differ]
  std::vector<int32_t> starts_, vertex_rows_;  // rows of each vertex, in the order of tiles
};

// Sums the tiles' rows of each vertex of a pixel into `values` [vertices, padded], whose row 0
// holds zeros, calls visit(kernel) and blurs them. Blurs along different axes do not commute where
// vertices are absent: the transposed filter takes them in reverse order.
template <class Real>
template <class Visit>
void Crf<Real>::filter(const Real* partial, int padded, bool transposed, Visit visit,
                       Real* values) const {
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
    // A grid is blurred as often as it has to be along an axis, piece by piece, while a piece is in
    // the cache.
    const int times = kernel.grid ? kernel.blur.passes : 1;
    for (int step = 0; step < blurs; step += times) {
      const int blur = transposed ? blurs - 1 - step : step, axis = kernel.axis_of(blur);
      const int list = kernel.grid            ? axis
                       : blur < axes          ? blur
                       : blur >= blurs - axes ? lists - blurs + blur
                                              : axes + axis;
      const Chains& chains = chains_[l][list];
      const Link* const links = chains.links.data();
      const int64_t pieces = int64_t(chains.pieces.size()) - 1;
      const int64_t cost =
          3 * padded * times * int64_t(chains.links.size()) / std::max<int64_t>(pieces, 1);
      for_each(pieces, cost, [&](int64_t i, int64_t) {
        // A piece ends with the end of a chain.
        for (int time = 0; time < times; ++time)
          functions_.blur(values, links + chains.pieces[i], links + chains.pieces[i + 1] - 1,
                          transposed, Real(kernel.side(axis)), padded);
      });
    }
  }
}

}  // namespace pyseg::crf
