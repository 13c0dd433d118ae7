"""What a study measures beside AP: AP of rare and frequent classes, the time that losses take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .data import CocoDataset, Id, collate
from .detector import Detector
from .evaluate import Evaluation
from .recipes import PRECISIONS, Recipe
from .structures import HeadOutputs
from .train import to_device, training_stream

THIRDS = ("rare", "common", "frequent")


def thirds(frequencies: Sequence[float]) -> dict[str, list[int]]:
    """The labels by how many training images have one: LVIS's bounds, 10 and 100 images, are for a data set of its size."""
    order = sorted(range(len(frequencies)), key=lambda label: frequencies[label])
    bounds = [round(i * len(order) / 3) for i in range(4)]
    return {name: order[bounds[i] : bounds[i + 1]] for i, name in enumerate(THIRDS)}


def ap_of_thirds(
    evaluation: Evaluation, ids: Sequence[Id | None], frequencies: Sequence[float]
) -> dict[str, float]:
    """AP_rare, AP_common and AP_frequent, means over the classes of which the split has objects; `ids` are its of the labels."""
    names = {id: "" for id in ids if id is not None}
    found = {row["id"]: row["AP"] for row in evaluation.by_category(names)}
    figures = {}
    for name, labels in thirds(frequencies).items():
        values = [found[ids[label]] for label in labels if ids[label] in found]
        figures[f"AP_{name}"] = statistics.mean(values) if values else 0.0
    return figures


def loss_times(
    model: Detector, recipe: Recipe, data: CocoDataset, device: str, repeats: int = 7
) -> dict[str, float]:
    """Seconds of the loss step, and of a training step that it is part of, each with its gradients and without the optimizer:
    medians over one batch of `data`, by turns."""
    model.train()
    stream, pieces = training_stream(recipe, data), recipe.batch_size // recipe.accumulate
    images, targets = to_device(collate([stream[n] for n in range(pieces)]), device)
    kind = torch.device(device).type

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(kind, PRECISIONS[recipe.precision], recipe.precision != "float32"):
            losses = model(images, targets)
        torch.stack([*losses.values()]).sum().backward()

    batch, resized = model.transform(images, targets)
    outputs, anchors = model.outputs(batch.tensors)
    leaves = HeadOutputs(*([x.detach().requires_grad_() for x in levels] for levels in outputs))

    def losses_alone() -> None:
        for level in (*leaves.cls_logits, *leaves.box_deltas):
            level.grad = None
        losses = model.loss_step(leaves, anchors, resized)
        torch.stack([*losses.values()]).sum().backward()

    def timed(function: Callable[[], None]) -> float:
        if kind == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times = [(timed(losses_alone), timed(step)) for _ in range(1 + repeats)][1:]
    names = ("loss_seconds", "step_seconds")
    return dict(zip(names, map(statistics.median, zip(*times, strict=True)), strict=True))
