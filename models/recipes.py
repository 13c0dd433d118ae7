"""Recipes: a model and how it is trained and run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .config import DetectorConfig, as_tuples, octave_sizes
from .detectors import DETECTORS, PUBLISHED, from_json, to_json
from .efficientdet import EfficientDetConfig
from .ranges import (
    Range,
    check_fields,
    check_names,
    one_of,
    optional,
    real,
    several,
    switch,
    whole,
)
from .retinanet import RetinaNetConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained and run. The defaults are the paper's, for COCO."""

    model: DetectorConfig = field(default_factory=RetinaNetConfig)
    steps: int = 90_000
    batch_size: int = 16  # of all processes together
    accumulate: int = 1  # the number of pieces that a batch is computed in, to save memory
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the convolutions
    compile: bool = False  # the network and the loss, by torch.compile
    sync_batch_norm: bool = False  # batch norms see the batch of all processes, on GPUs
    seed: int = 0
    # Optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    decay_vectors: bool = True  # weight_decay also of biases, norms and the weights of fusions
    schedule: Literal["steps", "cosine"] = "steps"
    drops: tuple[float, ...] = (2 / 3, 8 / 9)  # of the run: where "steps" divides the rate by ten
    warmup_steps: int = 500
    clip_norm: float | None = None  # the limit of the gradient's norm
    ema_decay: float | None = (
        None  # of a running average of the weights, which is then what is evaluated
    )
    ema_warmup: bool = False  # after t steps ema_decay is at most (1 + t) / (10 + t)
    ema_buffers: bool = False  # the statistics of the batch norms are averaged as the weights are
    # Samples
    crop: int | None = None  # the side of random squares to train on, instead of whole images
    crop_zoom: tuple[float, float] = (1.0, 1.0)
    # The image is resized to fit the square of the model's letterbox times a random factor, and cropped to the square.
    scale_jitter: tuple[float, float] | None = None  # the limits of the factor
    dihedral: bool = False  # all eight symmetries of the square instead of the horizontal flip
    photometric: bool = False
    # Evaluation
    window: int | None = None  # the side of overlapping windows to detect in, for large images
    window_overlap: int = 128
    symmetries: bool = False  # detect in all eight symmetries of the image, and let the boxes vote
    max_detections: int = 100  # detections of an image that count

    def __post_init__(self) -> None:
        check_fields(self, RANGES)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, {self.accumulate}, "
                f"got {self.batch_size}"
            )
        if list(self.drops) != sorted(self.drops):
            raise ValueError(f"drops must ascend, got {self.drops}")
        low, high = self.crop_zoom
        if low > high:
            raise ValueError(f"crop_zoom must be the lower and the higher limit, got {low}, {high}")
        if self.crop is not None and round(self.crop / high) < 1:
            raise ValueError(
                f"crop must be at least a pixel at the highest crop_zoom, {high}, got {self.crop}"
            )
        if self.scale_jitter is not None:
            self.check_jitter(*self.scale_jitter)
        if self.window is not None and self.window <= self.window_overlap:
            raise ValueError(
                f"window must be larger than window_overlap, {self.window_overlap}, "
                f"got {self.window}"
            )

    def check_jitter(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(
                f"scale_jitter must be the lower and the higher limit, got {low}, {high}"
            )
        if not self.model.letterbox:
            raise ValueError(
                "scale_jitter must be nothing without the model's letterbox, "
                f"got {self.scale_jitter}"
            )
        if self.crop is not None:
            raise ValueError(f"crop must be nothing with scale_jitter, got {self.crop}")

    def to_dict(self) -> dict[str, Any]:
        """As files have it: JSON's types, but for tuples."""
        return {**dataclasses.asdict(self), "model": to_json(self.model)}

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """The inverse of to_dict, also after JSON turned the tuples into lists."""
        check_names(cls, values)
        own = {name: as_tuples(value) for name, value in values.items() if name != "model"}
        return cls(**own, model=from_json(values.get("model")))


def with_model(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))


RANGES = {
    "model": Range(
        "the configuration of a detector that detectors.py names",
        lambda x: isinstance(x, DetectorConfig) and x.kind in DETECTORS,
    ),
    "steps": whole(1),
    "batch_size": whole(1),
    "accumulate": whole(1),
    "precision": one_of(tuple(PRECISIONS)),
    "compile": switch(),
    "sync_batch_norm": switch(),
    "seed": whole(0, 2**63 - 1),
    "optimizer": one_of(("sgd", "adamw")),
    "learning_rate": real(0, above=True),
    "weight_decay": real(0),
    "decay_vectors": switch(),
    "schedule": one_of(("steps", "cosine")),
    "drops": several(real(0, 1), least=0),
    "warmup_steps": whole(0),
    "clip_norm": optional(real(0, above=True)),
    "ema_decay": optional(real(0, 1, below=True)),
    "ema_warmup": switch(),
    "ema_buffers": switch(),
    "crop": optional(whole(1)),
    "crop_zoom": several(real(0, above=True), 2),
    "scale_jitter": optional(several(real(0, above=True), 2)),
    "dihedral": switch(),
    "photometric": switch(),
    "window": optional(whole(1)),
    "window_overlap": whole(0),
    "symmetries": switch(),
    "max_detections": whole(1),
}


