"""Non-maximum suppression of the candidates of an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchvision

from benchmarks.harness import OURS, Case
from benchmarks.scenes import random_boxes
from focalops import batched_nms, nms, reference


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for count in (1_000,) if quick else (1_000, 5_000, 20_000):
        yield case(count, 1, device, quick)
    if not quick:
        yield case(5_000, 80, device, quick)


def case(count: int, classes: int, device: torch.device, quick: bool) -> Case:
    objects = random_boxes(max(count // 20, 1), device)  # about 20 candidates an object
    boxes = objects[torch.randint(len(objects), (count,), device=device)]
    boxes = boxes + torch.randn_like(boxes) * 4
    scores = torch.rand(count, device=device)
    labels = torch.randint(classes, (count,), device=device)
    if classes == 1:
        contestants = {
            OURS: lambda: nms(boxes, scores, 0.5),
            "reference": lambda: reference.nms(boxes, scores, 0.5),
            "torchvision": lambda: torchvision.ops.nms(boxes, scores, 0.5),
        }
    else:
        contestants = {
            OURS: lambda: batched_nms(boxes, scores, labels, 0.5),
            "reference": lambda: reference.batched_nms(boxes, scores, labels, 0.5),
            "torchvision": lambda: torchvision.ops.batched_nms(boxes, scores, labels, 0.5),
        }

    def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        # torchvision separates classes by offsets, which costs coordinates their last bits
        assert torch.equal(ours, theirs) or len(set(ours.tolist()) ^ set(theirs.tolist())) < 5

    size = f"{count:,} boxes" + (f", {classes} classes" if classes > 1 else "")
    return Case("nms", size, count * 28, contestants, agree)
