// dense_focal_loss refuses these arguments.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "head.h"
#include "losses.h"

namespace focalops {

// dense_focal_loss takes these beside logits and labels.
struct HeadLossOptions {
  double alpha, gamma, label_smoothing;
  std::optional<Tensor> weight, class_weight;
  int64_t ignore_index;
};

// What the losses of a head's classes have in common.
inline HeadShape check_class_head(const char* op, const std::vector<Tensor>& cls_logits,
                                  const Tensor& labels, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& class_weight,
                                  const std::optional<Tensor>& normalizer) {
  const int64_t positions =
      check_levels(op, "cls_logits", cls_logits, "A * K", 1, "A * K", "logits");
  const Tensor& first = cls_logits[0];
  check_same_device(op, "labels", labels, "cls_logits[0]", first);
  if (!is_index(labels.scalar_type())) {
    fail(op, ": labels must be int32 or int64, got ", dtype_of(labels));
  }
  const int64_t images = first.size(0), channels = first.size(1);
  const bool has_rows = labels.dim() == 2 && labels.size(0) == images;
  const int64_t rows = has_rows ? labels.size(1) : 0;
  const int64_t anchors = positions > 0 ? rows / positions : 0;
  if (!has_rows || rows != anchors * positions || (positions > 0 && anchors == 0)) {
    fail(op, ": labels must have shape (", images, ", A * ", positions,
         "), A anchors at each position of the levels, got ", shape_of(labels));
  }
  if (anchors > 0 && channels % anchors != 0) {
    fail(op, ": cls_logits must have A * K channels, A = ", anchors,
         " by the shape of labels, got ", channels);
  }
  const int64_t classes = anchors > 0 ? channels / anchors : 0;
  if (classes >= int64_t{1} << 30) {
    fail(op, ": cls_logits must have fewer than 2^30 classes, got ", classes);
  }
  check_row_numbers(op, "weight", weight, "labels", labels, compute_dtype(first.scalar_type()));
  if (anchors > 0) {
    check_class_weight(op, class_weight, first, classes);
  }
  check_normalizer_of_images(op, normalizer, "cls_logits", first);
  return {images, anchors, classes, rows};
}

inline HeadShape check_dense_focal_loss(const std::vector<Tensor>& cls_logits, const Tensor& labels,
                                        const HeadLossOptions& options,
                                        const std::optional<Tensor>& normalizer) {
  const char* op = "dense_focal_loss";
  check_unit_or_none(op, "alpha", options.alpha);
  check_non_negative(op, "gamma", options.gamma);
  check_unit(op, "label_smoothing", options.label_smoothing);
  return check_class_head(op, cls_logits, labels, options.weight, options.class_weight, normalizer);
}

inline void check_overwritten(const std::vector<Tensor>& cls_logits) {
  for (size_t i = 0; i < cls_logits.size(); ++i) {
    const std::string name = level_name("cls_logits", i);
    check_overwritten("dense_focal_loss", name.c_str(), cls_logits[i], true);
  }
}

}  // namespace focalops
