"""focalops inside a torchvision RetinaNet that already exists."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from focalops.box_losses import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from focalops.boxes import decode_boxes, encode_boxes
from focalops.focal_loss import dense_focal_loss
from focalops.matching import class_index_targets, match_anchors
from focalops.postprocess import detect


@dataclass
class Accelerated:
    """What :func:`accelerate` did; ``print`` it."""

    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [f"replaced: {line}" for line in self.replaced]
            + [f"kept: {line}" for line in self.kept]
        )


def accelerate(model: nn.Module) -> Accelerated:
    """Swaps parts of the torchvision RetinaNets in a model for focalops', in place.

    The loss step (matching, focal loss, box loss), the post-processing (threshold, top-k, boxes, NMS) and, where both could be
    swapped, the copies between the heads' convolutions and them. Losses, gradients and detections stay what they were, but
    for the order of float32 sums; a ground-truth box that overlaps no anchor no longer makes all of them foreground.
    Parameters, their names and the way to call the model stay too, and so do ``copy.deepcopy`` and pickling.

    Args:
        model: a ``torchvision.models.detection.RetinaNet``, or a module that holds some. A part that a subclass or an
            attribute of the instance overrides is kept, and so is one that depends on a part that focalops does not know.
            Thresholds and other numbers may be changed afterwards; parts may not, without another call.

    Returns:
        What was replaced and what was kept and why, in sentences.

    Raises:
        ValueError: the model holds no torchvision RetinaNet.

    >>> print(accelerate(model))
    """
    try:
        from torchvision.models.detection import RetinaNet
    except ImportError:
        found = []
    else:
        found = [
            (name, part) for name, part in model.named_modules() if isinstance(part, RetinaNet)
        ]
    if not found:
        raise ValueError(
            f"model must be or hold a torchvision RetinaNet, got {type(model).__qualname__}"
        )
    report = Accelerated()
    for name, part in found:
        _accelerate(part, name or "model", report)
    return report


def _accelerate(model: Any, name: str, report: Accelerated) -> None:
    from torchvision.models.detection import retinanet
    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    head, matcher = model.head, model.proposal_matcher
    classification = getattr(head, "classification_head", None)
    regression = getattr(head, "regression_head", None)
    heads = [
        (f"{name}.head", head, retinanet.RetinaNetHead),
        (
            f"{name}.head.classification_head",
            classification,
            retinanet.RetinaNetClassificationHead,
        ),
        (f"{name}.head.regression_head", regression, retinanet.RetinaNetRegressionHead),
    ]

    generator = model.anchor_generator
    anchors = []
    for method in ("forward", "grid_anchors"):  # which give every image the same
        anchors += _overridden(f"{name}.anchor_generator", generator, AnchorGenerator, method)
    if not anchors and len(generator.sizes) > MAX_LEVELS:
        anchors.append(f"{name}.anchor_generator has more than {MAX_LEVELS} levels")

    reasons = _overridden(name, model, retinanet.RetinaNet, "compute_loss")
    for where, part, origin in heads:
        reasons += _overridden(where, part, origin, "compute_loss")
    for method in ("__call__", "set_low_quality_matches_"):
        reasons += _overridden(f"{name}.proposal_matcher", matcher, Matcher, method)
    coder = getattr(regression, "box_coder", None)
    for method in ("encode_single", "decode_single"):
        reasons += _overridden(f"{name}.head.regression_head.box_coder", coder, BoxCoder, method)
    reasons += anchors
    loss_type = getattr(regression, "_loss_type", None)
    if loss_type not in BOX_LOSSES:
        reasons.append(f"{name}.head.regression_head has the unknown box loss {loss_type!r}")
    loss = _swap(model, "compute_loss", _compute_loss, f"{name}: the loss step", reasons, report)

    reasons = _overridden(name, model, retinanet.RetinaNet, "postprocess_detections")
    reasons += _overridden(f"{name}.box_coder", model.box_coder, BoxCoder, "decode_single")
    reasons += anchors
    post_processing = _swap(
        model,
        "postprocess_detections",
        _postprocess_detections,
        f"{name}: the post-processing",
        reasons,
        report,
    )

    if loss and post_processing:
        reasons = _overridden(name, model, retinanet.RetinaNet, "forward")
        for where, part, origin in heads:
            reasons += _overridden(where, part, origin, "forward")
        for (where, part, _), forward in zip(
            heads[1:], (_classification_forward, _regression_forward), strict=True
        ):
            _swap(part, "forward", forward, f"{where}: the copies", reasons, report)


MAX_LEVELS = 8  # of dense_focal_loss and detect


def _overridden(where: str, part: Any, origin: type, method: str) -> list[str]:
    """Why this is not torchvision's own method, or nothing."""
    if not isinstance(part, origin):
        return [f"{where} is no {origin.__name__} but {type(part).__qualname__}"]
    if method in vars(part):
        own = vars(part)[method]
        is_ours = isinstance(own, functools.partial) and own.func.__module__ == __name__
        return [
            f"{where}.{method} is " + ("focalops' already" if is_ours else "the instance's own")
        ]
    if getattr(type(part), method) is not getattr(origin, method):
        return [f"{where}.{method} is overridden by {type(part).__qualname__}"]
    return []


