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
