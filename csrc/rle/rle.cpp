// COCO's run-length texts to the edges of their runs, and what two masks of such edges share. Both
// go through short lists from front to back, one number after the other: there are no vectors here.
#include "rle.h"

#include <tuple>
#include <vector>

#include "../common/common.h"

namespace pyseg::rle {
namespace {

const int64_t* checked(const char* name, const Tensor& tensor) {
  PYSEG_CHECK(
      tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name,
      " must be a contiguous vector of int64, got ", shape(tensor));
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Of vectors that lie one after the other: each ends where the next begins.
void check_ends(const char* name, const int64_t* ends, int64_t count, int64_t size) {
  int64_t before = 0;
  for (int64_t k = 0; k < count; before = ends[k++])
    PYSEG_CHECK(ends[k] >= before, name, " must rise, from 0 on");
  PYSEG_CHECK(before == size, name, " must end at ", size, ", got ", before);
}

// Edges of one mask: where the pixels of the runs of ones begin and end, none of them twice.
// Returns whether the text is whole and its runs add up to the mask's pixels.
bool edges_of(const uint8_t* text, int64_t size, int64_t pixels, std::vector<int64_t>& edges) {
  const size_t first = edges.size();
  int64_t before[2] = {0, 0}, place = 0, number = 0;
  for (int64_t i = 0; i < size; ++number) {
    int64_t value = 0;
    int digit = 0;
    while (true) {
      if (i == size || digit == kDigits) return false;
      const int code = int(text[i++]) - 48;
      if (code < 0 || code > 63) return false;
      value |= int64_t(code & 31) << (5 * digit++);
      if (code & 32) continue;
      if (code & 16) value -= int64_t(1) << (5 * digit);
      break;
    }
    if (value < -pixels || value > pixels) return false;  // so no sum wraps
    if (number > 2) value += before[number & 1];
    if (value < 0 || value > pixels - place) return false;
    before[number & 1] = value;
    place += value;
    // What ends and begins at the same place does neither.
    if (edges.size() > first && edges.back() == place)
      edges.pop_back();
    else
      edges.push_back(place);
  }
  if (place != pixels) return false;
  if (number & 1) {  // the end of zeros is no edge: it is there, or took one away that is
    if (edges.size() > first && edges.back() == place)
      edges.pop_back();
    else
      edges.push_back(place);
  }
  return true;
}

std::tuple<Tensor, Tensor> rle_edges_cpu(const Tensor& texts,   // [B] uint8, one after the other
                                         const Tensor& ends,    // [K] int64, of each text
                                         const Tensor& pixels)  // [K] int64, of each mask
{
  PYSEG_CHECK(texts.dim() == 1 && texts.scalar_type() == ScalarType::Byte && texts.is_contiguous(),
              "texts must be a contiguous vector of uint8, got ", shape(texts));
  const int64_t *const end = checked("ends", ends), *const total = checked("pixels", pixels);
  const int64_t count = ends.numel();
  PYSEG_CHECK(pixels.numel() == count, "pixels must be as many as texts, ", count, ", got ",
              pixels.numel());
  check_ends("ends", end, count, texts.numel());
  for (int64_t k = 0; k < count; ++k)
    PYSEG_CHECK(total[k] >= 0 && total[k] < int64_t(1) << 62, "pixels must be 0 to 2^62, got ",
                total[k]);
  Tensor counts = torch::stable::new_zeros(ends, {count}, ScalarType::Long);
  int64_t* const found = counts.mutable_data_ptr<int64_t>();
  const uint8_t* const text = static_cast<const uint8_t*>(texts.const_data_ptr());
  std::vector<int64_t> edges;
  edges.reserve(texts.numel() + count);
  for (int64_t k = 0, begin = 0; k < count; begin = end[k++]) {
    const int64_t before = int64_t(edges.size());
    const bool whole = begin < end[k] && edges_of(text + begin, end[k] - begin, total[k], edges);
    if (!whole) edges.resize(before);
    found[k] = whole ? int64_t(edges.size()) - before : -1;
  }
  Tensor result = torch::stable::new_empty(ends, {int64_t(edges.size())}, ScalarType::Long);
  std::copy(edges.begin(), edges.end(), result.mutable_data_ptr<int64_t>());
  return {result, counts};
}

// Pixels of both of two masks.
int64_t shared(const int64_t* a, const int64_t* a_end, const int64_t* b, const int64_t* b_end) {
  int64_t sum = 0;
  while (a < a_end && b < b_end) {
    const int64_t low = std::max(a[0], b[0]), high = std::min(a[1], b[1]);
    sum += std::max<int64_t>(high - low, 0);
    const bool first = a[1] < b[1];  // no branch: which run ends first is not predictable
    a += first ? 2 : 0, b += first ? 0 : 2;
  }
  return sum;
}

Tensor run_overlaps_cpu(
    const Tensor& first_edges,  // [E] int64, of one mask after the other, rising
    const Tensor& first_ends,   // [K] int64, even
    const Tensor& second_edges, const Tensor& second_ends,
    const Tensor& first,     // [P] int64: which masks are held against
    const Tensor& second) {  // each other
  struct Side {
    const int64_t *edges, *ends, *which;
    int64_t masks;
  };
  const Side sides[2] = {
      {checked("first_edges", first_edges), checked("first_ends", first_ends),
       checked("first", first), first_ends.numel()},
      {checked("second_edges", second_edges), checked("second_ends", second_ends),
       checked("second", second), second_ends.numel()}};
  const int64_t pairs = first.numel();
  PYSEG_CHECK(second.numel() == pairs, "first and second must be pairs, got ", pairs, " and ",
              second.numel());
  check_ends("first_ends", sides[0].ends, sides[0].masks, first_edges.numel());
  check_ends("second_ends", sides[1].ends, sides[1].masks, second_edges.numel());
  for (const Side& side : sides) {
    for (int64_t k = 0; k < side.masks; ++k)
      PYSEG_CHECK(side.ends[k] % 2 == 0, "each mask must have as many ends of runs as beginnings");
    for (int64_t k = 0; k < pairs; ++k)
      PYSEG_CHECK(side.which[k] >= 0 && side.which[k] < side.masks, "a pair names mask ",
                  side.which[k], " of ", side.masks);
  }
  Tensor result = torch::stable::new_empty(first, {pairs}, ScalarType::Long);
  int64_t* const sums = result.mutable_data_ptr<int64_t>();
  constexpr int64_t kTogether = 64;
  for_each((pairs + kTogether - 1) / kTogether, kTogether * 256, [&](int64_t item, int64_t) {
    for (int64_t k = item * kTogether; k < std::min(pairs, (item + 1) * kTogether); ++k) {
      const int64_t a = sides[0].which[k], b = sides[1].which[k];
      sums[k] = shared(
          sides[0].edges + (a ? sides[0].ends[a - 1] : 0), sides[0].edges + sides[0].ends[a],
          sides[1].edges + (b ? sides[1].ends[b - 1] : 0), sides[1].edges + sides[1].ends[b]);
    }
  });
  return result;
}

}  // namespace
}  // namespace pyseg::rle

// Of a text that is damaged the count is -1, and it has no edges.
STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("_rle_edges(Tensor texts, Tensor ends, Tensor pixels) -> (Tensor, Tensor)");
  m.def(
      "_run_overlaps(Tensor first_edges, Tensor first_ends, Tensor second_edges, "
      "Tensor second_ends, Tensor first, Tensor second) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("_rle_edges", TORCH_BOX(&pyseg::rle::rle_edges_cpu));
  m.impl("_run_overlaps", TORCH_BOX(&pyseg::rle::run_overlaps_cpu));
}
