// Pixels near another label, on CUDA. The first kernel finds the pixels whose window along the row
// has one label, from bits that say where labels change; the second walks down the columns and
// counts how long that has been so. Nothing synchronises.
//
// The template of a CUDA kernel: kernels, whose grid a comment explains; their launch for a dtype;
// the op, with a DeviceScope before anything is allocated; the registration. g++ compiles this
// file too, for the tests (tests/emulation): PYSEG_DYNAMIC_SHARED and PYSEG_LAUNCH stand for what
// only nvcc can parse, and the latter also checks whether the launch failed.
#include "boundary_mask.h"

#include <algorithm>

#include "../common/launch.h"
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using pyseg::Window;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kTile = 1024;               // columns of a block of the first kernel
constexpr int kAhead = 4;                 // rows that a thread of the second kernel reads ahead
constexpr int64_t kMaxDistance = 180000;  // its bits fit 48 KiB of shared memory

// Grid: x counts the tiles of a row, y the rows, z the images.
template <class T>
__global__ void find_uniform_kernel(const T* __restrict__ labels,  // [N, H, W]
                                    Window window,
                                    uint8_t* __restrict__ uniform) {  // [N, H, W]
  // Every thread of the block reaches the ballot and the barrier: no early return above them.
  PYSEG_DYNAMIC_SHARED(uint32_t, changes);  // bit i: column base + i is not like the one before
  const int64_t width = window.width, distance = window.distance;
  const int64_t row = (int64_t(blockIdx.z) * window.height + blockIdx.y) * width;
  const int64_t x0 = int64_t(blockIdx.x) * kTile, base = x0 - distance + 1;
  const int words = int((kTile + 2 * distance + 31) / 32);
  const int lane = threadIdx.x % 32;
  for (int word = threadIdx.x / 32; word < words; word += kThreads / 32) {
    const int64_t x = base + word * 32 + lane;
    bool change = window.border;  // also right outside the image
    if (x > 0 && x < width) change = labels[row + x] != labels[row + x - 1];
    const uint32_t bits = __ballot_sync(~0u, change);
    if (lane == 0) changes[word] = bits;
  }
  __syncthreads();
  for (int64_t x = x0 + threadIdx.x; x < x0 + kTile && x < width; x += kThreads) {
    // The changes from x - d + 1 to x + d.
    const int64_t first = x - x0, last = first + 2 * distance - 1;
    uint32_t any = 0;
    for (int64_t word = first / 32; word <= last / 32; ++word) {
      uint32_t bits = changes[word];
      if (word == first / 32) bits &= ~0u << (first % 32);
      if (word == last / 32) bits &= ~0u >> (31 - last % 32);
      any |= bits;
    }
    uniform[row + x] = any == 0;
  }
}

// Neighbours in a row, read and written at once.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Neighbours {
  T at[Count];
};

// As many of one label as are read at once: 4, or 16 bytes of wider ones.
template <class T>
constexpr int kNeighbours = sizeof(T) == 8 ? 2 : 4;

// Grid: x counts blocks of columns, y ranges of rows, z the images. A thread has Count columns, and
// reads a few rows of them before it looks at the first: __restrict__ says that what it writes
// meanwhile does not change them.
template <class T, int Count>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const T* __restrict__ labels, const uint8_t* __restrict__ uniform, Window window,
                int64_t rows, uint8_t* __restrict__ mask) {
  const int64_t x = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Count;
  if (x >= window.width) return;
  using Labels = Neighbours<T, Count>;
  using Flags = Neighbours<uint8_t, Count>;
  const int64_t image = int64_t(blockIdx.z) * window.height * window.width;
  const int64_t begin = int64_t(blockIdx.y) * rows, last = window.height - 1;
  const int64_t end = begin + rows < window.height ? begin + rows : window.height;
  const int distance = int(window.distance), full = 2 * distance + 1;
  int streak[Count];
  Labels above;
#pragma unroll
  for (int k = 0; k < Count; ++k) streak[k] = 0, above.at[k] = 0;
  for (int64_t top = begin - distance; top < end + distance; top += kAhead) {
    Labels label[kAhead];
    Flags flag[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int64_t y = top + r, row = y < 0 ? 0 : (y > last ? last : y);
      const int64_t place = image + row * window.width + x;
      label[r] = *reinterpret_cast<const Labels*>(labels + place);
      flag[r] = *reinterpret_cast<const Flags*>(uniform + place);
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int64_t y = top + r;
      if (y >= end + distance) break;
      const bool outside = window.border && (y < 0 || y > last);
      Flags marked;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        const int before = label[r].at[k] == above.at[k] ? streak[k] : 0;
        // A streak longer than the window says no more than one as long, and does not overflow.
        streak[k] = !outside && flag[r].at[k] ? min(before + 1, full) : 0;
        if (!outside) above.at[k] = label[r].at[k];
        marked.at[k] = streak[k] < full;
      }
      if (y - distance >= begin)
        *reinterpret_cast<Flags*>(mask + image + (y - distance) * window.width + x) = marked;
    }
  }
}

