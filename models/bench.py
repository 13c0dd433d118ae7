"""Where the time of a detector goes; a RetinaNet of torchvision's beside torchvision's with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor

from .detector import Detector
from .detectors import create, named
from .recipes import PRECISIONS
from .retinanet import RetinaNet
from .structures import HeadOutputs

BENCH_MODELS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")  # torchvision's
PHASES = ("forward", "loss", "backward", "post-process")
Figures = dict[str, dict[str, float]]  # phase -> implementation -> milliseconds


def bench(
    name: str,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    num_classes: int,
    size: tuple[int, int],
    device: str,
    precision: str,
    rounds: int,
) -> tuple[Figures, dict[str, float]]:
    """The least time of each phase over the rounds, in which both take turns, and the peak GiB of a
    training step on a GPU.

    `forward` is the images' transform, the backbone and the heads, with the copies that torchvision
    makes of their outputs; `loss` is anchors, matching, losses and their backward as far as the heads'
    outputs; `backward` is the rest of it; `post-process` is from the heads' outputs to detections.
    """
    torch.manual_seed(0)
    autocast = functools.partial(
        torch.autocast,
        torch.device(device).type,
        PRECISIONS[precision],
        enabled=precision != "float32",
    )
    both = name in BENCH_MODELS
    models = (_both if both else _ours)(name, images[:1], num_classes, size, device)
    figures: Figures = {phase: {} for phase in PHASES}
    peaks: dict[str, float] = {}
    outcomes: dict[str, Any] = {}
    for _ in range(rounds):
        for implementation, model in models.items():
            timed = functools.partial(_timed, figures, implementation, device)
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            with autocast():
                outcomes[implementation] = _round(model, images, targets, timed, peaks)
            if device.startswith("cuda"):
                peaks[implementation] = peaks.pop("step")
    if both:
        _check(outcomes)
    return figures, peaks


def _both(
    name: str, images: list[Tensor], num_classes: int, size: tuple[int, int], device: str
) -> dict[str, Any]:
    theirs = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=min(size),
        max_size=max(size),
    ).to(device)
    _let_detect(theirs, images)
    return {"torchvision": theirs, "focalops": RetinaNet.from_torchvision(theirs)}


def _ours(
    name: str, images: list[Tensor], num_classes: int, size: tuple[int, int], device: str
) -> dict[str, Any]:
    config = named(name)
    least = max(size) if config.letterbox else min(size)
    config = dataclasses.replace(
        config, num_classes=num_classes, min_size=least, max_size=max(size)
    )
    model = create(config).to(device)
    _let_be_chosen(model, images)
    return {"focalops": model}


def _round(
    model: Any,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    timed: Callable[[str, Callable[[], Any]], Any],
    peaks: dict[str, float],
) -> tuple[float, int]:
    """The loss and the number of detections."""
    is_ours = isinstance(model, Detector)
    batch: Any = None

    def forward() -> tuple[Any, Any]:
        nonlocal batch
        batch, scaled = model.transform(images, targets)
        if is_ours:
            outputs = model.network(batch.tensors)
            return outputs.cls_logits, (outputs, scaled)
        features = list(model.backbone(batch.tensors).values())
        return features, (dict(model.head(features)), scaled)

    def loss() -> Tensor:
        anchors = model.anchor_generator(batch, features)
        if is_ours:
            losses = model.loss_step(leaves, anchors[0], scaled)
        else:
            losses = model.compute_loss(scaled, leaves, anchors)
        total = sum(losses.values())
        total.backward()
        return total

    def post_process() -> list[dict[str, Tensor]]:
        anchors = model.anchor_generator(batch, features)
        if is_ours:
            return model.detections(leaves, anchors[0], batch.image_sizes)
        sizes = [f.shape[-2] * f.shape[-1] * 9 for f in features]
        split = {key: list(value.split(sizes, dim=1)) for key, value in leaves.items()}
        anchors = [list(a.split(sizes)) for a in anchors]
        return model.postprocess_detections(split, anchors, batch.image_sizes)

    model.train()
    features, (outputs, scaled) = timed("forward", forward)
    if is_ours:
        leaves: Any = HeadOutputs(*([_leaf(level) for level in levels] for levels in outputs))
        ends = [level for levels in outputs for level in levels]
        starts = [level for levels in leaves for level in levels]
    else:
        leaves = {key: _leaf(value) for key, value in outputs.items()}
        ends, starts = list(outputs.values()), list(leaves.values())
    total = timed("loss", loss)
    timed("backward", lambda: torch.autograd.backward(ends, [start.grad for start in starts]))
    if images[0].is_cuda:
        peaks["step"] = torch.cuda.max_memory_allocated() / 2**30
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        detections = timed("post-process", post_process)
    return total.item(), sum(len(found["boxes"]) for found in detections)


def _leaf(output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _timed(
    figures: Figures, implementation: str, device: str, phase: str, run: Callable[[], Any]
) -> Any:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    milliseconds = (time.perf_counter() - start) * 1000
    best = figures[phase].get(implementation, milliseconds)
    figures[phase][implementation] = min(best, milliseconds)
    return result


@torch.no_grad()
def _let_detect(model: Any, images: list[Tensor]) -> None:
    """A fresh head finds nothing; with this one some thousand scores pass the threshold, as trained."""
    head = model.eval().head
    features = list(model.backbone(model.transform(images)[0].tensors).values())
    for conv, output, std in (
        (head.classification_head.cls_logits, "cls_logits", 1.0),
        (head.regression_head.bbox_reg, "bbox_regression", 0.3),
    ):
        conv.bias.zero_()
        conv.weight *= std / head(features)[output].std()
    head.classification_head.cls_logits.bias.fill_(-6.5)


@torch.no_grad()
def _let_be_chosen(model: Detector, images: list[Tensor]) -> None:
    """A fresh head's scores are one; with this one they spread as trained ones."""
    model.eval()
    logits = torch.cat(
        [x.flatten() for x in model.network(model.transform(images)[0].tensors).cls_logits]
    )
    last = [n for n, _ in model.named_parameters() if n.startswith(model.class_layers)][-2:]
    weight, bias = (model.get_parameter(name) for name in last)
    weight.div_(logits.std())
    bias.fill_(-6.5)


