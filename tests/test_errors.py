"""A wrong argument gets one sentence: which it is, what it must be, what it was; the same from every backend."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import focalops

Arguments = dict[str, Any]

IOU_KINDS = ("", "generalized_", "distance_", "complete_")

ROW_LOSSES = {
    "ia_bce_loss": "gamma",
    "matchability_aware_loss": "gamma",
    "quality_focal_loss": "beta",
    "soft_focal_loss": "gamma",
    "varifocal_loss": "gamma",
}
REDUCED_LOSSES = (
    *ROW_LOSSES,
    "dense_box_loss",
    "dense_box_loss, distance",
    "dense_focal_loss",
    "dense_quality_loss",
    "distribution_focal_loss",
    "sigmoid_focal_loss, sum",
    "sigmoid_focal_loss_star",
    "softmax_focal_loss",
)


def reductions_of(op: str) -> tuple[str | None, ...]:
    if "reduction" not in inspect.signature(function_of(op)).parameters:
        return (None,)
    return ("none", "sum") if op.startswith("dense_") else ("none", "mean", "sum")


def right_arguments() -> dict[str, Arguments]:
    """For each op, arguments that it takes."""
    boxes, scores, indices = torch.zeros(6, 4), torch.zeros(6), torch.zeros(6).long()
    pairs = {"boxes1": boxes, "boxes2": boxes}
    focal = {"inputs": torch.zeros(6, 5), "targets": indices}
    head_of_classes = {
        "cls_logits": [torch.zeros(2, 15, 3, 5), torch.zeros(2, 15, 2, 2)],
        "labels": torch.zeros(2, 57).long(),
    }
    head_of_boxes = {
        "deltas": [torch.zeros(2, 12, 3, 5), torch.zeros(2, 12, 2, 2)],
        "anchors": torch.ones(57, 4),
        "gt_boxes": torch.zeros(2, 3, 4),
        "matches": torch.zeros(2, 57).long() - 1,
    }
    return {
        "assign_atss": {
            "anchors": boxes,
            "level_sizes": (4, 2),
            "gt_boxes": torch.zeros(2, 3, 4),
        },
        "assign_fcos": {
            "points": torch.zeros(6, 2),
            "strides": (8.0, 16.0),
            "level_sizes": (4, 2),
            "gt_boxes": torch.zeros(2, 3, 4),
        },
        "assign_simota": {
            "cls_logits": torch.randn(2, 6, 4),
            "pred_boxes": torch.zeros(2, 6, 4),
            "points": torch.zeros(6, 2),
            "strides": torch.ones(6),
            "gt_boxes": torch.zeros(2, 3, 4),
            "gt_labels": torch.zeros(2, 3).long(),
            "objectness": torch.randn(2, 6),
        },
        "assign_task_aligned": {
            "pred_scores": torch.rand(2, 6, 4),
            "pred_boxes": torch.zeros(2, 6, 4),
            "points": torch.zeros(6, 2),
            "gt_boxes": torch.zeros(2, 3, 4),
            "gt_labels": torch.zeros(2, 3).long(),
        },
        "batched_nms": {"boxes": boxes, "scores": scores, "idxs": indices, "iou_threshold": 0.5},
        **{f"{kind}box_iou": pairs for kind in IOU_KINDS},
        **{f"{kind}box_iou_loss": pairs for kind in IOU_KINDS},
        "class_index_targets": {
            "matches": indices.view(2, 3),
            "gt_labels": indices.view(2, 3),
            "num_classes": 5,
        },
        "count_degenerate_boxes": {"gt_boxes": torch.zeros(2, 3, 4)},
        "decode_boxes": {"deltas": boxes, "anchors": boxes},
        "decode_distances": {
            "levels": [torch.zeros(2, 12, 3, 5), torch.zeros(2, 12, 2, 2)],
            "points": torch.zeros(19, 2),
            "strides": (8.0, 16.0),
            "bins": 3,
        },
        "dense_box_loss": head_of_boxes,
        "dense_box_loss, distance": {
            "deltas": [torch.zeros(2, 12, 3, 5), torch.zeros(2, 12, 2, 2)],
            "anchors": torch.ones(19, 2),
            "gt_boxes": torch.zeros(2, 3, 4),
            "matches": torch.zeros(2, 19).long() - 1,
            "loss": "giou",
            "coding": "distance",
            "strides": (8.0, 16.0),
            "bins": 3,
        },
        "dense_equalized_focal_loss": head_of_classes | {"gamma": torch.ones(5)},
        "dense_focal_loss": head_of_classes,
        "dense_quality_loss": head_of_classes | {"scores": torch.zeros(2, 57)},
        "detect": {
            "cls_logits": [torch.zeros(2, 15, 3, 5), torch.zeros(2, 15, 2, 2)],
            "box_deltas": [torch.zeros(2, 12, 3, 5), torch.zeros(2, 12, 2, 2)],
            "anchors": torch.zeros(57, 4),
        },
        "detect, score_factors": {
            "cls_logits": [torch.zeros(2, 15, 3, 5), torch.zeros(2, 15, 2, 2)],
            "box_deltas": [torch.zeros(2, 12, 3, 5), torch.zeros(2, 12, 2, 2)],
            "anchors": torch.zeros(57, 4),
            "score_factors": [torch.zeros(2, 3, 3, 5), torch.zeros(2, 3, 2, 2)],
            "combine": "sqrt",
        },
        "distribution_focal_loss": {"inputs": torch.zeros(6, 5), "targets": scores},
        "encode_boxes": {"boxes": boxes, "anchors": boxes},
        "encode_distances": {"points": boxes[:, :2], "boxes": boxes},
        "fuse_features": {
            "features": [torch.zeros(2, 3, 4, 6), torch.zeros(2, 3, 2, 3)],
            "weights": torch.ones(2),
        },
        "matched_iou": head_of_boxes,
        "match_anchors": {"anchors": boxes, "gt_boxes": torch.zeros(2, 3, 4)},
        "match_iou_matrix": {"iou": boxes},
        "multiclass_nms": {
            "boxes": torch.zeros(2, 3, 4),
            "scores": torch.zeros(2, 3),
            "labels": indices.view(2, 3),
            "iou_threshold": 0.5,
        },
        "nms": {"boxes": boxes, "scores": scores, "iou_threshold": 0.5},
        "nms_match": {"boxes": boxes, "scores": scores, "iou_threshold": 0.5},
        "matrix_nms": {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3)},
        "soft_nms": {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3)},
        "sigmoid_focal_loss": focal,
        "sigmoid_focal_loss, sum": {**focal, "reduction": "sum"},
        **{
            op: {
                "inputs": torch.zeros(6, 5),
                "targets": (indices, scores),
                "reduction": "sum",
            }
            for op in ROW_LOSSES
        },
        "softmax_focal_loss": {**focal, "reduction": "sum"},
        "sigmoid_focal_loss_star": focal,
    }


FLOATING = "float16, bfloat16, float32 or float64"
ELSEWHERE = "must be on cpu like {}, got meta"


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def to_float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


def to_bool(tensor: Tensor) -> Tensor:
    return tensor.bool()


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def nms_of(boxes: str, shape: str) -> list[tuple[str, Callable, str]]:
    """What all kinds of NMS say, of boxes of this form and scores of this shape."""
    return [
        ("boxes", Tensor.long, f"boxes must be {FLOATING}, got torch.int64"),
        ("boxes", lambda b: b[..., :3], f"boxes must have shape {boxes}, got "),
        ("boxes", lambda b: b[0], f"boxes must have shape {boxes}, got "),
        ("scores", Tensor.long, f"scores must be {FLOATING}, got torch.int64"),
        ("scores", to_float8, f"scores must be {FLOATING}, got torch.float8_e4m3fn"),
        ("scores", lambda s: s[..., 1:], f"scores must have shape {shape}, one for each box, got "),
        ("scores", lambda s: s[..., None], f"scores must have shape {shape}, one for each box, got "),
        ("scores", elsewhere, "scores " + ELSEWHERE.format("boxes")),
        ("overlap", always("giou"), "overlap must be 'iou' or 'diou', got 'giou'"),
    ]  # fmt: skip


DECAYING_NMS = [
    ("boxes", Tensor.long, "boxes must be float32 or float64, got torch.int64"),
    ("boxes", lambda b: b[0], "boxes must have shape (B, N, 4), got (3, 4)"),
    ("scores", Tensor.long, "scores must be torch.float32 like boxes, got torch.int64"),
    ("scores", lambda s: s[:, 1:], "scores must have shape (2, 3), one for each box, got (2, 2)"),
    ("scores", elsewhere, "scores " + ELSEWHERE.format("boxes")),
    ("labels", always(torch.zeros(2, 3)), "labels must be int32 or int64, got torch.float32"),
    ("labels", always(torch.zeros(3).long()), "labels must have shape (2, 3), one for each box, got (3,)"),
    ("max_detections", always(-1), "max_detections must be >= 0, got -1"),
    ("method", always("hard"), "method must be 'linear' or 'gaussian', got 'hard'"),
    ("sigma", always(0), "sigma must be > 0, got 0"),
]  # fmt: skip


def focal_of(inputs: str) -> list[tuple[str, Callable, str]]:
    return [
        (inputs, Tensor.long, f"{inputs} must be {FLOATING}, got torch.int64"),
        ("targets", lambda t: t[:3], f"targets must have the shape of {inputs}, (6, 5), or that shape without its last dimension, got (3,)"),
        ("targets", lambda t: t[:, None], f"targets must have the shape of {inputs}, (6, 5), or that shape without its last dimension, got (6, 1)"),
        ("targets", Tensor.float, "class-index targets must be int32 or int64, got torch.float32"),
        ("targets", lambda _: torch.zeros(6, 5, requires_grad=True), "targets must not require grad"),
        ("targets", elsewhere, "targets " + ELSEWHERE.format(inputs)),
        ("reduction", always("avg"), "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ("normalizer", always(2), "normalizer must be None unless reduction is 'sum', got reduction 'none'"),
        ("inplace_backward", always(True), "inplace_backward needs reduction 'sum' or 'mean', got 'none'"),
    ]  # fmt: skip


TOO_LARGE_ALPHA = "alpha must lie in [0, 1], or be negative for none, got "


def numbers_of(*more: str) -> list[tuple[str, Callable, str]]:
    """What is said of the numbers of a loss that balances by alpha."""
    return [
        ("alpha", always(1.5), f"{TOO_LARGE_ALPHA}1.5"),
        ("alpha", always(math.nan), f"{TOO_LARGE_ALPHA}nan"),
        *numbers_that_the_host_needs("alpha", "gamma", *more),
    ]


def numbers_that_the_host_needs(*names: str) -> list[tuple[str, Callable, str]]:
    return [
        case
        for name in names
        for case in (
            (name, always("2"), f"{name} must be a number, got str"),
            (name, always(None), f"{name} must be a number, got NoneType"),
            (name, always(torch.ones(2)), f"{name} must be a number or a 0-d CPU tensor, got shape (2,) on "),
            (name, always(torch.ones((), device="meta")), f"{name} must be a number or a 0-d CPU tensor, got shape () on meta"),
        )
    ]  # fmt: skip


def weights_of(weight: str, shape: str, by_part: bool = True) -> list[tuple[str, Callable, str]]:
    dtype = "float32 (float64 for float64 logits)"
    classes = "(5,) or (3, 5)" if by_part else "(5,)"
    return [
        (weight, always(torch.ones(3)), f"weight must have the shape of {shape}, and be {dtype}, got (3,) and torch.float32"),
        ("class_weight", always(torch.ones(4)), f"class_weight must have shape {classes} and be {dtype}, got (4,) and torch.float32"),
    ]  # fmt: skip


def row_loss_of(exponent: str) -> list[tuple[str, Callable, str]]:
    shape = "must have the shape of inputs, (6, 5), without its last dimension"
    return [
        ("inputs", Tensor.long, f"inputs must be {FLOATING}, got torch.int64"),
        ("inputs", to_float8, f"inputs must be {FLOATING}, got torch.float8_e4m3fn"),
        ("targets", lambda t: (t[0][:3], t[1]), f"class-index targets {shape}, got (3,)"),
        ("targets", lambda t: (t[0].float(), t[1]), "class-index targets must be int32 or int64, got torch.float32"),
        ("targets", lambda t: (t[0], t[1][:3]), "scores must have the shape of targets, (6,), and be float32 (float64 for float64 logits), got (3,) and torch.float32"),
        ("targets", lambda t: (t[0], torch.zeros(6, requires_grad=True)), "scores must not require grad"),
        ("targets", always(None), "targets must be (labels, scores)"),
        ("targets", lambda t: t[:1], ", got 1 of them"),
        ("inputs", lambda x: x[0, 0], "inputs must have shape (..., K), got ()"),
        *numbers_that_the_host_needs(exponent),
        (exponent, always(-1), f"{exponent} must be >= 0, got -1"),
        ("reduction", always("avg"), "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ("normalizer", always(torch.ones(2)), "normalizer must be a number or a 0-d tensor, got a tensor of shape (2,)"),
        *weights_of("weight", "targets, (6,)"),
    ]  # fmt: skip


HEAD_OF_BOXES = [
    ("deltas", always([]), "deltas must be 1 to 8 levels, got 0"),
    ("deltas", lambda d: [d[0].long(), d[1]], f"deltas[0] must be {FLOATING}, got torch.int64"),
    ("deltas", lambda d: [d[0], d[1].double()], "deltas[1] must be torch.float32 like deltas[0], got torch.float64"),
    ("deltas", lambda d: [d[0], d[1][:, 1:]], "deltas[1] must have shape (B, A * 4, H, W), B and A the same in all levels, got (2, 11, 2, 2)"),
    ("deltas", always([torch.zeros(1).expand(1, 2**15, 2**8, 2**8)]), "deltas[0] must have fewer than 2^31 deltas an image, got 2147483648"),
    ("deltas", lambda d: [d[0], elsewhere(d[1])], "deltas[1] " + ELSEWHERE.format("deltas[0]")),
    ("anchors", lambda a: a[1:], "anchors must have shape (57, 4), one for every 4 channels at each position, got (56, 4)"),
    ("gt_boxes", lambda g: g[:1], "gt_boxes must be a list of 2 (M_i, 4) or have shape (2, M, 4), got (1, 3, 4)"),
    ("gt_boxes", lambda g: [g[0], g[0, 0]], "gt_boxes[1] must have shape (M, 4), got (4,)"),
    ("matches", Tensor.float, "matches must be torch.int64 of shape (2, 57), got torch.float32 of shape (2, 57)"),
    ("matches", lambda m: m[:, 1:], "matches must be torch.int64 of shape (2, 57), got torch.int64 of shape (2, 56)"),
    ("matches", elsewhere, "matches " + ELSEWHERE.format("deltas[0]")),
    ("weights", always((1, 1)), "weights must be 4 numbers, got 2"),
]  # fmt: skip


HEAD_OF_CLASSES = [
    ("cls_logits", always([]), "cls_logits must be 1 to 8 levels, got 0"),
    ("cls_logits", lambda c: c[:1] * 9, "cls_logits must be 1 to 8 levels, got 9"),
    ("cls_logits", lambda c: [c[0].long(), c[1]], f"cls_logits[0] must be {FLOATING}, got torch.int64"),
    ("cls_logits", lambda c: [c[0], c[1].double()], "cls_logits[1] must be torch.float32 like cls_logits[0], got torch.float64"),
    ("cls_logits", lambda c: [c[0], c[1][0]], "cls_logits[1] must have shape (B, A * K, H, W), B and A * K the same in all levels, got (15, 2, 2)"),
    ("cls_logits", lambda c: [c[0], c[1][:, 1:]], "cls_logits[1] must have shape (B, A * K, H, W), B and A * K the same in all levels, got (2, 14, 2, 2)"),
    ("cls_logits", always([torch.zeros(1).expand(1, 2**15, 2**8, 2**8)]), "cls_logits[0] must have fewer than 2^31 logits an image, got 2147483648"),
    ("cls_logits", lambda c: [c[0], elsewhere(c[1])], "cls_logits[1] " + ELSEWHERE.format("cls_logits[0]")),
    ("labels", Tensor.float, "labels must be int32 or int64, got torch.float32"),
    ("labels", lambda x: x[:1], "labels must have shape (2, A * 19), A anchors at each position of the levels, got (1, 57)"),
    ("labels", lambda x: x[:, 1:], "labels must have shape (2, A * 19), A anchors at each position of the levels, got (2, 56)"),
    ("labels", lambda x: x[:, :38], "cls_logits must have A * K channels, A = 2 by the shape of labels, got 15"),
    ("labels", elsewhere, "labels " + ELSEWHERE.format("cls_logits[0]")),
    ("normalizer", always(torch.ones(3)), "normalizer must be a number, a 0-d tensor or a tensor of shape (2,), got a tensor of shape (3,)"),
    ("normalizer", lambda _: torch.ones(2, requires_grad=True), "normalizer must not require grad"),
    *weights_of("weight", "labels, (2, 57)"),
    ("reduction", always("mean"), "reduction must be 'none' or 'sum', got 'mean'"),
]  # fmt: skip


# Of each op: argument, what is made of a right one, the sentence.
WRONG: dict[str, list[tuple[str, Callable, str]]] = {
    "batched_nms": [
        *nms_of("(N, 4)", "(6,)"),
        ("idxs", lambda i: i.to(torch.complex64), "idxs must be real numbers, got torch.complex64"),
        ("idxs", lambda i: i[:2], "idxs must have shape (6,), one for each box, got (2,)"),
        ("idxs", elsewhere, "idxs " + ELSEWHERE.format("boxes")),
    ],
    **{
        f"{kind}box_iou": [
            ("boxes1", lambda b: b[:, :3], "boxes1 must have shape (..., N, 4), got (6, 3)"),
            ("boxes1", lambda b: b[0, 0], "boxes1 must have shape (..., N, 4), got ()"),
            ("boxes1", to_bool, "boxes1 must be float32 or float64, got torch.bool"),
            ("boxes2", to_bool, "boxes2 must be torch.float32 like boxes1, got torch.bool"),
            ("boxes2", lambda b: b[0], "boxes2 must have shape (..., M, 4), a batch that broadcasts with that of boxes1, (6, 4), got (4,)"),
            ("boxes2", lambda b: b[0, 0], "boxes2 must have shape (..., M, 4), a batch that broadcasts with that of boxes1, (6, 4), got ()"),
            ("boxes2", elsewhere, "boxes2 " + ELSEWHERE.format("boxes1")),
            *([] if kind else [
                ("fmt", always("xywhr"), "fmt must be one of 'xyxy', 'xywh', 'cxcywh', got 'xywhr'"),
                ("mode", always("giou"), "mode must be 'iou' or 'iof', got 'giou'"),
            ]),
        ]
        for kind in IOU_KINDS
    },
    **{
        f"{kind}box_iou_loss": [
            ("boxes1", lambda b: b[:, :3], "boxes1 must have shape (..., 4), got (6, 3)"),
            ("boxes1", to_bool, "boxes1 must be float32 or float64, got torch.bool"),
            ("boxes2", to_bool, "boxes2 must be torch.float32 like boxes1, got torch.bool"),
            ("boxes2", lambda b: b[:5], "boxes2 must have a shape that broadcasts with that of boxes1, (6, 4), got (5, 4)"),
            ("boxes2", lambda b: b[0, 0], "boxes2 must have a shape that broadcasts with that of boxes1, (6, 4), got ()"),
            ("boxes2", elsewhere, "boxes2 " + ELSEWHERE.format("boxes1")),
            ("reduction", always("avg"), "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ]
        for kind in IOU_KINDS
    },
    "class_index_targets": [
        ("matches", Tensor.int, "matches must be torch.int64 of shape (B, A), got torch.int32 of shape (2, 3)"),
        ("matches", lambda m: m[0, 0], "matches must be torch.int64 of shape (B, A), got torch.int64 of shape ()"),
        ("gt_labels", Tensor.float, "gt_labels must be integers, got torch.float32"),
        ("gt_labels", lambda x: [x[0], x[1].bool()], "gt_labels[1] must be integers, got torch.bool"),
        ("gt_labels", lambda x: [x[0], x[1, 0]], "gt_labels[1] must have shape (M,), got ()"),
        ("gt_labels", elsewhere, "gt_labels " + ELSEWHERE.format("matches")),
        ("gt_labels", lambda x: [x[0]], "gt_labels must have one entry for each of the 2 images, got 1"),
        ("gt_labels", lambda x: x[0], "gt_labels must be a list of (M_i,) or have shape (2, M), got (3,)"),
    ],
    "count_degenerate_boxes": [
        ("gt_boxes", lambda g: [g[0], g[0, 0]], "gt_boxes[1] must have shape (M, 4), got (4,)"),
        ("gt_boxes", lambda g: g[0], "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got (3, 4)"),
        ("image_sizes", always(torch.ones(3, 2)), "image_sizes must have shape (2, 2), one for each image, got (3, 2)"),
        ("image_sizes", always([(3, 4), (5,)]), "image_sizes must be a Tensor or pairs of numbers, height and width of each image, got [(3, 4), (5,)]"),
        ("counts", always(torch.ones(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("counts", always(torch.ones(2)), "counts must be int32 or int64, got torch.float32"),
    ],
    "decode_boxes": [
        ("deltas", to_bool, f"deltas must be {FLOATING}, got torch.bool"),
        ("deltas", lambda d: d[:, :2], "deltas must have shape (..., 4), got (6, 2)"),
        ("anchors", lambda a: a[:, :2], "anchors must have shape (..., 4), got (6, 2)"),
        ("anchors", lambda a: a[:3], "anchors must have a shape that broadcasts with that of deltas, (6, 4), got (3, 4)"),
        ("anchors", to_bool, "anchors must be float32 (float64 for float64 deltas), got torch.bool"),
        ("anchors", elsewhere, "anchors " + ELSEWHERE.format("deltas")),
        ("weights", always((1,)), "weights must be 4 numbers, got 1"),
        ("image_size", always((3, 4, 5)), "image_size must be 2 numbers, height and width, got 3"),
        ("image_size", always(5), "image_size must be 2 numbers, height and width, got 5"),
        ("image_size", always(torch.ones(3, 2)), "image_size must be 2 numbers, height and width, or have shape (6, 2), those of each image, got shape (3, 2)"),
        ("ctr_clamp", always(-1), "ctr_clamp must be >= 0, got -1"),
    ],
    "decode_distances": [
        ("levels", always([]), "levels must be 1 to 8 levels, got 0"),
        ("levels", lambda x: [x[0].long(), x[1]], f"levels[0] must be {FLOATING}, got torch.int64"),
        ("levels", lambda x: [x[0], x[1].double()], "levels[1] must be torch.float32 like levels[0], got torch.float64"),
        ("levels", lambda x: [x[0], x[1][:, 1:]], "levels[1] must have shape (B, 4 * bins, H, W), B and bins the same in all levels, got (2, 11, 2, 2)"),
        ("levels", lambda x: [x[0], x[1][0]], "levels[1] must have shape (B, 4 * bins, H, W), B and bins the same in all levels, got (12, 2, 2)"),
        ("levels", lambda x: [level[:, :8] for level in x], "levels must have 4 channels for each of 3 bins, got 8"),
        ("levels", always([torch.zeros(1).expand(1, 2**15, 2**8, 2**8)]), "levels[0] must have fewer than 2^31 logits an image, got 2147483648"),
        ("levels", lambda x: [x[0], elsewhere(x[1])], "levels[1] " + ELSEWHERE.format("levels[0]")),
        ("points", lambda p: p[1:], "points must have shape (19, 2), one for each position of the levels, got (18, 2)"),
        ("points", to_bool, "points must be float32 (float64 for float64 levels), got torch.bool"),
        ("points", elsewhere, "points " + ELSEWHERE.format("levels[0]")),
        ("points", lambda p: p.clone().requires_grad_(), "points must not require grad"),
        ("strides", always([8.0]), "strides must be 2 numbers, one for each level, got 1"),
        ("strides", always(8), "strides must be numbers, one for each level, got 8"),
        ("bins", always(0), "bins must be >= 1, got 0"),
        ("bins", always(16), "levels must have 4 channels for each of 16 bins, got 12"),
        ("image_sizes", always(torch.ones(3, 2)), "image_sizes must have shape (2, 2), height and width of each image, got (3, 2)"),
        ("image_sizes", lambda _: elsewhere(torch.ones(2, 2)), "image_sizes " + ELSEWHERE.format("levels[0]")),
        ("image_sizes", lambda _: torch.ones(2, 2, requires_grad=True), "image_sizes must not require grad"),
    ],
    "dense_box_loss": [
        *HEAD_OF_BOXES,
        ("anchors", lambda a: a.clone().requires_grad_(), "anchors must not require grad"),
        ("loss", always("l2"), "loss must be one of 'l1', 'smooth_l1', 'iou', 'giou', 'diou', 'ciou', got 'l2'"),
        ("beta", always(-1), "beta must be >= 0, got -1"),
        ("normalizer", always(torch.ones(3)), "normalizer must be a number, a 0-d tensor or a tensor of shape (2,), got a tensor of shape (3,)"),
        ("gt_boxes", lambda g: g.clone().requires_grad_(), "gt_boxes must not require grad"),
        ("normalizer", lambda _: torch.ones(2, requires_grad=True), "normalizer must not require grad"),
        ("reduction", always("mean"), "reduction must be 'none' or 'sum', got 'mean'"),
        ("weight", always(torch.ones(3)), "weight must have the shape of matches, (2, 57), and be float32 (float64 for float64 deltas), got (3,) and torch.float32"),
        ("weight", lambda _: elsewhere(torch.ones(2, 57)), "weight " + ELSEWHERE.format("matches")),
        ("coding", always("xyxy"), "coding must be 'deltas' or 'distance', got 'xyxy'"),
        ("strides", always([8.0, 16.0]), "strides must be None unless coding is 'distance', got [8.0, 16.0]"),
        ("bins", always(3), "bins must be 1 unless coding is 'distance', got 3"),
        ("dfl_weight", always(0.2), "dfl_weight must be 0 unless coding is 'distance', got 0.2"),
    ],
    "dense_box_loss, distance": [
        ("deltas", always([]), "deltas must be 1 to 8 levels, got 0"),
        ("deltas", lambda d: [d[0].long(), d[1]], f"deltas[0] must be {FLOATING}, got torch.int64"),
        ("deltas", lambda d: [d[0], d[1][:, 1:]], "deltas[1] must have shape (B, 4 * bins, H, W), B and bins the same in all levels, got (2, 11, 2, 2)"),
        ("deltas", lambda d: [d[0], elsewhere(d[1])], "deltas[1] " + ELSEWHERE.format("deltas[0]")),
        ("bins", always(16), "deltas must have 4 channels for each of 16 bins, got 12"),
        ("bins", always(0), "bins must be >= 1, got 0"),
        ("anchors", lambda a: a[1:], "anchors must have shape (19, 2), one for each position of the levels, got (18, 2)"),
        ("anchors", to_bool, "anchors must be float32 (float64 for float64 deltas), got torch.bool"),
        ("strides", always([8.0]), "strides must be 2 numbers, one for each level, got 1"),
        ("strides", always(None), "strides must be 2 numbers, one for each level, got 0"),
        ("gt_boxes", lambda g: g[:1], "gt_boxes must be a list of 2 (M_i, 4) or have shape (2, M, 4), got (1, 3, 4)"),
        ("matches", lambda m: m[:, 1:], "matches must be torch.int64 of shape (2, 19), got torch.int64 of shape (2, 18)"),
        ("matches", elsewhere, "matches " + ELSEWHERE.format("deltas[0]")),
        ("loss", always("l1"), "loss must be one of 'iou', 'giou', 'diou', 'ciou', got 'l1'"),
        ("dfl_weight", always(-1), "dfl_weight must be >= 0, got -1"),
        ("weight", always(torch.ones(3)), "weight must have the shape of matches, (2, 19), and be float32 (float64 for float64 deltas), got (3,) and torch.float32"),
        ("normalizer", always(torch.ones(3)), "normalizer must be a number, a 0-d tensor or a tensor of shape (2,), got a tensor of shape (3,)"),
    ],
    "dense_equalized_focal_loss": [
        *(case for case in HEAD_OF_CLASSES if case[0] != "reduction"),
        ("weight", lambda _: torch.ones(2, 57, requires_grad=True), "weight must not require grad"),
        ("alpha", always(1.5), "alpha must lie in [0, 1], or be negative for none, got 1.5"),
        ("gamma", lambda g: g[:3], "gamma must have shape (5,) and be float32 (float64 for float64 logits), got (3,) and torch.float32"),
        ("gamma", lambda g: g[None], "gamma must have shape (5,) and be float32 (float64 for float64 logits), got (1, 5) and torch.float32"),
        ("gamma", elsewhere, "gamma " + ELSEWHERE.format("the logits")),
        ("gamma", lambda g: g.clone().requires_grad_(), "gamma must not require grad"),
        *numbers_that_the_host_needs("min_normalizer"),
    ],
    "dense_focal_loss": [
        *HEAD_OF_CLASSES,
        ("gamma", always(-1), "gamma must be >= 0, got -1"),
        ("gamma", always(math.nan), "gamma must be >= 0, got nan"),
        ("label_smoothing", always(1.5), "label_smoothing must lie in [0, 1], got 1.5"),
        *numbers_of("label_smoothing", "min_normalizer"),
    ],
    "dense_quality_loss": [
        *HEAD_OF_CLASSES,
        ("scores", lambda s: s[:1], "scores must have the shape of labels, (2, 57), and be float32 (float64 for float64 logits), got (1, 57) and torch.float32"),
        ("scores", elsewhere, "scores " + ELSEWHERE.format("labels")),
        ("scores", lambda s: s.clone().requires_grad_(), "scores must not require grad"),
        ("beta", always(-1), "beta must be >= 0, got -1"),
        ("loss", always("focal"), "loss must be one of 'soft_focal_loss', 'quality_focal_loss', 'varifocal_loss', 'matchability_aware_loss', 'ia_bce_loss', got 'focal'"),
        *numbers_that_the_host_needs("beta", "min_normalizer"),
    ],
    "detect": [
        ("cls_logits", always([]), "cls_logits must be 1 to 8 levels, got 0"),
        ("cls_logits", lambda c: [c[0].long(), c[1]], f"cls_logits[0] must be {FLOATING}, got torch.int64"),
        ("cls_logits", lambda c: [c[0], c[1].double()], "cls_logits[1] must be torch.float32 like cls_logits[0], got torch.float64"),
        ("cls_logits", lambda c: [c[0], c[1][:, 1:]], "cls_logits[1] must have shape (B, A * K, H, W), B and A * K the same in all levels, H and W those of the level, got (2, 14, 2, 2)"),
        ("cls_logits", lambda c: [x[:, :14] for x in c], "cls_logits and box_deltas must have A * K and A * 4 channels, got 14 and 12"),
        ("box_deltas", lambda d: d[:1], "box_deltas must be 2 levels like cls_logits, got 1"),
        ("box_deltas", lambda d: [d[0], d[1].double()], "box_deltas[1] must be torch.float32 like cls_logits[0], got torch.float64"),
        ("box_deltas", lambda d: [d[0], d[1][:, :, :1]], "box_deltas[1] must have shape (B, A * 4, H, W), B and A * 4 the same in all levels, H and W those of the level, got (2, 12, 1, 2)"),
        ("box_deltas", lambda d: [d[0], elsewhere(d[1])], "box_deltas[1] " + ELSEWHERE.format("cls_logits[0]")),
        ("anchors", lambda a: a[1:], "anchors must have shape (57, 4), 3 at each position of the levels, got (56, 4)"),
        ("anchors", elsewhere, "anchors " + ELSEWHERE.format("cls_logits[0]")),
        ("image_sizes", always(torch.ones(3, 2)), "image_sizes must have shape (2, 2), height and width of each image, got (3, 2)"),
        ("topk", always(0), "topk must be >= 1, or None for no limit, got 0"),
        ("method", always("soft"), "method must be one of 'hard', 'linear', 'gaussian', got 'soft'"),
        ("sigma", always(0), "sigma must be > 0, got 0"),
        ("sigma", always(math.nan), "sigma must be > 0, got nan"),
        ("weights", always((1, 1)), "weights must be 4 numbers, got 2"),
        ("topk_per_level", always(0), "topk_per_level must be >= 1, got 0"),
        ("overlap", always("giou"), "overlap must be 'iou' or 'diou', got 'giou'"),
        ("max_detections", always(-1), "max_detections must be >= 0, got -1"),
        ("coding", always("bins"), "coding must be 'deltas' or 'distance', got 'bins'"),
        ("coding", always("distance"), "strides must be numbers, one for each level, with coding 'distance', got none"),
        ("strides", always([8.0]), "strides must be None unless coding is 'distance', got [8.0]"),
        ("bins", always(4), "bins must be 1 unless coding is 'distance', got 4"),
        ("combine", always("sum"), "combine must be 'product' or 'sqrt', got 'sum'"),
        ("combine", always("sqrt"), "combine must be 'product' unless there are score_factors, got 'sqrt'"),
    ],
    "detect, score_factors": [
        ("score_factors", always([]), "score_factors must be 1 to 8 levels, got 0"),
        ("score_factors", lambda f: f[:1], "score_factors must be 2 levels like cls_logits, got 1"),
        ("score_factors", lambda f: [f[0], f[1].double()], "score_factors[1] must be torch.float32 like cls_logits[0], got torch.float64"),
        ("score_factors", lambda f: [f[0], elsewhere(f[1])], "score_factors[1] " + ELSEWHERE.format("cls_logits[0]")),
        ("score_factors", lambda f: [f[0], f[1][:, 1:]], "score_factors[1] must have shape (B, A, H, W), B and A the same in all levels, H and W those of the level, got (2, 2, 2, 2)"),
        ("score_factors", lambda f: [f[0][..., 1:], f[1]], "score_factors[0] must have shape (B, A, H, W), B and A the same in all levels, H and W those of the level, got (2, 3, 3, 4)"),
        ("score_factors", lambda f: [x[:, :1] for x in f], "score_factors must have a channel for each of 3 anchors, got 1"),
        ("score_factors", always(None), "combine must be 'product' unless there are score_factors, got 'sqrt'"),
    ],
    "distribution_focal_loss": [
        ("inputs", Tensor.long, f"inputs must be {FLOATING}, got torch.int64"),
        ("inputs", lambda x: x[:, :1], "inputs must have shape (..., bins), 2 bins at least and fewer than 2^30, got (6, 1)"),
        ("inputs", lambda x: x[0, 0], "inputs must have shape (..., bins), 2 bins at least and fewer than 2^30, got ()"),
        ("targets", lambda t: t[1:], "targets must have the shape of inputs, (6, 5), without its last dimension, got (5,)"),
        ("targets", to_bool, "targets must be float32 (float64 for float64 inputs), got torch.bool"),
        ("targets", elsewhere, "targets " + ELSEWHERE.format("inputs")),
        ("targets", lambda t: t.clone().requires_grad_(), "targets must not require grad"),
        ("weight", always(torch.ones(3)), "weight must have the shape of targets, (6,), and be float32 (float64 for float64 inputs), got (3,) and torch.float32"),
        ("weight", lambda _: elsewhere(torch.ones(6)), "weight " + ELSEWHERE.format("targets")),
        ("reduction", always("avg"), "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ("normalizer", always(2), "normalizer must be None unless reduction is 'sum', got reduction 'none'"),
    ],
    "encode_distances": [
        ("points", lambda p: p[:, :1], "points must have shape (..., 2), got (6, 1)"),
        ("points", to_bool, "points must be float32 or float64, got torch.bool"),
        ("boxes", lambda b: b[:, :3], "boxes must have shape (..., 4), got (6, 3)"),
        ("boxes", lambda b: b[:5], "boxes must have a shape that but for the last dimension broadcasts with that of points, (6, 2), got (5, 4)"),
        ("boxes", to_bool, "boxes must be torch.float32 like points, got torch.bool"),
        ("boxes", elsewhere, "boxes " + ELSEWHERE.format("points")),
        ("max_distance", always(-1), "max_distance must be >= 0, got -1"),
    ],
    "encode_boxes": [
        ("boxes", to_bool, "boxes must be float32 or float64, got torch.bool"),
        ("boxes", lambda b: b[:, :3], "boxes must have shape (..., 4), got (6, 3)"),
        ("anchors", lambda a: a[:, :1], "anchors must have shape (..., 4), got (6, 1)"),
        ("anchors", lambda a: a[:3], "anchors must have a shape that broadcasts with that of boxes, (6, 4), got (3, 4)"),
        ("anchors", to_bool, "anchors must be torch.float32 like boxes, got torch.bool"),
        ("anchors", elsewhere, "anchors " + ELSEWHERE.format("boxes")),
        ("weights", always((1, 1)), "weights must be 4 numbers, got 2"),
    ],
    "fuse_features": [
        ("features", always([]), "features must be 1 to 8 maps, got 0"),
        ("features", lambda f: f * 5, "features must be 1 to 8 maps, got 10"),
        ("features", lambda f: [f[0].long(), f[1]], f"features[0] must be {FLOATING}, got torch.int64"),
        ("features", lambda f: [f[0], f[1].double()], "features[1] must be torch.float32 like features[0], got torch.float64"),
        ("features", lambda f: [f[0], elsewhere(f[1])], "features[1] " + ELSEWHERE.format("features[0]")),
        ("features", lambda f: [f[0], f[1][:, 1:]], "features[1] must have shape (B, C, H, W), B and C the same in all maps, got (2, 2, 2, 3)"),
        ("features", lambda f: [f[0][0], f[1]], "features[0] must have shape (B, C, H, W), B and C the same in all maps, got (3, 4, 6)"),
        ("features", lambda f: [f[0], torch.zeros(2, 3, 9, 12)], "features[1] must have the height and width of features[0], 4 x 6, twice as much or less, got 9 x 12"),
        ("features", lambda f: [f[0], f[1][:, :, :0]], "features[1] must have the height and width of features[0], 4 x 6, twice as much or less, got 0 x 3"),
        ("weights", always(None), "weights must be one number for each map unless mode='sum'"),
        ("weights", lambda w: w[:1], "weights must have shape (2,), one for each map, got (1,)"),
        ("weights", Tensor.long, "weights must be float32 (float64 for float64 maps), got torch.int64"),
        ("weights", elsewhere, "weights " + ELSEWHERE.format("features[0]")),
        ("mode", always("sum"), "weights must be None with mode='sum'"),
        ("mode", always("slow"), "mode must be one of 'fast', 'softmax', 'sum', 'unbounded', got 'slow'"),
        ("activation", always("gelu"), "activation must be 'silu' or 'relu6', got 'gelu'"),
        ("padding", always("valid"), "padding must be 'same' or 'symmetric', got 'valid'"),
    ],
    "assign_atss": [
        ("anchors", lambda a: a[:, :2], "anchors must have shape (N, 4), got (6, 2)"),
        ("anchors", to_bool, "anchors must be float32 or float64, got torch.bool"),
        ("level_sizes", always([]), "level_sizes must be 1 to 8 levels, got 0"),
        ("level_sizes", always([4, 1]), "level_sizes must add up to the number of anchors, 6, got 5"),
        ("level_sizes", always([8, -2]), "level_sizes must lie in [0, 6], the number of anchors, got 8"),
        ("level_sizes", always(6), "level_sizes must be integers, one for each level, got 6"),
        ("gt_boxes", to_bool, "gt_boxes must be torch.float32 like anchors, got torch.bool"),
        ("gt_boxes", lambda g: [g[0], g[0, 0]], "gt_boxes[1] must have shape (M, 4), got (4,)"),
        ("gt_boxes", elsewhere, "gt_boxes " + ELSEWHERE.format("anchors")),
        ("topk", always(0), "topk must lie in [1, 128], got 0"),
        ("topk", always(129), "topk must lie in [1, 128], got 129"),
        ("counts", always(torch.ones(2)), "counts must be int32 or int64, got torch.float32"),
        ("rule", always("mmdet"), "rule must be 'atss' or 'mmyolo', got 'mmdet'"),
        ("crowd", always(torch.zeros(2, 3)), "crowd must be torch.bool of shape (2, 3), got torch.float32 of shape (2, 3)"),
        ("at_least_one", always(1), "at_least_one must be True or False, got int"),
    ],
    "assign_fcos": [
        ("points", lambda p: p[:, :1], "points must have shape (N, 2), got (6, 1)"),
        ("points", to_bool, "points must be float32 or float64, got torch.bool"),
        ("strides", always([8.0]), "strides must be 2 numbers, one for each level, got 1"),
        ("strides", always(8), "strides must be numbers, one for each level, got 8"),
        ("level_sizes", always([]), "level_sizes must be 1 to 8 levels, got 0"),
        ("level_sizes", always([4, 1]), "level_sizes must add up to the number of points, 6, got 5"),
        ("level_sizes", always([8, -2]), "level_sizes must lie in [0, 6], the number of points, got 8"),
        ("level_sizes", always([4, 2.0]), "level_sizes[1] must be an integer, got float"),
        ("level_sizes", always(6), "level_sizes must be integers, one for each level, got 6"),
        ("gt_boxes", to_bool, "gt_boxes must be torch.float32 like points, got torch.bool"),
        ("gt_boxes", lambda g: g[0], "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got (3, 4)"),
        ("gt_boxes", elsewhere, "gt_boxes " + ELSEWHERE.format("points")),
        ("counts", always(torch.ones(2)), "counts must be int32 or int64, got torch.float32"),
        ("counts", always(torch.ones(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("rule", always("mmcv"), "rule must be 'torchvision' or 'mmdet', got 'mmcv'"),
        ("center_radius", always(-1), "center_radius must be >= 0, got -1"),
        ("ranges", always([(0, 64)]), "ranges must be 2 pairs of numbers, one for each level, got 1"),
        ("ranges", always([(0, 64), 3]), "ranges must be pairs of numbers, one for each level, got [(0, 64), 3]"),
        ("crowd", always(torch.zeros(2, 3)), "crowd must be torch.bool of shape (2, 3), got torch.float32 of shape (2, 3)"),
    ],
    "assign_simota": [
        ("cls_logits", lambda s: s[:1], "cls_logits must have shape (2, 6, K), got (1, 6, 4)"),
        ("cls_logits", to_bool, "cls_logits must be float16, bfloat16, float32 or float64, got torch.bool"),
        ("pred_boxes", lambda b: b[:, :5], "pred_boxes must have shape (2, 6, 4), got (2, 5, 4)"),
        ("pred_boxes", elsewhere, "pred_boxes " + ELSEWHERE.format("points")),
        ("points", lambda p: p[:, :1], "points must have shape (N, 2), got (6, 1)"),
        ("points", to_bool, "points must be float32 or float64, got torch.bool"),
        ("strides", lambda s: s[:5], "strides must have shape (6,), one for each point, got (5,)"),
        ("strides", to_bool, "strides must be torch.float32 like points, got torch.bool"),
        ("gt_boxes", lambda g: g[0], "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got (3, 4)"),
        ("gt_labels", lambda g: g[:, :2], "gt_labels must be torch.int64 of shape (2, 3), got torch.int64 of shape (2, 2)"),
        ("objectness", lambda o: o[:, :5], "objectness must have shape (2, 6), got (2, 5)"),
        ("objectness", to_bool, "objectness must be float16, bfloat16, float32 or float64, got torch.bool"),
        ("counts", always(torch.ones(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("rule", always("ota"), "rule must be one of 'simota', 'yolox', 'rtmdet', got 'ota'"),
        ("rule", always("rtmdet"), "objectness must be None where rule is 'rtmdet', got a tensor of shape (2, 6)"),
        ("center_radius", always(-1), "center_radius must be >= 0, got -1"),
        ("candidates", always(33), "candidates must lie in [1, 32], got 33"),
        ("crowd", always(torch.zeros(2, 3)), "crowd must be torch.bool of shape (2, 3), got torch.float32 of shape (2, 3)"),
    ],
    "assign_task_aligned": [
        ("pred_scores", lambda s: s[:1], "pred_scores must have shape (2, 6, K), got (1, 6, 4)"),
        ("pred_scores", to_bool, "pred_scores must be float16, bfloat16, float32 or float64, got torch.bool"),
        ("pred_boxes", lambda b: b[:, :5], "pred_boxes must have shape (2, 6, 4), got (2, 5, 4)"),
        ("pred_boxes", elsewhere, "pred_boxes " + ELSEWHERE.format("points")),
        ("points", lambda p: p[:, :1], "points must have shape (N, 2), got (6, 1)"),
        ("points", to_bool, "points must be float32 or float64, got torch.bool"),
        ("gt_boxes", lambda g: g[0], "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got (3, 4)"),
        ("gt_labels", lambda g: g[:, :2], "gt_labels must be torch.int64 of shape (2, 3), got torch.int64 of shape (2, 2)"),
        ("gt_labels", lambda g: g.float(), "gt_labels must be integers, got torch.float32"),
        ("gt_labels", lambda g: [g[0]], "gt_labels must have one entry for each of the 2 images, got 1"),
        ("gt_labels", lambda g: [g[0], g[1, :2]], "gt_labels[1] must have shape (3,), one for each box, got (2,)"),
        ("topk", always(33), "topk must lie in [1, 32], got 33"),
        ("alpha", always(-0.5), "alpha must be >= 0, got -0.5"),
        ("beta", always(0), "beta must be > 0, got 0"),
        ("counts", always(torch.ones(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("rule", always("yolox"), "rule must be one of 'ultralytics', 'mmyolo', 'tood', got 'yolox'"),
        ("overlap", always("giou"), "overlap must be 'iou' or 'ciou', got 'giou'"),
        ("min_side", always(-1), "min_side must be >= 0, got -1"),
        ("final_topk", always(0), "final_topk must lie in [1, 32], got 0"),
        ("eps", always(-1), "eps must be >= 0, got -1"),
        ("crowd", always(torch.zeros(2, 3)), "crowd must be torch.bool of shape (2, 3), got torch.float32 of shape (2, 3)"),
    ],
    "match_anchors": [
        ("anchors", lambda a: a[0], "anchors must have shape (A, 4), got (4,)"),
        ("anchors", to_bool, "anchors must be float32 or float64, got torch.bool"),
        ("gt_boxes", to_bool, "gt_boxes must be torch.float32 like anchors, got torch.bool"),
        ("gt_boxes", lambda g: g[0], "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), got (3, 4)"),
        ("gt_boxes", lambda g: [g[0], g[0, 0]], "gt_boxes[1] must have shape (M, 4), got (4,)"),
        ("gt_boxes", elsewhere, "gt_boxes " + ELSEWHERE.format("anchors")),
        ("counts", always(torch.ones(2)), "counts must be int32 or int64, got torch.float32"),
        ("counts", always(torch.ones(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("fg_iou_threshold", always(0.25), "bg_iou_threshold must be <= fg_iou_threshold, 0.25, got 0.4"),
        ("rule", always("mmcv"), "rule must be one of 'torchvision', 'detectron2', 'mmdet', 'efficientdet', got 'mmcv'"),
        ("min_pos_iou", always(0.2), "min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got 'torchvision'"),
        ("gt_max_assign_all", always(False), "min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got 'torchvision'"),
        ("crowd", always(torch.zeros(2, 3)), "crowd must be bool, a list of (M_i,) or of shape (2, 3), got torch.float32 of shape (2, 3)"),
        ("crowd", always([torch.zeros(3).bool(), torch.zeros(2).bool()]), "crowd[1] must be bool of shape (3,), one for each box, got torch.bool of shape (2,)"),
        ("crowd", always([torch.zeros(3).bool()]), "crowd must have one entry for each of the 2 images, got 1"),
        ("crowd_threshold", always(-0.5), "crowd_threshold must be >= 0, got -0.5"),
        ("image_sizes", always(torch.ones(3, 2)), "image_sizes must have shape (2, 2), one for each image, got (3, 2)"),
        ("bg_iou_threshold", always(math.nan), "bg_iou_threshold must be <= fg_iou_threshold, 0.5, got nan"),
    ],
    "match_iou_matrix": [
        ("iou", Tensor.long, "iou must be floating and have shape (..., M, A), got torch.int64 of shape (6, 4)"),
        ("iou", lambda i: i[0], "iou must be floating and have shape (..., M, A), got torch.float32 of shape (4,)"),
        ("fg_iou_threshold", always(0.25), "bg_iou_threshold must be <= fg_iou_threshold, 0.25, got 0.4"),
        ("bg_iou_threshold", always(math.nan), "bg_iou_threshold must be <= fg_iou_threshold, 0.5, got nan"),
        ("rule", always("mmcv"), "rule must be one of 'torchvision', 'detectron2', 'mmdet', 'efficientdet', got 'mmcv'"),
        ("min_pos_iou", always(0.2), "min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got 'torchvision'"),
        ("gt_max_assign_all", always(False), "min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got 'torchvision'"),
    ],
    "matched_iou": HEAD_OF_BOXES,
    "matrix_nms": DECAYING_NMS,
    "multiclass_nms": [
        *nms_of("(B, N, 4)", "(2, 3)"),
        ("labels", Tensor.float, "labels must be int32 or int64, got torch.float32"),
        ("labels", lambda x: x[0], "labels must have shape (2, 3), one for each box, got (3,)"),
        ("labels", elsewhere, "labels " + ELSEWHERE.format("boxes")),
        ("counts", always(torch.zeros(3).int()), "counts must have shape (2,), one for each image, got (3,)"),
        ("counts", always(torch.zeros(2).bool()), "counts must be int32 or int64, got torch.bool"),
        ("max_detections", always(-1), "max_detections must be >= 0, got -1"),
    ],
    "nms": nms_of("(N, 4)", "(6,)"),
    "nms_match": nms_of("(N, 4)", "(6,)")[:-1],
    "soft_nms": DECAYING_NMS,
    "sigmoid_focal_loss": [
        *focal_of("inputs"),
        ("gamma", always(-1), "gamma must be >= 0, got -1"),
        ("gamma", always(math.nan), "gamma must be >= 0, got nan"),
        *numbers_of("label_smoothing"),
        ("targets", lambda _: torch.zeros(6, 5).where(torch.arange(5) != 3, -0.5), "dense targets must lie in [0, 1], got -0.5"),
        ("targets", lambda _: torch.full((6, 5), 255), "dense targets must lie in [0, 1], got 255"),
    ],
    "sigmoid_focal_loss, sum": [
        ("alpha", always(1.5), f"{TOO_LARGE_ALPHA}1.5"),
        ("gamma", always(-1), "gamma must be >= 0, got -1"),
        ("targets", Tensor.float, "class-index targets must be int32 or int64, got torch.float32"),
        ("targets", lambda t: t + 7, "class-index targets must lie in [0, 5] or equal ignore_index, -100, got 7"),
        ("normalizer", always([2]), "normalizer must be a number, got list"),
        ("normalizer", always(torch.ones(2)), "normalizer must be a number or a 0-d tensor, got a tensor of shape (2,)"),
        ("label_smoothing", always(1.5), "label_smoothing must lie in [0, 1], got 1.5"),
        *weights_of("weight", "targets, (6,)"),
    ],
    **{
        op: [
            *row_loss_of(exponent),
            ("targets", lambda t: (t[0] + 7, t[1]), "class-index targets must lie in [0, 5] or equal ignore_index, -100, got 7"),
            *([] if op == "quality_focal_loss" else numbers_that_the_host_needs("alpha")),
        ]
        for op, exponent in ROW_LOSSES.items()
    },
    "softmax_focal_loss": [
        ("inputs", Tensor.long, f"inputs must be {FLOATING}, got torch.int64"),
        ("inputs", to_float8, f"inputs must be {FLOATING}, got torch.float8_e4m3fn"),
        ("targets", lambda t: t[:3], "class-index targets must have the shape of inputs, (6, 5), without its last dimension, got (3,)"),
        ("targets", Tensor.float, "class-index targets must be int32 or int64, got torch.float32"),
        ("targets", lambda t: t + 5, "class-index targets must lie in [0, 4] or equal ignore_index, -100, got 5"),
        ("inputs", lambda x: x[:, :0], "inputs must have at least one class, got shape (6, 0)"),
        ("inputs", lambda x: x[0, 0], "inputs must have shape (..., K), got ()"),
        ("gamma", always(-1), "gamma must be >= 0, got -1"),
        *numbers_that_the_host_needs("alpha", "gamma"),
        ("reduction", always("avg"), "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ("normalizer", always(torch.ones(2)), "normalizer must be a number or a 0-d tensor, got a tensor of shape (2,)"),
        *weights_of("weight", "targets, (6,)", by_part=False),
    ],
    "sigmoid_focal_loss_star": [
        *focal_of("inputs"),
        ("gamma", always(0), "gamma must be > 0, got 0"),
        *numbers_of("beta"),
        ("targets", lambda t: t + 7, "class-index targets must lie in [0, 5] or equal ignore_index, -100, got 7"),
        ("targets", lambda _: torch.full((6, 5), 1.5), "dense targets must lie in [0, 1], got 1.5"),
    ],
}  # fmt: skip
WRONG["ia_bce_loss"].append(("alpha", always(1.5), "alpha must lie in [0, 1], got 1.5"))
for op in ("varifocal_loss", "matchability_aware_loss"):
    WRONG[op].append(("alpha", always(-0.5), "alpha must be >= 0, got -0.5"))


# Any value does; what `inplace_backward` needs of a graph is in test_inplace_backward.py.
ANY_VALUE = {
    "allow_low_quality_matches",
    "alpha",
    "beta",
    "class_agnostic",
    "clip",
    "detach_weight",
    "eps",
    "ignore_index",
    "ignore_wrt_candidates",
    "iou_weighted",
    "inplace_backward",
    "iou_threshold",
    "min_normalizer",
    "num_classes",
    "return_iou",
    "score_threshold",
}

CASES = [(op, *case) for op, cases in WRONG.items() for case in cases]


def moved(arguments: Arguments, device: str) -> Arguments:
    """To a device, but for tensors that lie elsewhere."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    return pytree.tree_map(move, arguments)


