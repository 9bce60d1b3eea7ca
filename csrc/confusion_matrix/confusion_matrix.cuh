// Where the counts of a confusion matrix go on CUDA: shared by the ops that end in one.
#pragma once

#include "../common/zeros.cuh"
#include "confusion_matrix.h"

namespace {

using Count = unsigned long long;

constexpr int kSharedBytes = 48 << 10;  // what a kernel may have without asking

struct Outputs {
  Count* matrix;   // [N, C, C]
  Count* missed;   // [N, C]
  Count* invalid;  // [N, 2]
};

__device__ void add_to_image(const Outputs& out, int64_t image, int classes, uint32_t row,
                             uint32_t column, Count amount) {
  const uint32_t c = uint32_t(classes);
  if (row < c && column < c)
    atomicAdd(out.matrix + (image * classes + row) * classes + column, amount);
  else if (row < c && column == c)
    atomicAdd(out.missed + image * classes + row, amount);
  else if (row < c)
    atomicAdd(out.invalid + image * 2, amount);
  else if (row == c + 1)
    atomicAdd(out.invalid + image * 2 + 1, amount);
}

}  // namespace
