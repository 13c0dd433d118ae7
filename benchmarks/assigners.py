"""Assigning the points of a batch to its ground truth."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from benchmarks.harness import OURS, Case
from focalops import (
    assign_atss,
    assign_fcos,
    assign_simota,
    assign_task_aligned,
    reference,
)

SIZE = 640


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for images, objects in ((1, 20),) if quick else ((1, 20), (16, 20), (16, 300)):
        yield fcos_case(images, objects, device)
    for images, objects in ((1, 20),) if quick else ((1, 20), (16, 20), (16, 300), (1, 4967)):
        yield atss_case(images, objects, device)
    sizes = ((1, 20), (16, 20), (1, 300), (16, 300), (1, 4967))  # the last as in xView
    for images, objects in sizes[:1] if quick else sizes:
        yield task_aligned_case(images, objects, device)
    for rule in ("simota", "yolox", "rtmdet"):
        for images, objects in sizes[:1] if quick else sizes[:3]:
            yield simota_case(rule, images, objects, device)


def grid(strides: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """The centers of the cells of each level of a square image, and how many each level has."""
    levels = []
    for stride in strides:
        along = (torch.arange(SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        levels.append(torch.stack((x, y), dim=-1).reshape(-1, 2))
    return torch.cat(levels).to(device), [len(level) for level in levels]


def random_boxes(count: int, device: torch.device, most: float = 400) -> Tensor:
    size = torch.exp(torch.rand(count, 2) * math.log(most / 6) + math.log(6))
    corner = torch.rand(count, 2) * (SIZE - size)
    return torch.cat((corner, corner + size), dim=1).to(device)


def fcos_case(images: int, objects: int, device: torch.device) -> Case:
    strides = [8, 16, 32, 64, 128]
    points, level_sizes = grid(strides, device)
    gt_boxes = [random_boxes(objects, device) for _ in range(images)]
    half = torch.tensor(strides).repeat_interleave(torch.tensor(level_sizes))[:, None] / 2
    anchors = torch.cat((points - half.to(device), points + half.to(device)), dim=1)
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matches: matches)
    model = SimpleNamespace(center_sampling_radius=1.5, head=head)
    targets = [{"boxes": boxes} for boxes in gt_boxes]

    def with_torchvision() -> Tensor:
        return torch.stack(FCOS.compute_loss(model, targets, {}, [anchors] * images, level_sizes))

    contestants = {
        OURS: lambda: assign_fcos(points, strides, level_sizes, gt_boxes),
        "reference": lambda: reference.assign_fcos(points, strides, level_sizes, gt_boxes),
        "torchvision": with_torchvision,
    }

    def agree(ours: Tensor, theirs: Tensor) -> None:
        assert torch.equal(ours, theirs)

    size = f"{images} x {len(points):,} points, {objects} boxes"
    return Case("assign_fcos", size, images * len(points) * 16, contestants, agree)


def atss_case(images: int, objects: int, device: torch.device) -> Case:
    strides = [8, 16, 32]
    points, level_sizes = grid(strides, device)
    half = torch.tensor(strides).repeat_interleave(torch.tensor(level_sizes))[:, None] * 4.0
    anchors = torch.cat((points - half.to(device), points + half.to(device)), dim=1)
    most = 400 if objects < 1000 else 40  # of an aerial image
    gt_boxes = [random_boxes(objects, device, most) for _ in range(images)]
    contestants = {OURS: lambda: assign_atss(anchors, level_sizes, gt_boxes)}
    if images * objects <= 320:
        contestants["reference"] = lambda: reference.assign_atss(anchors, level_sizes, gt_boxes)
    try:
        from mmdet.models.task_modules.assigners import ATSSAssigner
        from mmengine.structures import InstanceData
    except ImportError:
        pass
    else:
        assigner = ATSSAssigner(topk=9)
        labels = torch.zeros(objects, dtype=torch.int64, device=device)

        def with_mmdet() -> Tensor:
            priors = InstanceData(priors=anchors)
            return torch.stack(
                [
                    assigner.assign(
                        priors, level_sizes, InstanceData(bboxes=boxes, labels=labels)
                    ).gt_inds
                    - 1
                    for boxes in gt_boxes
                ]
            )

        contestants["mmdet"] = with_mmdet

    def agree(ours: Tensor, theirs: Tensor) -> None:
        assert torch.equal(ours, theirs)

    size = f"{images} x {len(anchors):,} anchors, {objects:,} boxes"
    return Case("assign_atss", size, images * len(anchors) * 24, contestants, agree)


def task_aligned_case(images: int, objects: int, device: torch.device) -> Case:
    """At YOLOv8's settings, predictions near the objects as a trained network has them."""
    num_classes = 80
    points, _ = grid([8, 16, 32], device)
    most = 400 if objects < 1000 else 40
    gt_boxes = torch.stack([random_boxes(objects, device, most) for _ in range(images)])
    gt_labels = torch.randint(0, num_classes, (images, objects), device=device)
    centers = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    near = gt_boxes.gather(1, torch.cdist(points, centers).argmin(2)[..., None].expand(-1, -1, 4))
    boxes = near + torch.randn_like(near) * (near[..., 2:] - near[..., :2]).repeat(1, 1, 2) * 0.15
    scores = torch.rand(images, len(points), num_classes, device=device) ** 4
    mask = torch.ones(images, objects, 1, device=device)

    contestants = {
        OURS: lambda: assign_task_aligned(scores, boxes, points, gt_boxes, gt_labels),
    }
    if images * objects <= 320:
        contestants["reference"] = lambda: reference.assign_task_aligned(
            scores, boxes, points, gt_boxes, gt_labels
        )
    with contextlib.suppress(ImportError):
        from ultralytics.utils.tal import TaskAlignedAssigner

        assigner = TaskAlignedAssigner(topk=10, num_classes=num_classes, alpha=0.5, beta=6.0)

        def with_ultralytics() -> tuple[Tensor, Tensor]:
            labels = gt_labels[..., None].float()
            _, _, targets, foreground, index = assigner(
                scores, boxes, points, labels, gt_boxes, mask
            )
            return index.where(foreground.bool(), -1), targets.sum(-1)

        contestants["ultralytics"] = with_ultralytics

    def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
        has_score = theirs[1] > 0  # their ties of metric 0 are background here
        assert torch.equal(ours[0].where(has_score, -1), theirs[0].where(has_score, -1))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-6)

    size = f"{images} x {len(points):,} points, {objects:,} boxes"
    moved = images * len(points) * 36
    return Case("assign_task_aligned", size, moved, contestants, agree)