def function_of(op: str) -> Callable[..., Any]:
    return getattr(focalops, op.partition(",")[0])


def sentence_of(op: str, arguments: Arguments) -> str:
    with pytest.raises((ValueError, TypeError)) as raised:
        function_of(op)(**arguments)
    return str(raised.value)


@pytest.mark.parametrize(("op", "argument", "wrong", "sentence"), CASES)
def test_says_what_is_wrong(op, argument, wrong, sentence, backend, device):
    arguments = right_arguments()[op]
    arguments[argument] = wrong(arguments.get(argument))
    check_says(op, arguments, sentence, backend, device)


# What does not depend on the reduction.
LOSS_CASES = [
    (*case, reduction)
    for case in CASES
    if case[0] in REDUCED_LOSSES and case[1] not in ("reduction", "normalizer", "inplace_backward")
    for reduction in reductions_of(case[0])
]


@pytest.mark.parametrize(("op", "argument", "wrong", "sentence", "reduction"), LOSS_CASES)
def test_every_reduction_says_the_same(op, argument, wrong, sentence, reduction, backend, device):
    arguments = right_arguments()[op] | {"reduction": reduction}
    arguments[argument] = wrong(arguments.get(argument))
    check_says(op, arguments, sentence, backend, device)


@pytest.mark.parametrize(("op", "argument", "wrong", "sentence", "reduction"), LOSS_CASES)
def test_devices_without_kernels_say_the_same(
    op, argument, wrong, sentence, reduction, without_kernels
):
    arguments = right_arguments()[op] | {"reduction": reduction}
    arguments[argument] = wrong(arguments.get(argument))
    if is_of_values(sentence):
        assert function_of(op)(**arguments).isnan().any()
    else:
        assert sentence in sentence_of(op, arguments)