def _check(outcomes: dict[str, tuple[float, int]]) -> None:
    (loss, count), (our_loss, our_count) = outcomes["torchvision"], outcomes["focalops"]
    if abs(our_loss - loss) > 0.01 * abs(loss) or abs(our_count - count) > 0.01 * count + 3:
        raise RuntimeError(
            f"the two must agree: losses {loss} and {our_loss}, {count} and {our_count} detections"
        )


def table(figures: Figures, peaks: dict[str, float]) -> str:
    """A column for each implementation, and how many times faster ours is where there are two."""
    rows = {phase: figures[phase] for phase in PHASES}
    names = list(rows["loss"])
    rows["training step"] = {
        name: sum(figures[phase][name] for phase in ("forward", "loss", "backward"))
        for name in names
    }

    def ratio(values: dict[str, float]) -> str:
        return f"{values['torchvision'] / values['focalops']:8.2f}" if names[1:] else ""

    lines = ["".join([f"{'':14}", *(f"{n:>14}" for n in names), f"{'ratio':>8}" * len(names[1:])])]
    for phase, times in rows.items():
        cells = "".join(f"{times[name]:11.1f} ms" for name in names)
        lines.append(f"{phase:14}{cells}{ratio(times)}")
    if peaks:
        cells = "".join(f"{peaks[name]:10.2f} GiB" for name in names)
        lines.append(f"{'peak memory':14}{cells}{ratio(peaks)}")
    return "\n".join(lines)
