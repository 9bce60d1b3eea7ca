// Tensors of zeros for what an op counts, filled by one launch where new_zeros would take one each.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "launch.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

template <int Count>
struct ZeroJobs {
  int64_t* data[Count];
  int64_t size[Count];
};

template <int Count>
__global__ void fill_zeros_kernel(ZeroJobs<Count> jobs) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll
  for (int k = 0; k < Count; ++k)
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < jobs.size[k]; i += step)
      jobs.data[k][i] = 0;
}

// int64 tensors of these shapes on the device of `like`.
template <int Count>
std::array<torch::stable::Tensor, Count> zeros(const torch::stable::Tensor& like,
                                               const std::vector<int64_t> (&shapes)[Count],
                                               cudaStream_t stream) {
  constexpr int kThreads = 256, kBlocks = 2048;
  std::array<torch::stable::Tensor, Count> tensors;
  ZeroJobs<Count> jobs;
  int64_t most = 0;
  for (int k = 0; k < Count; ++k) {
    tensors[k] = torch::stable::new_empty(like, shapes[k], torch::headeronly::ScalarType::Long);
    jobs.data[k] = static_cast<int64_t*>(tensors[k].mutable_data_ptr());
    jobs.size[k] = tensors[k].numel();
    most = std::max(most, jobs.size[k]);
  }
  const int64_t blocks = std::min<int64_t>((most + kThreads - 1) / kThreads, kBlocks);
  if (blocks > 0)
    PYSEG_LAUNCH((fill_zeros_kernel<Count>), unsigned(blocks), kThreads, 0, stream, jobs);
  return tensors;
}

}  // namespace
