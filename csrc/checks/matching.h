// match_anchors refuses these arguments.
#pragma once

#include <optional>

#include "../checks.h"
#include "../matching.h"

namespace focalops {

inline void check_match_anchors(const Tensor& anchors, const Tensor& gt_boxes,
                                const std::optional<Tensor>& counts,
                                const std::optional<Tensor>& roles, const MatchRule& rule) {
  const char* op = "match_anchors";
  check_coordinates(op, "anchors", anchors);
  if (anchors.dim() != 2 || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (A, 4), got ", shape_of(anchors));
  }
  check_like(op, "gt_boxes", gt_boxes, "anchors", anchors);
  if (gt_boxes.dim() != 3 || gt_boxes.size(2) != 4) {
    fail(op, ": gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got ",
         shape_of(gt_boxes));
  }
  if (gt_boxes.size(1) >= int64_t{1} << 31) {
    fail(op, ": gt_boxes must have fewer than 2^31 boxes an image, got ", gt_boxes.size(1));
  }
  if (counts.has_value()) {
    check_same_device(op, "counts", *counts, "anchors", anchors);
    if (!is_index(counts->scalar_type())) {
      fail(op, ": counts must be int32 or int64, got ", dtype_of(*counts));
    }
    if (counts->dim() != 1 || counts->size(0) != gt_boxes.size(0)) {
      fail(op, ": counts must have shape (", gt_boxes.size(0), ",), one for each image, got ",
           shape_of(*counts));
    }
  }
  if (roles.has_value()) {
    check_same_device(op, "roles", *roles, "anchors", anchors);
    if (roles->scalar_type() != ScalarType::Byte || roles->dim() != 2 ||
        !same_shape(*roles, gt_boxes, 2)) {
      fail(op, ": roles must be torch.uint8 of shape (", gt_boxes.size(0), ", ", gt_boxes.size(1),
           "), got ", dtype_of(*roles), " of shape ", shape_of(*roles));
    }
  }
  if (!(rule.bg_iou_threshold <= rule.fg_iou_threshold)) {
    fail(op, ": bg_iou_threshold must be <= fg_iou_threshold, ", rule.fg_iou_threshold, ", got ",
         rule.bg_iou_threshold);
  }
  if (rule.low_quality < 0 || rule.low_quality > 4) {
    fail(op, ": low_quality must lie in [0, 4], got ", rule.low_quality);
  }
  if (!(rule.crowd_threshold >= 0)) {
    fail(op, ": crowd_threshold must be >= 0, got ", rule.crowd_threshold);
  }
}

}  // namespace focalops
