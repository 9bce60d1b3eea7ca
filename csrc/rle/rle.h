// Masks as edges of runs: what the parts of the op agree on.
#pragma once

#include <cstdint>

namespace pyseg::rle {

constexpr int kDigits = 12;  // of a number at most, of 5 bits each

}  // namespace pyseg::rle