@pytest.mark.parametrize(("op", "argument", "wrong", "sentence"), CASES)
def test_every_function_says_the_same_on_devices_without_kernels(
    op, argument, wrong, sentence, without_kernels
):
    arguments = right_arguments()[op]
    arguments[argument] = wrong(arguments.get(argument))
    if is_of_values(sentence):
        assert function_of(op)(**arguments).isnan().any()
    else:
        assert sentence in sentence_of(op, arguments)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize(
    ("op", "argument", "wrong", "sentence"),
    [
        case
        for case in CASES
        if case[0].startswith("detect") and case[1] not in ("method", "overlap")
    ],
)
def test_soft_detections_say_the_same(op, argument, wrong, sentence, method, backend, device):
    arguments = right_arguments()[op] | {"method": method, "overlap": "iou"}
    arguments[argument] = wrong(arguments.get(argument))
    check_says(op, arguments, sentence, backend, device)


def test_soft_detections_have_no_other_overlap():
    arguments = right_arguments()["detect"] | {"method": "linear", "overlap": "diou"}
    assert "overlap must be 'iou' unless method is 'hard', got 'diou'" in sentence_of(
        "detect", arguments
    )


def is_of_values(sentence: str) -> bool:
    """Only the values show it: on CUDA, where looking would stop the device, the loss is NaN."""
    return "targets must lie in" in sentence


