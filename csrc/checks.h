// One check_<op>() per op, called by the CPU and the CUDA implementation alike. Each failure is one
// sentence: argument, what it must be, what it was; the fake kernels in Python say the same
// sentences.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"
#include "math/focal.h"

namespace focalops {

inline std::string shape_of(const Tensor& tensor) {  // as Python prints a tuple
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    out << (i ? ", " : "") << tensor.size(i);
  }
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string dtype_of(const Tensor& tensor) {  // as torch prints it
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::UInt16:
      return "torch.uint16";
    case ScalarType::UInt32:
      return "torch.uint32";
    case ScalarType::UInt64:
      return "torch.uint64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

template <typename... Args>
[[noreturn]] void fail(const Args&... sentence) {
  std::ostringstream out;
  (out << ... << sentence);
  throw std::runtime_error(out.str());
}

// `op` and `name` as in the Python signature.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    fail(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", dtype_of(tensor));
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* like_name, const Tensor& like) {
  if (device_of(tensor) != device_of(like)) {
    fail(op, ": ", name, " must be on ", device_of(like), " like ", like_name, ", got ",
         device_of(tensor));
  }
}

inline void check_boxes(const char* op, const char* name, const Tensor& boxes) {
  check_floating(op, name, boxes);
  if (boxes.dim() != 2 || boxes.size(1) != 4) {
    fail(op, ": ", name, " must have shape (N, 4), got ", shape_of(boxes));
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (a.size(i) != b.size(i)) {
      return false;
    }
  }
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && same_shape(a, b, a.dim());
}

inline void check_coordinates(const char* op, const char* name, const Tensor& tensor) {
  if (compute_dtype(tensor.scalar_type()) != tensor.scalar_type()) {
    fail(op, ": ", name, " must be float32 or float64, got ", dtype_of(tensor));
  }
}

// What follows a tensor that has passed: `tensor` must have the dtype of `like` and be on its
// device.
inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const char* like_name, const Tensor& like) {
  check_same_device(op, name, tensor, like_name, like);
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(op, ": ", name, " must be ", dtype_of(like), " like ", like_name, ", got ",
         dtype_of(tensor));
  }
}

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

// What a ground-truth box is to the matching.
enum Role : uint8_t { kObject, kCrowd, kNothing };

// Which anchors a box gets whose IoU with none reaches the threshold.
enum class LowQuality { kNone, kOwnBest, kLastBox, kLastBoxFirstAnchor, kFirstBoxFirstAnchor };

// Whether of equally good anchors a box takes the first alone.
inline bool takes_first_anchor(LowQuality rule) {
  return rule == LowQuality::kLastBoxFirstAnchor || rule == LowQuality::kFirstBoxFirstAnchor;
}

struct MatchRule {
  double fg_iou_threshold, bg_iou_threshold;
  int64_t low_quality;  // of LowQuality
  double min_pos_iou;
  double crowd_threshold;
};

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

// targets of the shape of inputs are dense, of the shape of inputs without its last dimension are
// class indices.
inline bool targets_are_dense(const Tensor& inputs, const Tensor& targets) {
  return inputs.dim() == targets.dim();
}

// (B, C, H, W) in memory as (B, H, W, C).
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) {
    return false;
  }
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) {
      return false;
    }
    stride *= tensor.size(d);
  }
  return true;
}

// The gradient is written over a tensor only where it lies as the kernels write it.
inline void check_overwritten(const char* op, const char* name, const Tensor& tensor,
                              bool may_be_channels_last) {
  if (!tensor.is_contiguous() && !(may_be_channels_last && is_channels_last(tensor))) {
    fail(op, ": inplace_backward needs ", name, " to be contiguous",
         may_be_channels_last ? " or channels_last" : "", ", and it is not");
  }
}

inline const char* focal_loss_name(const FocalParams& params) {
  return params.beta.has_value() ? "sigmoid_focal_loss_star" : "sigmoid_focal_loss";
}

