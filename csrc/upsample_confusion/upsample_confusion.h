// Bilinear upsampling fused with argmax and counting: the sampling is that of
// upsample_argmax/upsample_argmax.h, the coding of labels that of
// confusion_matrix/confusion_matrix.h. A prediction is never out of range.
#pragma once

#include "../confusion_matrix/confusion_matrix.h"
#include "../upsample_argmax/upsample_argmax.h"
