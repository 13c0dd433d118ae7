// What the kinds of NMS refuse.
#pragma once

#include <optional>
#include <string>

#include "../checks.h"

namespace focalops {

inline void check_boxes(const char* op, const char* name, const Tensor& boxes) {
  check_floating(op, name, boxes);
  if (boxes.dim() != 2 || boxes.size(1) != 4) {
    fail(op, ": ", name, " must have shape (N, 4), got ", shape_of(boxes));
  }
}

inline void check_nms(const Tensor& boxes, const Tensor& scores,
                      const std::optional<Tensor>& idxs) {
  const char* op = idxs.has_value() ? "batched_nms" : "nms";
  check_boxes(op, "boxes", boxes);
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "boxes", boxes);
  if (scores.dim() != 1 || scores.size(0) != boxes.size(0)) {
    fail(op, ": scores must have shape (", boxes.size(0), ",), one for each box, got ",
         shape_of(scores));
  }
  if (idxs.has_value()) {
    if (!is_index(idxs->scalar_type())) {
      fail(op, ": idxs must be int32 or int64, got ", dtype_of(*idxs));
    }
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
    if (idxs->dim() != 1 || idxs->size(0) != boxes.size(0)) {
      fail(op, ": idxs must have shape (", boxes.size(0), ",), one for each box, got ",
           shape_of(*idxs));
    }
  }
}

// boxes: (B, N, 4), scores and labels: (B, N), counts: (B,).
inline void check_multiclass_nms(const Tensor& boxes, const Tensor& scores,
                                 const std::optional<Tensor>& labels,
                                 const std::optional<Tensor>& counts, int64_t max_detections) {
  const char* op = "multiclass_nms";
  check_floating(op, "boxes", boxes);
  if (boxes.dim() != 3 || boxes.size(2) != 4) {
    fail(op, ": boxes must have shape (B, N, 4), got ", shape_of(boxes));
  }
  check_floating(op, "scores", scores);
  const auto check_one_for_each = [&](const char* name, const Tensor& tensor, int64_t dims) {
    check_same_device(op, name, tensor, "boxes", boxes);
    if (tensor.dim() != dims || !same_shape(tensor, boxes, dims)) {
      fail(op, ": ", name, " must have shape (", boxes.size(0), ",",
           dims == 2 ? " " + std::to_string(boxes.size(1)) : "", "), one for each ",
           dims == 2 ? "box" : "image", ", got ", shape_of(tensor));
    }
  };
  check_one_for_each("scores", scores, 2);
  const auto check_integers = [&](const char* name, const std::optional<Tensor>& tensor,
                                  int64_t dims) {
    if (tensor.has_value()) {
      if (!is_index(tensor->scalar_type())) {
        fail(op, ": ", name, " must be int32 or int64, got ", dtype_of(*tensor));
      }
      check_one_for_each(name, *tensor, dims);
    }
  };
  check_integers("labels", labels, 2);
  check_integers("counts", counts, 1);
  if (max_detections < 0) {
    fail(op, ": max_detections must be >= 0, got ", max_detections);
  }
}

// boxes: (B, N, 4), scores and labels: (B, N).
inline void check_decaying_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                               const std::optional<Tensor>& labels, double sigma,
                               int64_t max_detections) {
  check_coordinates(op, "boxes", boxes);
  if (boxes.dim() != 3 || boxes.size(2) != 4) {
    fail(op, ": boxes must have shape (B, N, 4), got ", shape_of(boxes));
  }
  check_like(op, "scores", scores, "boxes", boxes);
  const auto check_one_for_each_box = [&](const char* name, const Tensor& tensor) {
    if (tensor.dim() != 2 || !same_shape(tensor, boxes, 2)) {
      fail(op, ": ", name, " must have shape (", boxes.size(0), ", ", boxes.size(1),
           "), one for each box, got ", shape_of(tensor));
    }
  };
  check_one_for_each_box("scores", scores);
  if (labels.has_value()) {
    if (!is_index(labels->scalar_type())) {
      fail(op, ": labels must be int32 or int64, got ", dtype_of(*labels));
    }
    check_same_device(op, "labels", *labels, "boxes", boxes);
    check_one_for_each_box("labels", *labels);
  }
  if (!(sigma > 0)) {
    fail(op, ": sigma must be > 0, got ", sigma);
  }
  if (max_detections < 0) {
    fail(op, ": max_detections must be >= 0, got ", max_detections);
  }
}

}  // namespace focalops
