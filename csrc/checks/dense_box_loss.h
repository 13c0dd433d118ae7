// dense_box_loss and dense_box_losses refuse these arguments.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../math/box_loss.h"
#include "boxes.h"
#include "head.h"

namespace focalops {

// They take these beside the tensors.
struct BoxLossOptions {
  int64_t loss;  // a BoxLossKind
  std::vector<double> weights;
  double clip, beta, eps;

  bool has_loss() const { return loss != static_cast<int64_t>(BoxLossKind::kNone); }
  // The public function that sentences name.
  const char* name() const { return has_loss() ? "dense_box_loss" : "matched_iou"; }
};

// What is computed with levels of which `first` is the first has the dtype that they are computed
// in.
inline void check_like_levels(const char* op, const char* name, const Tensor& tensor,
                              const char* levels_name, const Tensor& first) {
  check_same_device(op, name, tensor, level_name(levels_name, 0).c_str(), first);
  if (tensor.scalar_type() != compute_dtype(first.scalar_type())) {
    fail(op, ": ", name, " must be float32 (float64 for float64 ", levels_name, "), got ",
         dtype_of(tensor));
  }
}

// The boxes of the images of a head, and the match of each of its anchors.
inline void check_matched_boxes(const char* op, const Tensor& first, const Tensor& gt_boxes,
                                const Tensor& matches, int64_t rows) {
  const int64_t images = first.size(0);
  check_like_levels(op, "gt_boxes", gt_boxes, "deltas", first);
  if (gt_boxes.dim() != 3 || gt_boxes.size(0) != images || gt_boxes.size(2) != 4) {
    fail(op, ": gt_boxes must be a list of ", images, " (M_i, 4) or have shape (", images,
         ", M, 4), got ", shape_of(gt_boxes));
  }
  check_same_device(op, "matches", matches, "deltas[0]", first);
  if (matches.scalar_type() != ScalarType::Long || matches.dim() != 2 ||
      matches.size(0) != images || matches.size(1) != rows) {
    fail(op, ": matches must be torch.int64 of shape (", images, ", ", rows, "), got ",
         dtype_of(matches), " of shape ", shape_of(matches));
  }
}

inline HeadShape check_dense_box_losses(const std::vector<Tensor>& deltas, const Tensor& anchors,
                                        const Tensor& gt_boxes, const Tensor& matches,
                                        const BoxLossOptions& options) {
  const char* op = options.name();
  const int64_t positions = check_levels(op, "deltas", deltas, "A * 4", 4, "A", "deltas");
  const Tensor& first = deltas[0];
  const int64_t images = first.size(0), of_position = first.size(1) / 4;
  const int64_t rows = of_position * positions;
  check_like_levels(op, "anchors", anchors, "deltas", first);
  if (anchors.dim() != 2 || anchors.size(0) != rows || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (", rows,
         ", 4), one for every 4 channels at each position, got ", shape_of(anchors));
  }
  check_matched_boxes(op, first, gt_boxes, matches, rows);
  if (options.loss < -1 || options.loss > 5) {
    fail(op, ": loss must lie in [-1, 5], got ", options.loss);
  }
  check_weights(op, options.weights);
  if (!(options.beta >= 0)) {
    fail(op, ": beta must be >= 0, got ", options.beta);
  }
  return {images, of_position, 4, rows};
}

inline HeadShape check_dense_box_loss(const std::vector<Tensor>& deltas, const Tensor& anchors,
                                      const Tensor& gt_boxes, const Tensor& matches,
                                      const BoxLossOptions& options,
                                      const std::optional<Tensor>& normalizer) {
  const HeadShape shape = check_dense_box_losses(deltas, anchors, gt_boxes, matches, options);
  if (!options.has_loss()) {
    fail("dense_box_loss: loss must lie in [0, 5], got ", options.loss);
  }
  check_normalizer_of_images("dense_box_loss", normalizer, "deltas", deltas[0]);
  return shape;
}

}  // namespace focalops
