// The number that a loss is divided by, and what of it the forward does to a gradient.
#pragma once

#include <optional>
#include <type_traits>

#include "dtypes.h"
#include "math/host_device.h"

namespace focalops {

template <typename T>
struct Normalizer {
  const T* value;  // null: there is none
  T least;
  bool per_image = false;  // value is [B]

  FOCALOPS_HOST_DEVICE T divisor(int64_t image = 0) const {
    if (value == nullptr) {
      return least;
    }
    const T given = value[per_image ? image : 0];
    return given < least ? least : given;  // a NaN stays
  }
};

// `given`, which is contiguous, must outlive it.
template <typename T>
Normalizer<T> normalizer_of(const std::optional<Tensor>& given, double least) {
  return {data_of<T>(given), static_cast<T>(least), given.has_value() && given->dim() == 1};
}

// The forward multiplies a gradient by this. A float16 gradient over a large normalizer is 0 before
// a loss scaler can help: the backward divides it instead.
template <typename scalar_t, typename T>
FOCALOPS_HOST_DEVICE T gradient_scale(T divisor) {
  return std::is_same_v<scalar_t, Half> ? T(1) : 1 / divisor;
}

}  // namespace focalops