// What all losses ask of inputs and targets.
inline void check_targets(const char* op, const Tensor& inputs, const Tensor& targets,
                          bool may_be_dense) {
  check_floating(op, "inputs", inputs);
  check_same_device(op, "targets", targets, "inputs", inputs);
  const bool dense = may_be_dense && targets_are_dense(inputs, targets);
  if (!may_be_dense && inputs.dim() == 0) {
    fail(op, ": inputs must have shape (..., K), got ()");
  }
  if (!(dense || targets.dim() + 1 == inputs.dim()) ||
      !same_shape(inputs, targets, targets.dim())) {
    if (may_be_dense) {
      fail(op, ": targets must have the shape of inputs, ", shape_of(inputs),
           ", or that shape without its last dimension, got ", shape_of(targets));
    }
    fail(op, ": class-index targets must have the shape of inputs, ", shape_of(inputs),
         ", without its last dimension, got ", shape_of(targets));
  }
  if (dense && targets.scalar_type() != inputs.scalar_type() &&
      targets.scalar_type() != compute_dtype(inputs.scalar_type())) {
    fail(op, ": dense targets must have the dtype of inputs, ", dtype_of(inputs),
         ", or float32, got ", dtype_of(targets));
  }
  if (!dense && !is_index(targets.scalar_type())) {
    fail(op, ": class-index targets must be int32 or int64, got ", dtype_of(targets));
  }
  if (!dense && inputs.size(inputs.dim() - 1) >= int64_t{1} << 30) {
    fail(op, ": inputs must have fewer than 2^30 classes, got ", inputs.size(inputs.dim() - 1));
  }
}

inline void check_classes(const char* op, const Tensor& inputs) {
  if (inputs.size(inputs.dim() - 1) == 0) {
    fail(op, ": inputs must have at least one class, got shape ", shape_of(inputs));
  }
}

inline void check_gamma(const char* op, const char* name, double gamma) {
  if (!(gamma >= 0)) {
    fail(op, ": ", name, " must be >= 0, got ", gamma);
  }
}

// alpha weights the positives, 1 - alpha the negatives; a negative alpha neither.
inline void check_alpha(const char* op, double alpha) {
  if (!(alpha <= 1)) {
    fail(op, ": alpha must lie in [0, 1], or be negative for none, got ", alpha);
  }
}

inline void check_focal_loss(const Tensor& inputs, const Tensor& targets,
                             const FocalParams& params) {
  const char* op = focal_loss_name(params);
  check_targets(op, inputs, targets, true);
  if (params.beta.has_value() && !(params.gamma > 0)) {
    fail(op, ": gamma must be > 0, got ", params.gamma);
  }
  check_gamma(op, "gamma", params.gamma);
  check_alpha(op, params.alpha);
}

inline void check_focal_loss_backward(const Tensor& grad_output, const Tensor& inputs,
                                      const Tensor& targets, const FocalParams& params) {
  check_focal_loss(inputs, targets, params);
  const char* op = focal_loss_name(params);
  check_same_device(op, "grad_output", grad_output, "inputs", inputs);
  if (grad_output.dim() != inputs.dim() || !same_shape(grad_output, inputs, inputs.dim()) ||
      grad_output.scalar_type() != inputs.scalar_type()) {
    fail(op, ": grad_output must have the shape and dtype of inputs, ", shape_of(inputs), " and ",
         dtype_of(inputs), ", got ", shape_of(grad_output), " and ", dtype_of(grad_output));
  }
}

inline void check_normalizer(const char* op, const Tensor& inputs,
                             const std::optional<Tensor>& normalizer) {
  if (normalizer.has_value()) {
    check_same_device(op, "normalizer", *normalizer, "inputs", inputs);
    if (normalizer->dim() != 0) {
      fail(op, ": normalizer must be a number or a 0-d tensor, got a tensor of shape ",
           shape_of(*normalizer));
    }
    if (normalizer->scalar_type() != compute_dtype(inputs.scalar_type())) {
      fail(op, ": normalizer must be float32 (float64 for float64 inputs), got ",
           dtype_of(*normalizer));
    }
  }
}

