// One check_<op>() per op, called by the CPU and the CUDA implementation alike. Each failure is one sentence: argument,
// what it must be, what it was; the fake kernels in Python say the same sentences.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "dtypes.h"
#include "math/focal.h"

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
    default:
      return torch::headeronly::toString(tensor.scalar_type());
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

// `op` and `name` as in the Python signature.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    fail(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", dtype_of(tensor));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* like_name, const Tensor& like) {
  if (device_of(tensor) != device_of(like)) {
    fail(op, ": ", name, " must be on ", device_of(like), " like ", like_name, ", got ", device_of(tensor));
  }
}

inline void check_boxes(const char* op, const char* name, const Tensor& boxes) {
  check_floating(op, name, boxes);
  if (boxes.dim() != 2 || boxes.size(1) != 4) {
    fail(op, ": ", name, " must have shape (N, 4), got ", shape_of(boxes));
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

// targets of the shape of inputs are dense, of the shape of inputs without its last dimension are class indices.
inline bool targets_are_dense(const Tensor& inputs, const Tensor& targets) {
  return inputs.dim() == targets.dim();
}

inline const char* focal_loss_name(const FocalParams& params) {
  return params.beta.has_value() ? "sigmoid_focal_loss_star" : "sigmoid_focal_loss";
}

inline void check_focal_loss(const Tensor& inputs, const Tensor& targets, const FocalParams& params) {
  const char* op = focal_loss_name(params);
  check_floating(op, "inputs", inputs);
  check_same_device(op, "targets", targets, "inputs", inputs);
  const bool dense = targets_are_dense(inputs, targets);
  if (!(dense || targets.dim() + 1 == inputs.dim()) || !same_shape(inputs, targets, targets.dim())) {
    fail(op, ": targets must have the shape of inputs, ", shape_of(inputs),
         ", or that shape without its last dimension, got ", shape_of(targets));
  }
  if (dense && targets.scalar_type() != inputs.scalar_type() &&
      targets.scalar_type() != compute_dtype(inputs.scalar_type())) {
    fail(op, ": dense targets must have the dtype of inputs, ", dtype_of(inputs), ", or float32, got ", dtype_of(targets));
  }
  if (!dense && !is_index(targets.scalar_type())) {
    fail(op, ": class-index targets must be int32 or int64, got ", dtype_of(targets));
  }
  if (!dense && inputs.size(inputs.dim() - 1) >= int64_t{1} << 30) {
    fail(op, ": inputs must have fewer than 2^30 classes, got ", inputs.size(inputs.dim() - 1));
  }
  if (params.beta.has_value() && !(params.gamma > 0)) {
    fail(op, ": gamma must be > 0, got ", params.gamma);
  }
  if (!(params.gamma >= 0)) {
    fail(op, ": gamma must be >= 0, got ", params.gamma);
  }
}

inline void check_focal_loss_backward(const Tensor& grad_output, const Tensor& inputs, const Tensor& targets, const FocalParams& params) {
  check_focal_loss(inputs, targets, params);
  const char* op = focal_loss_name(params);
  check_same_device(op, "grad_output", grad_output, "inputs", inputs);
  if (grad_output.dim() != inputs.dim() || !same_shape(grad_output, inputs, inputs.dim()) ||
      grad_output.scalar_type() != inputs.scalar_type()) {
    fail(op, ": grad_output must have the shape and dtype of inputs, ", shape_of(inputs), " and ", dtype_of(inputs),
         ", got ", shape_of(grad_output), " and ", dtype_of(grad_output));
  }
}

inline void check_focal_loss_sum(const Tensor& inputs, const Tensor& targets, const FocalParams& params,
                                 const std::optional<Tensor>& normalizer) {
  check_focal_loss(inputs, targets, params);
  if (normalizer.has_value()) {
    const char* op = focal_loss_name(params);
    check_same_device(op, "normalizer", *normalizer, "inputs", inputs);
    if (normalizer->dim() != 0) {
      fail(op, ": normalizer must be a number or a 0-d tensor, got a tensor of shape ", shape_of(*normalizer));
    }
    if (normalizer->scalar_type() != compute_dtype(inputs.scalar_type())) {
      fail(op, ": normalizer must be float32 (float64 for float64 inputs), got ", dtype_of(*normalizer));
    }
  }
}

inline void check_scale(const Tensor& tensor, const Tensor& scale) {
  const char* op = "_scale_";
  check_floating(op, "tensor", tensor);
  check_same_device(op, "scale", scale, "tensor", tensor);
  if (!tensor.is_contiguous()) {
    fail(op, ": tensor must be contiguous");
  }
  if (scale.numel() != 1 || scale.scalar_type() != compute_dtype(tensor.scalar_type())) {
    fail(op, ": scale must be one float32 (float64 for float64 tensors), got shape ", shape_of(scale), " and ", dtype_of(scale));
  }
}

inline void check_nms(const Tensor& boxes, const Tensor& scores,
                      const std::optional<Tensor>& idxs) {
  const char* op = idxs.has_value() ? "batched_nms" : "nms";
  check_boxes(op, "boxes", boxes);
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "boxes", boxes);
  if (scores.dim() != 1 || scores.size(0) != boxes.size(0)) {
    fail(op, ": scores must have shape (", boxes.size(0), ",), one for each box, got ",
         shape_of(scores));
  }
  if (idxs.has_value()) {
    if (!is_index(idxs->scalar_type())) {
      fail(op, ": idxs must be int32 or int64, got ", dtype_of(*idxs));
    }
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
    if (idxs->dim() != 1 || idxs->size(0) != boxes.size(0)) {
      fail(op, ": idxs must have shape (", boxes.size(0), ",), one for each box, got ",
           shape_of(*idxs));
    }
  }
}

}  // namespace focalops
