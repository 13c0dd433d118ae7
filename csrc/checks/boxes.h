// What the ops of boxes refuse: IoU, its losses, and the coder.
#pragma once

#include <string>
#include <vector>

#include "../checks.h"

namespace focalops {

// The public names of the IoU family, in the order of IouKind.
inline const char* iou_name(int64_t kind) {
  constexpr const char* kNames[] = {"box_iou", "generalized_box_iou", "distance_box_iou",
                                    "complete_box_iou"};
  if (kind < 0 || kind > 3) {
    fail("box_iou: kind must lie in [0, 3], got ", kind);
  }
  return kNames[kind];
}

// Of the family, and kind 4: the intersection over the area of the first box.
inline void check_box_iou(const Tensor& boxes1, const Tensor& boxes2, int64_t kind) {
  const char* op = kind == 4 ? "box_iou" : iou_name(kind);
  check_coordinates(op, "boxes1", boxes1);
  const int64_t dim = boxes1.dim();
  if ((dim != 2 && dim != 3) || boxes1.size(dim - 1) != 4) {
    fail(op, ": boxes1 must have shape (..., N, 4), got ", shape_of(boxes1));
  }
  check_like(op, "boxes2", boxes2, "boxes1", boxes1);
  if (boxes2.dim() != dim || boxes2.size(dim - 1) != 4 || !same_shape(boxes1, boxes2, dim - 2)) {
    fail(op, ": boxes2 must have shape (..., M, 4), a batch that broadcasts with that of boxes1, ",
         shape_of(boxes1), ", got ", shape_of(boxes2));
  }
}

inline void check_box_iou_backward(const Tensor& grad_output, const Tensor& boxes1,
                                   const Tensor& boxes2, int64_t kind) {
  const char* op = iou_name(kind);
  check_box_iou(boxes1, boxes2, kind);
  check_like(op, "grad_output", grad_output, "boxes1", boxes1);
  const int64_t dim = boxes1.dim();
  if (grad_output.dim() != dim || !same_shape(grad_output, boxes1, dim - 1) ||
      grad_output.size(dim - 1) != boxes2.size(dim - 2)) {
    fail(op, ": grad_output must have the shape of the output, got ", shape_of(grad_output));
  }
}

inline void check_rows_of_4(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.dim() == 0 || tensor.size(tensor.dim() - 1) != 4) {
    fail(op, ": ", name, " must have shape (..., 4), got ", shape_of(tensor));
  }
}

inline void check_box_pair_loss(const Tensor& boxes1, const Tensor& boxes2, int64_t kind) {
  const std::string name = std::string(iou_name(kind)) + "_loss";
  const char* op = name.c_str();
  check_coordinates(op, "boxes1", boxes1);
  check_rows_of_4(op, "boxes1", boxes1);
  check_like(op, "boxes2", boxes2, "boxes1", boxes1);
  if (!same_shape(boxes1, boxes2)) {
    fail(op, ": boxes2 must have a shape that broadcasts with that of boxes1, ", shape_of(boxes1),
         ", got ", shape_of(boxes2));
  }
}

inline void check_box_pair_loss_backward(const Tensor& grad_output, const Tensor& boxes1,
                                         const Tensor& boxes2, int64_t kind) {
  check_box_pair_loss(boxes1, boxes2, kind);
  const std::string name = std::string(iou_name(kind)) + "_loss";
  check_like(name.c_str(), "grad_output", grad_output, "boxes1", boxes1);
  if (grad_output.dim() + 1 != boxes1.dim() ||
      !same_shape(grad_output, boxes1, grad_output.dim())) {
    fail(name, ": grad_output must have the shape of the output, got ", shape_of(grad_output));
  }
}

inline void check_anchors(const char* op, const Tensor& anchors, const char* like_name,
                          const Tensor& like) {
  check_rows_of_4(op, "anchors", anchors);
  if (!same_shape(anchors, like)) {
    fail(op, ": anchors must have a shape that broadcasts with that of ", like_name, ", ",
         shape_of(like), ", got ", shape_of(anchors));
  }
}

inline void check_weights(const char* op, const std::vector<double>& weights) {
  if (weights.size() != 4) {
    fail(op, ": weights must be 4 numbers, got ", weights.size());
  }
}

inline void check_encode_boxes(const Tensor& boxes, const Tensor& anchors,
                               const std::vector<double>& weights) {
  const char* op = "encode_boxes";
  check_coordinates(op, "boxes", boxes);
  check_rows_of_4(op, "boxes", boxes);
  check_like(op, "anchors", anchors, "boxes", boxes);
  check_anchors(op, anchors, "boxes", boxes);
  check_weights(op, weights);
}

inline void check_decode_boxes(const Tensor& deltas, const Tensor& anchors,
                               const std::vector<double>& weights,
                               const std::vector<double>& image_size) {
  const char* op = "decode_boxes";
  check_floating(op, "deltas", deltas);
  check_rows_of_4(op, "deltas", deltas);
  check_same_device(op, "anchors", anchors, "deltas", deltas);
  if (anchors.scalar_type() != compute_dtype(deltas.scalar_type())) {
    fail(op, ": anchors must be float32 (float64 for float64 deltas), got ", dtype_of(anchors));
  }
  check_anchors(op, anchors, "deltas", deltas);
  check_weights(op, weights);
  if (!image_size.empty() && image_size.size() != 2) {
    fail(op, ": image_size must be 2 numbers, height and width, got ", image_size.size());
  }
}

// The gradient of encoded or decoded boxes, which are as many as the anchors and have their dtype.
inline void check_coder_gradient(const char* op, const Tensor& grad_output, const Tensor& anchors) {
  check_like(op, "grad_output", grad_output, "anchors", anchors);
  if (!same_shape(grad_output, anchors)) {
    fail(op, ": grad_output must have the shape of the output, ", shape_of(anchors), ", got ",
         shape_of(grad_output));
  }
}

}  // namespace focalops
