// Mean-field inference on CUDA: the iterations of dense_crf.cpp on the lattices of lattice.cuh.
//
// An iteration is one kernel for the tiles (slice, softmax, and splat: a row's sum is written by
// one thread), one that sums each vertex's rows in the order of tiles, and one per two blurs.
#pragma once

#include "lattice.cuh"

namespace {

using namespace pyseg;

// out = -factor compatibility in, per vertex, or factor in; a thread per vertex and class.
template <class T>
__global__ void mix_kernel(const T* in, const T* compatibility, const T* factors,
                           const int* kernel_of, const int* last, int classes, int stride,
                           bool transposed, T* out) {
  const int64_t n = int64_t(*last) * stride;
  const int along = transposed ? classes : 1, across = transposed ? 1 : classes;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t v = i / stride;
    const int to = int(i % stride);
    T sum = 0;
    if (v > 0 && to < classes) {
      if (!compatibility) sum = in[i];
      for (int from = 0; compatibility && from < classes; ++from)
        sum -= compatibility[to * across + from * along] * in[v * stride + from];
      sum *= factors[kernel_of[v]];
    }
    out[i] = sum;
  }
}

// -- mean field

template <class Real>
struct Pass {
  const Real* unary;   // [N, C, H, W]
  const Real* values;  // [vertices, vectors] messages; null: there are none yet
  Real* q;             // [N, C, H, W]; null but in the last pass
  Real* partial;       // [rows, vectors] sums; null in the last pass
  Arranged<Real> slice, splat;
  const uint16_t* lists;
  const Row* rows;
  const Span* unit_rows;
  const Counters* counters;
  int classes;
  // Of kernels with kWithoutSelf:
  const Real* shares;         // [pixels] of their own Q in messages
  const Real* compatibility;  // [C, C], or null
  const Real* before;         // [pixels, vectors] the last pass's Q
  Real* after;                // the same of this pass, may be the same memory
};

// The same when gradients flow back.
template <class Real>
struct Back {
  const Real* gradient;  // of q; null but in the first pass back
  const Real* values;    // gradients of the splat sums, blurred; null in the first pass back
  Real* of_unary;        // set by the first pass back, then added to
  Real* kept;            // [pixels, vectors] those of messages: of the later pass, then of this
};

// Shared memory holds the classes of each pixel together, in an odd number of vectors, so that
// threads that read one vector of consecutive pixels each do not wait for each other.
template <class Real>
struct Rows {
  static constexpr int N = 16 / sizeof(Real);
  using Vec = Vector<Real, N>;
  int vectors, stride;

  __device__ explicit Rows(int classes) : vectors((classes + N - 1) / N), stride(vectors | 1) {}

  // Calls visit(item, part) for all items and vectors, consecutive vectors in consecutive threads.
  template <class Visit>
  __device__ void each(int items, Visit visit) const {
    int item = int(threadIdx.x) / vectors, part = int(threadIdx.x) % vectors;
    while (item < items) {
      visit(item, part);
      item += kPassThreads / vectors, part += kPassThreads % vectors;
      if (part >= vectors) part -= vectors, ++item;
    }
  }

  __device__ void slice(const Tiling& tiling, const Real* values, const Arranged<Real>& arranged,
                        Vec* to) const {
    const Entry<Real>* const entries = arranged.by_pixel + blockIdx.x * tiling.per_tile();
    each(tiling.pixels, [&](int p, int part) {
      const Vec* const from = reinterpret_cast<const Vec*>(values) + part;
      const Entry<Real>* const its = entries + p * tiling.entries;
      Vec sum{};
#pragma unroll 5
      for (int e = 0; e < tiling.entries; ++e) {
        const Entry<Real> entry = its[e];
        add(sum, entry.weight, from[entry.vertex]);
      }
      to[p * stride + part] = sum;
    });
  }

