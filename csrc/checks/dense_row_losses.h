// dense_row_losses and _scale_rows_ refuse these arguments.
#pragma once

#include <string>
#include <vector>

#include "dense_focal_loss.h"
#include "row_losses.h"

namespace focalops {

// The op is called by dense_focal_loss too, whose name its sentences then have.
inline const char* dense_loss_name(const std::string& loss) {
  return loss == row_losses::Focal::kName ? "dense_focal_loss" : "dense_quality_loss";
}

inline HeadShape check_dense_row_losses(const std::vector<Tensor>& cls_logits, const Tensor& labels,
                                        const std::optional<Tensor>& scores,
                                        const std::string& loss,
                                        const std::vector<double>& parameters,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& class_weight,
                                        const std::optional<Tensor>& normalizer) {
  const char* op = dense_loss_name(loss);
  with_row_loss("dense_row_losses", loss, [&](auto member) {
    using Loss = decltype(member);
    if (Loss::kIsSoftmax) {
      fail("dense_row_losses: loss must be one of sigmoids, got '", loss, "'");
    }
    check_parameters<Loss>("dense_row_losses", op, parameters);
  });
  const HeadShape shape =
      check_class_head(op, cls_logits, labels, weight, class_weight, normalizer);
  check_row_numbers(op, "scores", scores, "labels", labels,
                    compute_dtype(cls_logits[0].scalar_type()));
  return shape;
}

// Returns the shape of which the tensor is a level.
inline HeadShape check_scale_rows(const Tensor& tensor, const Tensor& scale, int64_t anchors,
                                  int64_t first_row) {
  const char* op = "_scale_rows_";
  check_floating(op, "tensor", tensor);
  check_same_device(op, "scale", scale, "tensor", tensor);
  if (tensor.dim() != 4 || (!tensor.is_contiguous() && !is_channels_last(tensor))) {
    fail(op, ": tensor must be a level (B, A * C, H, W), contiguous or channels_last, got ",
         shape_of(tensor));
  }
  if (anchors < 1 || tensor.size(1) % anchors != 0) {
    fail(op, ": anchors must divide the channels, ", tensor.size(1), ", got ", anchors);
  }
  const int64_t images = tensor.size(0), rows = tensor.size(2) * tensor.size(3) * anchors;
  const bool has_rows = scale.dim() == 2 && scale.size(0) == images && first_row >= 0 &&
                        first_row + rows <= scale.size(1);
  if (!has_rows || scale.scalar_type() != compute_dtype(tensor.scalar_type())) {
    fail(op, ": scale must be float32 (float64 for float64 tensors) of shape (", images,
         ", N), N at least ", first_row, " + ", rows, ", got ", dtype_of(scale), " of shape ",
         shape_of(scale));
  }
  check_image_size(op, "tensor", tensor, "numbers");
  return {images, anchors, tensor.size(1) / anchors, scale.size(1)};
}

}  // namespace focalops
