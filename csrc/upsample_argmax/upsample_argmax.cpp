// Bilinear upsampling fused with argmax, on the CPU. Full-resolution logits never exist.
//
// Output rows that lie between the same two rows of the logits form a group of at most 8. Of each
// group: convert its two rows of logits, and then tile by tile along the row apply tx (once for all
// rows of the group) and look for the best class. A tile whose corners all have the same best class
// has it everywhere, and is filled.
#include "upsample_argmax.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/common.h"

namespace {

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PYSEG_HAS_X86_LEVELS 1
#define PYSEG_ARCH v4
#define PYSEG_TARGET __attribute__((target("arch=x86-64-v4")))
#define PYSEG_BYTES 64
#define PYSEG_ROWS 8
#include "classify.inc"
#define PYSEG_ARCH v3
#define PYSEG_TARGET __attribute__((target("arch=x86-64-v3")))
#define PYSEG_BYTES 32
#define PYSEG_ROWS 4
#include "classify.inc"
#endif
#define PYSEG_ARCH generic
#define PYSEG_TARGET
#define PYSEG_BYTES 16
#define PYSEG_ROWS 4
#include "classify.inc"

using namespace pyseg;

constexpr int kRows = 8;    // output rows of a group
constexpr int kTile = 32;   // output columns of a tile
constexpr int kLanes = 16;  // the most that a vector has
constexpr int64_t kMaxClasses = 32767;

template <class T, class Out>
struct Kernels {
  decltype(&generic::expand<T>) expand = &generic::expand<T>;
  decltype(&generic::classify<T, Out>) classify = &generic::classify<T, Out>;

  Kernels() {
#ifdef PYSEG_HAS_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4"))
      expand = &v4::expand<T>, classify = &v4::classify<T, Out>;
    else if (__builtin_cpu_supports("x86-64-v3"))
      expand = &v3::expand<T>, classify = &v3::classify<T, Out>;
#endif
  }
};

PYSEG_INLINE float widen(float x) { return x; }
PYSEG_INLINE double widen(double x) { return x; }
PYSEG_INLINE float widen(torch::headeronly::BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  return __builtin_bit_cast(float, bits);
}
// Without branches and tables, so that it vectorises: the exponent moves from bias 15 to 127.
PYSEG_INLINE float widen(torch::headeronly::Half x) {
  const uint32_t bits = x.x, magnitude = (bits & 0x7fff) << 13;
  const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
  const uint32_t value = magnitude >= 0x0f800000u ? special : __builtin_bit_cast(uint32_t, finite);
  const uint32_t with_sign = value | (bits & 0x8000) << 16;
  return __builtin_bit_cast(float, with_sign);
}

// One row of every class, as T. Returns whether all of it is tame.
template <class In, class T>
PYSEG_MULTIVERSION bool load_rows(const In* __restrict in, int64_t class_stride,
                                  int64_t column_stride, int64_t classes, int64_t width,
                                  T* __restrict out, int64_t stride) {
  int wild = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const In* __restrict source = in + c * class_stride;
    T* __restrict row = out + c * stride;
    if (column_stride == 1)
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x]);
    else
      for (int64_t x = 0; x < width; ++x) row[x] = widen(source[x * column_stride]);
    for (int64_t x = 0; x < width; ++x) wild |= tame(row[x]) ? 0 : 1;
  }
  return wild == 0;
}

// Where the output columns (or rows) lie between those of the logits; padded for whole tiles.
template <class T>
struct Axis {
  std::vector<int> low;
  std::vector<T> t;

  Axis(int64_t inputs, int64_t outputs) : low(outputs + kTile), t(outputs + kTile) {
    const T scale = T(inputs) / T(outputs);
    for (int64_t i = 0; i < outputs + kTile; ++i)
      source_index<T>(std::min(i, outputs - 1), scale, inputs, &low[i], &t[i]);
  }
};

// For logits that are not tame.
template <class T, class Out>
void classify_wild(const T* top, const T* bottom, int64_t stride, int64_t classes, int64_t width,
                   const Axis<T>& columns, T ty, int64_t out_width, Out* labels) {
  for (int64_t x = 0; x < out_width; ++x) {
    const int64_t left = columns.low[x], right = std::min<int64_t>(left + 1, width - 1);
    T best = 0;
    int64_t label = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const T *p = top + c * stride, *q = bottom + c * stride;
      const T v = blend(blend(p[left], p[right], columns.t[x]),
                        blend(q[left], q[right], columns.t[x]), ty);
      if (c == 0 || wins(v, best)) best = v, label = c;
    }
    labels[x] = Out(label);
  }
}