template <class T>
void launch(const Tensor& labels, Tensor& uniform, Tensor& mask, const Window& window,
            cudaStream_t stream) {
  const T* in = static_cast<const T*>(labels.const_data_ptr());
  uint8_t* flags = static_cast<uint8_t*>(uniform.mutable_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t images = labels.size(0), pixels = window.height * window.width;
  const size_t shared = size_t((kTile + 2 * window.distance + 31) / 32) * sizeof(uint32_t);
  // A range of rows reads 2 d rows more than it has.
  int64_t rows = std::max<int64_t>(32, window.distance);
  rows = std::max(rows, (window.height + 65534) / 65535);
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y and z
    const unsigned count = unsigned(std::min<int64_t>(65535, images - first));
    for (int64_t top = 0; top < window.height; top += 65535) {
      const dim3 grid(unsigned((window.width + kTile - 1) / kTile),
                      unsigned(std::min<int64_t>(65535, window.height - top)), count);
      const int64_t offset = first * pixels + top * window.width;
      PYSEG_LAUNCH((find_uniform_kernel<T>), grid, kThreads, shared, stream, in + offset, window,
                   flags + offset);
    }
    const auto mark = [&](auto kernel, int64_t columns) {
      const int64_t threads = (window.width + columns - 1) / columns;
      const dim3 grid(unsigned((threads + kThreads - 1) / kThreads),
                      unsigned((window.height + rows - 1) / rows), count);
      PYSEG_LAUNCH(kernel, grid, kThreads, 0, stream, in + first * pixels, flags + first * pixels,
                   window, rows, out + first * pixels);
    };
    constexpr int kCount = kNeighbours<T>;
    if (window.width % kCount == 0 && reinterpret_cast<uintptr_t>(in) % (sizeof(T) * kCount) == 0)
      mark(mark_kernel<T, kCount>, kCount);
    else
      mark(mark_kernel<T, 1>, 1);
  }
}

Tensor boundary_mask_cuda(const Tensor& labels, int64_t distance, bool border) {
  pyseg::check_labels(labels, distance);
  const pyseg::DeviceScope device(labels);  // the tensor's device and its current stream
  Tensor mask = torch::stable::new_empty(labels, labels.sizes(), ScalarType::Bool);
  if (labels.numel() == 0) return mask;
  const Tensor in = torch::stable::contiguous(labels);
  Tensor uniform = torch::stable::new_empty(labels, labels.sizes(), ScalarType::Byte);
  const int64_t height = in.size(1), width = in.size(2);
  const Window window{height, width, std::min(distance, std::max(height, width)), border};
  if (window.distance > kMaxDistance)
    throw std::invalid_argument("distance must be at most 180000 pixels on CUDA");
  const auto stream = device.stream;
  switch (in.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char: launch<uint8_t>(in, uniform, mask, window, stream); break;
    case ScalarType::Short: launch<int16_t>(in, uniform, mask, window, stream); break;
    case ScalarType::Int: launch<int32_t>(in, uniform, mask, window, stream); break;
    case ScalarType::Long: launch<int64_t>(in, uniform, mask, window, stream); break;
    default: throw std::invalid_argument("labels must be uint8, int8, int16, int32 or int64");
  }
  return mask;
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("boundary_mask", TORCH_BOX(&boundary_mask_cuda)); }
