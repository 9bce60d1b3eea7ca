// Compiles what follows for the instruction set PYSEG_LEVEL (v4, v3 or generic), which setup.py
// sets in each unit that it makes of a `*_simd.cpp`. Included after all other headers: what they
// define is shared with other units, and must run anywhere. For the same reason the target is set
// here and not by a flag of the compiler: templates of the standard library that a unit compiled
// for AVX-512 would be merged, by the linker, with those of other units.

// PYSEG_REGISTER: the length of a vector register.
#if defined(PYSEG_LEVEL_V4)
#define PYSEG_AVX512
#define PYSEG_REGISTER 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#elif defined(PYSEG_LEVEL_V3)
#define PYSEG_AVX2
#define PYSEG_REGISTER 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(256))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#else
#define PYSEG_REGISTER 16
#endif
