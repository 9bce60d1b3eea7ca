// What the parts of the PNG decoder share: the header, the stream of a file's IDAT chunks,
// checksums.
#pragma once

#include <cstdint>

namespace pyseg::png {

enum Form : int64_t {  // of what is made
  kValues,             // [H, W] uint8 of grey files and, as indices, of those with a palette
  kColours,            // [H, W, 3] uint8
  kSegmentIds,         // [H, W] int32, R + 256 G + 65536 B
  kForms
};

struct Picture {
  int64_t height, width;
  int64_t bytes;  // of a pixel in the file, 1 or 3
  int64_t row() const { return width * bytes; }
  int64_t filtered() const { return height * (row() + 1); }  // each row has its filter before it
};

constexpr int64_t kHistory = 32768;  // bytes that a copy reaches back at most
constexpr int64_t kPadding = 64;     // bytes of zeros that follow a stream

}  // namespace pyseg::png
