// Bilinear upsampling fused with argmax and counting on CUDA: blocks walk over the output pixels,
// count in shared memory where the table fits, and add it to the image's at the end. All sums are
// of integers, so their order does not matter. Nothing synchronises; targets out of range are
// counted in `invalid`.
#include "upsample_confusion.h"

#include "../confusion_matrix/confusion_matrix.cuh"
#include "../upsample_argmax/upsample_argmax.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;

// Codes of target labels of any integer type: one kernel for all of them, for the type is the same
// in all threads and the branch costs nothing beside the arithmetic on the logits.
struct Targets {
  const void* labels;  // [N, H, W]
  ScalarType type;
  pyseg::LabelCoder<uint8_t> of_uint8;
  pyseg::LabelCoder<int8_t> of_int8;
  pyseg::LabelCoder<int16_t> of_int16;
  pyseg::LabelCoder<int32_t> of_int32;
  pyseg::LabelCoder<int64_t> of_int64;

  Targets(const Tensor& target, int64_t classes, int64_t ignore)
      : labels(target.const_data_ptr()),
        type(target.scalar_type()),
        of_uint8(classes, ignore),
        of_int8(classes, ignore),
        of_int16(classes, ignore),
        of_int32(classes, ignore),
        of_int64(classes, ignore) {}

  // Of `count` <= Rows labels, `step` apart.
  template <int Rows>
  __device__ void codes(int64_t first, int64_t step, int count, uint32_t* code) const {
    switch (type) {
      case ScalarType::Byte: read<Rows>(of_uint8, first, step, count, code); break;
      case ScalarType::Char: read<Rows>(of_int8, first, step, count, code); break;
      case ScalarType::Short: read<Rows>(of_int16, first, step, count, code); break;
      case ScalarType::Int: read<Rows>(of_int32, first, step, count, code); break;
      default: read<Rows>(of_int64, first, step, count, code);
    }
  }
  template <int Rows, class Label>
  __device__ void read(const pyseg::LabelCoder<Label>& coder, int64_t first, int64_t step,
                       int count, uint32_t* code) const {
    const Label* const label = static_cast<const Label*>(labels) + first;
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      if (r < count) code[r] = coder(label[r * step]);
  }
};

// Grid: x walks over (row of logits, chunk, block of output columns), y is the image. Shared:
// `copies` tables, where one fits; a warp's threads use copy (warp % copies).
template <class In, class T, int Rows, bool Shared>
__global__ void __launch_bounds__(kThreads)
    upsample_confusion_kernel(const In* __restrict__ logits,  // [N, C, h, w], strided
                              Shape<T> shape,
                              const int16_t* __restrict__ known,  // [N, h, w] or null
                              const __grid_constant__ Targets targets, int64_t first_image,
                              int64_t ignore_index, Outputs out, int copies) {
  PYSEG_DYNAMIC_SHARED(uint32_t, tables);
  const int width = shape.classes + 2, cells = width * width;
  const int64_t image = first_image + blockIdx.y;
  if (Shared) {
    for (int i = threadIdx.x; i < cells * copies; i += kThreads) tables[i] = 0;
    __syncthreads();
  }
  uint32_t* table = Shared ? tables + int(threadIdx.x / 32) % copies * cells : nullptr;
  const auto add = [&](uint32_t row, uint32_t column, uint32_t amount) {
    if (Shared)
      atomicAdd(table + row * width + column, amount);
    else
      add_to_image(out, image, shape.classes, row, column, amount);
  };
  if (known) known += image * shape.height * shape.width;
  const int blocks = (shape.out_width + kThreads - 1) / kThreads;
  const int64_t jobs = int64_t(blocks) * shape.jobs();
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int x = int(job % blocks) * kThreads + int(threadIdx.x);
    if (x >= shape.out_width) continue;
    const int64_t column_start = image * shape.out_height * shape.out_width + x;
    classify_column<In, T, Rows>(
        logits + image * shape.image_stride, shape, known, int(job / blocks), x,
        [&](int y, int end, const int* label) {
          uint32_t next_row[Rows], row = 0, column = 0, length = 0;
          targets.codes<Rows>(column_start + int64_t(y) * shape.out_width, shape.out_width, end - y,
                              next_row);
#pragma unroll
          for (int r = 0; r < Rows; ++r) {  // one addition per run of equal pairs
            if (y + r >= end) break;
            const uint32_t next_column =
                label[r] == ignore_index ? uint32_t(shape.classes) : uint32_t(label[r]);
            if (length && (next_row[r] != row || next_column != column)) {
              add(row, column, length);
              length = 0;
            }
            row = next_row[r], column = next_column, ++length;
          }
          if (length) add(row, column, length);
        });
  }
  if (Shared) {
    __syncthreads();
    for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
      Count total = 0;
      for (int copy = 0; copy < copies; ++copy) total += tables[copy * cells + cell];
      if (total) add_to_image(out, image, shape.classes, cell / width, cell % width, total);
    }
  }
}