template <class In, class T, class Out>
void upsample_argmax_typed(const Tensor& logits, Tensor& labels) {
  const In* in = static_cast<const In*>(logits.const_data_ptr());
  Out* out = static_cast<Out*>(labels.mutable_data_ptr());
  const int64_t images = logits.size(0), classes = logits.size(1);
  const int64_t height = logits.size(2), width = logits.size(3);
  const int64_t out_height = labels.size(1), out_width = labels.size(2);
  const Axis<T> rows(height, out_height), columns(width, out_width);
  std::vector<int64_t> groups;  // the first output row of each
  for (int64_t y = 0; y < out_height; ++y)
    if (groups.empty() || rows.low[y] != rows.low[groups.back()] || y - groups.back() == kRows)
      groups.push_back(y);
  const int64_t count = int64_t(groups.size());
  groups.push_back(out_height);
  const Kernels<T, Out> kernels;
  // Of a class in the buffers below; `expand` reads a whole vector from any column.
  const int64_t stride = (width + 2 * kLanes - 1) / kLanes * kLanes;
  const int64_t work = classes * (out_width * kRows + 4 * width);  // of a group
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 18) / work);
  torch::stable::parallel_for(0, images * count, grain, [&](int64_t begin, int64_t end) {
    // The rows of logits above and below, and which they are; their best classes.
    std::vector<T> top(classes * stride), bottom(classes * stride);
    std::vector<Out> top_labels(stride), bottom_labels(stride);
    bool top_tame = true, bottom_tame = true;
    int64_t bottom_row = -1;  // counted over all images
    std::vector<T> value(classes * kTile), slope(value.size());
    const T zero[kRows] = {};
    const auto load = [&](int64_t image, int64_t y, std::vector<T>& to, std::vector<Out>& best) {
      const In* row = in + image * logits.stride(0) + y * logits.stride(2);
      const bool is_tame = load_rows<In, T>(row, logits.stride(1), logits.stride(3), classes, width,
                                            to.data(), stride);
      if (is_tame)  // with ty = 0 the slope does not matter, but must be finite
        kernels.classify(to.data(), to.data(), stride, classes, zero, 1, stride, best.data(),
                         stride);
      return is_tame;
    };
    for (int64_t job = begin; job < end; ++job) {
      const int64_t image = job / count, y = groups[job % count];
      const int64_t size = groups[job % count + 1] - y;
      const int64_t upper = rows.low[y], lower = std::min(upper + 1, height - 1);
      Out* target = out + (image * out_height + y) * out_width;
      if (bottom_row == image * height + upper) {
        top.swap(bottom), top_labels.swap(bottom_labels);
        top_tame = bottom_tame;
      } else {
        top_tame = load(image, upper, top, top_labels);
      }
      bottom_tame = load(image, lower, bottom, bottom_labels);
      bottom_row = image * height + lower;
      if (!top_tame || !bottom_tame) {
        for (int64_t r = 0; r < size; ++r)
          classify_wild(top.data(), bottom.data(), stride, classes, width, columns, rows.t[y + r],
                        out_width, target + r * out_width);
        continue;
      }
      T ty[kRows];
      for (int64_t r = 0; r < kRows; ++r) ty[r] = rows.t[y + std::min(r, size - 1)];
      for (int64_t x = 0; x < out_width; x += kTile) {
        const int64_t tile = std::min<int64_t>(kTile, out_width - x);
        const int64_t left = columns.low[x];
        const int64_t right = std::min<int64_t>(columns.low[x + tile - 1] + 1, width - 1);
        const Out label = top_labels[left];
        bool uniform = true;
        for (int64_t i = left; i <= right; ++i)
          uniform &= top_labels[i] == label && bottom_labels[i] == label;
        if (uniform) {
          for (int64_t r = 0; r < size; ++r) std::fill_n(target + r * out_width + x, tile, label);
          continue;
        }
        Out found[kRows * kTile];
        kernels.expand(top.data(), bottom.data(), stride, classes, &columns.low[x], &columns.t[x],
                       tile, value.data(), slope.data(), kTile);
        kernels.classify(value.data(), slope.data(), kTile, classes, ty, int(size), kTile, found,
                         kTile);
        for (int64_t r = 0; r < size; ++r)
          std::memcpy(target + r * out_width + x, found + r * kTile, tile * sizeof(Out));
      }
    }
  });
}

template <class In, class T>
void upsample_argmax_to(const Tensor& logits, Tensor& labels) {
  if (labels.scalar_type() == ScalarType::Byte)
    upsample_argmax_typed<In, T, uint8_t>(logits, labels);
  else
    upsample_argmax_typed<In, T, int16_t>(logits, labels);
}

Tensor upsample_argmax_cpu(const Tensor& logits,  // [N, C, h, w] floating point
                           int64_t height, int64_t width) {
  const int64_t classes = logits.size(1);
  PYSEG_CHECK(classes >= 1 && classes <= kMaxClasses, "logits must have 1 to ", kMaxClasses,
              " classes, got ", shape(logits));
  Tensor labels = torch::stable::new_empty(logits, {logits.size(0), height, width},
                                           classes <= 255 ? ScalarType::Byte : ScalarType::Short);
  if (labels.numel() == 0) return labels;
  PYSEG_CHECK(logits.numel() > 0, "logits must have pixels to sample, got ", shape(logits));
  switch (logits.scalar_type()) {
    case ScalarType::Float: upsample_argmax_to<float, float>(logits, labels); break;
    case ScalarType::Double: upsample_argmax_to<double, double>(logits, labels); break;
    case ScalarType::Half: upsample_argmax_to<torch::headeronly::Half, float>(logits, labels); break;
    case ScalarType::BFloat16:
      upsample_argmax_to<torch::headeronly::BFloat16, float>(logits, labels);
      break;
    default: PYSEG_CHECK(false, "logits must be float16, bfloat16, float32 or float64");
  }
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax_cpu));
}
