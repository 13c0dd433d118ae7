// The ops of distances refuse these arguments.
#pragma once

#include <optional>
#include <vector>

#include "dense_box_loss.h"
#include "head.h"

namespace focalops {

// Levels of distances with their points and strides; the names are those of the Python signature.
inline HeadShape check_distances(const char* op, const char* name,
                                 const std::vector<Tensor>& levels, const char* points_name,
                                 const Tensor& points, const std::vector<double>& strides,
                                 int64_t bins) {
  const int64_t rows = check_levels(op, name, levels, "4 * bins", 4, "bins", "logits");
  const Tensor& first = levels[0];
  if (bins < 1) {
    fail(op, ": bins must be >= 1, got ", bins);
  }
  if (first.size(1) / 4 != bins) {
    fail(op, ": ", name, " must have 4 channels for each of ", bins, " bins, got ", first.size(1));
  }
  check_like_levels(op, points_name, points, name, first);
  if (points.dim() != 2 || points.size(0) != rows || points.size(1) != 2) {
    fail(op, ": ", points_name, " must have shape (", rows,
         ", 2), one for each position of the levels, got ", shape_of(points));
  }
  if (strides.size() != levels.size()) {
    fail(op, ": strides must be ", levels.size(), " numbers, one for each level, got ",
         strides.size());
  }
  return {first.size(0), 1, 4 * bins, rows};
}

inline HeadShape check_decode_distances(const std::vector<Tensor>& levels, const Tensor& points,
                                        const std::vector<double>& strides, int64_t bins,
                                        const std::optional<Tensor>& image_sizes) {
  const char* op = "decode_distances";
  const HeadShape shape = check_distances(op, "levels", levels, "points", points, strides, bins);
  if (image_sizes.has_value()) {
    check_like_levels(op, "image_sizes", *image_sizes, "levels", levels[0]);
    if (image_sizes->dim() != 2 || image_sizes->size(0) != shape.images ||
        image_sizes->size(1) != 2) {
      fail(op, ": image_sizes must have shape (", shape.images,
           ", 2), height and width of each image, got ", shape_of(*image_sizes));
    }
  }
  return shape;
}

inline HeadShape check_decode_distances_backward(const Tensor& grad_output,
                                                 const std::vector<Tensor>& levels,
                                                 const Tensor& points,
                                                 const std::vector<double>& strides, int64_t bins,
                                                 const std::optional<Tensor>& image_sizes) {
  const char* op = "decode_distances";
  const HeadShape shape = check_decode_distances(levels, points, strides, bins, image_sizes);
  check_like(op, "grad_output", grad_output, "points", points);
  if (grad_output.dim() != 3 || grad_output.size(0) != shape.images ||
      grad_output.size(1) != shape.rows || grad_output.size(2) != 4) {
    fail(op, ": grad_output must have the shape of the output, (", shape.images, ", ", shape.rows,
         ", 4), got ", shape_of(grad_output));
  }
  return shape;
}

// loss is a BoxLossKind of the IoU family.
inline HeadShape check_dense_distance_losses(const std::vector<Tensor>& deltas,
                                             const Tensor& points, const Tensor& gt_boxes,
                                             const Tensor& matches,
                                             const std::vector<double>& strides, int64_t bins,
                                             int64_t loss, double dfl_weight) {
  const char* op = "dense_box_loss";
  const HeadShape shape = check_distances(op, "deltas", deltas, "anchors", points, strides, bins);
  check_matched_boxes(op, deltas[0], gt_boxes, matches, shape.rows);
  if (loss < 2 || loss > 5) {
    fail(op, ": loss must lie in [2, 5], got ", loss);
  }
  check_non_negative(op, "dfl_weight", dfl_weight);
  if (bins == 1 && dfl_weight != 0) {
    fail(op, ": dfl_weight must be 0 unless there are bins, got ", dfl_weight);
  }
  return shape;
}

// Returns the number of bins.
inline int64_t check_distribution_focal_loss(const Tensor& inputs, const Tensor& targets) {
  const char* op = "distribution_focal_loss";
  check_floating(op, "inputs", inputs);
  const int64_t bins = inputs.dim() > 0 ? inputs.size(inputs.dim() - 1) : 0;
  if (bins < 2 || bins >= int64_t{1} << 30) {
    fail(op, ": inputs must have shape (..., bins), 2 bins at least and fewer than 2^30, got ",
         shape_of(inputs));
  }
  check_same_device(op, "targets", targets, "inputs", inputs);
  if (targets.scalar_type() != compute_dtype(inputs.scalar_type())) {
    fail(op, ": targets must be float32 (float64 for float64 inputs), got ", dtype_of(targets));
  }
  if (targets.dim() + 1 != inputs.dim() || !same_shape(targets, inputs, targets.dim())) {
    fail(op, ": targets must have the shape of inputs, ", shape_of(inputs),
         ", without its last dimension, got ", shape_of(targets));
  }
  return bins;
}

}  // namespace focalops
