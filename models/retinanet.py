"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection") in one file.

The model takes and returns what torchvision's detection models take and return, and its parameters
carry torchvision's names. Convolutions are torch's; anchors, matching, box coding, the loss and NMS
are focalops'.

Shapes: B images, L pyramid levels of H x W positions, A anchors a position, K classes, M boxes of
an image, N = the sum of H * W * A over the levels: the anchors of an image, in the order level,
row, column, anchor. Labels are class indices 0..K-1 and none is reserved for background, as in
torchvision's RetinaNet.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focalops import AnchorGenerator, class_index_targets, dense_box_loss, detect, match_anchors

from .config import (
    BACKBONES,
    BOX_LOSSES,
    RESNET_STAGES,
    TIMM,
    RetinaNetConfig,
    as_tuples,
    octave_sizes,
)
from .losses import classification_loss

__all__ = [
    "BACKBONES",
    "BOX_LOSSES",
    "RESNET_STAGES",
    "TIMM",
    "Detections",
    "RetinaNet",
    "RetinaNetConfig",
    "Target",
    "as_tuples",
    "octave_sizes",
]

# "boxes" (M, 4) xyxy in pixels, "labels" (M,) integers and, where some are crowds, "iscrowd" (M,)
Target = dict[str, Tensor]
Detections = dict[str, Tensor]  # "boxes" (D, 4), "scores" (D,), "labels" (D,), best first


