// Every op of focalops: the table of contents of the native side. The implementations are
// registered at the end of cpu/<op>.cpp and cuda/<op>.cu; fake kernels and autograd are registered
// from Python, in focalops/<topic>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(focalops, m) {
  // focal_loss: FL, or FL* where there is a beta
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha, float gamma, float? beta, "
      "int ignore_index) -> Tensor");
  m.def(
      "_sigmoid_focal_loss_backward(Tensor grad_output, Tensor inputs, Tensor targets, float "
      "alpha, float gamma,"
      " float? beta, int ignore_index) -> Tensor");
  // loss: 0-d, divided by max(normalizer, min_normalizer); grad: d loss / d inputs, empty unless
  // compute_grad.
  m.def(
      "sigmoid_focal_loss_sum(Tensor inputs, Tensor targets, float alpha, float gamma, float? "
      "beta, int ignore_index,"
      " Tensor? normalizer, float min_normalizer, bool compute_grad) -> (Tensor loss, Tensor "
      "grad)");
  // Does the same with the gradient written over inputs.
  m.def(
      "_sigmoid_focal_loss_sum_(Tensor(a!) inputs, Tensor targets, float alpha, float gamma, "
      "float? beta, int ignore_index, Tensor? normalizer, float min_normalizer) -> Tensor loss");
  // Does the same of rows with class indices and what else they may have: a score of the true
  // class, a weight, a weight of the column. loss: the name of a member of row_losses::All
  // (math/row_losses.h), which says what its parameters are.
  m.def(
      "row_loss_sum(Tensor inputs, Tensor targets, Tensor? scores, str loss, float[] parameters, "
      "Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? normalizer, float "
      "min_normalizer, bool compute_grad) -> (Tensor loss, Tensor grad)");
  m.def(
      "_row_loss_sum_(Tensor(a!) inputs, Tensor targets, Tensor? scores, str loss, float[] "
      "parameters, Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? normalizer, "
      "float min_normalizer) -> Tensor loss");
  // A copy of class indices that row_loss_sum would take; on the CPU another index is an error, as
  // there.
  m.def("_class_indices(Tensor targets, str loss, int num_classes, int ignore_index) -> Tensor");
  // cls_logits: up to kMaxLevels levels (B, A * K, H, W); labels, weight: (B, N); class_weight:
  // (K,); normalizer: 0-d or (B,); grads: one a level, none unless compute_grad.
  m.def(
      "dense_focal_loss(Tensor[] cls_logits, Tensor labels, float alpha, float gamma, float "
      "label_smoothing, Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? "
      "normalizer, float min_normalizer, bool compute_grad) -> (Tensor loss, Tensor[] grads)");
  // Does the same with the gradients written over cls_logits.
  m.def(
      "_dense_focal_loss_(Tensor(a!)[] cls_logits, Tensor labels, float alpha, float gamma, float "
      "label_smoothing, Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? "
      "normalizer, float min_normalizer) -> Tensor loss");
  // gamma: (K,); gradient_sums: float64 (2, K), of each class the sums of the gradients, not
  // divided by the normalizer, that raise its logits, and of those that lower them.
  m.def(
      "dense_equalized_focal_loss(Tensor[] cls_logits, Tensor labels, Tensor gamma, float alpha, "
      "Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? normalizer, float "
      "min_normalizer, bool compute_grad) -> (Tensor loss, Tensor gradient_sums, Tensor[] grads)");
  // Of any member of row_losses::All but softmax_focal_loss. scores: (B, N); losses: (B, N), one an
  // anchor, multiplied by its weight and divided by its image's normalizer.
  m.def(
      "dense_row_losses(Tensor[] cls_logits, Tensor labels, Tensor? scores, str loss, float[] "
      "parameters, Tensor? weight, Tensor? class_weight, int ignore_index, Tensor? normalizer, "
      "float min_normalizer, bool compute_grad) -> (Tensor losses, Tensor[] grads)");
  // scale: one number, or one for each tensor[i]
  m.def("_scale_(Tensor(a!) tensor, Tensor scale) -> ()");
  // tensor: a level (B, A * C, H, W), contiguous or channels_last; scale: (B, N), one an anchor,
  // the level's from first_row on.
  m.def("_scale_rows_(Tensor(a!) tensor, Tensor scale, int anchors, int first_row) -> ()");

  // boxes. kind: 0 IoU, 1 generalized, 2 distance, 3 complete, and of box_iou alone 4, the
  // intersection over the area of the box of boxes1; eps is added to the divisors of the
  // penalties, and in the losses to the union.
  m.def("box_iou(Tensor boxes1, Tensor boxes2, int kind=0, float eps=0) -> Tensor");
  m.def(
      "_box_iou_backward(Tensor grad_output, Tensor boxes1, Tensor boxes2, int kind=0, float eps=0)"
      " -> Tensor grad_boxes1");
  // One loss a pair, 1 - IoU.
  m.def("box_pair_loss(Tensor boxes1, Tensor boxes2, int kind, float eps) -> Tensor");
  // A gradient is empty unless compute_grad.
  m.def(
      "_box_pair_loss_backward(Tensor grad_output, Tensor boxes1, Tensor boxes2, int kind, float "
      "eps,"
      " bool compute_grad1, bool compute_grad2) -> (Tensor grad_boxes1, Tensor grad_boxes2)");
  m.def("encode_boxes(Tensor boxes, Tensor anchors, float[] weights) -> Tensor");
  m.def(
      "_encode_boxes_backward(Tensor grad_output, Tensor boxes, Tensor anchors, float[] weights)"
      " -> (Tensor grad_boxes, Tensor grad_anchors)");
  // image_size: height and width, or empty: no clipping to the image.
  m.def(
      "decode_boxes(Tensor deltas, Tensor anchors, float[] weights, float clip, float[] "
      "image_size) -> Tensor");
  // grad_anchors is empty unless compute_grad_anchors.
  m.def(
      "_decode_boxes_backward(Tensor grad_output, Tensor deltas, Tensor anchors, float[] weights, "
      "float clip,"
      " float[] image_size, bool compute_grad_anchors) -> (Tensor grad_deltas, Tensor "
      "grad_anchors)");

  // deltas: up to kMaxLevels levels (B, A * 4, H, W); anchors: (N, 4); gt_boxes: (B, M, 4);
  // matches: (B, N); loss: 0 L1, 1 smooth L1, 2 .. 5 the IoU family; normalizer: 0-d or (B,);
  // grads: one a level, none unless compute_grad.
  m.def(
      "dense_box_loss(Tensor[] deltas, Tensor anchors, Tensor gt_boxes, Tensor matches, int loss,"
      " float[] weights, float clip, float beta, float eps, Tensor? normalizer, float "
      "min_normalizer,"
      " bool compute_grad) -> (Tensor loss, Tensor[] grads)");
  // Each anchor's own: losses, and iou, that of its decoded box and its match, are (B, N), 0 where
  // there is no match; losses is empty where loss is -1, iou unless compute_iou. grads are of the
  // losses by the anchor's own deltas.
  m.def(
      "dense_box_losses(Tensor[] deltas, Tensor anchors, Tensor gt_boxes, Tensor matches, int loss,"
      " float[] weights, float clip, float beta, float eps, bool compute_grad, bool compute_iou)"
      " -> (Tensor losses, Tensor iou, Tensor[] grads)");

  // distances. levels: up to kMaxLevels levels (B, 4 * bins, H, W); points: (N, 2); strides: one a
  // level; image_sizes: (B, 2), height and width; boxes: (B, N, 4).
  m.def(
      "decode_distances(Tensor[] levels, Tensor points, float[] strides, int bins, Tensor? "
      "image_sizes) -> Tensor boxes");
  m.def(
      "_decode_distances_backward(Tensor grad_output, Tensor[] levels, Tensor points, float[] "
      "strides, int bins, Tensor? image_sizes) -> Tensor[] grads");
  // As dense_box_losses, of distances: points: (N, 2); loss: 2 .. 5 the IoU family; losses: with
  // dfl_weight times the mean distribution focal loss of the four sides.
  m.def(
      "dense_distance_losses(Tensor[] levels, Tensor points, Tensor gt_boxes, Tensor matches, "
      "float[] strides, int bins, int loss, float eps, float dfl_weight, bool compute_grad, bool "
      "compute_iou) -> (Tensor losses, Tensor iou, Tensor[] grads)");
  // inputs: (..., bins); losses: one a target; grad: of each loss by its own inputs, empty unless
  // compute_grad.
  m.def(
      "distribution_focal_loss(Tensor inputs, Tensor targets, bool compute_grad) -> (Tensor "
      "losses, Tensor grad)");

  // fusion. features: 1 to 8 maps (B, C, H, W), weights: (n,); mode: 0 fast, 1 softmax, 2 sum, 3
  // unbounded; activation: 0 none, 1 SiLU, 2 ReLU6. grad_weights is empty where there are none.
  m.def(
      "fuse_features(Tensor[] features, Tensor? weights, int mode, float eps, int activation, bool "
      "symmetric) -> Tensor");
  m.def(
      "_fuse_features_backward(Tensor grad_output, Tensor[] features, Tensor? weights, int mode, "
      "float eps, int activation, bool symmetric) -> (Tensor[] grad_features, Tensor "
      "grad_weights)");

  // matching. roles: uint8 (B, M), 0 an object, 1 a crowd, 2 nothing; low_quality: 0 none, 1 the
  // anchor's own best box, 2 the last box, 3 the last box and of equal anchors the first,
  // 4 the first box and of equal anchors the first.
  // ignore_wrt_candidates: crowd_threshold is a share of the anchor, else of the crowd.
  m.def(
      "match_anchors(Tensor anchors, Tensor gt_boxes, Tensor? counts, float fg_iou_threshold,"
      " float bg_iou_threshold, int low_quality, float min_pos_iou=0, Tensor? roles=None,"
      " float crowd_threshold=0, bool ignore_wrt_candidates=True) -> Tensor");

  // assigners. points: (N, 2); crowd: bool (B, M); level_sizes: points of each level, whose range
  // is least .. most; rule: 0 torchvision's, 1 mmdet's.
  m.def(
      "assign_fcos(Tensor points, Tensor gt_boxes, Tensor? counts, Tensor? crowd,"
      " int[] level_sizes, float[] strides, float[] least, float[] most, float center_radius,"
      " int rule) -> Tensor matches");
  // pred_scores: (B, N, K); pred_boxes: (B, N, 4); gt_labels: int64 (B, M); rule: 0 ultralytics',
  // 1 mmyolo's, 2 TOOD's; overlap: 0 IoU, 3 CIoU; min_side: negative for none; final_topk: 0 for
  // none. All in float32. matches and scores: (B, N).
  m.def(
      "assign_task_aligned(Tensor pred_scores, Tensor pred_boxes, Tensor points, Tensor gt_boxes,"
      " Tensor gt_labels, Tensor? counts, Tensor? crowd, int topk, float alpha, float beta,"
      " int rule, int overlap, float min_side, int final_topk, float eps)"
      " -> (Tensor matches, Tensor scores)");
  // anchors: (N, 4); rule: 0 mmdet's, 1 mmyolo's.
  m.def(
      "assign_atss(Tensor anchors, Tensor gt_boxes, Tensor? counts, Tensor? crowd,"
      " int[] level_sizes, int topk, int rule, bool at_least_one) -> Tensor matches");
  // As above. strides: (N,), pixels; objectness: logits (B, N); rule: 0 mmdet's, 1 YOLOX's,
  // 2 RTMDet's. ious: (B, N).
  m.def(
      "assign_simota(Tensor cls_logits, Tensor pred_boxes, Tensor points, Tensor strides,"
      " Tensor gt_boxes, Tensor gt_labels, Tensor? objectness, Tensor? counts, Tensor? crowd,"
      " int rule, float center_radius, int candidates) -> (Tensor matches, Tensor ious)");

  // nms. by_distance: by DIoU
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, bool by_distance=False)"
      " -> Tensor");
  // indices: [B, max_detections], padded with -1; num_kept: [B].
  m.def(
      "multiclass_nms(Tensor boxes, Tensor scores, Tensor? labels, Tensor? counts,"
      " float iou_threshold, int max_detections, bool by_distance=False)"
      " -> (Tensor indices, Tensor num_kept)");
  // indices: [B, max_detections], padded with -1; kept_scores: as they have become, padded with 0.
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold, float sigma,"
      " bool is_gaussian, float score_threshold, int max_detections)"
      " -> (Tensor indices, Tensor kept_scores, Tensor num_kept)");

  m.def(
      "matrix_nms(Tensor boxes, Tensor scores, Tensor? labels, float sigma, bool is_gaussian,"
      " float score_threshold, int max_detections)"
      " -> (Tensor indices, Tensor kept_scores, Tensor num_kept)");

  // detections, padded with 0, 0 and -1. cls_logits: up to kMaxLevels levels (B, A * K, H, W);
  // box_deltas: (B, A * 4, H, W); anchors: (N, 4); image_sizes: (B, 2), height and width. With
  // strides, one a level, box_deltas are distances (B, 4 * bins, H, W), and anchors points (N, 2).
  // score_factors: (B, A, H, W), by which scores are multiplied, or none; takes_root: of the
  // product.
  m.def(
      "detect(Tensor[] cls_logits, Tensor[] box_deltas, Tensor anchors, Tensor? image_sizes,"
      " float[] weights, float clip, float score_threshold, int topk_per_level,"
      " float iou_threshold, int max_detections, bool class_agnostic, bool by_distance=False,"
      " int? topk=None, float[] strides=[], int bins=1, bool takes_root=False,"
      " Tensor[]? score_factors=None)"
      " -> (Tensor boxes, Tensor scores, Tensor labels, Tensor counts)");

  // What detect suppresses: (B, C) candidates of each image, best first, padded with 0, -inf and
  // -1.
  m.def(
      "_head_candidates(Tensor[] cls_logits, Tensor[] box_deltas, Tensor anchors,"
      " Tensor? image_sizes, float[] weights, float clip,"
      " float score_threshold, int topk_per_level, int? topk, float[] strides=[], int bins=1,"
      " bool takes_root=False, Tensor[]? score_factors=None)"
      " -> (Tensor boxes, Tensor scores, Tensor labels)");
}
