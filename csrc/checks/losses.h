// All classification losses refuse these arguments, those of rows and those of a head's levels.
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

// `by_part`: there may also be three of each class, by the part that a logit has in its row.
inline void check_class_weight(const char* op, const std::optional<Tensor>& given,
                               const Tensor& like, int64_t num_classes, bool by_part = true) {
  if (!given.has_value()) {
    return;
  }
  check_same_device(op, "class_weight", *given, "the logits", like);
  const int64_t dim = given->dim();
  const bool has_shape = (dim == 1 || (by_part && dim == 2 && given->size(0) == 3)) &&
                         given->size(dim - 1) == num_classes;
  if (!has_shape || given->scalar_type() != compute_dtype(like.scalar_type())) {
    std::ostringstream by_part_shape;
    if (by_part) {
      by_part_shape << " or (3, " << num_classes << ")";
    }
    fail(op, ": class_weight must have shape (", num_classes, ",)", by_part_shape.str(),
         " and be float32 (float64 for float64 logits), got ", shape_of(*given), " and ",
         dtype_of(*given));
  }
}

}  // namespace focalops
