// The inner loops of counting pairs of labels on the CPU: what count_cells.h knows of them.
#pragma once

#include "../common/inline.h"
#include "../common/simd_level.h"
#include "confusion_matrix.h"

namespace pyseg::counting {

constexpr int kTableCopies = 8;  // of a small table

// Adds up n pixels. `table` holds `copies` numbers for each of its `table_size` cells, which
// are (C + 2)^2.
PYSEG_DECLARE_LEVELS(template <class T> void count_pairs(const T* prediction, const T* target,
                                                         int64_t n, const LabelCoder<T>& coder,
                                                         uint32_t* table, int64_t table_size,
                                                         int copies);)

template <class T>
void count_at(SimdLevel level, const T* prediction, const T* target, int64_t n,
              const LabelCoder<T>& coder, uint32_t* table, int64_t table_size, int copies) {
  PYSEG_AT(level, count_pairs<T>)(prediction, target, n, coder, table, table_size, copies);
}

}  // namespace pyseg::counting
