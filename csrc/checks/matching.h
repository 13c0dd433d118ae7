// match_anchors refuses these arguments.
#pragma once

#include "../matching.h"
#include "ground_truth.h"

namespace focalops {

inline void check_match_anchors(const Tensor& anchors, const Tensor& gt_boxes,
                                const std::optional<Tensor>& counts,
                                const std::optional<Tensor>& roles, const MatchRule& rule) {
  const char* op = "match_anchors";
  check_coordinates(op, "anchors", anchors);
  if (anchors.dim() != 2 || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (A, 4), got ", shape_of(anchors));
  }
  check_gt_boxes(op, gt_boxes, counts, "anchors", anchors);
  if (roles.has_value()) {
    check_of_boxes(op, "roles", *roles, ScalarType::Byte, gt_boxes, "anchors", anchors);
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
