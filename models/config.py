"""What a RetinaNet may be: its configuration, and what each of the fields may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .losses import CLASSIFICATION_LOSSES
from .ranges import (
    Range,
    check_fields,
    check_names,
    either,
    one_of,
    optional,
    real,
    several,
    switch,
    whole,
)


def octave_sizes(*bases: int) -> tuple[tuple[int, ...], ...]:
    """Three anchor sizes a level, a third of an octave apart, cut to integers as torchvision's."""
    return tuple((base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))) for base in bases)


# The modules of each stage: stem, C2, C3, C4, C5. The output of a stage is that of its last module.
RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
MOBILENET_V2_STAGES = tuple(
    tuple(f"features.{block}" for block in range(first, last + 1))
    for first, last in ((0, 1), (2, 3), (4, 6), (7, 13), (14, 18))
)
EFFICIENTNET_STAGES = tuple(
    tuple(f"features.{block}" for block in range(first, last + 1))
    for first, last in ((0, 1), (2, 2), (3, 3), (4, 5), (6, 7))
)
RESNETS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
BACKBONES = (
    dict.fromkeys(RESNETS, RESNET_STAGES)
    | {"mobilenet_v2": MOBILENET_V2_STAGES}
    | {f"efficientnet_b{size}": EFFICIENTNET_STAGES for size in range(5)}
)
TIMM = "timm:"  # before the name of one of timm's models


BOX_LOSSES = ("l1", "smooth_l1", "iou", "giou", "diou", "ciou")

RANGES = {
    "num_classes": whole(1),
    "backbone": Range(
        f"one of {', '.join(BACKBONES)} or {TIMM}NAME",
        lambda x: isinstance(x, str) and (x in BACKBONES or x.startswith(TIMM)),
    ),
    "trainable_stages": whole(0, 5),
    "frozen_batch_norm": switch(),
    "batch_norm_eps": real(0),
    "min_level": whole(2, 5),
    "max_level": one_of((2, 3, 4, 5, 7)),
    "pyramid_channels": whole(1),
    "p6_from": one_of(("p5", "c5")),
    "head_depth": whole(0),
    "head_norm_groups": optional(whole(1)),
    "head_std": optional(real(0, above=True)),
    "prior_probability": real(0, 1, above=True, below=True),
    "anchor_sizes": several(several(real(0, above=True))),
    "aspect_ratios": several(real(0, above=True)),
    "fg_iou_threshold": real(0, 1),
    "bg_iou_threshold": real(0, 1),
    "classification_loss": one_of(CLASSIFICATION_LOSSES),
    "alpha": either(Range("-1, which is no balance,", lambda x: x == -1), real(0, 1)),
    "gamma": real(0),
    "beta": real(),
    "normalizer": one_of(("image", "batch")),
    "box_loss": one_of(BOX_LOSSES),
    "score_threshold": real(0, 1),
    "nms_threshold": real(0, 1),
    "topk_candidates": whole(1),
    "detections_per_image": whole(1),
    "min_size": optional(either(whole(1), several(whole(1)))),
    "max_size": whole(1),
    "image_mean": several(real(), 3),
    "image_std": several(real(0, above=True), 3),
}


@dataclass(frozen=True)
class RetinaNetConfig:
    """The defaults are torchvision's retinanet_resnet50_fpn."""

    num_classes: int = 91
    # Network
    backbone: str = "resnet50"
    trainable_stages: int = (
        3  # of the five, counted from the top; the rest keeps its ImageNet weights
    )
    frozen_batch_norm: bool = True
    batch_norm_eps: float = 1e-5
    min_level: int = 3  # the stride of level l is 2**l
    max_level: int = 7
    pyramid_channels: int = 256
    p6_from: Literal["p5", "c5"] = "p5"
    head_depth: int = 4  # 3x3 convolutions before the last one
    head_norm_groups: int | None = None  # of a GroupNorm behind each of them; None: no norm
    head_std: float | None = 0.01  # of their first weights; None keeps the variance (He et al.)
    prior_probability: float = 0.01
    # Anchors, one entry a level
    anchor_sizes: tuple[tuple[int, ...], ...] = octave_sizes(32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    # Loss
    fg_iou_threshold: float = 0.5
    bg_iou_threshold: float = 0.4
    classification_loss: Literal["focal", "focal_star", "ohem", "hinge"] = "focal"
    alpha: float = 0.25
    gamma: float = 2.0
    beta: float = 1.0  # of focal_star
    normalizer: Literal["image", "batch"] = "image"
    box_loss: Literal["l1", "smooth_l1", "iou", "giou", "diou", "ciou"] = "l1"
    # Detections
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    topk_candidates: int = 1000  # a level, before NMS
    detections_per_image: int = 300
    # Images: the shorter side is resized to min_size (of several one is drawn for each image in
    # training, and the last one used otherwise) unless the longer one would exceed max_size; with
    # None images keep their size
    min_size: int | tuple[int, ...] | None = 800
    max_size: int = 1333
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_fields(self, RANGES)
        if self.min_level > self.max_level:
            raise ValueError(
                f"min_level must be at most max_level, {self.max_level}, got {self.min_level}"
            )
        levels = self.max_level - self.min_level + 1
        if len(self.anchor_sizes) != levels:
            raise ValueError(
                f"anchor_sizes must have one entry for each of the {levels} levels, "
                f"got {len(self.anchor_sizes)}"
            )
        if len({len(sizes) for sizes in self.anchor_sizes}) > 1:
            raise ValueError(
                f"anchor_sizes must be equally many on each level, got {self.anchor_sizes}"
            )
        if self.head_norm_groups and self.pyramid_channels % self.head_norm_groups:
            raise ValueError(
                f"pyramid_channels must be a multiple of head_norm_groups, "
                f"{self.head_norm_groups}, got {self.pyramid_channels}"
            )
        if self.bg_iou_threshold > self.fg_iou_threshold:
            raise ValueError(
                f"bg_iou_threshold must be at most fg_iou_threshold, {self.fg_iou_threshold}, "
                f"got {self.bg_iou_threshold}"
            )
        if self.classification_loss == "focal_star" and self.gamma == 0:
            raise ValueError("gamma must be above 0 with classification_loss focal_star, got 0")
        sizes = self.min_size if isinstance(self.min_size, tuple) else (self.min_size or 0,)
        if max(sizes) > self.max_size:
            raise ValueError(
                f"min_size must be at most max_size, {self.max_size}, got {max(sizes)}"
            )

    @classmethod
    def from_dict(cls, values: Any) -> RetinaNetConfig:
        """The inverse of dataclasses.asdict, also after JSON turned the tuples into lists."""
        check_names(cls, values)
        return cls(**{name: as_tuples(value) for name, value in values.items()})


def as_tuples(value: Any) -> Any:
    return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
