// What match_anchors and the assigners refuse of the boxes of a batch, in the same sentences.
#pragma once

#include <optional>

#include "../checks.h"

namespace focalops {

// `like` is what the boxes are assigned to: anchors or points.
inline void check_gt_boxes(const char* op, const Tensor& gt_boxes,
                           const std::optional<Tensor>& counts, const char* like_name,
                           const Tensor& like) {
  check_like(op, "gt_boxes", gt_boxes, like_name, like);
  if (gt_boxes.dim() != 3 || gt_boxes.size(2) != 4) {
    fail(op, ": gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got ",
         shape_of(gt_boxes));
  }
  if (gt_boxes.size(1) >= int64_t{1} << 31) {
    fail(op, ": gt_boxes must have fewer than 2^31 boxes an image, got ", gt_boxes.size(1));
  }
  if (counts.has_value()) {
    check_same_device(op, "counts", *counts, like_name, like);
    if (!is_index(counts->scalar_type())) {
      fail(op, ": counts must be int32 or int64, got ", dtype_of(*counts));
    }
    if (counts->dim() != 1 || counts->size(0) != gt_boxes.size(0)) {
      fail(op, ": counts must have shape (", gt_boxes.size(0), ",), one for each image, got ",
           shape_of(*counts));
    }
  }
}

// One a box, of the dtype.
inline void check_of_boxes(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                           const Tensor& gt_boxes, const char* like_name, const Tensor& like) {
  check_same_device(op, name, tensor, like_name, like);
  if (tensor.scalar_type() != dtype || tensor.dim() != 2 || !same_shape(tensor, gt_boxes, 2)) {
    fail(op, ": ", name, " must be ",
         dtype == ScalarType::Bool   ? "torch.bool"
         : dtype == ScalarType::Byte ? "torch.uint8"
                                     : "torch.int64",
         " of shape (", gt_boxes.size(0), ", ", gt_boxes.size(1), "), got ", dtype_of(tensor),
         " of shape ", shape_of(tensor));
  }
}

}  // namespace focalops
