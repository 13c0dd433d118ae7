"""Scale jitter, as EfficientDet is trained with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

LEAST_SIDE = 1e-2  # of a box that stays: below, the float32 numbers of its sides may become one


@dataclass(frozen=True)
class ScaleJitter:
    """An image of a random size in the upper left of a square, or a random part of it where it exceeds the square."""

    factors: tuple[
        float, float
    ]  # limits of what the sides are multiplied by; at 1 the image fits the square
    side: int  # of the square
    colour: tuple[float, float, float]  # of the padding, in 0..1

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Resized and cropped; every box of which a part is seen stays, a crowd's too. `pad` comes last: what changes
        colours must not change that of the padding."""
        low, high = self.factors
        height, width = image.shape[-2:]
        scale = (low + (high - low) * torch.rand(()).item()) * self.side / max(height, width)
        size = [max(int(height * scale), 1), max(int(width * scale), 1)]
        shown = [min(extent, self.side) for extent in size]
        top, left = (
            int(torch.randint(extent - part + 1, ()))
            for extent, part in zip(size, shown, strict=True)
        )
        # Without antialiasing, as the model resizes its images.
        image = F.resize(image, size, antialias=False)[
            ..., top : top + shown[0], left : left + shown[1]
        ]
        boxes = boxes * boxes.new_tensor([size[1] / width, size[0] / height] * 2)
        boxes = (boxes - boxes.new_tensor([left, top] * 2)).clamp(min=0)
        boxes = torch.minimum(boxes, boxes.new_tensor([shown[1], shown[0]] * 2))
        keep = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(dim=1)
        return image, boxes[keep], labels[keep]

    def pad(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        square = image.new_tensor(self.colour)[:, None, None].repeat(1, self.side, self.side)
        square[:, :height, :width] = image
        return square
