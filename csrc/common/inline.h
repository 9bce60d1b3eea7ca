// What loops of every instruction set may use, without torch's headers.
#pragma once

#include <cstdint>
#include <cstring>

#define PYSEG_INLINE inline __attribute__((always_inline))

namespace pyseg {

// 64 bytes, each 0 or 1, to bits.
PYSEG_INLINE uint64_t bits_of(const uint8_t* flags) {
  uint64_t word = 0;
  for (int k = 0; k < 8; ++k) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * k, 8);
    word |= (eight * 0x0102040810204080u) >> 56 << (8 * k);
  }
  return word;
}

}  // namespace pyseg
