// What decode_png_simd.cpp offers to decode_png.cpp, once per instruction set.
#pragma once

#include "../common/inline.h"
#include "../common/simd_level.h"
#include "decode_png.h"

namespace pyseg::png {

// Bytes that `decode` works in.
int64_t workspace(const Picture& picture);

// A zlib stream of filtered rows to what `form` says. Returns whether it is whole and undamaged;
// whatever it holds, nothing beyond the stream's padding is read, nor anything beyond `to` written.
PYSEG_DECLARE_LEVELS(bool decode(const uint8_t* stream, int64_t size, const Picture& picture,
                                 Form form, uint8_t* memory, void* to);)

// How decode divides its workspace.
constexpr int64_t kSlab = 1 << 17;    // bytes that are inflated at a time, or a row if that is more
constexpr int64_t kSlack = 512;       // what the inner loops may write beyond where they end
constexpr int64_t kTables = 1 << 16;  // of codes

inline int64_t workspace(const Picture& picture) {
  return kTables + kHistory + kSlab + (picture.row() + 1) + kSlack + 2 * (picture.row() + kSlack);
}

}  // namespace pyseg::png
