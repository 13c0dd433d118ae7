"""What a detector may be, by topic: small dataclasses that the detectors' own configurations inherit.

A configuration is flat, as recipes, checkpoints and options have it, and is each of its topics: a part takes just the
topic that it needs (`match(..., config: MatchingConfig)`). A topic says what its fields may hold (RANGES), and checks
what they may be together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from .ranges import Range, check_fields, either, one_of, optional, real, several, switch, whole

Ranges = Mapping[str, Range]


@dataclass(frozen=True)
class Config:
    """What all topics share."""

    num_classes: int = 91

    RANGES: ClassVar[Ranges] = {"num_classes": whole(1)}

    def __post_init__(self) -> None:
        check_fields(self, self.ranges())

    @classmethod
    def ranges(cls) -> dict[str, Range]:
        """What each of the fields may hold; a class has the last word on those that it inherits."""
        lineage = [vars(c).get("RANGES", {}) for c in reversed(cls.__mro__)]
        return {name: rule for ranges in lineage for name, rule in ranges.items()}

    @property
    def pretrained_backbone(self) -> str | None:
        """What a new model can have ImageNet weights of; None: there are none."""
        return None


# ---- Network --------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class NetworkConfig(Config):
    """A classifier as the backbone, and the levels of the pyramid on it."""

    backbone: str = "resnet50"
    trainable_stages: int = (
        3  # of the five, counted from the top; the rest keeps its ImageNet weights
    )
    frozen_batch_norm: bool = True
    batch_norm_eps: float = 1e-5
    min_level: int = 3  # the stride of level l is 2**l
    max_level: int = 7

    RANGES: ClassVar[Ranges] = {
        "backbone": Range(
            f"one of {', '.join(BACKBONES)} or {TIMM}NAME",
            lambda x: isinstance(x, str) and (x in BACKBONES or x.startswith(TIMM)),
        ),
        "trainable_stages": whole(0, 5),
        "frozen_batch_norm": switch(),
        "batch_norm_eps": real(0),
        "min_level": whole(2, 5),
        "max_level": whole(2),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_level > self.max_level:
            raise ValueError(
                f"min_level must be at most max_level, {self.max_level}, got {self.min_level}"
            )

    @property
    def pretrained_backbone(self) -> str | None:
        return self.backbone


# ---- Anchors --------------------------------------------------------------------------------------


def octave_sizes(*bases: int) -> tuple[tuple[int, ...], ...]:
    """Three anchor sizes a level, a third of an octave apart, cut to integers as torchvision's."""
    return tuple((base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))) for base in bases)


