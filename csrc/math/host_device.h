// math/ is compiled by the host compiler and by nvcc alike, without torch and CUDA headers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FOCALOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a function without target attributes must become part of each SIMD clone of its
// caller.
#define FOCALOPS_HOST_DEVICE inline __attribute__((always_inline))
#endif
