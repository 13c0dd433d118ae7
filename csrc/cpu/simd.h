// FOCALOPS_SIMD in front of a function template compiles it for AVX-512, AVX2 and the baseline, and
// the loader picks one: one build runs anywhere. What a clone calls has to be inlined into it: a
// lambda that is FOCALOPS_INLINE.
//
// FOCALOPS_INDEPENDENT in front of a loop promises that its iterations do not depend on each other.
// `omp simd` says that too, and g++ then keeps the body free of branches, but it makes an array in
// memory of each struct whose address the body takes: loops over boxes are not vectorised at all.
// tests/test_build.py finds loops that are not.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOCALOPS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOCALOPS_SIMD
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define FOCALOPS_INDEPENDENT _Pragma("GCC ivdep")
#else
#define FOCALOPS_INDEPENDENT
#endif

#define FOCALOPS_INLINE __attribute__((always_inline))