inline void check_focal_loss_sum(const Tensor& inputs, const Tensor& targets,
                                 const FocalParams& params,
                                 const std::optional<Tensor>& normalizer) {
  check_focal_loss(inputs, targets, params);
  check_normalizer(focal_loss_name(params), inputs, normalizer);
}

inline const char* row_loss_name(int64_t loss) {
  constexpr const char* names[] = {"sigmoid_focal_loss", "quality_focal_loss",
                                   "varifocal_loss",     "matchability_aware_loss",
                                   "ia_bce_loss",        "softmax_focal_loss"};
  return names[loss];
}

inline void check_smoothing(const char* op, double label_smoothing) {
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    fail(op, ": label_smoothing must lie in [0, 1], got ", label_smoothing);
  }
}

// One number a row, such as its weight: of the shape of the class indices.
inline void check_row_numbers(const char* op, const char* name, const std::optional<Tensor>& given,
                              const char* like_name, const Tensor& like, ScalarType dtype) {
  if (!given.has_value()) {
    return;
  }
  check_same_device(op, name, *given, like_name, like);
  if (given->dim() != like.dim() || !same_shape(*given, like, like.dim()) ||
      given->scalar_type() != dtype) {
    fail(op, ": ", name, " must have the shape of ", like_name, ", ", shape_of(like),
         ", and be float32 (float64 for float64 logits), got ", shape_of(*given), " and ",
         dtype_of(*given));
  }
}

inline void check_class_weight(const char* op, const std::optional<Tensor>& given,
                               const Tensor& like, int64_t num_classes) {
  if (!given.has_value()) {
    return;
  }
  check_same_device(op, "class_weight", *given, "the logits", like);
  if (given->dim() != 1 || given->size(0) != num_classes ||
      given->scalar_type() != compute_dtype(like.scalar_type())) {
    fail(op, ": class_weight must have shape (", num_classes,
         ",) and be float32 (float64 for float64 logits), got ", shape_of(*given), " and ",
         dtype_of(*given));
  }
}

inline void check_weight_of_negatives(const char* op, double alpha) {
  if (!(alpha >= 0)) {
    fail(op, ": alpha must be >= 0, got ", alpha);
  }
}

inline void check_class_indices(const Tensor& targets, int64_t loss) {
  if (loss < 0 || loss >= kNumRowLosses) {
    fail("_class_indices: loss must be one of those in csrc/math/focal.h, got ", loss);
  }
  if (!is_index(targets.scalar_type())) {
    fail(row_loss_name(loss), ": class-index targets must be int32 or int64, got ",
         dtype_of(targets));
  }
}

inline void check_row_loss(const Tensor& inputs, const Tensor& targets,
                           const std::optional<Tensor>& scores, int64_t loss,
                           const std::vector<double>& parameters,
                           const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& class_weight,
                           const std::optional<Tensor>& normalizer) {
  if (!knows_row_loss(loss, parameters.size())) {
    fail("row_loss_sum: loss and parameters must be one of those in csrc/math/focal.h, got loss ",
         loss, " and ", parameters.size(), " parameters");
  }
  const char* op = row_loss_name(loss);
  check_targets(op, inputs, targets, false);
  if (static_cast<RowLoss>(loss) == RowLoss::softmax) {
    check_classes(op, inputs);
  }
  const ScalarType dtype = compute_dtype(inputs.scalar_type());
  check_row_numbers(op, "scores", scores, "targets", targets, dtype);
  check_row_numbers(op, "weight", weight, "targets", targets, dtype);
  check_class_weight(op, class_weight, inputs, inputs.size(inputs.dim() - 1));
  check_normalizer(op, inputs, normalizer);
  switch (static_cast<RowLoss>(loss)) {
    case RowLoss::focal:
      check_gamma(op, "gamma", parameters[1]);
      check_alpha(op, parameters[0]);
      return check_smoothing(op, parameters[2]);
    case RowLoss::quality:
      return check_gamma(op, "beta", parameters[0]);
    case RowLoss::matchability:
      check_weight_of_negatives(op, parameters[1]);
      return check_gamma(op, "gamma", parameters[0]);
    case RowLoss::varifocal:
      check_weight_of_negatives(op, parameters[0]);
      return check_gamma(op, "gamma", parameters[1]);
    case RowLoss::iou_aware:
      if (!(parameters[0] >= 0 && parameters[0] <= 1)) {
        fail(op, ": alpha must lie in [0, 1], got ", parameters[0]);
      }
      return check_gamma(op, "gamma", parameters[1]);
    default:
      return check_gamma(op, "gamma", parameters[1]);
  }
}

