// Compiles what follows for the instruction set PYSEG_LEVEL, v4 or generic, which setup.py sets in
// each unit that it makes of a `*_simd.cpp`. Included after all other headers: what they define is
// shared with other units, and must run anywhere.

#ifdef PYSEG_LEVEL_V4
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define PYSEG_AVX512
#endif
