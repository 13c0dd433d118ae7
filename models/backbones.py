"""Classifiers of torchvision's and timm's as backbones: images to the features of their stages."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from .config import BACKBONES, TIMM, NetworkConfig
from .data.downloads import timm_weights


def backbone(config: NetworkConfig, pretrained: bool, drop_path: float = 0.0) -> nn.Module:
    """(B, 3, H, W) -> the features of each of its levels, finest first, in a dictionary: "c3" and so on, up to "c5".

    `drop_path` is timm's: how often the last residual block is skipped in training.
    """
    if config.backbone.startswith(TIMM):
        return TimmBody(config, pretrained, drop_path)
    return torchvision_body(config, pretrained)


def torchvision_body(config: NetworkConfig, pretrained: bool) -> nn.Module:
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


class SameConv2d(nn.Conv2d):
    """timm's Conv2dSame, TensorFlow's SAME padding, whose output sizes torch.export can simplify: of a size that is a multiple of
    the stride the padding is a constant. timm's ceilings of quotients nest, and an export of five took more than ten minutes."""

    def __init__(self, of: Any) -> None:
        super().__init__(
            of.in_channels,
            of.out_channels,
            of.kernel_size,
            of.stride,
            dilation=of.dilation,
            groups=of.groups,
            bias=of.bias is not None,
        )
        self.weight, self.bias = of.weight, of.bias

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for axis in (1, 0):
            covered = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            missing = max(-x.shape[2 + axis] % self.stride[axis] + covered - self.stride[axis], 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


class TimmBody(nn.Module):
    """A convolutional model of timm's, by its own name."""

    def __init__(self, config: NetworkConfig, pretrained: bool, drop_path: float) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"backbone {config.backbone!r} needs the package timm") from None
        dropping: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        name = config.backbone.removeprefix(TIMM)
        create = functools.partial(
            timm.create_model,
            name,
            features_only=True,
            **dropping,
        )
        try:
            info: Any = create(pretrained=False).feature_info
        except RuntimeError as error:
            raise ValueError(f"backbone {config.backbone!r}: {error}") from None
        except TypeError:
            if not drop_path:
                raise
            raise ValueError(
                f"drop_path must be 0 with backbone {config.backbone!r}, got {drop_path}"
            ) from None
        last = {reduction: index for index, reduction in enumerate(info.reduction())}
        self.levels = range(config.min_level, min(config.max_level, 5) + 1)
        if any(2**level not in last for level in self.levels):
            raise ValueError(
                f"backbone {config.backbone!r} must have the strides "
                f"{[2**level for level in self.levels]}, got {info.reduction()}"
            )
        of_package = pretrained and timm_weights(name).is_file()
        self.model = create(
            pretrained=pretrained and not of_package,
            out_indices=[last[2**level] for level in self.levels],
        )
        for path, module in list(self.model.named_modules()):
            if isinstance(module, timm.layers.Conv2dSame):
                self.model.set_submodule(path, SameConv2d(module))
        if of_package:
            weights = torch.load(timm_weights(name), map_location="cpu", weights_only=True)
            names = self.model.state_dict()  # without those of the classifier
            self.model.load_state_dict({name: weights[name] for name in names})
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
def channels(body: nn.Module) -> list[int]:
    """Of the features of each of its levels."""
    was_training = body.training
    body.eval()  # batch statistics must not see the probe
    features = list(body(torch.zeros(1, 3, 64, 64)).values())
    body.train(was_training)
    return [feature.shape[1] for feature in features]