// What dense_focal_loss takes beside logits and labels.
struct HeadLossOptions {
  double alpha, gamma, label_smoothing;
  std::optional<Tensor> weight, class_weight;
  int64_t ignore_index;
};

// What the levels of a head have in common.
struct HeadShape {
  int64_t images, anchors, classes;  // anchors of a position
  int64_t rows;                      // of an image, over all levels: one an anchor
};

// The CUDA kernels number the parts of an image in 32 bits.
inline void check_image_size(const char* op, const std::string& name, const Tensor& level,
                             const char* what) {
  const int64_t numbers = level.size(1) * level.size(2) * level.size(3);
  if (numbers >= int64_t{1} << 31) {
    fail(op, ": ", name, " must have fewer than 2^31 ", what, " an image, got ", numbers);
  }
}

inline HeadShape check_dense_focal_loss(const std::vector<Tensor>& cls_logits, const Tensor& labels,
                                        const HeadLossOptions& options,
                                        const std::optional<Tensor>& normalizer) {
  const char* op = "dense_focal_loss";
  if (cls_logits.empty() || cls_logits.size() > 8) {
    fail(op, ": cls_logits must be 1 to 8 levels, got ", cls_logits.size());
  }
  const Tensor& first = cls_logits[0];
  check_floating(op, "cls_logits[0]", first);
  int64_t positions = 0;
  for (size_t i = 0; i < cls_logits.size(); ++i) {
    const Tensor& level = cls_logits[i];
    const std::string name = "cls_logits[" + std::to_string(i) + "]";
    check_like(op, name.c_str(), level, "cls_logits[0]", first);
    if (level.dim() != 4 || (i > 0 && !same_shape(level, first, 2))) {
      fail(op, ": ", name,
           " must have shape (B, A * K, H, W), B and A * K the same in all levels, got ",
           shape_of(level));
    }
    check_image_size(op, name, level, "logits");
    positions += level.size(2) * level.size(3);
  }
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
  check_gamma(op, "gamma", options.gamma);
  check_alpha(op, options.alpha);
  check_smoothing(op, options.label_smoothing);
  const ScalarType dtype = compute_dtype(first.scalar_type());
  check_row_numbers(op, "weight", options.weight, "labels", labels, dtype);
  if (anchors > 0) {
    check_class_weight(op, options.class_weight, first, classes);
  }
  if (normalizer.has_value()) {
    check_same_device(op, "normalizer", *normalizer, "cls_logits[0]", first);
    if (normalizer->dim() > 1 || (normalizer->dim() == 1 && normalizer->size(0) != images)) {
      fail(op, ": normalizer must be a number, a 0-d tensor or a tensor of shape (", images,
           ",), got a tensor of shape ", shape_of(*normalizer));
    }
    if (normalizer->scalar_type() != compute_dtype(first.scalar_type())) {
      fail(op, ": normalizer must be float32 (float64 for float64 cls_logits), got ",
           dtype_of(*normalizer));
    }
  }
  return {images, anchors, classes, rows};
}

