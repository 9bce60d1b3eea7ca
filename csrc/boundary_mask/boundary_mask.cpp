// Pixels near another label, on the CPU: row by row, with the length of the run of equal rows kept
// per column.
//
// The template of a CPU kernel, from the inside out: hot loops under PYSEG_MULTIVERSION; the work
// of one thread; the op for one dtype, which shares it out to threads; the op, which checks,
// allocates and chooses the dtype; at the end the schema and the registration. All of it is in an
// anonymous namespace, because all ops are linked into one library.
#include "boundary_mask.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/common.h"

namespace {

using namespace pyseg;

constexpr int64_t kBlock = 64;  // pixels that are compared together

// PYSEG_MULTIVERSION (common/common.h) compiles a function once per SIMD level. It belongs on leaf
// functions with plain loops, which the compiler turns into vectors; what they call has to be
// inlined, hence the attribute of `close`.

// Sets the pixels whose window along the row has one label; returns nothing else.
template <class T>
PYSEG_MULTIVERSION void find_uniform(const T* labels, Window window, uint8_t* uniform) {
  const int64_t width = window.width;
  std::memset(uniform, 0, width);
  int64_t start = 0;
  const auto close = [&](int64_t end) __attribute__((always_inline)) {
    const int64_t first = start == 0 && !window.border ? 0 : start + window.distance;
    const int64_t last = end == width && !window.border ? width : end - window.distance;
    if (first < last) std::memset(uniform + first, 1, last - first);
    start = end;
  };
  int64_t x = 1;
  for (; x + kBlock <= width; x += kBlock) {
    uint8_t changed[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) changed[k] = labels[x + k] != labels[x + k - 1] ? 1 : 0;
    for (uint64_t word = bits_of(changed); word; word &= word - 1) close(x + __builtin_ctzll(word));
  }
  for (; x < width; ++x)
    if (labels[x] != labels[x - 1]) close(x);
  close(width);
}

// streak: how many rows up to this one were uniform and had this label; `needed` are enough.
template <class T, class Streak>
PYSEG_MULTIVERSION void add_row(const uint8_t* __restrict uniform, const T* __restrict labels,
                                const T* __restrict above, int64_t width, Streak needed,
                                Streak* __restrict streak) {
  for (int64_t x = 0; x < width; ++x) {
    const Streak before = labels[x] == above[x] ? streak[x] : Streak(0);
    const Streak longer = Streak(before + (before < needed ? 1 : 0));
    streak[x] = uniform[x] ? longer : Streak(0);
  }
}

template <class Streak>
PYSEG_MULTIVERSION void write_row(const Streak* __restrict streak, int64_t width, Streak needed,
                                  uint8_t* __restrict mask) {
  for (int64_t x = 0; x < width; ++x) mask[x] = streak[x] < needed;
}

// Rows [begin, end) of one image.
template <class T, class Streak>
void mark_rows(const T* labels, const Window& window, int64_t begin, int64_t end, uint8_t* mask) {
  const int64_t width = window.width, last = window.height - 1, distance = window.distance;
  std::vector<uint8_t> uniform(width);
  std::vector<Streak> streak(width);
  const Streak needed = Streak(2 * distance + 1);
  int64_t ready = -1;  // the row that `uniform` is of
  for (int64_t y = begin - distance; y < end + distance; ++y) {
    const bool outside = y < 0 || y > last;
    const int64_t row = std::clamp<int64_t>(y, 0, last);
    if (outside && window.border) {
      std::fill(streak.begin(), streak.end(), 0);
    } else {
      if (row != ready) find_uniform(labels + row * width, window, uniform.data());
      ready = row;
      const int64_t above = std::clamp<int64_t>(y - 1, 0, last);
      add_row(uniform.data(), labels + row * width, labels + above * width, width, needed,
              streak.data());
    }
    if (y - distance >= begin)
      write_row(streak.data(), width, needed, mask + (y - distance) * width);
  }
}

// Threads share out the rows of all images, not the images: a batch may be one image. A result must
// not depend on their number, so a range recomputes what it needs from rows around it.
template <class T>
void boundary_mask_typed(const Tensor& labels, Tensor& mask, const Window& window) {
  const T* in = static_cast<const T*>(labels.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t pixels = window.height * window.width;
  // Every range of rows also needs the rows around it.
  const int64_t grain =
      std::max<int64_t>(2 * window.distance, (int64_t(1) << 17) / window.width + 1);
  torch::stable::parallel_for(
      0, labels.size(0) * window.height, grain, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t image = begin / window.height;
          const int64_t stop = std::min(end, (image + 1) * window.height);
          const auto mark = 2 * window.distance < 255 ? mark_rows<T, uint8_t>  // more lanes
                                                      : mark_rows<T, int32_t>;
          mark(in + image * pixels, window, begin - image * window.height,
               stop - image * window.height, out + image * pixels);
          begin = stop;
        }
      });
}

// pyseg/ops/boundary_mask.py has checked the arguments and named what is wrong; what is checked
// here guards memory against calls of torch.ops.pyseg itself. Empty input returns first.
Tensor boundary_mask_cpu(const Tensor& labels,  // [N, H, W] integer
                         int64_t distance, bool border) {
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

// The schema stands once, beside the CPU kernel. torch sends each call to the kernel of its
// tensors' device; the fake kernel, for torch.compile, is in Python.
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("boundary_mask(Tensor labels, int distance, bool border) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("boundary_mask", TORCH_BOX(&boundary_mask_cpu)); }