def check_says(op: str, arguments: Arguments, sentence: str, backend: str, device: str) -> None:
    if is_of_values(sentence):
        if backend == "cpu":
            assert sentence in sentence_of(op, moved(arguments, device))
        else:
            assert function_of(op)(**moved(arguments, device)).isnan().any()
        return
    in_words = sentence.replace("on cpu", f"on {torch.zeros(0, device=device).device}")
    said = sentence_of(op, moved(arguments, device))
    assert in_words in said and "\n" not in said.strip()

    if sentence.endswith("got meta"):
        return  # nothing lies elsewhere once all is fake
    assert sentence in sentence_of(op, moved(arguments, "meta"))
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        assert sentence in sentence_of(op, fake)


LOSS_TENSORS = {
    **{op: ["inputs", "weight", "class_weight"] for op in ROW_LOSSES},
    "dense_equalized_focal_loss": ["labels", "gamma", "weight", "class_weight"],
    "dense_focal_loss": ["labels", "weight", "class_weight"],
    "dense_quality_loss": ["labels", "scores", "weight", "class_weight"],
    "distribution_focal_loss": ["inputs", "targets", "weight"],
    "sigmoid_focal_loss": ["inputs", "targets", "weight", "class_weight"],
    "sigmoid_focal_loss_star": ["inputs", "targets"],
    "softmax_focal_loss": ["inputs", "targets", "weight", "class_weight"],
}
BOX_OPS = sorted(op for op in WRONG if op.partition(",")[0] not in LOSS_TENSORS)
TENSORS = {
    name: [argument for argument, value in arguments.items() if isinstance(value, (Tensor, list))]
    for name, arguments in right_arguments().items()
}