@dataclass(frozen=True)
class AnchorConfig(Config):
    anchor_sizes: tuple[tuple[int, ...], ...] = octave_sizes(32, 64, 128, 256, 512)  # of each level
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    RANGES: ClassVar[Ranges] = {
        "anchor_sizes": several(several(real(0, above=True))),
        "aspect_ratios": several(real(0, above=True)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({len(sizes) for sizes in self.anchor_sizes}) > 1:
            raise ValueError(
                f"anchor_sizes must be equally many on each level, got {self.anchor_sizes}"
            )


def check_levels(config: NetworkConfig, anchors: AnchorConfig) -> None:
    levels = config.max_level - config.min_level + 1
    if len(anchors.anchor_sizes) != levels:
        raise ValueError(
            f"anchor_sizes must have one entry for each of the {levels} levels, "
            f"got {len(anchors.anchor_sizes)}"
        )


# ---- Loss -----------------------------------------------------------------------------------------


# By IoU with the thresholds; by ATSS; by their place and FCOS' ranges of sizes; by how well their predictions do.
Assigner = Literal["iou", "atss", "fcos", "simota", "task_aligned"]
ASSIGNERS: tuple[str, ...] = get_args(Assigner)
MatchingRule = Literal["torchvision", "mmdet", "efficientdet"]


@dataclass(frozen=True)
class MatchingConfig(Config):
    """Which anchors are foreground, background, or neither."""

    assigner: Assigner = "iou"  # the others look at neither threshold
    fg_iou_threshold: float = 0.5
    bg_iou_threshold: float = 0.4
    matching_rule: MatchingRule = "torchvision"  # what boxes get whose best anchor is below it

    RANGES: ClassVar[Ranges] = {
        "assigner": one_of(ASSIGNERS),
        "fg_iou_threshold": real(0, 1),
        "bg_iou_threshold": real(0, 1),
        "matching_rule": one_of(get_args(MatchingRule)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bg_iou_threshold > self.fg_iou_threshold:
            raise ValueError(
                f"bg_iou_threshold must be at most fg_iou_threshold, {self.fg_iou_threshold}, "
                f"got {self.bg_iou_threshold}"
            )


ClassificationLoss = Literal[
    "focal", "focal_star", "quality", "eql", "eqlv2", "efl", "ohem", "hinge"
]
# Prime sample attention: importance-based sample reweighting of positives, of negatives, classification-aware regression loss,
# the first and the third; noisy anchors; the unified sample weighting network, with one weight for all class losses or not.
Weighting = Literal[
    "none", "isr", "isr_n", "carl", "pisa", "cleanliness", "unified", "unified_mean"
]
# The number of foreground anchors of each image; its mean over the images of the batch, and of all ranks; or the
# number of the batch, plus 1, for the sum over the images.
Normalizer = Literal["image", "batch", "positives"]
BoxLoss = Literal["l1", "smooth_l1", "iou", "giou", "diou", "ciou"]
CLASSIFICATION_LOSSES: tuple[str, ...] = get_args(ClassificationLoss)
BOX_LOSSES: tuple[str, ...] = get_args(BoxLoss)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


@dataclass(frozen=True)
class LossConfig(Config):
    classification_loss: ClassificationLoss = "focal"
    alpha: float = 0.25  # of the focal losses
    gamma: float = 2.0  # of the focal losses and of quality; 0: cross entropy
    beta: float = 1.0  # of focal_star
    class_frequencies: tuple[float, ...] | None = (
        None  # of eql: the shares of images with each class; from the data set unless given
    )
    rare_below: float = 0.00177  # of eql: the frequency below which a class is rare
    weighting: Weighting = "none"  # of the anchors of the focal loss and of the box loss
    normalizer: Normalizer = "image"  # whose foreground the losses are divided by
    box_loss: BoxLoss = "l1"
    box_loss_beta: float = 1.0  # of smooth_l1: below it the loss is quadratic
    box_loss_weight: float = 1.0

    RANGES: ClassVar[Ranges] = {
        "classification_loss": one_of(CLASSIFICATION_LOSSES),
        "alpha": either(Range("-1, which is no balance,", lambda x: x == -1), real(0, 1)),
        "gamma": real(0),
        "beta": real(),
        "class_frequencies": optional(several(real(0, 1))),
        "rare_below": real(0, 1),
        "weighting": one_of(WEIGHTINGS),
        "normalizer": one_of(get_args(Normalizer)),
        "box_loss": one_of(BOX_LOSSES),
        "box_loss_beta": real(0, above=True),
        "box_loss_weight": real(0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.classification_loss
        if name in ("focal_star", "efl") and self.gamma == 0:  # it divides
            raise ValueError(f"gamma must be above 0 with classification_loss {name}, got 0")
        if self.weighting != "none" and self.classification_loss not in ("focal", "eql"):
            raise ValueError(
                f"weighting must be none unless classification_loss is focal or eql, got {self.weighting}"
            )
        given = self.class_frequencies
        if given is not None and len(given) != self.num_classes:
            raise ValueError(
                f"class_frequencies must be one of each of the {self.num_classes} classes, "
                f"got {len(given)}"
            )


# ---- Detections and images ------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionConfig(Config):
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    topk_candidates: int = 1000  # a level, before NMS
    topk: int | None = None  # of all levels together, before NMS
    nms_method: Literal["hard", "linear", "gaussian"] = "hard"  # the others are soft NMS
    nms_sigma: float = 0.5  # of "gaussian"
    detections_per_image: int = 300

    RANGES: ClassVar[Ranges] = {
        "score_threshold": real(0, 1),
        "nms_threshold": real(0, 1),
        "topk_candidates": whole(1),
        "topk": optional(whole(1)),
        "nms_method": one_of(("hard", "linear", "gaussian")),
        "nms_sigma": real(0, above=True),
        "detections_per_image": whole(1),
    }


@dataclass(frozen=True)
class ImageConfig(Config):
    # The shorter side is resized to min_size (of several one is drawn for each image in training, and
    # the last one used otherwise) unless the longer one would exceed max_size; with None images keep
    # their size.
    min_size: int | tuple[int, ...] | None = 800  # the shorter side becomes it, or one of several
    max_size: int = 1333  # the limit of the longer side
    letterbox: bool = False  # pad every image to the square of max_size, on the right and below
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    RANGES: ClassVar[Ranges] = {
        "min_size": optional(either(whole(1), several(whole(1)))),
        "max_size": whole(1),
        "letterbox": switch(),
        "image_mean": several(real(), 3),
        "image_std": several(real(0, above=True), 3),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.min_size if isinstance(self.min_size, tuple) else (self.min_size or 0,)
        if max(sizes) > self.max_size:
            raise ValueError(
                f"min_size must be at most max_size, {self.max_size}, got {max(sizes)}"
            )
        if self.letterbox and self.min_size is None:
            raise ValueError("min_size must be a size where letterbox is, got None")

    @property
    def size_divisor(self) -> int:
        """What height and width of a batch are multiples of: 32, as in torchvision's detectors, unless the network asks
        for more."""
        return 32

    @property
    def batch_divisor(self) -> int:
        """What a batch is padded to multiples of: size_divisor, or the side of a letterbox's square, which no image
        exceeds."""
        divisor = self.size_divisor
        return -(-self.max_size // divisor) * divisor if self.letterbox else divisor


# ---- A detector -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectorConfig(ImageConfig, DetectionConfig, LossConfig, MatchingConfig, AnchorConfig):
    """What a Detector asks of its configuration; that of its network is its own.

    Dataclasses have the fields of the last base first.
    """

    kind: ClassVar[str]  # the detector's row in detectors.DETECTORS

    @property
    def finest_stride(self) -> int:
        """Of the first level; that of each next one is twice as large."""
        return 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assigner == "task_aligned" and self.classification_loss != "quality":
            raise ValueError(
                "classification_loss must be quality with assigner task_aligned, whose targets are scores, "
                f"got {self.classification_loss}"
            )


def as_tuples(value: Any) -> Any:
    return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
