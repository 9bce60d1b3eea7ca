// What loops of every instruction set may use, without torch's headers.
#pragma once

#include <cstdint>

#define PYSEG_INLINE inline __attribute__((always_inline))