inline void check_overwritten(const std::vector<Tensor>& cls_logits) {
  for (size_t i = 0; i < cls_logits.size(); ++i) {
    const std::string name = "cls_logits[" + std::to_string(i) + "]";
    check_overwritten("dense_focal_loss", name.c_str(), cls_logits[i], true);
  }
}

inline HeadShape check_dense_box_loss(const std::vector<Tensor>& deltas, const Tensor& anchors,
                                      const Tensor& gt_boxes, const Tensor& matches, int64_t loss,
                                      const std::vector<double>& weights, double beta,
                                      const std::optional<Tensor>& normalizer) {
  const char* op = "dense_box_loss";
  if (deltas.empty() || deltas.size() > 8) {
    fail(op, ": deltas must be 1 to 8 levels, got ", deltas.size());
  }
  const Tensor& first = deltas[0];
  check_floating(op, "deltas[0]", first);
  int64_t positions = 0;
  for (size_t i = 0; i < deltas.size(); ++i) {
    const Tensor& level = deltas[i];
    const std::string name = "deltas[" + std::to_string(i) + "]";
    check_like(op, name.c_str(), level, "deltas[0]", first);
    if (level.dim() != 4 || level.size(1) % 4 != 0 || !same_shape(level, first, 2)) {
      fail(op, ": ", name,
           " must have shape (B, A * 4, H, W), B and A the same in all levels, got ",
           shape_of(level));
    }
    check_image_size(op, name, level, "deltas");
    positions += level.size(2) * level.size(3);
  }
  const int64_t images = first.size(0), of_position = first.size(1) / 4;
  const int64_t rows = of_position * positions;
  const auto check_boxes_like = [&](const char* name, const Tensor& boxes) {
    check_same_device(op, name, boxes, "deltas[0]", first);
    if (boxes.scalar_type() != compute_dtype(first.scalar_type())) {
      fail(op, ": ", name, " must be float32 (float64 for float64 deltas), got ", dtype_of(boxes));
    }
  };
  check_boxes_like("anchors", anchors);
  if (anchors.dim() != 2 || anchors.size(0) != rows || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (", rows,
         ", 4), one for every 4 channels at each position, got ", shape_of(anchors));
  }
  check_boxes_like("gt_boxes", gt_boxes);
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
  if (loss < 0 || loss > 5) {
    fail(op, ": loss must lie in [0, 5], got ", loss);
  }
  check_weights(op, weights);
  if (!(beta >= 0)) {
    fail(op, ": beta must be >= 0, got ", beta);
  }
  if (normalizer.has_value()) {
    check_same_device(op, "normalizer", *normalizer, "deltas[0]", first);
    if (normalizer->dim() > 1 || (normalizer->dim() == 1 && normalizer->size(0) != images)) {
      fail(op, ": normalizer must be a number, a 0-d tensor or a tensor of shape (", images,
           ",), got a tensor of shape ", shape_of(*normalizer));
    }
    if (normalizer->scalar_type() != compute_dtype(first.scalar_type())) {
      fail(op, ": normalizer must be float32 (float64 for float64 deltas), got ",
           dtype_of(*normalizer));
    }
  }
  return {images, of_position, 4, rows};
}

