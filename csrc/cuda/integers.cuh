// Labels and counts, as the caller has them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace focalops {
namespace {

// int32 or int64, told apart at run time; null where there are none.
struct Integers {
  const void* data;
  bool is_int64;

  __device__ __forceinline__ int64_t at(int64_t i, int64_t otherwise) const {
    if (data == nullptr) {
      return otherwise;
    }
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace
}  // namespace focalops