  // Messages, or their gradients, lose what pixels contribute to their own; `all` holds the pixels
  // as they contributed. Right after `slice`: a thread changes what it has written.
  __device__ void remove_self(const Tiling& tiling, const Pass<Real>& pass, const Real* all,
                              bool transposed, Vec* to) const {
    const int64_t first = int64_t(blockIdx.x) * tiling.pixels;
    const Real* const matrix = pass.compatibility;
    const int classes = pass.classes;
    const int along = transposed ? classes : 1, across = transposed ? 1 : classes;
    each(tiling.pixels, [&](int p, int part) {
      const Real* const own = all + (first + p) * vectors * N;
      const Real share = pass.shares[first + p];
      Vec taken{};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int c = part * N + i;
        if (!matrix) taken.at[i] = own[c];
        for (int from = 0; matrix && c < classes && from < classes; ++from)
          taken.at[i] -= matrix[c * across + from * along] * own[from];
      }
      add(to[p * stride + part], -share, taken);
    });
  }

  // Keeps a tile's pixels for `remove_self`, with 0 beyond the border.
  __device__ void keep(const Tiling& tiling, const Vec* from, Real* all) const {
    const Corner corner = corner_of(tiling, blockIdx.x);
    Vec* const to = reinterpret_cast<Vec*>(all) + int64_t(blockIdx.x) * tiling.pixels * vectors;
    each(tiling.pixels, [&](int p, int part) {
      const int x = corner.x + p % tiling.tile_width, y = corner.y + p / tiling.tile_width;
      const bool inside = x < tiling.width && y < tiling.height;
      to[p * vectors + part] = inside ? from[p * stride + part] : Vec{};
    });
  }

  __device__ void splat(const Tiling& tiling, const Pass<Real>& pass,
                        const Arranged<Real>& arranged, const Vec* from) const {
    const int64_t first = blockIdx.x * tiling.per_tile();
    for (int l = 0; l < tiling.kernels; ++l) {
      const Span unit = pass.unit_rows[int64_t(blockIdx.x) * tiling.kernels + l];
      each(unit.count, [&](int r, int part) {
        const Row row = pass.rows[unit.first + r];
        const uint16_t* const list = pass.lists + first + (row.entries & 0xFFFF);
        const Real* const weights = arranged.list_weights + first + (row.entries & 0xFFFF);
        const Vec* const its = from + part;
        const int count = int(row.entries >> 16);
        Vec sum{};
#pragma unroll 4
        for (int i = 0; i < count; ++i) add(sum, weights[i], its[list[i]]);
        reinterpret_cast<Vec*>(pass.partial)[int64_t(row.to) * vectors + part] = sum;
      });
    }
  }

  // A pixel's messages, if there are any, become probabilities, and 0 past the last class.
  __device__ void softmax(const Real* unary, int64_t plane, int classes, bool messages,
                          Vec* row) const {
    Real largest = -INFINITY, sum = 0;
    for (int part = 0; part < vectors; ++part) {
      Vec logits{};
      if (messages) logits = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (part * N + i < classes) {
          logits.at[i] -= unary[(part * N + i) * plane];
          largest = logits.at[i] > largest ? logits.at[i] : largest;
        }
      row[part] = logits;
    }
    for (int part = 0; part < vectors; ++part) {
      Vec e = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        e.at[i] = part * N + i < classes ? exp(e.at[i] - largest) : Real(0);
        sum += e.at[i];
      }
      row[part] = e;
    }
    const Real scale = Real(1) / sum;
    for (int part = 0; part < vectors; ++part) {
      Vec e = row[part];
#pragma unroll
      for (int i = 0; i < N; ++i) e.at[i] *= scale;
      row[part] = e;
    }
  }
};

// Calls visit(p, where it is in [N, C, H, W]) for the pixels of a tile.
template <class Visit>
__device__ void each_pixel(const Tiling& tiling, int classes, Visit visit) {
  const Corner corner = corner_of(tiling, blockIdx.x);
  const int64_t plane = int64_t(tiling.height) * tiling.width;
  for (int p = threadIdx.x; p < tiling.pixels; p += kPassThreads) {
    const int x = corner.x + p % tiling.tile_width, y = corner.y + p / tiling.tile_width;
    if (x < tiling.width && y < tiling.height)
      visit(p, corner.image * classes * plane + int64_t(y) * tiling.width + x);
  }
}

// What a graph's result is where it had too little room.
template <class Real>
__device__ void fill_nan(const Tiling& tiling, int classes, Real* to) {
  const int64_t plane = int64_t(tiling.height) * tiling.width;
  each_pixel(tiling, classes, [&](int, int64_t pixel) {
    for (int c = 0; c < classes; ++c) to[pixel + c * plane] = Real(NAN);
  });
}

