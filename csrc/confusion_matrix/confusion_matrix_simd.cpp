// The inner loops of counting pairs of labels on the CPU.
#include "confusion_matrix_simd.h"

#include "../common/level.h"  // after all others

namespace pyseg::counting::PYSEG_LEVEL {

constexpr int64_t kBlock = 512;  // pixels coded at a time: these stay in the L1 cache
constexpr int64_t kRun = 32;     // pixels that are counted at once where they are all alike

// A code of a label is as wide as the label where it can be, because changing the width between
// comparing and selecting costs more than both.
template <class T, class Code, class Cell>
PYSEG_INLINE void encode(const T* __restrict prediction, const T* __restrict target, int64_t n,
                         LabelCoder<T> coder, Cell* __restrict cells) {
  const Cell width = Cell(coder.num_classes + 2);
  for (int64_t i = 0; i < n; ++i) {
    const Code row = coder.template code<Code>(target[i]);
    const Code column = coder.template code<Code>(prediction[i]);
    cells[i] = Cell(Cell(Cell(row) * width) + Cell(column));
  }
}

// Adjacent pixels go to different copies of the table: an increment that follows another of the
// same cell would wait for its store. Meanwhile the labels that `encode` reads next are fetched,
// or counting and reading memory would take turns.
template <int Copies, class T, class Cell>
PYSEG_INLINE void count(const Cell* cells, int64_t n, uint32_t* table, int64_t table_size,
                        const T* next_prediction, const T* next_target) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int64_t k = i; k < i + kRun; k += kLine) {
      __builtin_prefetch(next_prediction + k);
      __builtin_prefetch(next_target + k);
    }
    const Cell first = cells[i];
    Cell different = 0;
    for (int64_t k = 0; k < kRun; ++k) different |= Cell(cells[i + k] ^ first);
    if (different == 0) {  // label maps are mostly flat
      table[first] += uint32_t(kRun);
      continue;
    }
    for (int64_t k = 0; k < kRun; k += Copies)
      for (int copy = 0; copy < Copies; ++copy) ++table[copy * table_size + cells[i + k + copy]];
  }
  for (; i < n; ++i) ++table[cells[i]];
}

template <int Copies, class Code, class Cell, class T>
PYSEG_INLINE void count_blocks(const T* prediction, const T* target, int64_t n,
                               const LabelCoder<T>& coder, uint32_t* table, int64_t table_size) {
  Cell cells[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const T *p = prediction + begin, *t = target + begin;
    encode<T, Code>(p, t, size, coder, cells);
    count<Copies>(cells, size, table, table_size, p + kBlock, t + kBlock);
  }
}

template <class T>
void count_pairs(const T* prediction, const T* target, int64_t n, const LabelCoder<T>& coder,
                 uint32_t* table, int64_t table_size, int copies) {
  using Narrow = typename LabelCoder<T>::Unsigned;
  using Wide = std::conditional_t<sizeof(T) == 1, uint16_t, Narrow>;
  if (copies == kTableCopies)
    count_blocks<kTableCopies, Narrow, uint16_t>(prediction, target, n, coder, table, table_size);
  else if (table_size <= int64_t(1) << 16)  // then codes, too, fit a label of 8 bits
    count_blocks<1, Narrow, uint16_t>(prediction, target, n, coder, table, table_size);
  else
    count_blocks<1, Wide, uint32_t>(prediction, target, n, coder, table, table_size);
}

#define PYSEG_COUNT(T)                                                                             \
  template void count_pairs(const T*, const T*, int64_t, const LabelCoder<T>&, uint32_t*, int64_t, \
                            int);
PYSEG_COUNT(uint8_t)
PYSEG_COUNT(int8_t)
PYSEG_COUNT(int16_t)
PYSEG_COUNT(int32_t)
PYSEG_COUNT(int64_t)

}  // namespace pyseg::counting::PYSEG_LEVEL
