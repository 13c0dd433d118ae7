"""Random arguments for what is no function of tensors, AnchorGenerator and accelerate, and what they are compared with."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import focalops

pick = random.choice
between = random.randint


def anchor_generator() -> dict[str, Any]:
    levels = between(1, 4)
    convention = pick(("torchvision", "detectron2", "mmdet", "efficientdet"))
    strides = [between(1, 64) for _ in range(levels)]
    options: dict[str, Any] = {}
    if convention in ("detectron2", "mmdet"):
        options["offset"] = pick((0.0, 0.5))
    if convention == "mmdet":
        options["scale_major"] = pick((True, False))
    ratios = (0.5, 1.0, random.uniform(0.1, 3))
    return {
        "sizes": tuple(tuple(float(between(8, 600)) for _ in range(2)) for _ in range(levels)),
        "aspect_ratios": ratios if convention == "efficientdet" else (ratios,) * levels,
        "convention": convention,
        "strides": None if convention == "torchvision" else strides,
        **options,
        "image_size": (between(64, 500), between(64, 500)),
        "feature_sizes": [(between(1, 20), between(1, 20)) for _ in range(levels)],
    }


def grid(image_size: Any, feature_sizes: Any, **options: Any) -> Tensor:
    return focalops.AnchorGenerator(**options).grid(image_size, feature_sizes)


def grid_of_formulas(
    sizes: Any,
    aspect_ratios: Any,
    convention: str,
    strides: Any,
    image_size: Any,
    feature_sizes: Any,
    offset: float = 0,
    scale_major: bool = True,
) -> Tensor:
    """torchvision's own module, or what the others say in words."""
    if convention == "torchvision":
        maps = [torch.zeros(1, 1, *size) for size in feature_sizes]
        images = ImageList(torch.zeros(1, 1, *image_size), [image_size])
        return AnchorGenerator(sizes, aspect_ratios)(images, maps)[0]
    anchors = []
    for scales, stride, (height, width) in zip(sizes, strides, feature_sizes, strict=True):
        step_x = step_y = stride
        ratios = (
            aspect_ratios[0] if convention != "efficientdet" else [1 / r for r in aspect_ratios]
        )
        if convention == "efficientdet":  # width / height, and strides as they come out
            step_x, step_y, offset = image_size[1] / width, image_size[0] / height, 0.5
        shapes = [(s, r) for s in scales for r in ratios]
        if convention == "mmdet" and scale_major:
            shapes = [(s, r) for r in ratios for s in scales]
        for y in range(height):
            for x in range(width):
                for s, r in shapes:
                    w, h = s / r**0.5 * step_x / stride, s * r**0.5 * step_y / stride
                    x0, y0 = (x + offset) * step_x, (y + offset) * step_y
                    anchors.append((x0 - w / 2, y0 - h / 2, x0 + w / 2, y0 + h / 2))
    return torch.tensor(anchors, dtype=torch.float64)


class Backbone(torch.nn.Module):
    """Two levels of 32 channels."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(c, 32, 3, s, 1) for c, s in ((3, 8), (32, 2)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x).relu()
        return {"0": x, "1": self.second(x)}


def detector() -> dict[str, Any]:
    kind = pick((RetinaNet, FCOS))
    sizes = ((16.0, 24.0), (64.0,) * 2) if kind is RetinaNet else ((8.0,), (64.0,))
    generator = AnchorGenerator(sizes, ((0.5, 1.0) if kind is RetinaNet else (1.0,),) * 2)
    settings = {"min_size": 64, "max_size": 96, "anchor_generator": generator}
    # Where nothing is near a threshold rounding takes no detection away; detect itself has rounds of its own.
    settings |= {"score_thresh": 0.0, "nms_thresh": 1.0}
    model = kind(Backbone(), between(1, 5), **settings)
    images = [torch.rand(3, between(50, 90), between(50, 90)) for _ in range(between(1, 3))]
    targets = []
    for _ in images:
        corner = torch.rand(between(0, 3), 2) * 30
        found = torch.cat((corner, corner + 2 + torch.rand(corner.shape) * 20), dim=1)
        targets.append({"boxes": found, "labels": torch.zeros(len(found)).long()})
    return {"model": model, "images": images, "targets": targets}


def of_detector(model: Any, images: list[Tensor], targets: list[Any]) -> list[Tensor]:
    """Losses, gradients and the scores of the detections; boxes of equal scores come in any order."""
    losses = model.train()(images, targets)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sum(losses.values()), parameters)
    gradient = torch.cat([g.flatten() for g in grads])
    with torch.no_grad():
        scores = [found["scores"] for found in model.eval()(images)]
    return [*losses.values(), gradient, *scores]


def of_accelerated(model: Any, **batch: Any) -> list[Tensor]:
    model = copy.deepcopy(model)
    focalops.accelerate(model)
    return of_detector(model, **batch)


# How to call each, and what gives the same.
MODULES = {
    "AnchorGenerator": (grid, grid_of_formulas),
    "accelerate": (of_accelerated, of_detector),
}
