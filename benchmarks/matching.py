"""Matching the anchors of a batch to its ground truth."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from benchmarks.harness import OURS, Case
from benchmarks.scenes import random_boxes, retinanet_anchors
from focalops import match_anchors, reference


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    images = 1 if quick or device.type == "cpu" else 16
    for objects in (8,) if quick else (8, 50, 500):
        yield case(images, objects, device, quick)


def case(images: int, objects: int, device: torch.device, quick: bool) -> Case:
    anchors = retinanet_anchors(device)
    gt_boxes = [random_boxes(objects, device) for _ in range(images)]
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def with_torchvision() -> Tensor:
        return torch.stack([matcher(torchvision.ops.box_iou(boxes, anchors)) for boxes in gt_boxes])

    contestants = {
        OURS: lambda: match_anchors(anchors, gt_boxes),
        "reference": lambda: reference.match_anchors(anchors, gt_boxes),
    }
    if not quick:
        compiled = torch.compile(reference.match_anchors)
        contestants["reference, compiled"] = lambda: compiled(anchors, gt_boxes)
        contestants["torchvision"] = with_torchvision

    def agree(ours: Tensor, theirs: Tensor) -> None:
        # A compiled rival contracts multiplications and additions, and then a tie can fall the other way.
        assert (ours != theirs).float().mean() < 1e-4

    size = f"{images} x {len(anchors):,} anchors, {objects} boxes"
    least = images * len(anchors) * 24  # 16 bytes of anchor, 8 of match
    return Case("match_anchors", size, least, contestants, agree)
