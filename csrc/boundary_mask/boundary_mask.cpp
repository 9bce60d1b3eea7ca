// Pixels near another label, on the CPU.
//
// The template of a CPU kernel: the hot loops are in boundary_mask_simd.cpp, one function per
// dtype; here the op for one dtype, which shares the work out to threads; the op, which checks,
// allocates and chooses the dtype; at the end the schema and the registration. All of it is in an
// anonymous namespace, because all ops are linked into one library.
#include "boundary_mask.h"

#include <algorithm>

#include "../common/common.h"
#include "boundary_mask_simd.h"

namespace pyseg::boundary {
namespace {

// How many rows are worth handing to a thread at once. Every range of rows also needs the rows
// around it.
int64_t rows_together(const Window& window, int64_t images) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1) return window.height;
  const int64_t share = (images * window.height + threads - 1) / threads;
  const int64_t rows = std::max(8 * window.distance, (int64_t(1) << 15) / window.width + 1);
  return std::min(window.height, 2 * rows > share ? share : rows);
}

// Threads share out the rows of all images, not the images: a batch may be one image. A result must
// not depend on their number, so a range recomputes what it needs from rows around it. for_each
// lets threads take ranges as they finish others: one that is held up takes fewer.
template <class T>
void boundary_mask_typed(const Tensor& labels, Tensor& mask, const Window& window) {
  const T* in = static_cast<const T*>(labels.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const auto mark_rows = PYSEG_AT_LEVEL(mark_rows<T>);  // of the level in force
  const int64_t images = labels.size(0), pixels = window.height * window.width;
  const int64_t together = rows_together(window, images);
  const int64_t ranges = (window.height + together - 1) / together;
  for_each(images * ranges, 2 * together * window.width, [&](int64_t item, int64_t) {
    const int64_t at = item / ranges * pixels, begin = item % ranges * together;
    mark_rows(in + at, window, begin, std::min(window.height, begin + together), out + at);
  });
}

// Empty input returns first.
Tensor boundary_mask_cpu(const Tensor& labels,  // [N, H, W] integer
                         int64_t distance, bool border) {
  check_labels(labels, distance);
  Tensor mask = torch::stable::new_empty(labels, labels.sizes(), ScalarType::Bool);
  if (labels.numel() == 0) return mask;
  const Tensor in = torch::stable::contiguous(labels);
  const int64_t height = in.size(1), width = in.size(2);
  const Window window{height, width, std::min(distance, std::max(height, width)), border};
  switch (in.scalar_type()) {
    case ScalarType::Byte:  // labels are only compared, so a sign makes no difference
    case ScalarType::Char: boundary_mask_typed<uint8_t>(in, mask, window); break;
    case ScalarType::Short: boundary_mask_typed<int16_t>(in, mask, window); break;
    case ScalarType::Int: boundary_mask_typed<int32_t>(in, mask, window); break;
    case ScalarType::Long: boundary_mask_typed<int64_t>(in, mask, window); break;
    default: PYSEG_CHECK(false, "labels must be uint8, int8, int16, int32 or int64");
  }
  return mask;
}

}  // namespace
}  // namespace pyseg::boundary

// The schema stands once, beside the CPU kernel. torch sends each call to the kernel of its
// tensors' device; the fake kernel, for torch.compile, is in Python.
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("boundary_mask(Tensor labels, int distance, bool border) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("boundary_mask", TORCH_BOX(&pyseg::boundary::boundary_mask_cpu));
}