inline void check_scale(const Tensor& tensor, const Tensor& scale) {
  const char* op = "_scale_";
  check_floating(op, "tensor", tensor);
  check_same_device(op, "scale", scale, "tensor", tensor);
  if (!tensor.is_contiguous() && !is_channels_last(tensor)) {
    fail(op, ": tensor must be contiguous or channels_last");
  }
  const bool is_number = scale.dim() == 0;
  const bool is_one_each = scale.dim() == 1 && tensor.dim() > 0 && scale.size(0) == tensor.size(0);
  if (!(is_number || is_one_each) || scale.scalar_type() != compute_dtype(tensor.scalar_type())) {
    fail(op,
         ": scale must be one float32 (float64 for float64 tensors), or one for each tensor[i], "
         "got shape ",
         shape_of(scale), " and ", dtype_of(scale));
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

inline HeadShape check_detect(const std::vector<Tensor>& cls_logits,
                              const std::vector<Tensor>& box_deltas, const Tensor& anchors,
                              const std::optional<Tensor>& image_sizes,
                              const std::vector<double>& weights, int64_t topk_per_level,
                              int64_t max_detections) {
  const char* op = "detect";
  if (cls_logits.empty() || cls_logits.size() > 8) {
    fail(op, ": cls_logits must be 1 to 8 levels, got ", cls_logits.size());
  }
  if (box_deltas.size() != cls_logits.size()) {
    fail(op, ": box_deltas must be ", cls_logits.size(), " levels like cls_logits, got ",
         box_deltas.size());
  }
  const Tensor& first = cls_logits[0];
  check_floating(op, "cls_logits[0]", first);
  int64_t positions = 0;
  const auto check_levels = [&](const char* levels_name, const std::vector<Tensor>& levels,
                                const char* channels) {
    for (size_t i = 0; i < levels.size(); ++i) {
      const Tensor &level = levels[i], &logits = cls_logits[i];
      const std::string name = levels_name + ("[" + std::to_string(i) + "]");
      check_like(op, name.c_str(), level, "cls_logits[0]", first);
      if (level.dim() != 4 || level.size(0) != first.size(0) ||
          level.size(1) != levels[0].size(1) || level.size(2) != logits.size(2) ||
          level.size(3) != logits.size(3)) {
        fail(op, ": ", name, " must have shape (B, ", channels, ", H, W), B and ", channels,
             " the same in all levels, H and W those of the level, got ", shape_of(level));
      }
    }
  };
  check_levels("cls_logits", cls_logits, "A * K");
  check_levels("box_deltas", box_deltas, "A * 4");
  for (const Tensor& level : cls_logits) {
    positions += level.size(2) * level.size(3);
  }
  const int64_t images = first.size(0), channels = first.size(1);
  const int64_t per_position = box_deltas[0].size(1), num_anchors = per_position / 4;
  if (num_anchors == 0 || per_position % 4 != 0 || channels % num_anchors != 0) {
    fail(op, ": cls_logits and box_deltas must have A * K and A * 4 channels, got ", channels,
         " and ", per_position);
  }
  const int64_t rows = num_anchors * positions, classes = channels / num_anchors;
  if (rows * classes >= int64_t{1} << 31) {
    fail(op, ": cls_logits must have fewer than 2^31 logits an image, got ", rows * classes);
  }
  check_same_device(op, "anchors", anchors, "cls_logits[0]", first);
  if (anchors.scalar_type() != ScalarType::Float) {
    fail(op, ": anchors must be float32, got ", dtype_of(anchors));
  }
  if (anchors.dim() != 2 || anchors.size(0) != rows || anchors.size(1) != 4) {
    fail(op, ": anchors must have shape (", rows, ", 4), ", num_anchors,
         " at each position of the levels, got ", shape_of(anchors));
  }
  if (image_sizes.has_value()) {
    check_same_device(op, "image_sizes", *image_sizes, "cls_logits[0]", first);
    if (image_sizes->scalar_type() != ScalarType::Float) {
      fail(op, ": image_sizes must be float32, got ", dtype_of(*image_sizes));
    }
    if (image_sizes->dim() != 2 || image_sizes->size(0) != images || image_sizes->size(1) != 2) {
      fail(op, ": image_sizes must have shape (", images,
           ", 2), height and width of each image, got ", shape_of(*image_sizes));
    }
  }
  check_weights(op, weights);
  if (topk_per_level < 1) {
    fail(op, ": topk_per_level must be >= 1, got ", topk_per_level);
  }
  if (max_detections < 0) {
    fail(op, ": max_detections must be >= 0, got ", max_detections);
  }
  return {images, num_anchors, classes, rows};
}

}  // namespace focalops
