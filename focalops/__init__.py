"""CUDA and C++ kernels for the parts of dense object detection that are not convolutions."""

from focalops._version import __version__
from focalops.anchors import AnchorGenerator
from focalops.boxes import box_iou, decode_boxes, encode_boxes
from focalops.focal_loss import dense_focal_loss, sigmoid_focal_loss, sigmoid_focal_loss_star
from focalops.matching import class_index_targets, match_anchors
from focalops.nms import batched_nms, multiclass_nms, nms

__all__ = [
    "AnchorGenerator",
    "__version__",
    "batched_nms",
    "box_iou",
    "class_index_targets",
    "decode_boxes",
    "dense_focal_loss",
    "encode_boxes",
    "match_anchors",
    "multiclass_nms",
    "nms",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
]
