"""Which box, and which class, each anchor is to learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focalops import (
    assign_atss,
    assign_fcos,
    assign_simota,
    assign_task_aligned,
    decode_boxes,
    match_anchors,
)
from focalops.reference import head_rows

from ..config import MatchingConfig
from ..structures import HeadOutputs, Target
from .balance import GradientBalance

ATSS_TOPK = 9  # candidates of a box on a level, as many times as there are anchors at a position
TASK_ALIGNED = 13, 1.0, 6.0  # TOOD's candidates of a box, alpha and beta
IGNORED = -100  # the class of an anchor that has neither loss nor gradient


class Matched(NamedTuple):
    """What the parts of the loss step see: a network's outputs and what the anchors are to learn."""

    outputs: HeadOutputs
    anchors: Tensor  # (N, 4)
    targets: list[Target]  # B
    matches: Tensor  # (B, N), of each anchor the index of its box, -1 for background, -2 where it is neither
    classes: Tensor  # (B, N), of each anchor the class, num_classes for background, or IGNORED
    normalizers: Tensor  # (B,), what each image's losses are divided by
    class_weight: Tensor | None = None  # (3, K), of the focal loss
    balance: GradientBalance | None = None  # of eqlv2 and efl
    scores: Tensor | None = None  # (B, N), the assigner's, of task_aligned


def match(
    outputs: HeadOutputs,
    anchors: Tensor,  # (N, 4)
    targets: list[Target],  # B
    config: MatchingConfig,
    finest_stride: int,
) -> tuple[Tensor, Tensor | None]:
    """(B, N): of each anchor the index of its box, -1 or -2, which is also that of anchors in crowds; and of an assigner that
    has them the scores that the anchors are to learn."""
    boxes, crowd = [t["boxes"] for t in targets], None
    if any("iscrowd" in t for t in targets):
        crowd = [
            t["iscrowd"].bool()
            if "iscrowd" in t
            else torch.zeros_like(t["labels"], dtype=torch.bool)
            for t in targets
        ]
    if config.assigner == "iou":
        thresholds = config.fg_iou_threshold, config.bg_iou_threshold
        rule = config.matching_rule
        return match_anchors(anchors, boxes, *thresholds, rule=rule, crowd=crowd), None
    sizes = [level[0].numel() // 4 for level in outputs.box_deltas]
    if config.assigner == "atss":
        topk = ATSS_TOPK * (outputs.box_deltas[0].shape[1] // 4)
        return assign_atss(anchors, sizes, boxes, topk, crowd=crowd), None
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    strides = [float(finest_stride * 2**level) for level in range(len(sizes))]
    if config.assigner == "fcos":
        return assign_fcos(points, strides, sizes, boxes, crowd=crowd), None
    labels = [t["labels"] for t in targets]
    logits = rows_of(outputs.cls_logits, config.num_classes).detach()
    deltas = rows_of(outputs.box_deltas, 4).detach().float()
    predicted = decode_boxes(deltas, anchors.expand(len(targets), -1, -1))
    if config.assigner == "simota":
        of_points = torch.cat(
            [points.new_full((n,), s) for n, s in zip(sizes, strides, strict=True)]
        )
        matches, _ = assign_simota(logits, predicted, points, of_points, boxes, labels, crowd=crowd)
        return matches, None
    return assign_task_aligned(
        logits.sigmoid(),
        predicted,
        points,
        boxes,
        labels,
        *TASK_ALIGNED,
        rule="tood",
        crowd=crowd,
    )


def rows_of(levels: list[Tensor], columns: int) -> Tensor:
    """(B, N, columns), the anchors of an image in the order level, row, column, anchor."""
    return torch.cat([head_rows(level, columns) for level in levels], dim=1)


def normalizers(counts: Tensor, kind: str) -> Tensor:  # (B,) -> (B,)
    """What each image's losses are divided by, from the images' numbers of foreground anchors.

    With "batch" all images of all ranks share one: where an image has few objects, or none, its
    anchors weigh no more than others'.
    """
    if kind == "image":
        return counts
    if kind == "positives":  # losses are averaged over the images afterwards
        return ((counts.sum() + 1) / len(counts)).expand(len(counts))
    total = torch.stack([counts.sum(), counts.new_tensor(len(counts))])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).expand(len(counts))
