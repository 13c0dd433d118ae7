// The C++ type that a tensor's elements have, and the one that they are computed in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <stdexcept>
#include <type_traits>

#include "stable_compat.h"

namespace focalops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Half and bfloat16 are computed in float.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline bool is_index(ScalarType dtype) {
  return dtype == ScalarType::Int || dtype == ScalarType::Long;
}

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Tag>
using tag_t = typename std::decay_t<Tag>::type;

// Calls f with the TypeTag of the dtype. The check_<op>() functions have refused every other dtype
// before.
template <typename F>
void dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::Half:
      return f(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return f(TypeTag<BFloat16>{});
    default:
      throw std::logic_error("dispatch_floating: the dtype was not checked");
  }
}

template <typename F>
void dispatch_compute(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double) {
    return f(TypeTag<double>{});
  }
  return f(TypeTag<float>{});
}

template <typename F>
void dispatch_index(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Int) {
    return f(TypeTag<int32_t>{});
  }
  return f(TypeTag<int64_t>{});
}

// A tensor that need not be there, as the kernels read it; null where it is not there.
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor))
                            : std::nullopt;
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace focalops
