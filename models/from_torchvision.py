"""What a torchvision RetinaNet is, in the words of RetinaNetConfig."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import retinanet as peer
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .config import BACKBONES, RESNET_STAGES
from .retinanet import RetinaNetConfig


def config_of(model: Any) -> RetinaNetConfig:
    """The configuration of a torchvision RetinaNet; ValueError where none means the same."""
    _require(model, peer.RetinaNet, "model")
    head, transform, matcher = model.head, model.transform, model.proposal_matcher
    _require(head, peer.RetinaNetHead, "model.head")
    classification, regression = head.classification_head, head.regression_head
    _require(classification, peer.RetinaNetClassificationHead, "model.head.classification_head")
    _require(regression, peer.RetinaNetRegressionHead, "model.head.regression_head")
    _require(transform, GeneralizedRCNNTransform, "model.transform")
    generator = model.anchor_generator
    if (
        getattr(generator, "convention", None) != "torchvision"
    ):  # focalops' with torchvision's anchors
        _require(generator, AnchorGenerator, "model.anchor_generator")
    ratios = set(generator.aspect_ratios)
    for what, value, known in (
        (
            "model.transform.size_divisible",
            transform.size_divisible,
            RetinaNetConfig().size_divisor,
        ),
        ("model.transform.fixed_size", transform.fixed_size, None),
        ("the number of sets of aspect ratios", len(ratios), 1),
        ("model.box_coder.weights", tuple(model.box_coder.weights), (1, 1, 1, 1)),
        ("the heads' box_coder.weights", tuple(regression.box_coder.weights), (1, 1, 1, 1)),
        ("allow_low_quality_matches", matcher.allow_low_quality_matches, True),
    ):
        if value != known:
            raise ValueError(f"{what} must be {known}, got {value}")
    backbone = _backbone(model.backbone)
    body, min_sizes = model.backbone.body, tuple(transform.min_size)
    return RetinaNetConfig(
        num_classes=classification.num_classes,
        **backbone,
        trainable_stages=sum(any(_trains(body, m) for m in stage) for stage in RESNET_STAGES),
        pyramid_channels=model.backbone.out_channels,
        head_depth=len(classification.conv),
        head_norm_groups=_norm_groups(head),
        anchor_sizes=tuple(tuple(sizes) for sizes in generator.sizes),
        aspect_ratios=tuple(ratios.pop()),
        fg_iou_threshold=matcher.high_threshold,
        bg_iou_threshold=matcher.low_threshold,
        box_loss=regression._loss_type,
        score_threshold=model.score_thresh,
        nms_threshold=model.nms_thresh,
        topk_candidates=model.topk_candidates,
        detections_per_image=model.detections_per_img,
        min_size=(
            None if transform._skip_resize else min_sizes[0] if len(min_sizes) == 1 else min_sizes
        ),
        max_size=transform.max_size,
        image_mean=tuple(transform.image_mean),
        image_std=tuple(transform.image_std),
    )


def _require(part: Any, known: type, name: str) -> None:
    kind = getattr(
        type(part), "accelerated_from", type(part)
    )  # what focalops.accelerate swaps is the same
    if kind is not known:
        raise ValueError(
            f"{name} must be torchvision's {known.__name__} itself, "
            f"got {type(part).__module__}.{type(part).__qualname__}"
        )


def _trains(body: Any, name: str) -> bool:
    return any(p.requires_grad for p in body.get_submodule(name).parameters())


def _backbone(backbone: Any) -> dict[str, Any]:
    _require(backbone, BackboneWithFPN, "model.backbone")
    _require(backbone.body, IntermediateLayerGetter, "model.backbone.body")
    body = {name: value.shape for name, value in backbone.body.named_parameters()}
    norms = [
        m for m in backbone.body.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))
    ]
    frozen = bool(norms) and isinstance(norms[0], FrozenBatchNorm2d)
    layers = list(backbone.body.return_layers)
    extra = backbone.fpn.extra_blocks
    if layers != ["layer1", "layer2", "layer3", "layer4"][-len(layers) :] or not (
        extra is None or type(extra) is LastLevelP6P7
    ):
        raise ValueError(
            "model.backbone must return the last stages, up to layer4, and P6 and P7 or nothing "
            f"above, got {layers} and {type(extra).__name__}"
        )
    for name in BACKBONES:
        if BACKBONES[name] is RESNET_STAGES and _shapes(name, frozen).items() >= body.items():
            break
    else:
        raise ValueError("model.backbone.body must be one of torchvision's ResNets")
    return {
        "backbone": name,
        "frozen_batch_norm": frozen,
        "batch_norm_eps": norms[0].eps,
        "min_level": 6 - len(layers),
        "max_level": 5 if extra is None else 7,
        "p6_from": "c5" if extra is not None and not extra.use_P5 else "p5",
    }


@functools.cache
def _shapes(name: str, frozen: bool) -> dict[str, torch.Size]:
    with torch.device("meta"):
        norm_layer = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        classifier = torchvision.models.get_model(name, norm_layer=norm_layer)
    return {name: value.shape for name, value in classifier.named_parameters()}


def _norm_groups(head: Any) -> int | None:
    groups = {
        m.num_groups if isinstance(m, nn.GroupNorm) else None
        for tower in (head.classification_head.conv, head.regression_head.conv)
        for block in tower
        for m in block
        if not isinstance(m, (nn.Conv2d, nn.ReLU))
    }
    if len(groups) > 1 or (None in groups):
        raise ValueError(f"the heads must have no norm or one kind of GroupNorm, got {head}")
    return groups.pop() if groups else None
