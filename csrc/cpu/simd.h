// FOCALOPS_SIMD in front of a function template compiles it for AVX-512, AVX2 and the baseline, and
// the loader picks one: one build runs anywhere. Clones do not reach into lambdas, so loop bodies
// are named functions.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOCALOPS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOCALOPS_SIMD
#endif