// One mean-field update of a tile: slice every lattice, softmax, splat into every lattice.
// kWithoutSelf: where there are shares, without self terms.
template <class Real, bool kWithoutSelf>
__global__ void __launch_bounds__(kPassThreads) pass_kernel(Tiling tiling, Pass<Real> pass) {
  using Vec = typename Rows<Real>::Vec;
  PYSEG_DYNAMIC_SHARED(Vec, shared);  // [pixels, stride]
  const Rows<Real> rows(pass.classes);
  const int64_t plane = int64_t(tiling.height) * tiling.width;
  if (pass.counters->failed) {
    if (pass.q) fill_nan(tiling, pass.classes, pass.q);
    return;
  }
  if (pass.values) {
    rows.slice(tiling, pass.values, pass.slice, shared);
    if (kWithoutSelf && pass.shares) rows.remove_self(tiling, pass, pass.before, false, shared);
    __syncthreads();
  }
  each_pixel(tiling, pass.classes, [&](int p, int64_t pixel) {
    Vec* const row = shared + p * rows.stride;
    rows.softmax(pass.unary + pixel, plane, pass.classes, pass.values, row);
    if (pass.q)
      for (int c = 0; c < pass.classes; ++c)
        pass.q[pixel + c * plane] = row[c / Rows<Real>::N].at[c % Rows<Real>::N];
  });
  if (!pass.partial) return;
  __syncthreads();
  if (kWithoutSelf && pass.shares) rows.keep(tiling, shared, pass.after);
  rows.splat(tiling, pass, pass.splat, shared);
}

// The update backwards: recomputes q, slices its gradient, adds to the gradient of unary and splats
// that of the messages.
template <class Real, bool kWithoutSelf>
__global__ void __launch_bounds__(kPassThreads)
    back_kernel(Tiling tiling, Pass<Real> pass, Back<Real> back) {
  constexpr int N = Rows<Real>::N;
  using Vec = typename Rows<Real>::Vec;
  PYSEG_DYNAMIC_SHARED(Vec, shared);  // [2, pixels, stride]
  const Rows<Real> rows(pass.classes);
  Vec* const gradients = shared + tiling.pixels * rows.stride;
  const int64_t plane = int64_t(tiling.height) * tiling.width;
  if (pass.counters->failed) {
    if (back.gradient) fill_nan(tiling, pass.classes, back.of_unary);
    return;
  }
  if (pass.values) rows.slice(tiling, pass.values, pass.slice, shared);
  if (back.values) rows.slice(tiling, back.values, pass.splat, gradients);
  if (kWithoutSelf && pass.shares && pass.values)
    rows.remove_self(tiling, pass, pass.before, false, shared);
  if (kWithoutSelf && pass.shares && back.values)
    rows.remove_self(tiling, pass, back.kept, true, gradients);
  __syncthreads();
  each_pixel(tiling, pass.classes, [&](int p, int64_t pixel) {
    Vec* const row = shared + p * rows.stride;
    Vec* const gradient = gradients + p * rows.stride;
    rows.softmax(pass.unary + pixel, plane, pass.classes, pass.values, row);
    Real dot = 0;
    for (int part = 0; part < rows.vectors; ++part) {
      Vec g{};
      if (back.values) g = gradient[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!back.values && part * N + i < pass.classes)
          g.at[i] = back.gradient[pixel + (part * N + i) * plane];
        dot += row[part].at[i] * g.at[i];
      }
      gradient[part] = g;
    }
    for (int part = 0; part < rows.vectors; ++part) {
      Vec g = gradient[part];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g.at[i] = row[part].at[i] * (g.at[i] - dot);
        if (part * N + i < pass.classes) {
          Real& of_unary = back.of_unary[pixel + (part * N + i) * plane];
          of_unary = (back.values ? of_unary : Real(0)) - g.at[i];
        }
      }
      row[part] = g;
    }
  });
  if (!pass.partial) return;
  __syncthreads();
  if (kWithoutSelf && pass.shares) rows.keep(tiling, shared, back.kept);
  rows.splat(tiling, pass, pass.slice, shared);
}

