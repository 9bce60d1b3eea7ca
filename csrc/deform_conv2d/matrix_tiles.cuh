// Products of small matrices by a warp on tensor cores: ldmatrix and mma.sync, compute capability
// 8.0 and later. The emulation moves the same numbers between the same lanes, as PTX's manual lays
// matrices out over a warp, so that a mistake in an index shows there.
//
// With g = lane / 4 and t = lane % 4, a lane holds of the left matrix (16 x 16) rows g and g + 8 in
// columns 2t, 2t + 1 (left[0], left[1]) and 2t + 8, 2t + 9 (left[2], left[3]); of the right one
// (16 x 8) rows 2t, 2t + 1 (right[0]) and 2t + 8, 2t + 9 (right[1]) in column g; of the sums
// (16 x 8) rows g (sums[0], sums[1]) and g + 8 (sums[2], sums[3]) in columns 2t, 2t + 1.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../common/launch.h"

namespace pyseg::matrix_tiles {

#ifdef PYSEG_EMULATED

struct Posted {  // by the lanes of a warp for each other
  const char* row;
  unsigned left[4], right[2];
};
__shared__ Posted posted[32][32];  // [warp, lane], of each block

template <bool kTransposed>
void load(unsigned (&to)[4], const void* row) {
  const int lane = int(threadIdx.x) % 32;
  Posted* const warp = posted[threadIdx.x / 32];
  warp[lane].row = static_cast<const char*>(row);
  __syncwarp();
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int half = 0; half < 2; ++half) {
      const int line = lane / 4, column = lane % 4 * 2 + half;
      const char* const from = warp[8 * matrix + (kTransposed ? column : line)].row;
      std::memcpy(reinterpret_cast<char*>(&to[matrix]) + 2 * half,
                  from + 2 * (kTransposed ? line : column), 2);
    }
  __syncwarp();
}

template <class T>
float part(unsigned pair, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&pair) + 2 * half, 2);
  return float(value);
}

template <class T>
void multiply_add(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
  const int lane = int(threadIdx.x) % 32;
  Posted* const warp = posted[threadIdx.x / 32];
  std::memcpy(warp[lane].left, left, sizeof left);
  std::memcpy(warp[lane].right, right, sizeof right);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, below = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      sums[i] += part<T>(warp[4 * row + k % 8 / 2].left[k / 8 * 2 + below], k % 2) *
                 part<T>(warp[4 * column + k % 8 / 2].right[k / 8], k % 2);
  }
  __syncwarp();
}

#else

// Four matrices of 8 x 8 numbers of 16 bits from shared memory, of which the lanes 8 i .. 8 i + 7
// name the rows of matrix i, 16 bytes each and aligned to that. A lane gets two neighbours of row
// g of each matrix, columns 2t and 2t + 1; kTransposed: of its column g, rows 2t and 2t + 1.
template <bool kTransposed>
__device__ __forceinline__ void load(unsigned (&to)[4], const void* row) {
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// sums += left right
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&left)[4],
                                             const unsigned (&right)[2]) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

#endif

}  // namespace pyseg::matrix_tiles
