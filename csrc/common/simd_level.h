// The instruction sets that the hot loops are compiled for, and the choice of one at run time.
//
// Such loops live in `<op>_simd.cpp`, which setup.py compiles once per level, each in a namespace
// of the level's name (see level.h). The rest of the op declares and picks them:
//
//   PYSEG_DECLARE_LEVELS(void add_rows(const float* from, int64_t n, float* to);)
//   const auto add_rows = PYSEG_AT_LEVEL(add_rows);  // before threads start: it may throw
#pragma once

// Where the units of setup.py's level_units() exist.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define PYSEG_X86_LEVELS
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyseg {

enum class SimdLevel {
  generic,  // what every processor of the platform has: SSE2 on x86-64
  v3,       // x86-64-v3: AVX2 and FMA
  v4,       // x86-64-v4: AVX-512
};

// The processor's best level or, if that is lower, the environment's PYSEG_SIMD (v4, v3, generic).
// Read at each call: so tests run the levels that their processor would not take.
inline SimdLevel simd_level() {
  [[maybe_unused]] SimdLevel most = SimdLevel::v4;  // without levels it is checked alone
  if (const char* const asked = std::getenv("PYSEG_SIMD"); asked && *asked) {
    const std::string name = asked;
    if (name == "v3")
      most = SimdLevel::v3;
    else if (name == "generic")
      most = SimdLevel::generic;
    else if (name != "v4")
      throw std::invalid_argument("PYSEG_SIMD must be v4, v3 or generic, got " + name);
  }
#ifdef PYSEG_X86_LEVELS
  static const SimdLevel best = [] {
    __builtin_cpu_init();
#ifdef __clang__  // names neither levels nor F16C, which comes with AVX2, before its release 18
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#else
    const bool v3 = __builtin_cpu_supports("x86-64-v3"), v4 = __builtin_cpu_supports("x86-64-v4");
#endif
    return v4 ? SimdLevel::v4 : v3 ? SimdLevel::v3 : SimdLevel::generic;
  }();
  return most < best ? most : best;
#else
  return SimdLevel::generic;
#endif
}

inline const char* simd_level_name() {
  const SimdLevel level = simd_level();
  return level == SimdLevel::v4 ? "v4" : level == SimdLevel::v3 ? "v3" : "generic";
}

}  // namespace pyseg

// Declarations of functions that `<op>_simd.cpp` defines; and the one of the level in force, as a
// pointer. Both inside the namespace that holds the levels' namespaces.
#ifdef PYSEG_X86_LEVELS
#define PYSEG_DECLARE_LEVELS(...) \
  namespace v4 {                  \
  __VA_ARGS__                     \
  }                               \
  namespace v3 {                  \
  __VA_ARGS__                     \
  }                               \
  namespace generic {             \
  __VA_ARGS__                     \
  }
#define PYSEG_AT(level, ...)                              \
  ((level) == ::pyseg::SimdLevel::v4   ? &v4::__VA_ARGS__ \
   : (level) == ::pyseg::SimdLevel::v3 ? &v3::__VA_ARGS__ \
                                       : &generic::__VA_ARGS__)
#else
#define PYSEG_DECLARE_LEVELS(...) \
  namespace generic {             \
  __VA_ARGS__                     \
  }
#define PYSEG_AT(level, ...) (&generic::__VA_ARGS__)
#endif
#define PYSEG_AT_LEVEL(...) PYSEG_AT(::pyseg::simd_level(), __VA_ARGS__)
