"""The detectors by name: what a recipe, a checkpoint and a study's record call the `kind` of their model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import DetectorConfig, as_tuples
from .detector import Detector
from .efficientdet import SCALES, EfficientDet, EfficientDetConfig
from .ranges import check, check_names, one_of
from .retinanet import RetinaNet, RetinaNetConfig

# A model is made from its configuration and whether its backbone starts with ImageNet weights.
DETECTORS: dict[str, tuple[type[DetectorConfig], Callable[..., Detector]]] = {
    "retinanet": (RetinaNetConfig, RetinaNet),
    "efficientdet": (EfficientDetConfig, EfficientDet),
}
# What torchvision and EfficientDet's authors published: the former's names, and the latter's with the kind before them.
PUBLISHED: dict[str, DetectorConfig] = {
    "retinanet_resnet50_fpn": RetinaNetConfig(),
    "retinanet_resnet50_fpn_v2": RetinaNetConfig(
        frozen_batch_norm=False,
        p6_from="c5",
        head_norm_groups=32,
        box_loss="giou",
        min_size=tuple(range(480, 801, 32)),
    ),
    # The original drops residual blocks of all backbones but B0; of lite's training nothing is known.
    **{
        f"efficientdet_{size}": EfficientDetConfig.named(
            f"tf_{size}", drop_path=0.2 if size.startswith("d") and size != "d0" else 0.0
        )
        for size in SCALES
    },
}
OF_OLD = "retinanet"  # the kind of what was written before there were kinds


def create(config: DetectorConfig, pretrained_backbone: bool = False) -> Detector:
    _, model = DETECTORS[config.kind]
    return model(config, pretrained_backbone)


def named(name: str) -> DetectorConfig:
    """A published model, or a kind with its defaults.

    Raises:
        ValueError: there is none of that name.
    """
    check("--model", name, one_of((*DETECTORS, *PUBLISHED)))
    return PUBLISHED[name] if name in PUBLISHED else DETECTORS[name][0]()


def to_json(config: DetectorConfig) -> dict[str, Any]:
    """{"kind": ..., and its fields}."""
    return {"kind": config.kind, **dataclasses.asdict(config)}


def from_json(values: Any) -> DetectorConfig:
    """The inverse of to_json, also after JSON turned the tuples into lists.

    Raises:
        ValueError: it is no dictionary, its kind or a field is unknown, or a value is outside its range.
    """
    fields = dict(values) if isinstance(values, dict) else values
    kind = fields.pop("kind", OF_OLD) if isinstance(fields, dict) else OF_OLD
    check("kind", kind, one_of(tuple(DETECTORS)))
    config, _ = DETECTORS[kind]
    check_names(config, fields)
    if kind == EfficientDetConfig.kind and "letterbox" not in fields:
        # Before there was the field, images were padded to a square where both sizes were one.
        sizes = [fields.get(name, getattr(config, name)) for name in ("min_size", "max_size")]
        fields["letterbox"] = sizes[0] == sizes[1]
    return config(**{name: as_tuples(value) for name, value in fields.items()})
