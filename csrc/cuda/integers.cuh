// Class indices, labels and counts, as the caller has them.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include "../dtypes.h"

namespace focalops {

// int32 or int64, told apart at run time: a second set of kernels would save nothing. Null where
// there are none.
struct Integers {
  const void* data = nullptr;
  bool is_int64 = false;

  Integers() = default;
  explicit Integers(const Tensor& tensor)
      : data(tensor.const_data_ptr()), is_int64(tensor.scalar_type() == ScalarType::Long) {}
  explicit Integers(const std::optional<Tensor>& tensor)
      : Integers(tensor.has_value() ? Integers(*tensor) : Integers()) {}

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  __device__ __forceinline__ int64_t at(int64_t i, int64_t otherwise) const {
    return data == nullptr ? otherwise : (*this)[i];
  }

  __device__ __forceinline__ Integers from(int64_t i) const {
    Integers rest = *this;
    rest.data = static_cast<const char*>(data) + i * (is_int64 ? 8 : 4);
    return rest;
  }
};

}  // namespace focalops
