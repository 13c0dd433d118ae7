"""IoU matrices, encoding and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torchvision
from torch import Tensor

from benchmarks.harness import OURS, Case, Contestant
from benchmarks.scenes import random_anchors, random_boxes
from focalops import box_iou, decode_boxes, encode_boxes, reference


def iou_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    boxes, anchors = random_boxes(50, device), random_anchors(50_000 if quick else 201_600, device)
    contestants = {
        OURS: lambda: box_iou(boxes, anchors),
        "reference": lambda: reference.box_iou(boxes, anchors),
    }
    if not quick:
        compiled = torch.compile(reference.box_iou)
        contestants["reference, compiled"] = lambda: compiled(boxes, anchors)
        contestants["torchvision"] = lambda: torchvision.ops.box_iou(boxes, anchors)
    size = f"{len(boxes)} x {len(anchors):,} float32"
    least = 4 * len(boxes) * len(anchors)
    yield Case("box_iou", size, least, contestants, close)


def coding_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    anchors = random_anchors(50_000 if quick else 201_600, device)
    deltas = torch.randn(1 if quick else 4, len(anchors), 4, device=device) / 2
    boxes = reference.decode_boxes(deltas, anchors)
    size = f"{deltas.shape[0]} x {len(anchors):,} float32"
    for name, ours, theirs, argument in (
        ("encode_boxes", encode_boxes, reference.encode_boxes, boxes),
        ("decode_boxes", decode_boxes, reference.decode_boxes, deltas),
    ):
        contestants: dict[str, Contestant] = {
            OURS: partial(ours, argument, anchors),
            "reference": partial(theirs, argument, anchors),
        }
        if not quick:
            contestants["reference, compiled"] = partial(torch.compile(theirs), argument, anchors)
        least = 2 * deltas.numel() * 4 + anchors.numel() * 4
        yield Case(name, size, least, contestants, close)


def close(ours: Tensor, theirs: Tensor) -> None:
    # A compiler may contract multiplications and additions: an ulp of a coordinate near 1,000
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
