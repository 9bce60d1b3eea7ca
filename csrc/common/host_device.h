// For functions that CPU and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define PYSEG_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(PYSEG_EMULATED)
#define PYSEG_HOST_DEVICE inline
#else
#define PYSEG_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Before a loop whose arrays must end up in registers.
#ifdef __CUDACC__
#define PYSEG_UNROLL _Pragma("unroll")
#else
#define PYSEG_UNROLL _Pragma("GCC unroll 9")
#endif

namespace pyseg {

// a * b, rounded: compilers that may fuse it with the sum that follows, as nvcc does, would give
// CPU and GPU other bits. For whatever decides by comparing, or names by rounding.
template <class T>
PYSEG_HOST_DEVICE T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float))
    return __fmul_rn(a, b);
  else
    return __dmul_rn(a, b);
#elif defined(PYSEG_EMULATED)  // also compiled with contraction, to see what it changes
  volatile T rounded = a * b;
  return rounded;
#else                          // compiled without contraction
  return a * b;
#endif
}

}  // namespace pyseg