// Adds products of the gradients of messages, still to be blurred, with the sums that the messages
// were made of, over a kernel's vertices. Or, kSelf, takes away what was in the messages of the
// pixels' own: the gradients `even` of messages with Q, `sums`, over pixels. Tiling: y is the
// kernel. Without a compatibility matrix a block adds to one number, otherwise to [C, C]. Each
// block takes the same vertices every time.
template <class T, bool kSelf>
__global__ void __launch_bounds__(kPassThreads)
    products_kernel(const T* even, const T* odd, const T* sums, const Filter<T>* filters,
                    const int* kernel_ends, const T* self, int64_t pixels, int classes, int stride,
                    bool matrix, double* products) {  // [kernels, blocks, 1 or C * C]
  const int l = blockIdx.y;
  const int64_t begin = kSelf ? 0 : l ? kernel_ends[l - 1] : 1;
  const int64_t end = kSelf ? pixels : kernel_ends[l];
  const int cells = matrix ? classes * classes : 1;
  double* const to = products + (int64_t(l) * gridDim.x + blockIdx.x) * cells;
  if (begin >= end) return;
  const T* const gradients = !kSelf && launches(filters[l].blurs) % 2 ? odd : even;
  const auto times = [&](int64_t i, T product) {
    return kSelf ? -self[i * gridDim.y + l] * product : product;
  };
  if (!matrix) {
    using Reduce = BlockReduce<double, kPassThreads>;
    __shared__ typename Reduce::TempStorage storage;
    double sum = 0;
    for (int64_t v = begin + int64_t(blockIdx.x) * kPassThreads + threadIdx.x; v < end;
         v += int64_t(gridDim.x) * kPassThreads) {
      T dot = 0;
      for (int c = 0; c < classes; ++c) dot += gradients[v * stride + c] * sums[v * stride + c];
      sum += times(v, dot);
    }
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x == 0) *to += sum;
    return;
  }
  constexpr int kRun = 64;  // so many products are summed in T
  for (int cell = threadIdx.x; cell < cells; cell += kPassThreads) {
    const int row = cell / classes, column = cell % classes;
    double sum = 0;
    for (int64_t v = begin + int64_t(blockIdx.x) * kRun; v < end; v += int64_t(gridDim.x) * kRun) {
      const int64_t stop = min(end, v + kRun);
      T few = 0;
      for (int64_t i = v; i < stop; ++i)
        few += times(i, gradients[i * stride + row] * sums[i * stride + column]);
      sum += few;
    }
    to[cell] += sum;
  }
}

// One block per kernel: the gradient of its weight.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    weight_gradient_kernel(const double* products, const T* compatibility, int blocks, int cells,
                           T scale, const Counters* counters, T* gradient) {
  using Reduce = BlockReduce<double, kPassThreads>;
  __shared__ typename Reduce::TempStorage storage;
  double sum = 0;
  for (int cell = threadIdx.x; cell < cells; cell += kPassThreads)
    for (int block = 0; block < blocks; ++block) {
      const double value = products[int64_t(block) * cells + cell];
      sum += compatibility ? -double(compatibility[cell]) * value : value;
    }
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) *gradient += counters->failed ? T(NAN) : T(double(scale) * sum);
}

// A thread is an element of the compatibility matrix.
template <class T>
__global__ void compatibility_gradient_kernel(const double* products, const T* factors, int kernels,
                                              int blocks, int cells, const Counters* counters,
                                              T* gradient) {
  const int cell = blockIdx.x * blockDim.x + threadIdx.x;
  if (cell >= cells) return;
  double total = 0;
  for (int l = 0; l < kernels; ++l) {
    double sum = 0;
    for (int block = 0; block < blocks; ++block)
      sum += products[(int64_t(l) * blocks + block) * cells + cell];
    total -= double(factors[l]) * sum;
  }
  gradient[cell] += counters->failed ? T(NAN) : T(total);
}

// Mean field on the lattices of a batch of images.
template <class Real>
struct MeanField {
  static constexpr int kVector = Lattice<Real>::kVector;
  using Vec = typename Lattice<Real>::Vec;

