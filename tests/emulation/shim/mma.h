// Found before the toolkit's header of the same name when kernels are emulated. Products of matrices
// by a warp: lane 0 holds all of a fragment and does all the work, in float; the other lanes only have
// to come. Sums are in the order of k, which tensor cores do not promise.
#pragma once
#include <limits>

#include "../cuda_emulation.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  float values[rows][columns];
  fragment() {
    for (auto& row : values)
      for (float& value : row) value = std::numeric_limits<float>::quiet_NaN();
  }
};

inline bool leads() { return cuda_emulation::engine.current->lane == 0; }

template <class Use, int M, int N, int K, class T, class Layout>
void fill_fragment(fragment<Use, M, N, K, T, Layout>& f, float value) {
  for (auto& row : f.values)
    for (float& v : row) v = value;
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const T* from, unsigned stride,
                      CUDA_EMULATION_WHERE) {
  __syncwarp(~0u, where);
  if (!leads()) return;
  constexpr bool by_rows = std::is_same_v<Layout, row_major>;
  for (int r = 0; r < f.rows; ++r)
    for (int c = 0; c < f.columns; ++c)
      f.values[r][c] = float(from[by_rows ? r * stride + c : c * stride + r]);
}

template <int M, int N, int K, class T, class A, class B>
void mma_sync(fragment<accumulator, M, N, K, float>& d,
              const fragment<matrix_a, M, N, K, T, A>& a, const fragment<matrix_b, M, N, K, T, B>& b,
              const fragment<accumulator, M, N, K, float>& c, CUDA_EMULATION_WHERE) {
  __syncwarp(~0u, where);
  if (!leads()) return;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float sum = c.values[i][j];
      for (int k = 0; k < K; ++k) sum += a.values[i][k] * b.values[k][j];
      d.values[i][j] = sum;
    }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& f, unsigned stride,
                       layout_t layout, CUDA_EMULATION_WHERE) {
  __syncwarp(~0u, where);
  if (!leads()) return;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      to[layout == mem_row_major ? i * stride + j : j * stride + i] = f.values[i][j];
}

}  // namespace nvcuda::wmma
