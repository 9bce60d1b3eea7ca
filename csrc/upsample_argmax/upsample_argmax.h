// Bilinear sampling of logits (align_corners=False), shared by the CPU and the CUDA kernel.
//
// Between the pixels (y, x) and (y+1, x+1) of the logits a class has the value
//   (p + tx px) + ty (py + tx pxy)
// with the differences px, py, pxy of its four corners: one addition and one multiplication per
// class and output pixel, once tx is applied. These differences neither overflow nor turn into
// NaN while the logits are `tame`; where they are not, `blend` is used, which like torch weighs
// the corners, so that infinities and NaN come out as they should.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/host_device.h"

namespace pyseg {

// Output index -> the lower of its two source indices, and how far it is from there to the next. In
// the index's own type: on a GPU conversions of 64 bits take long.
template <class T, class Index>
PYSEG_HOST_DEVICE void source_index(Index output, T scale, std::type_identity_t<Index> inputs,
                                    int* low, T* t) {
  T source = product(scale, T(output) + T(0.5)) - T(0.5);
  source = source < T(0) ? T(0) : source;
  const Index floor = Index(source);
  *low = int(floor < inputs - 1 ? floor : inputs - 1);
  *t = floor < inputs - 1 ? source - T(floor) : T(0);  // the last source pixel has no next
}

template <class T>
PYSEG_HOST_DEVICE bool tame(T logit) {
  return std::fabs(logit) < T(1e37);
}

// A neighbour of weight 0 does not count, even if it is infinite.
template <class T>
PYSEG_HOST_DEVICE T blend(T a, T b, T t) {
  return t == T(0) ? a : (T(1) - t) * a + t * b;
}

// As in torch.argmax: the first of equal values, and NaN above everything.
template <class T>
PYSEG_HOST_DEVICE bool wins(T value, T best) {
  return value > best || (value != value && best == best);
}

}  // namespace pyseg