  // double, which checks gradients, has the slower one of the kernels only: nvcc takes long.
  static constexpr bool kOneKernel = sizeof(Real) == 8;

  const Lattice<Real>& lattice;
  Memory memory;

  explicit MeanField(const Lattice<Real>& lattice) : lattice(lattice), memory(lattice.like) {}

  struct History {           // of all iterations, which `backward` needs
    std::vector<Vec*> sums;  // blurred: small next to Q
    std::vector<Vec*> q;     // [pixels, vectors], only without self terms
  };
  void infer(const Real* unary, const Real* compatibility, Real* q, History* history = nullptr);
  void backward(const Real* unary, const Real* compatibility, const Real* gradient, Real* of_unary,
                Real* of_weights, Real* of_compatibility);

 private:
  void mix(const Vec* in, const Real* compatibility, bool transposed, Vec* out) const;
  Vec* messages() {  // room for [1 + vertices, vectors]
    Vec* const values = memory.template get<Vec>((1 + lattice.capacity.vertices) * lattice.vectors);
    STD_CUDA_CHECK(cudaMemsetAsync(values, 0, lattice.vectors * sizeof(Vec), lattice.stream));
    return values;
  }
  Vec* pixel_rows() { return memory.template get<Vec>(lattice.pixels() * lattice.vectors); }
  Pass<Real> pass(const Real* unary, const Vec* messages, const Real* compatibility,
                  const Vec* before, Vec* after) const {
    Pass<Real> pass{};
    pass.unary = unary, pass.values = reinterpret_cast<const Real*>(messages);
    pass.slice = lattice.arranged[0], pass.splat = lattice.arranged[1];
    pass.lists = lattice.entries.lists, pass.rows = lattice.entries.rows;
    pass.unit_rows = lattice.entries.unit_rows;
    pass.counters = lattice.counters, pass.classes = lattice.classes;
    pass.shares = lattice.shares, pass.compatibility = compatibility;
    pass.before = reinterpret_cast<const Real*>(before);
    pass.after = reinterpret_cast<Real*>(after);
    return pass;
  }
};

template <class Real>
void MeanField<Real>::mix(const Vec* in, const Real* compatibility, bool transposed,
                          Vec* out) const {
  lattice.over((1 + lattice.capacity.vertices) * lattice.vectors * kVector, mix_kernel<Real>,
               reinterpret_cast<const Real*>(in), compatibility, lattice.factors, lattice.kernel_of,
               lattice.last(), lattice.classes, lattice.vectors * kVector, transposed,
               reinterpret_cast<Real*>(out));
}

// Writes q or, with `history`, that instead.
template <class Real>
void MeanField<Real>::infer(const Real* unary, const Real* compatibility, Real* q,
                            History* history) {
  const int iterations = lattice.count() ? lattice.settings.iterations : 0;
  Vec *partial = nullptr, *values = nullptr, *spare = nullptr, *before = nullptr;
  if (iterations) {
    partial = memory.template get<Vec>(lattice.capacity.rows * lattice.vectors);
    if (!history) values = messages();
    if (!history && lattice.shares) before = pixel_rows();
    spare = messages();
  }
  const auto kernel = lattice.shares ? pass_kernel<Real, true> : pass_kernel<Real, kOneKernel>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const bool mixes = compatibility || history;
  const Vec* in = nullptr;
  for (int step = 0; step <= iterations; ++step) {
    const bool last = step == iterations;
    if (last && history) break;
    if (history && lattice.shares) history->q.push_back(pixel_rows());
    Vec* const after = history && lattice.shares ? history->q.back() : before;
    Pass<Real> update = pass(unary, in, compatibility, before, after);
    update.q = last ? q : nullptr;
    update.partial = reinterpret_cast<Real*>(last ? nullptr : partial);
    PYSEG_LAUNCH(kernel, unsigned(lattice.tiling.tiles()), kPassThreads, lattice.tile_bytes(1),
                 lattice.stream, lattice.tiling, update);
    if (last) break;
    before = after;
    if (history) history->sums.push_back(values = messages());
    lattice.template combine<Real, kVector>(partial, lattice.vectors, values, spare);
    lattice.template blur<Real, kVector>(lattice.vectors, mixes ? nullptr : lattice.factors, false,
                                         values, spare);
    in = values;
    if (mixes) mix(values, compatibility, false, spare), in = spare;
  }
}

