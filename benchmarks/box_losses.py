"""Losses of boxes: of pairs, and of a head's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor

import focalops
from benchmarks.harness import OURS, Case, Contestant
from benchmarks.scenes import (
    HEIGHT,
    STRIDES,
    WIDTH,
    random_anchors,
    random_boxes,
    retinanet_anchors,
)
from focalops import reference

NAMES = (
    "box_iou_loss",
    "generalized_box_iou_loss",
    "distance_box_iou_loss",
    "complete_box_iou_loss",
)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for name in NAMES[1:2] if quick else NAMES:
        yield pairs(name, 50_000 if quick else 201_600, device, quick)
    images = 1 if quick or device.type == "cpu" else 16
    for loss in ("l1",) if quick else ("l1", "giou"):
        yield dense(loss, images, device)
    if not quick:
        yield of_anchors("giou", images, device)
        yield overlaps(images, device)


def pairs(name: str, count: int, device: torch.device, quick: bool) -> Case:
    boxes = random_anchors(count, device)
    moved = reference.decode_boxes(torch.randn(count, 4, device=device) / 4, boxes).requires_grad_()

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            value = loss(moved, boxes, reduction="sum")
            return value.detach(), torch.autograd.grad(value, moved)[0]

        return run

    contestants = {
        OURS: step(getattr(focalops, name)),
        "reference": step(getattr(reference, name)),
    }
    if not quick:
        contestants["reference, compiled"] = step(torch.compile(getattr(reference, name)))
        if hasattr(torchvision.ops, name):
            contestants["torchvision"] = step(getattr(torchvision.ops, name))
    least = count * (32 + 32 + 16)  # the boxes twice, the gradient
    return Case(f"{name} + gradient", f"{count:,} pairs", least, contestants, close)


Head = tuple[list[Tensor], Tensor, list[Tensor], Tensor]  # deltas, anchors, boxes, matches


def head(images: int, device: torch.device) -> Head:
    anchors = retinanet_anchors(device)
    gt_boxes = [random_boxes(20, device) for _ in range(images)]
    matches = focalops.match_anchors(anchors, gt_boxes)
    deltas = [
        torch.randn(images, 36, -(-HEIGHT // s), -(-WIDTH // s), device=device).div_(4)
        for s in STRIDES
    ]
    return [level.requires_grad_() for level in deltas], anchors, gt_boxes, matches


def size_of(matches: Tensor) -> str:
    return f"{matches.shape[0]} x {matches.shape[1]:,} anchors, 20 boxes"


def dense(loss: str, images: int, device: torch.device) -> Case:
    deltas, *others, matches = head(images, device)
    normalizer = (matches >= 0).sum(1)

    def step(function: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            value = function(deltas, *others, matches, loss=loss, normalizer=normalizer)
            grads = torch.autograd.grad(value, deltas)
            return value.detach(), torch.cat([grad.flatten() for grad in grads[2:]])

        return run

    contestants = {
        OURS: step(focalops.dense_box_loss),
        "reference": step(reference.dense_box_loss),
    }
    least = matches.numel() * (8 + 16)  # the matches, the gradient
    name = f"dense_box_loss {loss} + gradient"
    return Case(name, size_of(matches), least, contestants, close)


def of_anchors(loss: str, images: int, device: torch.device) -> Case:
    """The losses of the anchors with a gradient for each, beside that of their sum."""
    deltas, *others, matches = head(images, device)
    upstream = torch.full(matches.shape, 0.5, device=device)

    def step(function: Callable[..., Tensor], reduction: str) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            value = function(deltas, *others, matches, loss=loss, reduction=reduction)
            grads = torch.autograd.grad(value, deltas, upstream if value.dim() else upstream[0, 0])
            return value.detach(), torch.cat([grad.flatten() for grad in grads[2:]])

        return run

    contestants = {
        OURS: step(focalops.dense_box_loss, "none"),
        "the sum": step(focalops.dense_box_loss, "sum"),
        "reference": step(reference.dense_box_loss, "none"),
    }
    least = matches.numel() * (8 + 4 + 4 + 16)  # matches, losses, upstream, the gradient

    def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
        close((ours[0].sum(), ours[1]), (theirs[0].sum(), theirs[1]))

    name = f"dense_box_loss {loss} of anchors + gradient"
    return Case(name, size_of(matches), least, contestants, agree)


def overlaps(images: int, device: torch.device) -> Case:
    arguments = head(images, device)
    contestants: dict[str, Contestant] = {
        OURS: lambda: focalops.matched_iou(*arguments),
        "reference": lambda: reference.matched_iou(*arguments),
    }
    matches = arguments[-1]
    least = matches.numel() * (8 + 4)
    return Case("matched_iou", size_of(matches), least, contestants, torch.testing.assert_close)


def close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)  # a sum of many
    # Cancellation in the differences of coordinates near 1,000.
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-3)