template <class In, class T, int Rows>
void launch_rows(const Tensor& logits, const Tensor& target, const Outputs& out, int64_t ignore,
                 cudaStream_t stream) {
  const auto shape = make_shape<In, T>(logits, target.size(1), target.size(2), Rows);
  const std::optional<Tensor> best = best_classes<In, T>(logits, shape, stream);
  const int16_t* const known = best ? static_cast<const int16_t*>(best->const_data_ptr()) : nullptr;
  const Targets targets(target, shape.classes, ignore);
  const int64_t table_bytes =
      int64_t(shape.classes + 2) * (shape.classes + 2) * int64_t(sizeof(uint32_t));
  const int copies = int(std::min<int64_t>(kThreads / 32, kSharedBytes / table_bytes));
  const int64_t jobs = int64_t((shape.out_width + kThreads - 1) / kThreads) * shape.jobs();
  const int64_t images = logits.size(0);
  // As many as run at once; more would only flush more tables.
  const auto kernel = copies > 0 ? upsample_confusion_kernel<In, T, Rows, true>
                                 : upsample_confusion_kernel<In, T, Rows, false>;
  const int64_t resident =
      pyseg::resident_blocks(kernel, kThreads, size_t(table_bytes * copies)) / images;
  const int64_t blocks = std::min<int64_t>(jobs, std::max<int64_t>(1, resident));
  for (int64_t first = 0; first < images; first += 65535) {  // the limit of gridDim.y
    const dim3 grid(unsigned(blocks), unsigned(std::min<int64_t>(65535, images - first)));
    PYSEG_LAUNCH(kernel, grid, kThreads, size_t(table_bytes * copies), stream,
                 static_cast<const In*>(logits.const_data_ptr()), shape, known, targets, first,
                 ignore, out, copies);
  }
}

template <class In, class T>
void launch(const Tensor& given, const Tensor& target, const Outputs& out, int64_t ignore,
            cudaStream_t stream) {
  const Tensor logits = walkable<In>(given);
  switch (rows_per_thread(logits.size(2), target.size(1))) {
    case 8: launch_rows<In, T, 8>(logits, target, out, ignore, stream); break;
    case 4: launch_rows<In, T, 4>(logits, target, out, ignore, stream); break;
    default: launch_rows<In, T, 1>(logits, target, out, ignore, stream);
  }
}

std::tuple<Tensor, Tensor, Tensor> upsample_confusion_cuda(const Tensor& logits,
                                                           const Tensor& target_labels,
                                                           int64_t ignore_index) {
  pyseg::check_target(logits, target_labels);
  const pyseg::DeviceScope device(logits, target_labels);
  const int64_t images = logits.size(0), classes = logits.size(1);
  auto [matrix, missed, invalid] =
      zeros(logits, {{images, classes, classes}, {images, classes}, {images, 2}}, device.stream);
  if (target_labels.numel() == 0) return {matrix, missed, invalid};
  const Tensor target = torch::stable::contiguous(target_labels);
  const Outputs out{static_cast<Count*>(matrix.mutable_data_ptr()),
                    static_cast<Count*>(missed.mutable_data_ptr()),
                    static_cast<Count*>(invalid.mutable_data_ptr())};
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(logits, target, out, ignore_index, device.stream);
      break;
    case ScalarType::Double:
      launch<double, double>(logits, target, out, ignore_index, device.stream);
      break;
    case ScalarType::Half:
      launch<torch::headeronly::Half, float>(logits, target, out, ignore_index, device.stream);
      break;
    case ScalarType::BFloat16:
      launch<torch::headeronly::BFloat16, float>(logits, target, out, ignore_index, device.stream);
      break;
    default: throw std::invalid_argument("logits must be float16, bfloat16, float32 or float64");
  }
  return {matrix, missed, invalid};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) { m.impl("upsample_confusion", TORCH_BOX(&upsample_confusion_cuda)); }
