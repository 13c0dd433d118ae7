"""Which box, and which class, each anchor is to learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focalops import match_anchors

from ..config import MatchingConfig
from ..structures import HeadOutputs, Target
from .balance import GradientBalance

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


def match(anchors: Tensor, targets: list[Target], config: MatchingConfig) -> Tensor:
    """(N, 4) -> (B, N): of each anchor the index of its box, -1 or -2, which is also that of anchors in crowds."""
    crowd = None
    if any("iscrowd" in t for t in targets):
        crowd = [
            t["iscrowd"].bool()
            if "iscrowd" in t
            else torch.zeros_like(t["labels"], dtype=torch.bool)
            for t in targets
        ]
    return match_anchors(
        anchors,
        [t["boxes"] for t in targets],
        config.fg_iou_threshold,
        config.bg_iou_threshold,
        rule=config.matching_rule,
        crowd=crowd,
    )


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
