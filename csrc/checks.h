// The sentences of checks. Each op has one check_<op>() in checks/<topic>.h, called by the CPU and
// the CUDA implementation alike. A failure is one sentence: the argument, what it must be, what it
// was; the fake kernels in Python say the same sentences.
#pragma once

#include <algorithm>
#include <cctype>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtypes.h"

namespace focalops {

inline std::string shape_of(const Tensor& tensor) {  // as Python prints a tuple
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    out << (i ? ", " : "") << tensor.size(i);
  }
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string dtype_of(const Tensor& tensor) {  // as torch prints it
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::UInt16:
      return "torch.uint16";
    case ScalarType::UInt32:
      return "torch.uint32";
    case ScalarType::UInt64:
      return "torch.uint64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default: {  // Float8_e4m3fn and the like
      std::string name = std::string("torch.") + torch::headeronly::toString(tensor.scalar_type());
      std::transform(name.begin(), name.end(), name.begin(),
                     [](unsigned char c) { return std::tolower(c); });
      return name;
    }
  }
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

template <typename... Args>
[[noreturn]] void fail(const Args&... sentence) {
  std::ostringstream out;
  (out << ... << sentence);
  throw std::runtime_error(out.str());
}

// `op` and `name` are those of the Python signature.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    fail(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", dtype_of(tensor));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* like_name, const Tensor& like) {
  if (device_of(tensor) != device_of(like)) {
    fail(op, ": ", name, " must be on ", device_of(like), " like ", like_name, ", got ",
         device_of(tensor));
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) {
      return false;
    }
  }
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && same_shape(a, b, a.dim());
}

inline void check_coordinates(const char* op, const char* name, const Tensor& tensor) {
  if (compute_dtype(tensor.scalar_type()) != tensor.scalar_type()) {
    fail(op, ": ", name, " must be float32 or float64, got ", dtype_of(tensor));
  }
}

// `tensor` follows one that has passed, `like`: it must have its dtype and be on its device.
inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const char* like_name, const Tensor& like) {
  check_same_device(op, name, tensor, like_name, like);
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(op, ": ", name, " must be ", dtype_of(like), " like ", like_name, ", got ",
         dtype_of(tensor));
  }
}

inline void check_non_negative(const char* op, const char* name, double given) {
  if (!(given >= 0)) {
    fail(op, ": ", name, " must be >= 0, got ", given);
  }
}

inline void check_unit(const char* op, const char* name, double given) {
  if (!(given >= 0 && given <= 1)) {
    fail(op, ": ", name, " must lie in [0, 1], got ", given);
  }
}

// Such is alpha, which weights the positives by itself and the negatives by 1 - alpha.
inline void check_unit_or_none(const char* op, const char* name, double given) {
  if (!(given <= 1)) {
    fail(op, ": ", name, " must lie in [0, 1], or be negative for none, got ", given);
  }
}

}  // namespace focalops
