"""Points, boxes and predictions as a detector without anchor boxes has them, for the tests of the assigners."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden" / "assigners.json").read_text())


def grid(size: int, strides: list[int], device: str = "cpu") -> tuple[Tensor, list[int]]:
    """The centers of the cells of each level of a square image, and how many each level has."""
    levels = []
    for stride in strides:
        along = (torch.arange(-(-size // stride)) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        levels.append(torch.stack((x, y), dim=-1).reshape(-1, 2))
    return torch.cat(levels).to(device), [len(level) for level in levels]


def random_boxes(n: int, size: int, least: float = 3, most: float = 250) -> Tensor:
    """Some partly outside."""
    center = torch.rand(n, 2) * size
    sides = least * (most / least) ** torch.rand(n, 2)
    return torch.cat((center - sides / 2, center + sides / 2), dim=1)


def positives(matches: Tensor) -> list[list[int]]:
    """Of one image, as the golden cases have them: point and box of each match."""
    points = torch.where(matches >= 0)[0]
    return torch.stack((points, matches[points]), dim=1).tolist()


def predictions(
    points: Tensor, gt_boxes: list[Tensor], num_classes: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores (B, N, K) and boxes (B, N, 4), most of them near a ground-truth box, and labels; on the CPU."""
    scores = torch.rand(len(gt_boxes), len(points), num_classes) ** 2
    sides = 4 + 60 * torch.rand(len(gt_boxes), len(points), 4)
    boxes = points.repeat(1, 2) + sides * torch.tensor([-1, -1, 1, 1])
    for predicted, of_image in zip(boxes, gt_boxes, strict=True):
        if len(of_image):
            nearest = torch.cdist(points, (of_image[:, :2] + of_image[:, 2:]) / 2).argmin(1)
            near = of_image[nearest]
            off = torch.randn(len(points), 4) * (near[:, 2:] - near[:, :2]).repeat(1, 2) * 0.15
            predicted.copy_(torch.where(torch.rand(len(points), 1) < 0.7, near + off, predicted))
    labels = [torch.randint(0, num_classes, (len(of_image),)) for of_image in gt_boxes]
    return scores, boxes, labels


def squares(
    size: int, strides: list[int], sides: float, device: str = "cpu"
) -> tuple[Tensor, list[int]]:
    """Anchors of as many strides about those centers, and how many each level has."""
    points, level_sizes = grid(size, strides, device)
    of_level = torch.tensor(level_sizes, device=device)
    half = torch.tensor(strides, device=device).repeat_interleave(of_level)[:, None] * (sides / 2)
    return torch.cat((points - half, points + half), dim=1), level_sizes