@pytest.mark.parametrize("op", BOX_OPS)
def test_says_what_is_no_tensor(op):
    for argument in TENSORS[op]:
        for wrong in (None, np.zeros((6, 4)), [np.zeros((6, 4))], "boxes", 3):
            arguments = right_arguments()[op]
            is_optional = inspect.signature(function_of(op)).parameters[argument].default is None
            takes_lists = isinstance(arguments[argument], list) or argument.startswith("gt_")
            if wrong is None and (is_optional or (op, argument) == ("multiclass_nms", "labels")):
                continue
            arguments[argument] = wrong
            name, got = argument, type(wrong).__name__
            if isinstance(wrong, list) and takes_lists:
                name, got = f"{argument}[0]", "ndarray"
            with pytest.raises(TypeError, match=re.escape(f"{name} must be a Tensor, got {got}")):
                function_of(op)(**arguments)


@pytest.mark.parametrize(
    ("op", "reduction"), [(op, r) for op in LOSS_TENSORS for r in reductions_of(op)]
)
def test_losses_take_tensors(op, reduction):
    options = {} if reduction is None else {"reduction": reduction}
    wrongs = {"ndarray": np.zeros(6), "list": [0.0] * 6, "float": 0.5, "NoneType": None}

    def says(sentence: str, **wrong: Any) -> None:
        with pytest.raises(TypeError) as raised:
            function_of(op)(**(right_arguments()[op] | options | wrong))
        assert str(raised.value) == sentence

    for kind, value in wrongs.items():
        for name in LOSS_TENSORS[op]:
            if value is not None or "weight" not in name:
                says(f"{name} must be a Tensor, got {kind}", **{name: value})
        if op in ROW_LOSSES:
            labels, scores = right_arguments()[op]["targets"]
            says(f"labels must be a Tensor, got {kind}", targets=(value, scores))
            says(f"scores must be a Tensor, got {kind}", targets=(labels, value))
        if op.startswith("dense_"):
            says(f"cls_logits[0] must be a Tensor, got {kind}", cls_logits=[value])
    if op.startswith("dense_"):
        for value in (None, torch.zeros(6)):
            given = type(value).__name__
            says(f"cls_logits must be a list of Tensors, got {given}", cls_logits=value)


@pytest.mark.parametrize("op", WRONG)
def test_right_arguments_are_taken(op, device):
    function_of(op)(**moved(right_arguments()[op], device))


def test_every_argument_of_every_op_is_in_the_table():
    functions = {n for n in focalops.__all__ if inspect.isfunction(getattr(focalops, n))}
    functions -= {"accelerate"}  # takes a model
    assert WRONG.keys() == right_arguments().keys()
    assert functions == {op.partition(",")[0] for op in WRONG}
    for op in functions:
        tested = {argument for name, argument, *_ in CASES if function_of(name).__name__ == op}
        parameters = inspect.signature(function_of(op)).parameters.values()
        named = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
        assert named - ANY_VALUE <= tested, op
