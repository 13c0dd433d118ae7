// dense_equalized_focal_loss refuses these arguments.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dense_focal_loss.h"

namespace focalops {

inline HeadShape check_dense_equalized_focal_loss(const std::vector<Tensor>& cls_logits,
                                                  const Tensor& labels, const Tensor& gamma,
                                                  double alpha, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& class_weight,
                                                  const std::optional<Tensor>& normalizer) {
  const char* op = "dense_equalized_focal_loss";
  check_unit_or_none(op, "alpha", alpha);
  const HeadShape shape =
      check_class_head(op, cls_logits, labels, weight, class_weight, normalizer);
  const Tensor& first = cls_logits[0];
  check_same_device(op, "gamma", gamma, "the logits", first);
  const bool knows_classes = shape.anchors > 0;  // without positions nothing tells
  if (gamma.dim() != 1 || (knows_classes && gamma.size(0) != shape.classes) ||
      gamma.scalar_type() != compute_dtype(first.scalar_type())) {
    fail(op, ": gamma must have shape (", knows_classes ? std::to_string(shape.classes) : "K",
         ",) and be float32 (float64 for float64 logits), got ", shape_of(gamma), " and ",
         dtype_of(gamma));
  }
  return shape;
}

}  // namespace focalops
