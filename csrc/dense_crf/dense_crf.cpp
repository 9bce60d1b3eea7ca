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
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/common.h"
#include "arguments.h"
#include "crf_cpu.h"
#include "dense_crf_simd.h"

namespace pyseg::crf {

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
TilePass<Real> Crf<Real>::tile_pass(const Tile& tile, const Real* unary, const RowSize& row) const {
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
        functions_.gather(values.get(), row_vertex_.get() + tile.first_row, tile.rows, padded,
                          stride, own[0]);
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
                              std::min(kExact, end - begin), padded, classes,
                              compatibility != nullptr, few.data());
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

}  // namespace pyseg::crf

namespace {

using namespace pyseg;
using namespace pyseg::crf;

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

// Whether an image is so large that its loops start threads at all: some eight additions for each
// of its values.
bool worth_a_team(const Tensor& values) {
  return 8 * values.numel() / std::max<int64_t>(values.size(0), 1) >= kWorthThreads;
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
  Team::run(worth_a_team(a.unary), [&] {
    if (unary.scalar_type() == ScalarType::Float)
      infer<float>(a, q);
    else
      infer<double>(a, q);
  });
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
  Team::run(worth_a_team(a.unary), [&] {
    if (unary.scalar_type() == ScalarType::Float)
      backward<float>(a, g, of_unary, of_weights, of_compatibility);
    else
      backward<double>(a, g, of_unary, of_weights, of_compatibility);
  });
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
  Team::run(worth_a_team(features),
            [&] { lattice->crf.build(a.features.const_data_ptr<float>()); });
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
  Team::run(worth_a_team(from), [&] {
    lattice->crf.messages(from.const_data_ptr<float>(), lattice->weights.data(), int(q.size(1)),
                          out.mutable_data_ptr<float>());
  });
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
      "_dense_crf_backward(Tensor gradient, Tensor unary, Tensor features, Tensor weights, Tensor? "
      "compatibility, int[] sizes, int[] channels, float[] sigmas, int iterations, int "
      "normalization, bool self_term, int passes, float spread, int rings) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu));
  m.impl("_dense_crf_backward", TORCH_BOX(&dense_crf_backward_cpu));
  m.impl("_dense_crf_lattice", TORCH_BOX(&dense_crf_lattice_cpu));
  m.impl("_dense_crf_messages", TORCH_BOX(&dense_crf_messages_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CompositeExplicitAutograd, m) {
  m.impl("_dense_crf_release", TORCH_BOX(&dense_crf_release));
}
