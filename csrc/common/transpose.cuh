// Batches of matrices, transposed in tiles, so that both sides are read and written in whole lines.
#pragma once

#include <stdexcept>

#include "launch.h"

namespace {  // a kernel of its own for each file

constexpr int kTransposeThreads = 256;

// [batch, rows, columns] -> [batch, columns + extra, rows], zeros in the extra rows. The matrices
// of the result are in another order: batch = (n, group) of `groups` becomes (group, n).
template <class T>
__global__ void transpose_kernel(const T* __restrict__ in, int64_t rows, int64_t columns, int extra,
                                 int64_t batches, int groups, T* __restrict__ out) {
  __shared__ T tile[32][33];
  const int64_t out_rows = columns + extra, across = (out_rows + 31) / 32, down = (rows + 31) / 32;
  const int64_t first = blockIdx.x % across * 32, top = blockIdx.x / across % down * 32;
  const int64_t batch = blockIdx.x / across / down;
  const int64_t out_batch = batch % groups * (batches / groups) + batch / groups;
  const int x = int(threadIdx.x) % 32;
  for (int y = int(threadIdx.x) / 32; y < 32; y += kTransposeThreads / 32) {
    const bool inside = top + y < rows && first + x < columns;
    tile[y][x] = inside ? in[(batch * rows + top + y) * columns + first + x] : T(0);
  }
  __syncthreads();
  for (int y = int(threadIdx.x) / 32; y < 32; y += kTransposeThreads / 32)
    if (first + y < out_rows && top + x < rows)
      out[(out_batch * out_rows + first + y) * rows + top + x] = tile[x][y];
}

template <class T>
void transpose(const T* in, int64_t batches, int64_t rows, int64_t columns, int extra,
               int64_t groups, T* out, cudaStream_t stream) {
  // One dimension of the grid: the others end at 65535.
  const int64_t blocks = batches * ((columns + extra + 31) / 32) * ((rows + 31) / 32);
  if (blocks >= int64_t(1) << 31)
    throw std::invalid_argument("a tensor is too large to be transposed at once");
  if (blocks)
    PYSEG_LAUNCH((transpose_kernel<T>), unsigned(blocks), kTransposeThreads, 0, stream, in, rows,
                 columns, extra, batches, int(groups), out);
}

}  // namespace
