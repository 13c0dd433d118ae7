"""Models and files of the package effdet as our EfficientDet: the configuration that means the same, and the names of the weights."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_weights
from .config import TIMM
from .data import DataError
from .efficientdet import EfficientDet, EfficientDetConfig, Node, anchor_sizes, cell_nodes
from .outputs import reason

FUSIONS: dict[str, Any] = {
    "bifpn_fa": "fast",
    "bifpn_attn": "softmax",
    "bifpn_sum": "sum",
}
# What a name begins with there and here. Inputs of nodes are counted otherwise: `input_of`.
NAMES = (
    (r"fpn\.resample\.\d+\.conv\.conv\.", "fpn.coarsest.0."),
    (r"fpn\.resample\.\d+\.conv\.bn\.", "fpn.coarsest.1."),
    (r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.combine\.edge_weights", r"fpn.cells.\1.nodes.\2.weights"),
    (
        r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.combine\.resample\.(\d+)\.conv\.conv\.",
        r"fpn.cells.\1.nodes.\2.laterals.\3.0.",
    ),
    (
        r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.combine\.resample\.(\d+)\.conv\.bn\.",
        r"fpn.cells.\1.nodes.\2.laterals.\3.1.",
    ),
    (
        r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.after_combine\.conv\.conv_dw\.",
        r"fpn.cells.\1.nodes.\2.conv.0.",
    ),
    (
        r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.after_combine\.conv\.conv_pw\.",
        r"fpn.cells.\1.nodes.\2.conv.1.",
    ),
    (
        r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.after_combine\.conv\.bn\.",
        r"fpn.cells.\1.nodes.\2.conv.2.",
    ),
    (r"(class|box)_net\.conv_rep\.(\d+)\.conv_dw\.", r"\1_head.convs.\2.0."),
    (r"(class|box)_net\.conv_rep\.(\d+)\.conv_pw\.", r"\1_head.convs.\2.1."),
    (r"(class|box)_net\.bn_rep\.(\d+)\.(\d+)\.bn\.", r"\1_head.norms.\2.\3."),
    (r"(class|box)_net\.predict\.conv_dw\.", r"\1_head.output.0."),
    (r"(class|box)_net\.predict\.conv_pw\.", r"\1_head.output.1."),
    (r"backbone\.", "backbone.model."),
)


def config_of(model: Any) -> EfficientDetConfig:
    """The configuration of an effdet.EfficientDet; ValueError where none means the same."""
    theirs = getattr(model, "config", None)
    if theirs is None or not hasattr(theirs, "fpn_cell_repeats"):
        raise ValueError(
            f"model must be an EfficientDet of the package effdet, got {type(model).__qualname__}"
        )
    fusion = theirs.fpn_name or "bifpn_fa"
    for what, value, known in (
        ("fpn_name", fusion, tuple(FUSIONS)),
        ("fpn_config", theirs.fpn_config, (None,)),
        ("act_type", theirs.act_type, ("swish", "relu6")),
        ("head_act_type", theirs.head_act_type, (None, theirs.act_type)),
        ("pad_type", theirs.pad_type, ("", "same")),
        ("separable_conv", theirs.separable_conv, (True,)),
        ("apply_resample_bn", theirs.apply_resample_bn, (True,)),
        ("conv_bn_relu_pattern", theirs.conv_bn_relu_pattern, (False,)),
        ("head_bn_level_first", theirs.head_bn_level_first, (False,)),
        ("downsample_type", theirs.downsample_type, ("max",)),
        ("upsample_type", theirs.upsample_type, ("nearest",)),
        ("num_scales", theirs.num_scales, (3,)),
        ("fpn_drop_path_rate", theirs.fpn_drop_path_rate, (0,)),
        ("label_smoothing", theirs.label_smoothing, (0,)),
        ("legacy_focal", theirs.legacy_focal, (False,)),
    ):
        if value not in known:
            options = " or ".join(map(repr, known))
            raise ValueError(f"model.config.{what} must be {options}, got {value!r}")
    height, width = theirs.image_size
    if height != width:
        raise ValueError(f"model.config.image_size must be a square, got {theirs.image_size}")
    return EfficientDetConfig(
        num_classes=theirs.num_classes,
        backbone=TIMM + theirs.backbone_name,
        min_level=theirs.min_level,
        max_level=theirs.max_level,
        pyramid_channels=theirs.fpn_channels,
        cells=theirs.fpn_cell_repeats,
        fusion=FUSIONS[fusion],
        head_depth=theirs.box_class_repeats,
        activation="relu6" if theirs.act_type == "relu6" else "silu",
        padding="same" if theirs.pad_type == "same" else "symmetric",
        redundant_bias=theirs.redundant_bias,
        anchor_sizes=anchor_sizes(theirs.anchor_scale, theirs.min_level, theirs.max_level),
        aspect_ratios=tuple(map(tuple, theirs.aspect_ratios)),
        alpha=theirs.alpha,
        gamma=theirs.gamma,
        box_loss_beta=theirs.delta,
        box_loss_weight=theirs.box_loss_weight * theirs.delta / 4,
        detections_per_image=theirs.max_det_per_image,
        topk_candidates=theirs.max_detection_points,
        topk=theirs.max_detection_points,
        nms_method="gaussian" if theirs.soft_nms else "hard",
        score_threshold=0.001 if theirs.soft_nms else 0.0,  # where their soft NMS ends
        min_size=height,
        max_size=height,
        image_mean=tuple(theirs.get("mean", EfficientDetConfig.image_mean)),
        image_std=tuple(theirs.get("std", EfficientDetConfig.image_std)),
    )


def from_effdet_file(path: Path | str, name: str, **fields: Any) -> EfficientDet:
    """The EfficientDet in evaluation mode whose weights a file of the package effdet's has.

    A file that was released, or a checkpoint of effdet's training, whose averaged weights are taken where it has them.
    Nothing in it is executed.

    Args:
        path: what torch.save wrote.
        name: as effdet has it, "tf_efficientdet_d0", or as EfficientDetConfig.named: "tf_d0". "tf_" is optional: the file
            tells. So it does the number of classes.
        fields: of the configuration, where they differ from the published model's.

    Raises:
        DataError: there is no such file, or it is none of that model's.
        ValueError: no published model has that name.
    """
    state = read_state(Path(path))
    size = name.removeprefix("tf_").removeprefix("efficientdet_")
    original = "fpn.cell.0.fnode.0.after_combine.conv.conv_pw.bias" in state
    config = EfficientDetConfig.named(f"{'tf_' * original}{size}", **fields)
    logits = state.get("class_net.predict.conv_pw.bias")
    if logits is None:
        raise DataError(f"{path} holds no weights of an EfficientDet of the package effdet")
    anchors = len(config.anchor_sizes[0]) * len(config.aspect_ratios)
    config = dataclasses.replace(config, num_classes=max(1, len(logits) // anchors))
    model = EfficientDet(config)
    counts = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
    load_weights(model, counts | renamed(state, model), Path(path), f"an EfficientDet {size}")
    return model.eval()


def read_state(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)})") from None
    except Exception:  # a damaged pickle raises anything
        content = None
    for name in ("state_dict_ema", "state_dict"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(f"{path} holds no weights of an EfficientDet of the package effdet")
    # A model in one of effdet's benches, or in torch's wrapper for several GPUs, has names behind theirs.
    state = {re.sub(r"^(module\.|model\.)+", "", name): v for name, v in content.items()}
    return {name: v for name, v in state.items() if name != "anchors.boxes"}


def renamed(state: Mapping[str, Tensor], model: EfficientDet) -> dict[str, Tensor]:
    """A state dict of the package effdet with our names and our order of a box's numbers."""
    nodes = cell_nodes(model.config.min_level, model.config.max_level)
    ours = {}
    for name, value in state.items():
        for pattern, start in NAMES:
            found = re.match(pattern, name)
            if found:
                name = found.expand(start) + name[found.end() :]
                break
        name = re.sub(r"nodes\.(\d+)\.laterals\.(\d+)", functools.partial(input_of, nodes), name)
        if name.startswith("box_head.output.1."):
            value = xywh(value)
        ours[name] = value
    return ours


def input_of(nodes: list[Node], match: re.Match[str]) -> str:
    """There an input of a node has the index of its own node in the cell, here its place among the inputs."""
    node, index = map(int, match.groups())
    return f"nodes.{node}.laterals.{nodes[node].inputs.index(index)}"


def xywh(rows: Tensor) -> Tensor:
    """(A * 4, ...) of (y, x, h, w) as (x, y, w, h)."""
    return rows.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
