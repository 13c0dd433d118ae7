// What the focal losses of a tensor of logits refuse, and the losses of rows with them.
#pragma once

#include <optional>

#include "../math/focal.h"
#include "losses.h"

namespace focalops {

// targets of the shape of inputs are dense, of the shape of inputs without its last dimension are
// class indices.
inline bool targets_are_dense(const Tensor& inputs, const Tensor& targets) {
  return inputs.dim() == targets.dim();
}

// What all losses ask of inputs and targets.
inline void check_targets(const char* op, const Tensor& inputs, const Tensor& targets,
                          bool may_be_dense) {
  check_floating(op, "inputs", inputs);
  check_same_device(op, "targets", targets, "inputs", inputs);
  const bool dense = may_be_dense && targets_are_dense(inputs, targets);
  if (!may_be_dense && inputs.dim() == 0) {
    fail(op, ": inputs must have shape (..., K), got ()");
  }
  if (!(dense || targets.dim() + 1 == inputs.dim()) ||
      !same_shape(inputs, targets, targets.dim())) {
    if (may_be_dense) {
      fail(op, ": targets must have the shape of inputs, ", shape_of(inputs),
           ", or that shape without its last dimension, got ", shape_of(targets));
    }
    fail(op, ": class-index targets must have the shape of inputs, ", shape_of(inputs),
         ", without its last dimension, got ", shape_of(targets));
  }
  if (dense && targets.scalar_type() != inputs.scalar_type() &&
      targets.scalar_type() != compute_dtype(inputs.scalar_type())) {
    fail(op, ": dense targets must have the dtype of inputs, ", dtype_of(inputs),
         ", or float32, got ", dtype_of(targets));
  }
  if (!dense && !is_index(targets.scalar_type())) {
    fail(op, ": class-index targets must be int32 or int64, got ", dtype_of(targets));
  }
  if (!dense && inputs.size(inputs.dim() - 1) >= int64_t{1} << 30) {
    fail(op, ": inputs must have fewer than 2^30 classes, got ", inputs.size(inputs.dim() - 1));
  }
}

inline void check_classes(const char* op, const Tensor& inputs) {
  if (inputs.size(inputs.dim() - 1) == 0) {
    fail(op, ": inputs must have at least one class, got shape ", shape_of(inputs));
  }
}

inline void check_focal_loss(const Tensor& inputs, const Tensor& targets,
                             const FocalParams& params) {
  const char* op = focal_loss_name(params);
  check_targets(op, inputs, targets, true);
  check_unit_or_none(op, "alpha", params.alpha);
  if (params.beta.has_value() && !(params.gamma > 0)) {
    fail(op, ": gamma must be > 0, got ", params.gamma);
  }
  check_non_negative(op, "gamma", params.gamma);
}

inline void check_focal_loss_backward(const Tensor& grad_output, const Tensor& inputs,
                                      const Tensor& targets, const FocalParams& params) {
  check_focal_loss(inputs, targets, params);
  const char* op = focal_loss_name(params);
  check_same_device(op, "grad_output", grad_output, "inputs", inputs);
  if (grad_output.dim() != inputs.dim() || !same_shape(grad_output, inputs, inputs.dim()) ||
      grad_output.scalar_type() != inputs.scalar_type()) {
    fail(op, ": grad_output must have the shape and dtype of inputs, ", shape_of(inputs), " and ",
         dtype_of(inputs), ", got ", shape_of(grad_output), " and ", dtype_of(grad_output));
  }
}

inline void check_normalizer(const char* op, const Tensor& inputs,
                             const std::optional<Tensor>& normalizer) {
  if (normalizer.has_value()) {
    check_same_device(op, "normalizer", *normalizer, "inputs", inputs);
    if (normalizer->dim() != 0) {
      fail(op, ": normalizer must be a number or a 0-d tensor, got a tensor of shape ",
           shape_of(*normalizer));
    }
    if (normalizer->scalar_type() != compute_dtype(inputs.scalar_type())) {
      fail(op, ": normalizer must be float32 (float64 for float64 inputs), got ",
           dtype_of(*normalizer));
    }
  }
}

inline void check_focal_loss_sum(const Tensor& inputs, const Tensor& targets,
                                 const FocalParams& params,
                                 const std::optional<Tensor>& normalizer) {
  check_focal_loss(inputs, targets, params);
  check_normalizer(focal_loss_name(params), inputs, normalizer);
}

// A gradient is stored 16 bytes at a time. Only a view can begin elsewhere.
inline void check_overwritten_rows(const char* op, const Tensor& inputs) {
  check_overwritten(op, "inputs", inputs, false);
  if (reinterpret_cast<uintptr_t>(inputs.const_data_ptr()) % 16 != 0) {
    fail(op, ": inplace_backward needs inputs to begin at a multiple of 16 bytes, and it does not");
  }
}

inline void check_scale(const Tensor& tensor, const Tensor& scale) {
  const char* op = "_scale_";
  check_floating(op, "tensor", tensor);
  check_same_device(op, "scale", scale, "tensor", tensor);
  if (!tensor.is_contiguous() && !is_channels_last(tensor)) {
    fail(op, ": tensor must be contiguous or channels_last");
  }
  const bool is_number = scale.dim() == 0;
  const bool is_one_each = scale.dim() == 1 && tensor.dim() > 0 && scale.size(0) == tensor.size(0);
  if (!(is_number || is_one_each) || scale.scalar_type() != compute_dtype(tensor.scalar_type())) {
    fail(op,
         ": scale must be one float32 (float64 for float64 tensors), or one for each tensor[i], "
         "got shape ",
         shape_of(scale), " and ", dtype_of(scale));
  }
}

}  // namespace focalops