// Goes through the iterations once more, keeping their blurred sums, which are small next to q;
// then backwards, recomputing each q from them. Gradients other than unary's are added to.
template <class Real>
void MeanField<Real>::backward(const Real* unary, const Real* compatibility, const Real* gradient,
                               Real* of_unary, Real* of_weights, Real* of_compatibility) {
  const int iterations = lattice.count() ? lattice.settings.iterations : 0;
  const int cells = compatibility ? lattice.classes * lattice.classes : 1;
  const int blocks = std::clamp((1 << 20) / cells, 16, 128);
  History history;
  infer(unary, compatibility, nullptr, &history);
  Vec *partial = nullptr, *values = nullptr, *spare = nullptr, *mixed = nullptr;
  Vec* slopes = nullptr;  // of messages, per pixel
  double* products = nullptr;
  if (iterations) {
    partial = memory.template get<Vec>(lattice.capacity.rows * lattice.vectors);
    values = messages(), spare = messages(), mixed = messages();
    if (lattice.shares) slopes = pixel_rows();
    products = memory.template get<double>(int64_t(lattice.count()) * blocks * cells);
    STD_CUDA_CHECK(cudaMemsetAsync(
        products, 0, int64_t(lattice.count()) * blocks * cells * sizeof(double), lattice.stream));
  }
  const auto kernel = lattice.shares ? back_kernel<Real, true> : back_kernel<Real, kOneKernel>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const Vec* in = nullptr;
  for (int step = iterations; step >= 0; --step) {
    const Vec* const sums = step > 0 ? history.sums[step - 1] : nullptr;
    const Vec* const q = step > 0 && lattice.shares ? history.q[step - 1] : nullptr;
    if (step > 0) mix(sums, compatibility, false, mixed);
    Pass<Real> update = pass(unary, step > 0 ? mixed : nullptr, compatibility, q, nullptr);
    update.partial = reinterpret_cast<Real*>(step > 0 ? partial : nullptr);
    const Back<Real> back{gradient, reinterpret_cast<const Real*>(in), of_unary,
                          reinterpret_cast<Real*>(slopes)};
    PYSEG_LAUNCH(kernel, unsigned(lattice.tiling.tiles()), kPassThreads, lattice.tile_bytes(2),
                 lattice.stream, lattice.tiling, update, back);
    if (step == 0) break;
    lattice.template combine<Real, kVector>(partial, lattice.vectors, values, spare);
    const auto add_products = [&](auto which, const Vec* even, const Vec* odd, const Vec* with) {
      PYSEG_LAUNCH(which, dim3(unsigned(blocks), unsigned(lattice.count())), kPassThreads, 0,
                   lattice.stream, reinterpret_cast<const Real*>(even),
                   reinterpret_cast<const Real*>(odd), reinterpret_cast<const Real*>(with),
                   lattice.filters, lattice.kernel_ends, lattice.self, lattice.pixels(),
                   lattice.classes, lattice.vectors * kVector, compatibility != nullptr, products);
    };
    add_products(products_kernel<Real, false>, values, spare, sums);
    if (lattice.shares) add_products(products_kernel<Real, true>, slopes, slopes, q);
    lattice.template blur<Real, kVector>(lattice.vectors, compatibility ? nullptr : lattice.factors,
                                         true, values, spare);
    in = values;
    if (compatibility) mix(values, compatibility, true, spare), in = spare;
  }
  if (iterations == 0) return;
  for (int l = 0; l < lattice.count(); ++l)
    PYSEG_LAUNCH(weight_gradient_kernel<Real>, 1, kPassThreads, 0, lattice.stream,
                 products + int64_t(l) * blocks * cells, compatibility, blocks, cells,
                 lattice.scale_of(l), lattice.counters, of_weights + lattice.given[l]);
  if (compatibility)
    PYSEG_LAUNCH(compatibility_gradient_kernel<Real>, unsigned((cells + 255) / 256), 256, 0,
                 lattice.stream, products, lattice.factors, lattice.count(), blocks, cells,
                 lattice.counters, of_compatibility);
}

}  // namespace
