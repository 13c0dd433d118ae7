"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection"): its configuration, the feature pyramid and the heads.

Parameters carry torchvision's names. Convolutions are torch's; what surrounds them is a Detector's. Shapes and their
letters are those of structures.py.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focalops import AnchorGenerator

from .backbones import backbone, channels
from .config import DetectorConfig, NetworkConfig, Ranges, check_levels
from .detector import Detector
from .ranges import one_of, optional, real, whole
from .structures import HeadOutputs


@dataclass(frozen=True)
class PyramidConfig(NetworkConfig):
    pyramid_channels: int = 256
    p6_from: Literal["p5", "c5"] = "p5"
    head_depth: int = 4  # 3x3 convolutions before the last one
    head_norm_groups: int | None = None  # of a GroupNorm behind each of them; None: no norm
    head_std: float | None = 0.01  # of their first weights; None keeps the variance (He et al.)
    prior_probability: float = 0.01

    RANGES: ClassVar[Ranges] = {
        "max_level": one_of((2, 3, 4, 5, 7)),
        "pyramid_channels": whole(1),
        "p6_from": one_of(("p5", "c5")),
        "head_depth": whole(0),
        "head_norm_groups": optional(whole(1)),
        "head_std": optional(real(0, above=True)),
        "prior_probability": real(0, 1, above=True, below=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm_groups and self.pyramid_channels % self.head_norm_groups:
            raise ValueError(
                f"pyramid_channels must be a multiple of head_norm_groups, "
                f"{self.head_norm_groups}, got {self.pyramid_channels}"
            )


@dataclass(frozen=True)
class RetinaNetConfig(DetectorConfig, PyramidConfig):
    """The defaults are torchvision's retinanet_resnet50_fpn."""

    kind: ClassVar[str] = "retinanet"

    @property
    def finest_stride(self) -> int:
        return int(2**self.min_level)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self, self)


class RetinaNet(Detector):
    config: RetinaNetConfig
    class_layers = ("head.classification_head.cls_logits.",)

    def __init__(self, config: RetinaNetConfig, pretrained_backbone: bool = False) -> None:
        anchors = AnchorGenerator(
            config.anchor_sizes, (config.aspect_ratios,) * len(config.anchor_sizes)
        )
        super().__init__(config, anchors)
        self.backbone = Backbone(config, pretrained_backbone)
        self.head = RetinaNetHead(config, anchors.num_anchors_per_location()[0])

    def network(self, images: Tensor) -> HeadOutputs:
        return self.head(self.backbone(images))

    @classmethod
    def from_torchvision(cls, model: nn.Module) -> RetinaNet:
        """A copy of torchvision's retinanet_resnet50_fpn, its _v2 or another of its RetinaNets on a
        ResNet: same losses, gradients and detections, same names of the parameters.

        Where no RetinaNetConfig means the same, a ValueError says what stands against it.
        """
        from .from_torchvision import config_of

        copy = cls(config_of(model))
        copy.load_state_dict(model.state_dict())
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_(trained[name])
        return copy.to(next(model.parameters()).device).train(model.training)


# ---- Backbone and pyramid -----------------------------------------------------------------------


class Backbone(nn.Module):
    """A classifier's stages (`body`) under torchvision's feature pyramid (`fpn`)."""

    def __init__(self, config: PyramidConfig, pretrained: bool) -> None:
        super().__init__()
        self.body = backbone(config, pretrained)
        of_stages, width = channels(self.body), config.pyramid_channels
        self.num_levels = config.max_level - config.min_level + 1
        extra = None
        if config.max_level == 7:
            from_p5 = config.p6_from == "p5"
            extra = LastLevelP6P7(width if from_p5 else of_stages[-1], width)
            extra.use_P5 = from_p5  # torchvision guesses it from the number of channels
        self.fpn = FeaturePyramidNetwork(of_stages, width, extra_blocks=extra)
        for block in self.fpn.layer_blocks[self.num_levels :]:
            block.requires_grad_(False)  # left out: no gradient will come, for which DDP would wait

    def forward(
        self, images: Tensor
    ) -> list[Tensor]:  # (B, 3, H, W) -> L of (B, C, H, W), finest first
        pyramid = self.fpn(OrderedDict(self.body(images)))
        return list(pyramid.values())[: self.num_levels]  # what is left out still gave context


# ---- Heads --------------------------------------------------------------------------------------


class RetinaNetHead(nn.Module):
    """The two subnets, shared by all levels; outputs stay per level, as the convolutions wrote them."""

    def __init__(self, config: PyramidConfig, num_anchors: int) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(config, num_anchors)
        self.regression_head = RegressionHead(config, num_anchors)

    def forward(self, features: list[Tensor]) -> HeadOutputs:
        return HeadOutputs(
            [self.classification_head(f) for f in features],
            [self.regression_head(f) for f in features],
        )


class ClassificationHead(nn.Module):
    def __init__(self, config: PyramidConfig, num_anchors: int) -> None:
        super().__init__()
        self.conv = _tower(config)
        self.cls_logits = _head_conv(config.pyramid_channels, num_anchors * config.num_classes)
        # Every anchor starts at sigmoid(bias) = prior: else the many negatives swamp the first steps.
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        return self.cls_logits(self.conv(feature))


class RegressionHead(nn.Module):
    def __init__(self, config: PyramidConfig, num_anchors: int) -> None:
        super().__init__()
        self.conv = _tower(config)
        self.bbox_reg = _head_conv(config.pyramid_channels, num_anchors * 4)

    def forward(self, feature: Tensor) -> Tensor:
        return self.bbox_reg(self.conv(feature))


def _tower(config: PyramidConfig) -> nn.Sequential:
    width = config.pyramid_channels
    groups = config.head_norm_groups
    norm_layer = functools.partial(nn.GroupNorm, groups) if groups else None
    layers = [
        Conv2dNormActivation(width, width, norm_layer=norm_layer) for _ in range(config.head_depth)
    ]
    for layer in layers:
        _initialise(layer[0], config.head_std)
    return nn.Sequential(*layers)


def _head_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return _initialise(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1), std=0.01)


def _initialise(conv: nn.Conv2d, std: float | None) -> nn.Conv2d:
    if std is None:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
