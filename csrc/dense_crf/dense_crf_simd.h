// The inner loops of the dense CRF on the CPU: what dense_crf.cpp and dense_crf_lattice.cpp know of
// them.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/inline.h"
#include "../common/simd_level.h"
#include "dense_crf.h"

namespace pyseg::crf {

constexpr int kTileWidth = 128;
constexpr int kTileHeight = 64;
constexpr int kBufferRows = 2 * kTileWidth + 2 * 16;  // two lines of pixels, then planes of a few

// A kernel's grid in a tile: rows of the tile, `wide` in each row of the grid.
template <class Real>
struct GridPass {
  const Real *slice[2], *splat[2];  // of x and y: each pixel's weights of the vertices around it
  int cell[2], offset[2];           // pixels between vertices; from the vertex before the tile
  int wide, first_row;
};

template <class Real>
struct Grids {
  const GridPass<Real>* grids;
  int count;
  const GridPass<Real>* begin() const { return grids; }
  const GridPass<Real>* end() const { return grids + count; }
};

template <class Real>
struct TilePass {
  const Real* unary;     // the tile's corner in [C, H, W]
  Real* q;               // the same place of the result; null but in the last pass
  const Real* in;        // [tile rows, stride] messages at the vertices; null in the first pass
  Real* out;             // [tile rows, stride] sums at the vertices; null in the last pass
  const uint16_t* rows;  // [pixels, entries] vertices of each pixel
  const Real* slice;     // [pixels, entries] their weights
  const Real* splat;
  Grids<Real> grids;
  const Real* self;    // [pixels] share of their own Q in messages, to be taken out, or null
  const Real* matrix;  // for that: mixing_matrix(), or null
  const Real* before;  // [pixels, padded] the last pass's Q
  Real* after;         // the same of this pass, may be the same memory
  Real* buffer;        // [kBufferRows, stride] scratch, zeros beyond `padded`
  bool* not_finite;    // set in the first pass where unary is not; or null
  int64_t plane, image_width;
  int classes, padded, stride, entries, width, height;
};

// The same pass when gradients flow back: `out` takes those of the messages, and `q` is not used.
template <class Real>
struct TileBackward {
  TilePass<Real> pass;
  const Real* gradient;  // of Q, the tile's corner in [C, H, W]; null where `back` has it
  const Real* back;      // [tile rows, stride] gradients of the sums that Q was splat into, or null
  Real* unary_gradient;  // the corner in [C, H, W]; what is there is added to if `back` is not null
  Real* kept;            // [pixels, padded] gradients of messages: the later pass's, then ours
  const Real* transposed;  // as pass.matrix
};

// A vertex in the list of chains of neighbours along one axis. A chain ends with a Link of vertex
// 0, the one that is absent. Some vertices only matter in a part of the blurs: before that they
// would hold 0, which is not stored, and after it nothing that reaches a vertex of a pixel.
class Link {
 public:
  Link() = default;
  Link(int64_t vertex, bool before, bool after)
      : bits_(uint32_t(vertex) << 2 | uint32_t(before) | uint32_t(after) << 1) {}
  void move(int64_t vertices) { bits_ += vertex() ? uint32_t(vertices) << 2 : 0; }
  uint32_t vertex() const { return bits_ >> 2; }
  // Whether it holds a value before this blur or, if that is transposed, after it.
  bool filled(bool transposed) const { return bits_ & (transposed ? 2 : 1); }

 private:
  uint32_t bits_ = 0;
};

// What one blur goes through.
struct Chains {
  std::vector<Link> links;
  std::vector<int64_t> pieces;  // for threads, whole chains: where they begin, and the end
};

// The loops of a level; rows of classes are `padded` numbers in a lattice, `stride` in a tile.
template <class Real>
struct LevelFunctions {
  int lanes;  // numbers in a vector
  void (*tile)(const TilePass<Real>&);
  void (*tile_backward)(const TileBackward<Real>&);
  void (*gather)(const Real* values, const int32_t* vertices, int64_t count, int padded, int stride,
                 Real* to);
  void (*pack)(const Real* rows, int64_t count, int padded, int stride, Real* to);
  void (*combine)(const Real* partial, const int32_t* starts, const int32_t* rows, int64_t begin,
                  int64_t end, int padded, Real* values);
  void (*blur)(Real* values, const Link* begin, const Link* end, bool transposed, Real side,
               int padded);
  void (*mix)(Real* values, const Real* matrix, Real factor, int64_t count, int padded, int stride,
              int classes);
  // `out` += the splat of pass.unary, and pass.q = the slice of `in`.
  void (*splat_tile)(const TilePass<Real>&);
  void (*slice_tile)(const TilePass<Real>&);
  void (*add_products)(const Real* a, const Real* b, const Real* factors, int apart, int64_t count,
                       int padded, int classes, bool matrix, Real* products);
  bool (*range_of)(const Real* values, int64_t n, double& low, double& high);
  // Of points [D, kTileWidth], D from 1: weights and names of their vertices, [D + 1, kTileWidth].
  void (*locate[kMaxFeatures])(const Real* points, const VertexNames&, int count, Real* weights,
                               uint64_t* names);
};

PYSEG_DECLARE_LEVELS(template <class Real> LevelFunctions<Real> functions();
                     template <> LevelFunctions<float> functions<float>();
                     template <> LevelFunctions<double> functions<double>();)

}  // namespace pyseg::crf
