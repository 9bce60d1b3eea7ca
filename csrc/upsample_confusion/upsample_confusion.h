// Bilinear upsampling fused with argmax and counting: the sampling is that of
// upsample_argmax/upsample_argmax.h, the coding of labels that of
// confusion_matrix/confusion_matrix.h. A prediction is never out of range.
#pragma once

#include "../common/common.h"
#include "../confusion_matrix/confusion_matrix.h"
#include "../upsample_argmax/upsample_argmax.h"

namespace pyseg {

// Checks what the memory accesses rely on; Python has checked it in more words.
inline void check_target(const Tensor& logits, const Tensor& target) {
  PYSEG_CHECK(logits.dim() == 4 && target.dim() == 3 && target.size(0) == logits.size(0),
              "logits must be [N, C, h, w] and target [N, H, W], got ", shape(logits), " and ",
              shape(target));
}

}  // namespace pyseg