# For two CPU cores: a small model, and anchors for tree crowns, 8 to 107 pixels wide. They are large
# for their strides (8 and 16), or crowns would lie too far from the nearest anchor to match it.
# There is one photograph to learn from: longer training fits it better and other places worse.
TREES = Recipe(
    model=RetinaNetConfig(
        num_classes=1,
        backbone="mobilenet_v2",
        trainable_stages=3,
        max_level=4,
        pyramid_channels=96,
        head_depth=2,
        head_std=None,
        anchor_sizes=((14, 20, 28, 40), (52, 68, 88, 112)),
        aspect_ratios=(1.0,),
        score_threshold=0.02,
        detections_per_image=1000,
        nms_threshold=0.4,
        gamma=0.5,
        alpha=0.5,
        box_loss="giou",
        min_size=None,
    ),
    steps=500,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=10.0,
    ema_decay=0.99,
    crop=256,
    crop_zoom=(0.67, 1.5),
    dihedral=True,
    photometric=True,
    window=512,
    symmetries=True,
    max_detections=1000,
)

# For the drawn shapes, 22 to 56 pixels wide, of which the rare third of the classes is in at most 14 of 600 images.
SHAPES = Recipe(
    model=RetinaNetConfig(
        num_classes=30,
        backbone="mobilenet_v2",
        trainable_stages=3,
        max_level=4,
        pyramid_channels=96,
        head_depth=2,
        head_std=None,
        anchor_sizes=octave_sizes(20, 40),
        aspect_ratios=(1.0,),
        rare_below=0.024,
        box_loss="giou",
        score_threshold=0.005,
        detections_per_image=100,
        min_size=None,
    ),
    steps=500,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=10.0,
    ema_decay=0.99,
)

# For a few hundred photographs and two CPU cores: ten minutes.
SMALL = Recipe(
    model=RetinaNetConfig(
        backbone="mobilenet_v2",
        trainable_stages=3,
        max_level=5,
        pyramid_channels=96,
        head_depth=2,
        head_std=None,
        anchor_sizes=octave_sizes(24, 48, 96),
        box_loss="giou",
        score_threshold=0.02,
        detections_per_image=100,
        min_size=240,
        max_size=400,
    ),
    steps=700,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=10.0,
    ema_decay=0.99,
    photometric=True,
)

# The published recipes in terms of this one: 12 epochs of COCO's train2017, and torchvision's 26
# for the model that it calls v2.
R101 = Recipe(model=RetinaNetConfig(backbone="resnet101"))
V2 = Recipe(
    model=PUBLISHED["retinanet_resnet50_fpn_v2"],
    steps=190_000,
    optimizer="adamw",
    learning_rate=1e-4,
    weight_decay=0.05,
    drops=(16 / 26, 22 / 26),
)

# EfficientDet as its authors trained it on COCO: hparams_config.py and det_model_fn.py of google/automl; the batch, which
# is a flag there, and 600 epochs for D7 and D7x are the paper's. Different are: the warm-up starts at 0 as the paper
# says, not at a tenth of the rate; the cosine starts where the warm-up ends, which moves the rate by half a percent at
# most; gradients are clipped together, not each of them before. A smaller batch has a rate in proportion.
EPOCH = 120_000 // 128  # steps, as they count COCO's images


def published(name: str) -> Recipe:
    return Recipe(
        model=PUBLISHED[name],
        steps=(600 if name in ("efficientdet_d7", "efficientdet_d7x") else 300) * EPOCH,
        batch_size=128,
        sync_batch_norm=True,
        learning_rate=0.16,
        weight_decay=4e-5,
        decay_vectors=False,
        schedule="cosine",
        warmup_steps=EPOCH,
        clip_norm=10.0,
        ema_decay=0.9998,
        ema_warmup=True,
        ema_buffers=True,
        scale_jitter=(0.1, 2.0),
    )


# SMALL's data and time for an EfficientDet: lite0's backbone and widths at a lower resolution. With the momentum of the
# original, 0.01, the statistics of its new batch norms would take hundreds of steps to become those of the features: until
# then it detects next to nothing.
SMALL_EFFICIENTDET = Recipe(
    model=EfficientDetConfig.named(
        "lite0", min_size=256, max_size=256, score_threshold=0.02, batch_norm_momentum=0.1
    ),
    steps=700,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    decay_vectors=False,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=10.0,
    ema_decay=0.99,
    ema_warmup=True,
    ema_buffers=True,
    scale_jitter=(0.5, 1.5),
    photometric=True,
)

# TREES for an EfficientDet, which has levels up to 6 at least: anchors of the upper two are larger than crowns, but their
# maps tell the lower ones what is around.
TREES_EFFICIENTDET = dataclasses.replace(
    TREES,
    model=EfficientDetConfig.named(
        "lite0",
        num_classes=1,
        trainable_stages=3,
        frozen_batch_norm=True,
        pyramid_channels=96,
        activation="silu",
        fusion="fast",
        batch_norm_momentum=0.1,
        max_level=6,
        anchor_sizes=(
            (14, 20, 28, 40),
            (52, 68, 88, 112),
            (144, 160, 176, 192),
            (224, 256, 288, 320),
        ),
        aspect_ratios=(1.0,),
        matching_rule="torchvision",
        bg_iou_threshold=0.4,
        normalizer="image",
        score_threshold=0.02,
        topk_candidates=1000,
        topk=None,
        detections_per_image=1000,
        nms_threshold=0.4,
        gamma=0.5,
        alpha=0.5,
        box_loss="giou",
        box_loss_weight=1.0,
        min_size=None,
        max_size=1333,
        letterbox=False,
    ),
    decay_vectors=False,
    ema_warmup=True,
    ema_buffers=True,
)

RECIPES = {
    "coco": Recipe(),
    "coco_r101": R101,
    "coco_v2": V2,
    "small": SMALL,
    "trees": TREES,
    "shapes": SHAPES,
    **{name: published(name) for name in PUBLISHED if name.startswith("efficientdet_d")},
    "efficientdet_small": SMALL_EFFICIENTDET,
    "efficientdet_trees": TREES_EFFICIENTDET,
}
