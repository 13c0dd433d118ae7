"""From images to a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from .config import ImageConfig
from .structures import Target


def transform(config: ImageConfig) -> GeneralizedRCNNTransform:
    return (ResizingTransform if config.min_size else UnresizedTransform)(
        config.min_size,
        config.max_size,
        list(config.image_mean),
        list(config.image_std),
        size_divisible=config.batch_divisor,
    )


class ResizingTransform(GeneralizedRCNNTransform):
    """torchvision's. Images of bytes become numbers when they have their size, a channel at a time: a
    floating-point copy of a large photograph would be four times as large."""

    def normalize(self, image: Tensor) -> Tensor:
        is_later = image.dtype == torch.uint8 and not self.training
        return image if is_later else super().normalize(image)

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        if image.dtype != torch.uint8:
            return super().resize(image, target)
        channels = [super(ResizingTransform, self).resize(c.float())[0] for c in image.split(1)]
        return super().normalize(torch.cat(channels) / 255), target


class UnresizedTransform(GeneralizedRCNNTransform):
    """Normalises and pads to a batch, nothing else."""

    def normalize(self, image: Tensor) -> Tensor:
        is_bytes = image.dtype == torch.uint8 and not self.training
        return super().normalize(image.float() / 255 if is_bytes else image)

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        return image, target
