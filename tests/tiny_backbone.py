"""A backbone of a few thousand weights, so that training in tests takes milliseconds and its checkpoints few bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models._api import register_model

from models.__main__ import main
from models.config import BACKBONES, RESNET_STAGES
from models.recipes import Recipe
from models.retinanet import RetinaNetConfig


class TinyBackbone(nn.Module):
    """The names and strides of a ResNet, one convolution a stage."""

    def __init__(self, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm_layer(4)
        channels = (4, 4, 8, 8, 16)
        for stage in range(1, 5):
            narrow, wide = channels[stage - 1 : stage + 1]
            layer = nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False)
            setattr(self, f"layer{stage}", nn.Sequential(layer, norm_layer(wide), nn.ReLU()))

    def forward(self, images: Tensor) -> Tensor:
        features = self.bn1(self.conv1(images))
        return self.layer4(self.layer3(self.layer2(self.layer1(features))))


@register_model("tiny")
def tiny(*, weights: Any = None, norm_layer: Callable[[int], nn.Module]) -> TinyBackbone:
    assert weights is None, "there are no ImageNet weights of the tiny backbone"
    return TinyBackbone(norm_layer)


BACKBONES["tiny"] = RESNET_STAGES

TINY_RECIPE = Recipe(
    model=RetinaNetConfig(
        num_classes=2,
        backbone="tiny",
        trainable_stages=5,
        max_level=5,
        pyramid_channels=8,
        head_depth=1,
        head_std=None,
        anchor_sizes=((16,), (32,), (64,)),
        aspect_ratios=(1.0,),
        min_size=(48, 64, 80),  # drawn from the global generator
        max_size=160,
        score_threshold=0.0,
        detections_per_image=20,
    ),
    steps=4,
    batch_size=2,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="cosine",
    ema_decay=0.9,
)

if __name__ == "__main__":  # python -m models, with this backbone
    sys.exit(main())
