// The operator namespace `pyseg`. Each op adds its schema beside its kernel, as a fragment.
#include "common.h"

namespace {

std::string simd_level() { return pyseg::simd_level_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) { m.def("simd_level() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(pyseg, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level));
}
