"""Boxes as a detector meets them: an image of 800 x 1344, the anchors of P3 to P7, objects as large as COCO's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from focalops import AnchorGenerator

HEIGHT, WIDTH = 800, 1344
STRIDES = (8, 16, 32, 64, 128)


def retinanet_anchors(
    device: torch.device, image_size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Tensor:
    """9 anchors a position of P3 to P7: by default (201,600, 4) in round numbers."""
    sizes = [[s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)] for s in (32, 64, 128, 256, 512)]
    generator = AnchorGenerator(sizes, [[0.5, 1.0, 2.0]] * 5).to(device)
    height, width = image_size
    feature_sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return generator.grid(image_size, feature_sizes, device)


def random_anchors(count: int, device: torch.device) -> Tensor:
    anchors = retinanet_anchors(device)
    if count >= len(anchors):
        return anchors
    return anchors[torch.randperm(len(anchors), device=device)[:count].sort().values]


def random_boxes(count: int, device: torch.device) -> Tensor:
    """Sides log-normal around 80 pixels: two in five are small by COCO's measure, one in four large."""
    size = torch.exp(torch.randn(count, 2) * 0.8 + math.log(80)).clamp(4, 780)
    limit = torch.tensor([WIDTH, HEIGHT]) - size
    corner = torch.rand(count, 2) * limit.clamp(min=0)
    return torch.cat((corner, corner + size), dim=1).to(device)
