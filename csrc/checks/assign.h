// The assigners refuse these arguments.
#pragma once

#include <string>

#include "../assign.h"
#include "ground_truth.h"

namespace focalops {

inline void check_points(const char* op, const Tensor& points) {
  check_coordinates(op, "points", points);
  if (points.dim() != 2 || points.size(1) != 2) {
    fail(op, ": points must have shape (N, 2), got ", shape_of(points));
  }
  if (points.size(0) >= int64_t{1} << 31) {
    fail(op, ": points must be fewer than 2^31, got ", points.size(0));
  }
}

inline void check_boxes_and_crowd(const char* op, const Tensor& gt_boxes,
                                  const std::optional<Tensor>& counts,
                                  const std::optional<Tensor>& crowd, const char* like_name,
                                  const Tensor& like) {
  check_gt_boxes(op, gt_boxes, counts, like_name, like);
  if (crowd.has_value()) {
    check_of_boxes(op, "crowd", *crowd, ScalarType::Bool, gt_boxes, like_name, like);
  }
}

// `what`, of which there are `number`, are those of the levels together.
inline void check_level_sizes(const char* op, const std::vector<int64_t>& level_sizes,
                              const char* what, int64_t number) {
  if (level_sizes.empty() || level_sizes.size() > kMaxLevels) {
    fail(op, ": level_sizes must be 1 to ", kMaxLevels, " levels, got ", level_sizes.size());
  }
  int64_t sum = 0;
  for (const int64_t size : level_sizes) {
    if (size < 0 || size > number) {
      fail(op, ": level_sizes must lie in [0, ", number, "], the number of ", what, ", got ", size);
    }
    sum += size;
  }
  if (sum != number) {
    fail(op, ": level_sizes must add up to the number of ", what, ", ", number, ", got ", sum);
  }
}

inline void check_assign_fcos(const Tensor& points, const Tensor& gt_boxes,
                              const std::optional<Tensor>& counts,
                              const std::optional<Tensor>& crowd, const FcosOptions& options) {
  const char* op = "assign_fcos";
  check_points(op, points);
  check_boxes_and_crowd(op, gt_boxes, counts, crowd, "points", points);
  check_level_sizes(op, options.level_sizes, "points", points.size(0));
  const size_t levels = options.level_sizes.size();
  if (options.strides.size() != levels) {
    fail(op, ": strides must be ", levels, " numbers, one for each level, got ",
         options.strides.size());
  }
  if (options.least.size() != levels || options.most.size() != levels) {
    fail(op, ": ranges must be ", levels, " pairs of numbers, one for each level, got ",
         options.least.size());
  }
  check_non_negative(op, "center_radius", options.center_radius);
  if (options.rule < 0 || options.rule > 1) {
    fail(op, ": rule must lie in [0, 1], got ", options.rule);
  }
}

// `classes`, of the name `of_classes`, are the predicted scores or logits.
inline void check_predictions(const char* op, const char* of_classes, const Tensor& classes,
                              const Tensor& pred_boxes, const Tensor& points,
                              const Tensor& gt_boxes, const Tensor& gt_labels,
                              const std::optional<Tensor>& counts,
                              const std::optional<Tensor>& crowd) {
  check_points(op, points);
  if (points.scalar_type() != ScalarType::Float) {
    fail(op, ": points must be float32, got ", dtype_of(points));
  }
  check_boxes_and_crowd(op, gt_boxes, counts, crowd, "points", points);
  const int64_t num_images = gt_boxes.size(0), num_points = points.size(0);
  check_of_boxes(op, "gt_labels", gt_labels, ScalarType::Long, gt_boxes, "points", points);
  check_same_device(op, of_classes, classes, "points", points);
  check_floating(op, of_classes, classes);
  if (classes.dim() != 3 || classes.size(0) != num_images || classes.size(1) != num_points) {
    fail(op, ": ", of_classes, " must have shape (", num_images, ", ", num_points, ", K), got ",
         shape_of(classes));
  }
  check_like(op, "pred_boxes", pred_boxes, "points", points);
  if (pred_boxes.dim() != 3 || pred_boxes.size(0) != num_images ||
      pred_boxes.size(1) != num_points || pred_boxes.size(2) != 4) {
    fail(op, ": pred_boxes must have shape (", num_images, ", ", num_points, ", 4), got ",
         shape_of(pred_boxes));
  }
}

inline void check_assign_task_aligned(const Tensor& pred_scores, const Tensor& pred_boxes,
                                      const Tensor& points, const Tensor& gt_boxes,
                                      const Tensor& gt_labels, const std::optional<Tensor>& counts,
                                      const std::optional<Tensor>& crowd,
                                      const TaskAlignedOptions& options) {
  const char* op = "assign_task_aligned";
  check_predictions(op, "pred_scores", pred_scores, pred_boxes, points, gt_boxes, gt_labels, counts,
                    crowd);
  if (options.topk < 1 || options.topk > kMaxTopk) {
    fail(op, ": topk must lie in [1, ", kMaxTopk, "], got ", options.topk);
  }
  if (options.final_topk < 0 || options.final_topk > kMaxTopk) {
    fail(op, ": final_topk must lie in [1, ", kMaxTopk, "], got ", options.final_topk);
  }
  check_non_negative(op, "alpha", options.alpha);
  if (!(options.beta > 0)) {
    fail(op, ": beta must be > 0, got ", options.beta);
  }
  check_non_negative(op, "eps", options.eps);
  if (options.rule < 0 || options.rule > 2) {
    fail(op, ": rule must lie in [0, 2], got ", options.rule);
  }
  if (options.overlap != 0 && options.overlap != 3) {
    fail(op, ": overlap must be 0 or 3, got ", options.overlap);
  }
}

inline void check_assign_atss(const Tensor& anchors, const Tensor& gt_boxes,
                              const std::optional<Tensor>& counts,
                              const std::optional<Tensor>& crowd, const AtssOptions& options) {
  const char* op = "assign_atss";
  check_coordinates(op, "anchors", anchors);
  if (anchors.dim() != 2 || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (N, 4), got ", shape_of(anchors));
  }
  if (anchors.size(0) >= int64_t{1} << 31) {
    fail(op, ": anchors must be fewer than 2^31, got ", anchors.size(0));
  }
  check_boxes_and_crowd(op, gt_boxes, counts, crowd, "anchors", anchors);
  check_level_sizes(op, options.level_sizes, "anchors", anchors.size(0));
  if (options.topk < 1 || options.topk > kMaxAtssTopk) {
    fail(op, ": topk must lie in [1, ", kMaxAtssTopk, "], got ", options.topk);
  }
  if (options.rule < 0 || options.rule > 1) {
    fail(op, ": rule must lie in [0, 1], got ", options.rule);
  }
}

inline void check_assign_simota(const Tensor& cls_logits, const Tensor& pred_boxes,
                                const Tensor& points, const Tensor& strides, const Tensor& gt_boxes,
                                const Tensor& gt_labels, const std::optional<Tensor>& objectness,
                                const std::optional<Tensor>& counts,
                                const std::optional<Tensor>& crowd, const SimotaOptions& options) {
  const char* op = "assign_simota";
  check_predictions(op, "cls_logits", cls_logits, pred_boxes, points, gt_boxes, gt_labels, counts,
                    crowd);
  check_like(op, "strides", strides, "points", points);
  if (strides.dim() != 1 || strides.size(0) != points.size(0)) {
    fail(op, ": strides must have shape (", points.size(0), ",), one for each point, got ",
         shape_of(strides));
  }
  const int64_t num_images = gt_boxes.size(0), num_points = points.size(0);
  if (objectness.has_value()) {
    check_same_device(op, "objectness", *objectness, "points", points);
    check_floating(op, "objectness", *objectness);
    if (objectness->dim() != 2 || objectness->size(0) != num_images ||
        objectness->size(1) != num_points) {
      fail(op, ": objectness must have shape (", num_images, ", ", num_points, "), got ",
           shape_of(*objectness));
    }
  }
  if (options.rule < 0 || options.rule > 2) {
    fail(op, ": rule must lie in [0, 2], got ", options.rule);
  }
  check_non_negative(op, "center_radius", options.center_radius);
  if (options.candidates < 1 || options.candidates > kMaxTopk) {
    fail(op, ": candidates must lie in [1, ", kMaxTopk, "], got ", options.candidates);
  }
}

}  // namespace focalops
