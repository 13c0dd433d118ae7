"""EfficientDet (Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object Detection"): its configuration, the
pyramid of weighted fusions (BiFPN) and the heads.

Backbones are timm's, and EfficientDet.from_effdet takes a model of the package effdet, weights included, from_effdet_file
one of its files. Shapes and their letters are those of structures.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalops import AnchorGenerator, fuse_features

from .backbones import backbone, channels
from .config import (
    TIMM,
    BoxLoss,
    DetectorConfig,
    MatchingRule,
    NetworkConfig,
    Normalizer,
    Ranges,
    check_levels,
)
from .detector import Detector
from .ranges import check, either, one_of, real, several, switch, whole
from .structures import HeadOutputs


class Scale(NamedTuple):
    """A row of the published table."""

    size: int  # of the images
    backbone: str  # behind timm's efficientnet_
    pyramid_channels: int
    cells: int
    head_depth: int
    fusion: str = "fast"
    anchor_scale: float = 4
    max_level: int = 7


# The published models. Where they differ from the paper's formulas (`compound`) the table is what was trained.
SCALES = {
    "d0": Scale(512, "b0", 64, 3, 3),
    "d1": Scale(640, "b1", 88, 4, 3),
    "d2": Scale(768, "b2", 112, 5, 3),
    "d3": Scale(896, "b3", 160, 6, 4),
    "d4": Scale(1024, "b4", 224, 7, 4),
    "d5": Scale(1280, "b5", 288, 7, 4),
    "d6": Scale(1280, "b6", 384, 8, 5, "sum"),
    "d7": Scale(1536, "b6", 384, 8, 5, "sum", 5),
    "d7x": Scale(1536, "b7", 384, 8, 5, "sum", 4, 8),
    "lite0": Scale(320, "lite0", 64, 3, 3, "sum", 3),
    "lite1": Scale(384, "lite1", 88, 4, 3, "sum", 3),
    "lite2": Scale(448, "lite2", 112, 5, 3, "sum", 3),
    "lite3": Scale(512, "lite3", 160, 6, 4, "sum"),
    "lite4": Scale(640, "lite4", 224, 7, 4, "sum"),
}


def compound(phi: int) -> Scale:
    """The paper's formulas for the coefficient phi, its widths rounded to multiples of 8."""
    width = 8 * round(64 * 1.35**phi / 8)
    return Scale(512 + 128 * phi, f"b{min(phi, 7)}", width, 3 + phi, 3 + phi // 3)


def anchor_sizes(scale: float, min_level: int, max_level: int) -> tuple[tuple[float, ...], ...]:
    """Three a level, a third of an octave apart, from `scale` strides on; not rounded."""
    return tuple(
        tuple(scale * 2**level * 2 ** (octave / 3) for octave in range(3))
        for level in range(min_level, max_level + 1)
    )


@dataclass(frozen=True)
class BiFPNConfig(NetworkConfig):
    backbone: str = "timm:efficientnet_b0"
    trainable_stages: int = 5
    frozen_batch_norm: bool = False
    pyramid_channels: int = 64
    cells: int = 3  # how often the pyramid goes down and up
    # Weights of what is fused: fast, relu(w) / (sum of relu(w) + 1e-4); softmax; unbounded, as they are; sum, none.
    fusion: Literal["fast", "softmax", "unbounded", "sum"] = "fast"
    head_depth: int = 3  # separable convolutions before the last one
    activation: Literal["silu", "relu6"] = "silu"
    # Of the pools and strided convolutions: TensorFlow's, or as many on both sides.
    padding: Literal["symmetric", "same"] = "symmetric"
    # The original's, 0.99 as Keras counts it. A run of a few hundred steps wants more: what is left of the statistics that
    # norms start with, (1 - momentum)**steps of a variance of 1, is much where that of the features is a hundredth.
    batch_norm_momentum: float = 0.01  # of the pyramid's and the heads' norms
    redundant_bias: bool = False  # of convolutions before a batch norm, as the original has them
    drop_path: float = (
        0.0  # how often timm's last residual block is skipped in training; the others less
    )
    prior_probability: float = 0.01

    RANGES: ClassVar[Ranges] = {
        "max_level": whole(6),
        "pyramid_channels": whole(1),
        "cells": whole(1),
        "fusion": one_of(("fast", "softmax", "unbounded", "sum")),
        "head_depth": whole(0),
        "activation": one_of(("silu", "relu6")),
        "padding": one_of(("symmetric", "same")),
        "batch_norm_momentum": real(0, 1, above=True),
        "redundant_bias": switch(),
        "drop_path": real(0, 1, below=True),
        "prior_probability": real(0, 1, above=True, below=True),
    }


@dataclass(frozen=True)
class EfficientDetConfig(DetectorConfig, BiFPNConfig):
    """The defaults are efficientdet_d0's; `named` has the others."""

    kind: ClassVar[str] = "efficientdet"

    num_classes: int = 90
    anchor_sizes: tuple[tuple[float, ...], ...] = anchor_sizes(4, 3, 7)  # type: ignore[assignment]
    aspect_ratios: tuple[Any, ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))  # factors of (w, h)
    bg_iou_threshold: float = 0.5
    matching_rule: MatchingRule = "efficientdet"
    gamma: float = 1.5
    normalizer: Normalizer = "positives"
    # 50 times the mean of the Huber losses (delta 0.1) of a box's four numbers: 50 * 0.1 / 4 times this smooth L1.
    box_loss: BoxLoss = "smooth_l1"
    box_loss_beta: float = 0.1
    box_loss_weight: float = 1.25
    score_threshold: float = 0.0
    topk_candidates: int = 5000
    topk: int | None = 5000
    detections_per_image: int = 100
    min_size: int = 512
    max_size: int = 512
    letterbox: bool = True

    RANGES: ClassVar[Ranges] = {
        "anchor_sizes": several(several(real(0, above=True))),
        "aspect_ratios": several(either(real(0, above=True), several(real(0, above=True), 2))),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self, self)
        if self.drop_path and not self.backbone.startswith(TIMM):
            raise ValueError(
                f"drop_path must be 0 with a backbone of torchvision's, {self.backbone}, "
                f"got {self.drop_path}"
            )

    @property
    def finest_stride(self) -> int:
        return int(2**self.min_level)

    @property
    def size_divisor(self) -> int:
        return 2**self.max_level

    @property
    def batch_divisor(self) -> int:
        """A square may have any side: strides are its own, as lite0's 320 / 3."""
        return self.max_size if self.letterbox else self.size_divisor

    @classmethod
    def named(cls, name: str, **fields: Any) -> EfficientDetConfig:
        """A published model: ``"d0"`` to ``"d7"`` and ``"d7x"``, ``"lite0"`` to ``"lite4"``, and ``tf_`` before a name for
        the form of the original weights; `fields` differ from it."""
        base = name.removeprefix("tf_")
        check("name", base, one_of(tuple(SCALES)))
        scale = SCALES[base]
        is_lite = base.startswith("lite")
        original = is_lite or base != name
        made: dict[str, Any] = {
            "backbone": f"timm:{'tf_' * original}efficientnet_{scale.backbone}",
            "pyramid_channels": scale.pyramid_channels,
            "cells": scale.cells,
            "head_depth": scale.head_depth,
            "fusion": scale.fusion,
            "activation": "relu6" if is_lite else "silu",
            "padding": "same" if original else "symmetric",
            "redundant_bias": original,
            "max_level": scale.max_level,
            "anchor_sizes": anchor_sizes(scale.anchor_scale, 3, scale.max_level),
            "min_size": scale.size,
            "max_size": scale.size,
        }
        if is_lite:
            made |= {"image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3}
        return cls(**made | fields)


class EfficientDet(Detector):
    config: EfficientDetConfig
    class_layers = ("class_head.output.",)
    delta_clip = 1000.0  # none: its exponential is infinite

    def __init__(self, config: EfficientDetConfig, pretrained_backbone: bool = False) -> None:
        anchors = AnchorGenerator(
            config.anchor_sizes,
            config.aspect_ratios,
            convention="efficientdet",
            strides=[2**level for level in range(config.min_level, config.max_level + 1)],
        )
        super().__init__(config, anchors)
        self.backbone = backbone(config, pretrained_backbone, config.drop_path)
        self.fpn = BiFPN(config, channels(self.backbone))
        num_anchors = anchors.num_anchors_per_location()[0]
        self.class_head = Head(config, num_anchors * config.num_classes)
        self.box_head = Head(config, num_anchors * 4)
        prior = config.prior_probability
        nn.init.constant_(self.class_head.output[1].bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def network(self, images: Tensor) -> HeadOutputs:
        features = self.fpn([*self.backbone(images).values()])
        return HeadOutputs(self.class_head(features), self.box_head(features))

    @classmethod
    def from_effdet(cls, model: nn.Module) -> EfficientDet:
        """A copy of a model of the package effdet: same features, losses, gradients and detections.

        Its boxes are in the order (y, x, h, w), these in (x, y, w, h).

        Raises:
            ValueError: what stands against a copy that means the same.
        """
        from .from_effdet import config_of, renamed

        copy = cls(config_of(model))
        copy.load_state_dict(renamed(model.state_dict(), copy))
        return copy.to(next(model.parameters()).device).train(model.training)

    @classmethod
    def from_effdet_file(cls, path: Path | str, name: str, **fields: Any) -> EfficientDet:
        """from_effdet.from_effdet_file, which says what it takes."""
        from .from_effdet import from_effdet_file

        return from_effdet_file(path, name, **fields)


# ---- Pyramid --------------------------------------------------------------------------------------


class Node(NamedTuple):
    level: int
    inputs: tuple[int, ...]  # indices of nodes; the first ones are the cell's inputs, finest first


def cell_nodes(min_level: int, max_level: int) -> list[Node]:
    """A way down from the coarsest level but one, and a way up from the finest but one.

    A node of the way down takes its level's input and the node above; one of the way up takes all that its level
    has, the input too, and the node below.
    """
    at = {level: [index] for index, level in enumerate(range(min_level, max_level + 1))}
    nodes: list[Node] = []

    def add(level: int, inputs: Iterable[int]) -> None:
        at[level].append(len(at) + len(nodes))
        nodes.append(Node(level, tuple(inputs)))

    for level in reversed(range(min_level, max_level)):
        add(level, (at[level][-1], at[level + 1][-1]))
    for level in range(min_level + 1, max_level + 1):
        add(level, (*at[level], at[level - 1][-1]))
    return nodes


class BiFPN(nn.Module):
    """Features C3 to C5 of a backbone -> L maps of (B, pyramid_channels, H, W), finest first."""

    def __init__(self, config: BiFPNConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        width, above = config.pyramid_channels, config.max_level - 5
        self.coarsest = lateral(config, in_channels[-1])
        of_inputs = [*in_channels, *[width] * above]
        self.cells = nn.ModuleList()
        for _ in range(config.cells):
            self.cells.append(Cell(config, of_inputs))
            of_inputs = [width] * len(of_inputs)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        coarser = self.coarsest(features[-1])
        for _ in range(5, self.config.max_level):
            coarser = halve(coarser, self.config.padding)
            features = [*features, coarser]
        for cell in self.cells:
            features = cell(features)
        return features


def halve(feature: Tensor, padding: str) -> Tensor:
    if padding == "symmetric":
        return F.max_pool2d(feature, kernel_size=3, stride=2, padding=1)
    # TensorFlow's SAME: as little as gives ceil(n / 2) positions, and the odd one behind.
    right, below = ((0 if n % 2 else 1) for n in (feature.shape[-1], feature.shape[-2]))
    padded = F.pad(feature, (1 - right, 1, 1 - below, 1), value=-math.inf)
    return F.max_pool2d(padded, kernel_size=3, stride=2)


class Cell(nn.Module):
    """Once down and up the pyramid."""

    def __init__(self, config: BiFPNConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.structure = cell_nodes(config.min_level, config.max_level)
        self.min_level = config.min_level
        widths = list(in_channels)
        self.nodes = nn.ModuleList()
        for node in self.structure:
            self.nodes.append(Fusion(config, [widths[index] for index in node.inputs]))
            widths.append(config.pyramid_channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = list(features)
        outputs = list(features)
        for node, fusion in zip(self.structure, self.nodes, strict=True):
            fused = fusion([maps[index] for index in node.inputs])
            maps.append(fused)
            outputs[node.level - self.min_level] = fused  # the last node of a level is its output
        return outputs


class Fusion(nn.Module):
    """A node: maps of one level and its neighbours, weighted, added, and convolved.

    An input of another width has a lateral convolution of its own, also where another node takes the same map.
    """

    weights: Tensor | None

    def __init__(self, config: BiFPNConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        width = config.pyramid_channels
        self.laterals = nn.ModuleList(
            nn.Identity() if channels == width else lateral(config, channels)
            for channels in in_channels
        )
        ones = nn.Parameter(torch.ones(len(in_channels)))
        self.register_parameter("weights", None if config.fusion == "sum" else ones)
        self.conv = nn.Sequential(
            *separable_conv(width, width, config.redundant_bias), batch_norm(config)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        config = self.config
        fused = fuse_features(
            maps,
            self.weights,
            config.fusion,
            activation=config.activation,
            padding=config.padding,
        )
        return self.conv(fused)


def lateral(config: BiFPNConfig, in_channels: int) -> nn.Sequential:
    width = config.pyramid_channels
    conv = nn.Conv2d(in_channels, width, kernel_size=1, bias=config.redundant_bias)
    return nn.Sequential(conv, batch_norm(config))


# ---- Heads ----------------------------------------------------------------------------------------


class Head(nn.Module):
    """Convolutions that all levels share, with a batch norm of its own behind each of them for each level."""

    def __init__(self, config: BiFPNConfig, out_channels: int) -> None:
        super().__init__()
        width, levels = config.pyramid_channels, config.max_level - config.min_level + 1
        self.convs = nn.ModuleList(
            separable_conv(width, width, config.redundant_bias) for _ in range(config.head_depth)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(batch_norm(config) for _ in range(levels))
            for _ in range(config.head_depth)
        )
        self.activation = ACTIVATIONS[config.activation]
        self.output = separable_conv(width, out_channels, bias=True)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        outputs = []
        for level, feature in enumerate(features):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                feature = self.activation(norms[level](conv(feature)))  # type: ignore[index]
            outputs.append(self.output(feature))
        return outputs


ACTIVATIONS = {"silu": F.silu, "relu6": F.relu6}


def batch_norm(config: BiFPNConfig) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(config.pyramid_channels, eps=1e-3, momentum=config.batch_norm_momentum)


def separable_conv(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=bias),
    )