def _swap(
    part: Any, method: str, function: Any, what: str, reasons: list[str], report: Accelerated
) -> bool:
    if reasons:
        report.kept.append(f"{what}, because {' and '.join(reasons)}")
        return False
    setattr(part, method, functools.partial(function, part))  # unlike a method, it can be pickled
    report.replaced.append(what)
    return True


# ---- what is put in -----------------------------------------------------------------------------


class HeadOutputs:
    """A head's outputs as the convolutions left them, where torchvision has them permuted and concatenated."""

    def __init__(self, levels: list[Tensor], columns: int) -> None:  # L of (B, A * columns, H, W)
        self.levels, self.columns = levels, columns

    def size(self, dim: int) -> int:
        """Of the (B, N, columns) tensor that torchvision would have made."""
        rows = sum(level[0].numel() for level in self.levels) // self.columns
        return (len(self.levels[0]), rows, self.columns)[dim]

    def split(self, sizes: Sequence[int], dim: int) -> list[Tensor]:
        """The levels: torchvision splits where it has concatenated."""
        return self.levels


def _classification_forward(head: Any, features: list[Tensor]) -> HeadOutputs:
    return HeadOutputs([head.cls_logits(head.conv(f)) for f in features], head.num_classes)


def _regression_forward(head: Any, features: list[Tensor]) -> HeadOutputs:
    return HeadOutputs([head.bbox_reg(head.conv(f)) for f in features], 4)


def _compute_loss(
    model: Any,
    targets: list[dict[str, Tensor]],
    head_outputs: dict[
        str, Any
    ],  # "cls_logits" and "bbox_regression": HeadOutputs or (B, N, columns)
    anchors: list[Tensor],  # B of (N, 4), all the same: the batch is padded to one size
) -> dict[str, Tensor]:
    """Each image's losses are divided by its number of foreground anchors, then averaged."""
    matcher, regression = model.proposal_matcher, model.head.regression_head
    cls_logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    num_classes = model.head.classification_head.num_classes
    if isinstance(cls_logits, HeadOutputs):
        cls_levels = cls_logits.levels
        deltas = torch.cat([_rows(level, 4) for level in deltas.levels], dim=1)
    else:
        cls_levels = [_level(cls_logits)]

    boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
    matches = match_anchors(
        anchors[0],
        boxes,
        matcher.high_threshold,
        matcher.low_threshold,
        matcher.allow_low_quality_matches,
    )  # (B, N)
    classes = class_index_targets(matches, labels, num_classes)
    foreground = matches >= 0
    counts = foreground.sum(dim=1)
    classification = dense_focal_loss(cls_levels, classes, normalizer=counts) / len(targets)

    image, anchor = torch.where(foreground)  # (F,) each
    gt_boxes = nn.utils.rnn.pad_sequence(boxes, batch_first=True)  # (B, M, 4)
    losses = _box_losses(
        regression,
        deltas[image, anchor],
        anchors[0][anchor],
        gt_boxes[image, matches[image, anchor]] if len(image) else gt_boxes.new_empty((0, 4)),
    )  # (F,)
    bbox_regression = (losses / counts[image]).sum() / max(1, len(targets))
    return {"classification": classification, "bbox_regression": bbox_regression}


IOU_LOSSES = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}
BOX_LOSSES = ("l1", "smooth_l1", *IOU_LOSSES)


def _box_losses(
    regression: Any,
    deltas: Tensor,  # (F, 4)
    anchors: Tensor,  # (F, 4)
    gt_boxes: Tensor,  # (F, 4)
) -> Tensor:  # (F,)
    name, coder = regression._loss_type, regression.box_coder
    if name in ("l1", "smooth_l1"):
        loss = nn.functional.l1_loss if name == "l1" else nn.functional.smooth_l1_loss
        return loss(deltas, encode_boxes(gt_boxes, anchors, coder.weights), reduction="none").sum(1)
    return IOU_LOSSES[name](
        decode_boxes(deltas, anchors, coder.weights, coder.bbox_xform_clip), gt_boxes
    )


def _postprocess_detections(
    model: Any,
    head_outputs: dict[str, list[Tensor]],  # L of (B, A * columns, H, W) or (B, H * W * A, columns)
    anchors: list[list[Tensor]],  # B of L of (H * W * A, 4), all the same
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Score threshold and top-k a level, boxes of the survivors, NMS per class."""
    *padded, counts = detect(
        [_level(level) for level in head_outputs["cls_logits"]],
        [_level(level) for level in head_outputs["bbox_regression"]],
        torch.cat(anchors[0]),
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        iou_threshold=model.nms_thresh,
        max_detections=model.detections_per_img,
        image_sizes=image_shapes,
        weights=model.box_coder.weights,
        clip=model.box_coder.bbox_xform_clip,
    )
    names = ("boxes", "scores", "labels")
    return [
        {name: value[image, :count] for name, value in zip(names, padded, strict=True)}
        for image, count in enumerate(counts.tolist())
    ]


def _level(outputs: Tensor) -> Tensor:
    """As (B, A * columns, H, W): rows are a channels_last column of positions with one anchor each."""
    return outputs if outputs.dim() == 4 else outputs.transpose(1, 2).unsqueeze(3)


def _rows(level: Tensor, columns: int) -> Tensor:
    """One row an anchor: (B, A * columns, H, W) -> (B, H * W * A, columns)."""
    batch, _, height, width = level.shape
    split = level.view(batch, -1, columns, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, columns)
