"""Assigning the points of a batch to its ground truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from benchmarks.harness import OURS, Case
from focalops import assign_fcos, reference

SIZE = 640


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for images, objects in ((1, 20),) if quick else ((1, 20), (16, 20), (16, 300)):
        yield fcos_case(images, objects, device)


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
