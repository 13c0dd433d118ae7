// What all classification losses refuse: of rows and of a head's levels.
#pragma once

#include <optional>

#include "../checks.h"
#include "../head_levels.h"

namespace focalops {

// The gradient is written over a tensor only where it lies as the kernels write it.
inline void check_overwritten(const char* op, const char* name, const Tensor& tensor,
                              bool may_be_channels_last) {
  if (!tensor.is_contiguous() && !(may_be_channels_last && is_channels_last(tensor))) {
    fail(op, ": inplace_backward needs ", name, " to be contiguous",
         may_be_channels_last ? " or channels_last" : "", ", and it is not");
  }
}

// One number a row, such as its weight: of the shape of the class indices.
inline void check_row_numbers(const char* op, const char* name, const std::optional<Tensor>& given,
                              const char* like_name, const Tensor& like, ScalarType dtype) {
  if (!given.has_value()) {
    return;
  }
  check_same_device(op, name, *given, like_name, like);
  if (given->dim() != like.dim() || !same_shape(*given, like, like.dim()) ||
      given->scalar_type() != dtype) {
    fail(op, ": ", name, " must have the shape of ", like_name, ", ", shape_of(like),
         ", and be float32 (float64 for float64 logits), got ", shape_of(*given), " and ",
         dtype_of(*given));
  }
}

inline void check_class_weight(const char* op, const std::optional<Tensor>& given,
                               const Tensor& like, int64_t num_classes) {
  if (!given.has_value()) {
    return;
  }
  check_same_device(op, "class_weight", *given, "the logits", like);
  if (given->dim() != 1 || given->size(0) != num_classes ||
      given->scalar_type() != compute_dtype(like.scalar_type())) {
    fail(op, ": class_weight must have shape (", num_classes,
         ",) and be float32 (float64 for float64 logits), got ", shape_of(*given), " and ",
         dtype_of(*given));
  }
}

}  // namespace focalops
