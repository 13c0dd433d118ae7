"""CUDA and C++ kernels for the parts of dense object detection that are not convolutions."""

from focalops._ops import refuse_scripting
from focalops._version import __version__
from focalops.accelerate import accelerate
from focalops.anchors import AnchorGenerator
from focalops.assigners import assign_atss, assign_fcos
from focalops.box_losses import (
    box_iou_loss,
    complete_box_iou_loss,
    dense_box_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    matched_iou,
)
from focalops.boxes import (
    box_iou,
    complete_box_iou,
    decode_boxes,
    distance_box_iou,
    encode_boxes,
    generalized_box_iou,
)
from focalops.dense_equalized_focal_loss import dense_equalized_focal_loss
from focalops.dense_focal_loss import dense_focal_loss
from focalops.dense_row_losses import dense_quality_loss
from focalops.distances import decode_distances, distribution_focal_loss, encode_distances
from focalops.dynamic_assigners import assign_simota, assign_task_aligned
from focalops.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_star, softmax_focal_loss
from focalops.fusion import fuse_features
from focalops.matching import (
    class_index_targets,
    count_degenerate_boxes,
    match_anchors,
    match_iou_matrix,
)
from focalops.nms import batched_nms, matrix_nms, multiclass_nms, nms, nms_match, soft_nms
from focalops.postprocess import detect
from focalops.quality_losses import (
    ia_bce_loss,
    matchability_aware_loss,
    quality_focal_loss,
    soft_focal_loss,
    varifocal_loss,
)

__all__ = [
    "AnchorGenerator",
    "__version__",
    "accelerate",
    "assign_atss",
    "assign_fcos",
    "assign_simota",
    "assign_task_aligned",
    "batched_nms",
    "box_iou",
    "box_iou_loss",
    "class_index_targets",
    "complete_box_iou",
    "complete_box_iou_loss",
    "count_degenerate_boxes",
    "decode_boxes",
    "decode_distances",
    "dense_box_loss",
    "dense_equalized_focal_loss",
    "dense_focal_loss",
    "dense_quality_loss",
    "detect",
    "distance_box_iou",
    "distance_box_iou_loss",
    "distribution_focal_loss",
    "encode_boxes",
    "encode_distances",
    "fuse_features",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "ia_bce_loss",
    "match_anchors",
    "match_iou_matrix",
    "matchability_aware_loss",
    "matched_iou",
    "matrix_nms",
    "multiclass_nms",
    "nms",
    "nms_match",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "soft_focal_loss",
    "soft_nms",
    "softmax_focal_loss",
    "varifocal_loss",
]

refuse_scripting(__all__, globals())
