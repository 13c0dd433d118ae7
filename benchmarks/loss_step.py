"""The whole loss step of a RetinaNet: matching, both losses, and their gradients with respect to the head's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead

from benchmarks.harness import OURS, Case, Contestant
from benchmarks.scenes import HEIGHT, STRIDES, WIDTH, random_boxes, retinanet_anchors
from focalops import class_index_targets, dense_box_loss, dense_focal_loss, match_anchors, reference

CLASSES, ANCHORS = 91, 9


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    yield case(1 if quick or device.type == "cpu" else 16, device, quick)


def case(images: int, device: torch.device, quick: bool) -> Case:
    anchors = retinanet_anchors(device)
    sizes = [(-(-HEIGHT // s), -(-WIDTH // s)) for s in STRIDES]
    cls_logits = [torch.randn(images, ANCHORS * CLASSES, *hw, device=device) - 4 for hw in sizes]
    deltas = [torch.randn(images, ANCHORS * 4, *hw, device=device) / 4 for hw in sizes]
    gt_boxes = [random_boxes(20, device) for _ in range(images)]
    labels = [torch.randint(0, CLASSES, (20,), device=device) for _ in range(images)]
    outputs = [level.requires_grad_() for level in (*cls_logits, *deltas)]

    def step(ops: Any) -> Contestant:
        def run() -> tuple[Tensor, Tensor, list[Tensor]]:
            matches = ops.match_anchors(anchors, gt_boxes)
            classes = ops.class_index_targets(matches, labels, CLASSES)
            number = (matches >= 0).sum(1)
            focal = ops.dense_focal_loss(cls_logits, classes, normalizer=number) / images
            box = ops.dense_box_loss(deltas, anchors, gt_boxes, matches, normalizer=number) / images
            grads = torch.autograd.grad(focal + box, outputs)
            return focal.detach(), box.detach(), list(grads)

        return run

    contestants = {OURS: step(Ours), "reference": step(reference)}
    if not quick:
        contestants["torchvision"] = torchvisions(cls_logits, deltas, anchors, gt_boxes, labels)

    def agree(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-4, atol=0)  # sums of many
        for grad, other in zip(ours[2], theirs[2], strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-8)

    size = f"{images} x {len(anchors):,} anchors, K = {CLASSES}, 20 boxes"
    least = images * len(anchors) * (8 * CLASSES + 16 + 16)
    return Case("loss step + gradient", size, least, contestants, agree)


class Ours:
    match_anchors = staticmethod(match_anchors)
    class_index_targets = staticmethod(class_index_targets)
    dense_focal_loss = staticmethod(dense_focal_loss)
    dense_box_loss = staticmethod(dense_box_loss)


def torchvisions(
    cls_logits: list[Tensor],
    deltas: list[Tensor],
    anchors: Tensor,
    gt_boxes: list[Tensor],
    labels: list[Tensor],
) -> Contestant:
    """RetinaNet.compute_loss, and what its head does to the outputs before."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.models.detection.retinanet import RetinaNet

    model = RetinaNet.__new__(RetinaNet)
    torch.nn.Module.__init__(model)
    model.head = RetinaNetHead(8, ANCHORS, CLASSES)
    model.proposal_matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    targets = [{"boxes": b, "labels": k} for b, k in zip(gt_boxes, labels, strict=True)]

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        outputs = {
            "cls_logits": torch.cat([rows(level, CLASSES) for level in cls_logits], dim=1),
            "bbox_regression": torch.cat([rows(level, 4) for level in deltas], dim=1),
        }
        losses = model.compute_loss(targets, outputs, [anchors] * len(targets))
        focal, box = losses["classification"], losses["bbox_regression"]
        grads = torch.autograd.grad(focal + box, [*cls_logits, *deltas])
        return focal.detach(), box.detach(), list(grads)

    return run


def rows(level: Tensor, columns: int) -> Tensor:
    return level.unflatten(1, (ANCHORS, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3)