class RetinaNet(nn.Module):
    def __init__(self, config: RetinaNetConfig, pretrained_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        transform = ResizingTransform if config.min_size else UnresizedTransform
        self.transform = transform(
            config.min_size, config.max_size, list(config.image_mean), list(config.image_std)
        )
        self.backbone = Backbone(config, pretrained_backbone)
        self.anchor_generator = AnchorGenerator(
            config.anchor_sizes, (config.aspect_ratios,) * len(config.anchor_sizes)
        )
        self.head = RetinaNetHead(config, self.anchor_generator.num_anchors_per_location()[0])

    @classmethod
    def from_torchvision(cls, model: nn.Module) -> RetinaNet:
        """A copy of torchvision's retinanet_resnet50_fpn, its _v2 or another of its RetinaNets on a
        ResNet: same losses, gradients and detections, same names of the parameters.

        Where no RetinaNetConfig means the same, a ValueError says what stands against it.
        """
        from .convert import config_of

        copy = cls(config_of(model))
        copy.load_state_dict(model.state_dict())
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_(trained[name])
        return copy.to(next(model.parameters()).device).train(model.training)

    def forward(
        self,
        images: list[Tensor],  # B of (3, H_i, W_i) in 0..1; in evaluation also uint8
        targets: list[Target] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """The losses in training mode, the detections of each image in evaluation mode."""
        if self.training:
            check_targets(images, targets, self.config.num_classes)
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)  # L of (B, C, H, W)
        cls_logits, bbox_regression = self.head(features)
        # The batch is padded to one size, so that every image has the same anchors.
        anchors = self.anchor_generator.grid(
            batch.tensors.shape[-2:], [feature.shape[-2:] for feature in features], images[0].device
        )  # (N, 4)
        if self.training:
            assert targets is not None
            return self.compute_loss(cls_logits, bbox_regression, anchors, targets)
        detections = self.postprocess_detections(
            cls_logits, bbox_regression, anchors, batch.image_sizes
        )
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    def match(self, anchors: Tensor, targets: list[Target]) -> Tensor:  # (N, 4) -> (B, N)
        """Of each anchor the index of its box, -1 or -2, which is also that of anchors in crowds."""
        crowd = None
        if any("iscrowd" in t for t in targets):
            crowd = [
                t["iscrowd"].bool()
                if "iscrowd" in t
                else torch.zeros_like(t["labels"], dtype=torch.bool)
                for t in targets
            ]
        return match_anchors(
            anchors,
            [t["boxes"] for t in targets],
            self.config.fg_iou_threshold,
            self.config.bg_iou_threshold,
            crowd=crowd,
        )

    def classes(self, matches: Tensor, targets: list[Target]) -> Tensor:  # (B, N) -> (B, N)
        """Of each anchor the class, num_classes for background, -100 where it is ignored."""
        return class_index_targets(matches, [t["labels"] for t in targets], self.config.num_classes)

    def compute_loss(
        self,
        cls_logits: list[Tensor],  # L of (B, A * K, H, W)
        bbox_regression: list[Tensor],  # L of (B, A * 4, H, W)
        anchors: Tensor,  # (N, 4)
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Each image's losses are divided by its number of foreground anchors, or by the mean number
        over the images of all ranks, then averaged."""
        config = self.config
        matches = self.match(anchors, targets)  # (B, N)
        classes = self.classes(matches, targets)  # (B, N)
        counts = normalizers((matches >= 0).sum(dim=1), config.normalizer)  # (B,)

        classification = classification_loss(cls_logits, classes, counts, anchors, config) / len(
            targets
        )
        bbox = dense_box_loss(
            bbox_regression,
            anchors,
            [t["boxes"] for t in targets],
            matches,
            loss=config.box_loss,
            normalizer=counts,
        ) / len(targets)
        return {"classification": classification, "bbox_regression": bbox}

    def postprocess_detections(
        self,
        cls_logits: list[Tensor],  # L of (B, A * K, H, W)
        bbox_regression: list[Tensor],  # L of (B, A * 4, H, W)
        anchors: Tensor,  # (N, 4)
        image_sizes: list[tuple[int, int]],  # B of (height, width) before padding
    ) -> list[Detections]:
        """Score threshold and top-k a level, boxes of the survivors, NMS per class."""
        config = self.config
        *padded, counts = detect(
            cls_logits,
            bbox_regression,
            anchors,
            score_threshold=config.score_threshold,
            topk_per_level=config.topk_candidates,
            iou_threshold=config.nms_threshold,
            max_detections=config.detections_per_image,
            image_sizes=image_sizes,
        )
        return [
            {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
            for boxes, scores, labels, count in zip(*padded, counts.tolist(), strict=True)
        ]


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


def normalizers(counts: Tensor, kind: str) -> Tensor:  # (B,) -> (B,)
    """What each image's losses are divided by, from the images' numbers of foreground anchors.

    With "batch" all images of all ranks share one: where an image has few objects, or none, its
    anchors weigh no more than others'.
    """
    if kind == "image":
        return counts
    total = torch.stack([counts.sum(), counts.new_tensor(len(counts))])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).expand(len(counts))


def check_targets(images: list[Tensor], targets: list[Target] | None, num_classes: int) -> None:
    """Labels on a GPU are not looked at: where one is no class the loss is NaN."""
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else f"{len(targets)}"
        raise ValueError(
            f"training needs one target for each of the {len(images)} images, got {got}"
        )
    for index, target in enumerate(targets):
        for name in ("boxes", "labels"):
            value = target.get(name)
            if not isinstance(value, Tensor):
                got = type(value).__name__
                raise TypeError(f"targets[{index}][{name!r}] must be a Tensor, got {got}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"targets[{index}]['boxes'] must have shape (M, 4), got {tuple(boxes.shape)}"
            )
        degenerate = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        if degenerate.any():
            raise ValueError(
                f"targets[{index}]['boxes'] must have positive width and height, "
                f"got {boxes[degenerate][0].tolist()}"
            )
        is_integer = not (labels.is_floating_point() or labels.is_complex())
        if labels.shape != boxes.shape[:1] or not is_integer or labels.dtype == torch.bool:
            raise ValueError(
                f"targets[{index}]['labels'] must be integers of shape ({len(boxes)},), one for each "
                f"box, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"targets[{index}]['labels'] must lie in [0, {num_classes - 1}], "
                    f"got {wrong[0].item()}"
                )


# ---- Backbone and pyramid -----------------------------------------------------------------------


class Backbone(nn.Module):
    """A classifier's stages (`body`) under torchvision's feature pyramid (`fpn`)."""

    def __init__(self, config: RetinaNetConfig, pretrained: bool) -> None:
        super().__init__()
        from_timm = config.backbone.startswith(TIMM)
        self.body = (TimmBody if from_timm else torchvision_body)(config, pretrained)
        channels = [feature.shape[1] for feature in _probe(self.body)]
        width = config.pyramid_channels
        self.num_levels = config.max_level - config.min_level + 1
        extra = None
        if config.max_level == 7:
            from_p5 = config.p6_from == "p5"
            extra = LastLevelP6P7(width if from_p5 else channels[-1], width)
            extra.use_P5 = from_p5  # torchvision guesses it from the number of channels
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=extra)
        for block in self.fpn.layer_blocks[self.num_levels :]:
            block.requires_grad_(False)  # left out: no gradient will come, for which DDP would wait

    def forward(
        self, images: Tensor
    ) -> list[Tensor]:  # (B, 3, H, W) -> L of (B, C, H, W), finest first
        pyramid = self.fpn(OrderedDict(self.body(images)))
        return list(pyramid.values())[: self.num_levels]  # what is left out still gave context


def torchvision_body(config: RetinaNetConfig, pretrained: bool) -> nn.Module:
    stages = BACKBONES[config.backbone]
    classifier = torchvision.models.get_model(
        config.backbone,
        weights="IMAGENET1K_V1" if pretrained else None,
        norm_layer=functools.partial(
            FrozenBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d,
            eps=config.batch_norm_eps,
        ),
    )
    for stage in stages[: len(stages) - config.trainable_stages]:
        for module in stage:
            classifier.get_submodule(module).requires_grad_(False)
    outputs = {
        stage[-1]: f"c{level}"
        for level, stage in enumerate(stages, start=1)
        if level >= config.min_level
    }
    return create_feature_extractor(classifier, outputs)


class TimmBody(nn.Module):
    """A convolutional model of timm's, by its own name."""

    def __init__(self, config: RetinaNetConfig, pretrained: bool) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"backbone {config.backbone!r} needs the package timm") from None
        create = functools.partial(
            timm.create_model, config.backbone.removeprefix(TIMM), features_only=True
        )
        try:
            info: Any = create(pretrained=False).feature_info
        except RuntimeError as error:
            raise ValueError(f"backbone {config.backbone!r}: {error}") from None
        last = {reduction: index for index, reduction in enumerate(info.reduction())}
        self.levels = range(config.min_level, min(config.max_level, 5) + 1)
        if any(2**level not in last for level in self.levels):
            raise ValueError(
                f"backbone {config.backbone!r} must have the strides "
                f"{[2**level for level in self.levels]}, got {info.reduction()}"
            )
        self.model = create(
            pretrained=pretrained, out_indices=[last[2**level] for level in self.levels]
        )
        if config.frozen_batch_norm:
            self.model = timm.layers.freeze_batch_norm_2d(self.model)
        frozen = [i for r, i in last.items() if r <= 2 ** (5 - config.trainable_stages)]
        if frozen:
            # In order of the forward pass: all parameters up to the last of that stage's.
            module = info.module_name(max(frozen))
            prefixes = (f"{module}.", f"{module.replace('.', '_')}.")
            parameters = list(self.model.named_parameters())
            ends = [n for n, (name, _) in enumerate(parameters) if name.startswith(prefixes)]
            for _, parameter in parameters[: max(ends, default=-1) + 1]:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model(images)
        return {f"c{level}": f for level, f in zip(self.levels, features, strict=True)}


@torch.no_grad()
def _probe(body: nn.Module) -> list[Tensor]:
    was_training = body.training
    body.eval()  # batch statistics must not see the probe
    features = list(body(torch.zeros(1, 3, 64, 64)).values())
    body.train(was_training)
    return features


# ---- Heads --------------------------------------------------------------------------------------


class RetinaNetHead(nn.Module):
    """The two subnets, shared by all levels; outputs stay per level, as the convolutions wrote them."""

    def __init__(self, config: RetinaNetConfig, num_anchors: int) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(config, num_anchors)
        self.regression_head = RegressionHead(config, num_anchors)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # L of (B, A * K, H, W), L of (B, A * 4, H, W)
        return [self.classification_head(f) for f in features], [
            self.regression_head(f) for f in features
        ]


class ClassificationHead(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_anchors: int) -> None:
        super().__init__()
        self.conv = _tower(config)
        self.cls_logits = _head_conv(config.pyramid_channels, num_anchors * config.num_classes)
        # Every anchor starts at sigmoid(bias) = prior: else the many negatives swamp the first steps.
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, feature: Tensor) -> Tensor:
        return self.cls_logits(self.conv(feature))


class RegressionHead(nn.Module):
    def __init__(self, config: RetinaNetConfig, num_anchors: int) -> None:
        super().__init__()
        self.conv = _tower(config)
        self.bbox_reg = _head_conv(config.pyramid_channels, num_anchors * 4)

    def forward(self, feature: Tensor) -> Tensor:
        return self.bbox_reg(self.conv(feature))


def _tower(config: RetinaNetConfig) -> nn.Sequential:
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