def simota_case(rule: str, images: int, objects: int, device: torch.device) -> Case:
    """COCO's classes; predictions near the objects as a trained network has them."""
    num_classes = 80
    points, level_sizes = grid([8, 16, 32], device)
    strides = torch.tensor([8.0, 16, 32]).repeat_interleave(torch.tensor(level_sizes)).to(device)
    if rule == "rtmdet":
        points = points - strides[:, None] / 2
    gt_boxes = torch.stack([random_boxes(objects, device) for _ in range(images)])
    gt_labels = torch.randint(0, num_classes, (images, objects), device=device)
    centers = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    near = gt_boxes.gather(1, torch.cdist(points, centers).argmin(2)[..., None].expand(-1, -1, 4))
    boxes = near + torch.randn_like(near) * (near[..., 2:] - near[..., :2]).repeat(1, 1, 2) * 0.15
    logits = 2 * torch.randn(images, len(points), num_classes, device=device) - 3
    objectness = 2 * torch.randn(images, len(points), device=device) if rule == "yolox" else None
    arguments = (logits, boxes, points, strides, gt_boxes, gt_labels)
    options = {"objectness": objectness, "rule": rule}
    contestants = {OURS: lambda: assign_simota(*arguments, **options)}
    if images * objects <= 20:
        contestants["reference"] = lambda: reference.assign_simota(*arguments, **options)
    if rule == "yolox":
        with contextlib.suppress(ImportError):
            from yolox.models.yolo_head import YOLOXHead

            head = YOLOXHead(num_classes)
            shifts = ((points - strides[:, None] / 2) / strides[:, None]).t()[:, None]
            centered, centered_gt = (
                torch.cat((b[..., :2] + b[..., 2:], 2 * (b[..., 2:] - b[..., :2])), dim=-1) / 2
                for b in (boxes, gt_boxes)
            )

            def with_yolox() -> tuple[Tensor, ...]:
                matches = torch.full((images, len(points)), -1, device=device)
                for image in range(images):
                    _, foreground, _, matched, _ = head.get_assignments(
                        image,
                        objects,
                        centered_gt[image],
                        gt_labels[image],
                        centered[image],
                        strides[None],
                        *shifts,
                        logits,
                        objectness[..., None],
                    )
                    matches[image, foreground] = matched
                return (matches,)

            contestants["yolox"] = with_yolox
    else:
        with contextlib.suppress(ImportError):
            from mmdet.models.task_modules import assigners
            from mmengine.structures import InstanceData

            name = "SimOTAAssigner" if rule == "simota" else "DynamicSoftLabelAssigner"
            assigner = getattr(assigners, name)()
            priors = torch.cat((points, strides[:, None].expand(-1, 2)), dim=1)
            # The first takes probabilities, the second logits.
            scores = logits.sigmoid() if rule == "simota" else logits

            def with_mmdet() -> tuple[Tensor, ...]:
                matches = []
                for image in range(images):
                    predictions = InstanceData(
                        priors=priors, bboxes=boxes[image], scores=scores[image]
                    )
                    truth = InstanceData(bboxes=gt_boxes[image], labels=gt_labels[image])
                    matches.append(assigner.assign(predictions, truth).gt_inds - 1)
                return (torch.stack(matches),)

            contestants["mmdet"] = with_mmdet

    def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        # Logarithms of other polynomials: costs that differ by an ulp may change places.
        assert (ours[0] != theirs[0]).float().mean() < 1e-3

    size = f"{rule}, {images} x {len(points):,} points, {objects:,} boxes"
    moved = images * len(points) * (40 + 4 * num_classes)
    return Case("assign_simota", size, moved, contestants, agree)
