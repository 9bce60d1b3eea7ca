// Which pixels an instance's box has; shared by the CPU and the CUDA kernel of panoptic_head.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../upsample_argmax/upsample_argmax.h"

namespace pyseg {

// Pixels trunc(x0) to trunc(x1), both included, before they are clipped to the image.
struct PixelBox {
  int left, top, width, height;  // width and height 0: no pixel

  PYSEG_HOST_DEVICE bool has_row(int y) const { return y >= top && y - top < height; }
  PYSEG_HOST_DEVICE bool has_column(int x) const { return x >= left && x - left < width; }
};

PYSEG_HOST_DEVICE PixelBox pixel_box(const float* xyxy) {
  constexpr float kFar = 16777216.0f;
  PixelBox box{0, 0, 0, 0};
  for (int i = 0; i < 4; ++i)
    if (!(xyxy[i] > -kFar && xyxy[i] < kFar)) return box;
  const int right = int(xyxy[2]), bottom = int(xyxy[3]);
  box.left = int(xyxy[0]), box.top = int(xyxy[1]);
  if (right >= box.left && bottom >= box.top)
    box.width = right - box.left + 1, box.height = bottom - box.top + 1;
  return box;
}

}  // namespace pyseg
