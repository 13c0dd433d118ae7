// Distributions over bins on the CPU: lanes, each of which has the logits of some bins. They are
// laid out bin by bin in the L1 cache, and loops over the lanes make exponentials of them.
#pragma once

#include "../math/distances.h"
#include "simd.h"

namespace focalops {
namespace {

template <typename T>
T least_logit() {
  return -detail::largest(T());
}

// The logits of a bin, `step` apart, and what they do to the largest of each lane.
template <typename scalar_t, typename T>
FOCALOPS_SIMD void lay_out_bin(const scalar_t* from, int64_t step, int64_t n, T* x, T* largest) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    x[i] = static_cast<T>(from[i * step]);
    largest[i] = x[i] > largest[i] ? x[i] : largest[i];
  }
}

// Replaces the logits of a bin by their exponentials.
template <typename T>
FOCALOPS_SIMD void add_exponentials(T* x, const T* largest, int64_t n, T* sum) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    x[i] = detail::exp_nonpositive(x[i] - largest[i]);
    sum[i] += x[i];
  }
}

}  // namespace
}  // namespace focalops
