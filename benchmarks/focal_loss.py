"""Focal loss and its gradient, summed: the loss step of a detector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from benchmarks.harness import OURS, Case, Contestant
from focalops import (
    dense_equalized_focal_loss,
    dense_focal_loss,
    reference,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

ANCHORS = 201_600  # of an image of 800 x 1344
LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # 9 anchors a position
CLASSES = (80, 91, 264, 1203)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_LOGITS = 16_000_000
ROWS, PLANES = "channels_last", "contiguous"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if quick:
        yield rows_case(50_000, 80, torch.float32, device, quick)
        return
    is_cpu = device.type == "cpu"
    for dtype in DTYPES:
        # On a CPU, which half precision hardly helps: only the smallest and the largest K.
        for classes in CLASSES if dtype == torch.float32 or not is_cpu else CLASSES[::3]:
            rows = CPU_LOGITS // classes if is_cpu else 16 * ANCHORS
            yield rows_case(rows, classes, dtype, device, quick)
    for layout in (ROWS, PLANES):
        for dtype in DTYPES[:2]:
            yield head_case(1 if is_cpu else 16, 80, dtype, layout, device)
            yield anchors_case(1 if is_cpu else 16, 80, dtype, layout, device)
    for classes in CLASSES[::3]:
        yield softmax_case(CPU_LOGITS // classes if is_cpu else 16 * ANCHORS, classes, device)


def make_targets(shape: tuple[int, ...], classes: int, device: torch.device) -> Tensor:
    """One anchor in 200 positive, one in 50 ignored."""
    kind = torch.rand(shape, device=device)
    classes_of = torch.randint(0, classes, shape, device=device)
    return torch.where(kind < 0.005, classes_of, torch.where(kind < 0.025, -100, classes))


def new_logits(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Those of a network at its start (pi = 0.01) and later."""
    return (torch.randn(shape, device=device) * 2 - 4).to(dtype)


def agree_in(dtype: torch.dtype) -> Callable[[Any, Any], None]:
    coarse = dtype != torch.float32

    def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        # Half the digits of the dtype: the rivals round every intermediate to it.
        torch.testing.assert_close(
            ours[0], theirs[0].float(), rtol=2e-2 if coarse else 1e-4, atol=0
        )
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(
                one, other, rtol=5e-2 if coarse else 1e-3, atol=1e-4 if coarse else 1e-9
            )

    return agree


def rows_case(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, quick: bool
) -> Case:
    logits = new_logits(rows, classes, dtype=dtype, device=device).requires_grad_()
    targets = make_targets((rows,), classes, device)
    normalizer = ((targets >= 0) & (targets < classes)).sum().float()

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            total = loss(logits, targets, reduction="sum", normalizer=normalizer)
            return total.detach(), torch.autograd.grad(total, logits)[0]

        return run

    contestants = {OURS: step(sigmoid_focal_loss), "reference": step(reference.sigmoid_focal_loss)}
    if not quick:
        contestants["reference, compiled"] = step(torch.compile(reference.sigmoid_focal_loss))
        of_torchvision = torchvision.ops.sigmoid_focal_loss
        contestants["torchvision"] = step(on_dense_targets(of_torchvision))
        contestants["torchvision, compiled"] = step(on_dense_targets(torch.compile(of_torchvision)))
        if device.type == "cuda":
            contestants |= {name: step(loss) for name, loss in cuda_rivals(classes)}
    size = f"{rows:,} x {classes} {str(dtype).removeprefix('torch.')}"
    least = 2 * logits.numel() * logits.element_size()
    return Case("focal loss + gradient", size, least, contestants, agree_in(dtype))


def softmax_case(rows: int, classes: int, device: torch.device) -> Case:
    logits = new_logits(rows, classes, dtype=torch.float32, device=device).requires_grad_()
    targets = torch.randint(0, classes, (rows,), device=device)

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            total = loss(logits, targets, reduction="sum")
            return total.detach(), torch.autograd.grad(total, logits)[0]

        return run

    contestants = {
        OURS: step(softmax_focal_loss),
        "reference": step(reference.softmax_focal_loss),
        "reference, compiled": step(torch.compile(reference.softmax_focal_loss)),
    }
    least = 2 * logits.numel() * logits.element_size()
    size = f"{rows:,} x {classes} float32"
    return Case("softmax focal loss + gradient", size, least, contestants, agree_in(torch.float32))


def on_dense_targets(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """From class indices to the one-hot matrix of the rows that count, as torchvision's RetinaNet makes it."""

    def run(logits: Tensor, targets: Tensor, reduction: str, normalizer: Tensor) -> Tensor:
        kept, positive = targets >= 0, (targets >= 0) & (targets < logits.shape[1])
        one_hot = torch.zeros_like(logits)
        one_hot[positive, targets[positive]] = 1
        # As reduction="sum" does it, but for the dtype: a sum in float16 ends at 65,504.
        losses = loss(logits[kept], one_hot[kept], reduction="none")
        return losses.sum(dtype=torch.float32) / normalizer.clamp(min=1)

    return run


def cuda_rivals(classes: int) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """mmcv and apex, where they can be imported; apex where K is a multiple of 8."""
    try:
        mmcv_loss = import_module("mmcv.ops").sigmoid_focal_loss
    except ImportError:
        pass
    else:

        def mmcv(logits: Tensor, targets: Tensor, reduction: str, normalizer: Tensor) -> Tensor:
            kept = targets >= 0
            loss = mmcv_loss(logits[kept], targets[kept], 2.0, 0.25, None, reduction)
            return loss / normalizer

        yield "mmcv", mmcv
    try:
        apex_loss = import_module("apex.contrib.focal_loss").focal_loss
    except ImportError:
        return
    if classes % 8 == 0:

        def apex(logits: Tensor, targets: Tensor, reduction: str, normalizer: Tensor) -> Tensor:
            theirs = torch.where(targets == classes, -1, targets).masked_fill(targets < 0, -2)
            return apex_loss(logits, theirs, normalizer, classes, 0.25, 2.0, 0.0)

        yield "apex", apex


def make_head(
    images: int, classes: int, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    memory_format = torch.channels_last if layout == ROWS else torch.contiguous_format
    levels = [
        new_logits(images, 9 * classes, *size, dtype=dtype, device=device)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for size in LEVELS
    ]
    anchors = sum(9 * height * width for height, width in LEVELS)
    return levels, make_targets((images, anchors), classes, device)


def size_of(labels: Tensor, classes: int, dtype: torch.dtype, layout: str) -> str:
    images, anchors = labels.shape
    return f"{images} x {anchors:,} x {classes} {str(dtype).removeprefix('torch.')}, {layout}"


def anchors_case(
    images: int, classes: int, dtype: torch.dtype, layout: str, device: torch.device
) -> Case:
    """The loss of each anchor with a gradient for each, beside that of the sum times a number; class weights by part, and a gamma
    of each class with the gradient sums."""
    levels, labels = make_head(images, classes, dtype, layout, device)
    upstream = torch.rand(labels.shape, device=device)
    by_part = torch.ones(3, classes, device=device)

    def step(loss: Callable[..., Tensor], **options: Any) -> Contestant:
        def run() -> tuple[Tensor, ...]:
            value = loss(levels, labels, **options)
            grads = torch.autograd.grad(value, levels, upstream if value.dim() else upstream[0, 0])
            return value.detach(), *grads

        return run

    gamma = torch.full((classes,), 2.0, device=device)

    def with_gammas(levels: list[Tensor], labels: Tensor) -> Tensor:
        return dense_equalized_focal_loss(levels, labels, gamma)[0]

    contestants = {
        OURS: step(dense_focal_loss, reduction="none"),
        "the sum": step(dense_focal_loss),
        "the sum, class weights": step(dense_focal_loss, class_weight=by_part),
        "the sum, gammas, gradient sums": step(with_gammas),
        "reference": step(reference.dense_focal_loss, reduction="none"),
        "reference, compiled": step(torch.compile(reference.dense_focal_loss), reduction="none"),
    }
    # Forward and backward read and write numbers of the logits' size.
    least = 4 * sum(level.numel() * level.element_size() for level in levels)

    def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        last = None if theirs[0].dim() else 1  # the gradients of the sum are others
        agree_in(dtype)((ours[0].sum(), *ours[1:last]), (theirs[0].sum(), *theirs[1:last]))

    size = size_of(labels, classes, dtype, layout)
    return Case("focal loss of anchors + gradient", size, least, contestants, agree)


def head_case(
    images: int, classes: int, dtype: torch.dtype, layout: str, device: torch.device
) -> Case:
    levels, labels = make_head(images, classes, dtype, layout, device)
    normalizer = ((labels >= 0) & (labels < classes)).sum(1).float()

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, ...]:
            total = loss(levels, labels, normalizer=normalizer)
            return total.detach(), *torch.autograd.grad(total, levels)

        return run

    def concatenated(levels: list[Tensor], labels: Tensor, normalizer: Tensor) -> Tensor:
        """Permute, cat, and the loss of each image in turn, as torchvision's RetinaNet."""
        rows = [
            level.unflatten(1, (9, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels
        ]
        loss = on_dense_targets(torchvision.ops.sigmoid_focal_loss)
        images = zip(torch.cat(rows, dim=1), labels, normalizer, strict=True)
        return torch.stack([loss(*image[:2], "sum", image[2]) for image in images]).sum()

    contestants = {
        OURS: step(dense_focal_loss),
        "reference": step(reference.dense_focal_loss),
        "reference, compiled": step(torch.compile(reference.dense_focal_loss)),
        "torchvision": step(concatenated),
    }
    size = size_of(labels, classes, dtype, layout)
    least = 2 * sum(level.numel() * level.element_size() for level in levels)
    return Case("focal loss of a head + gradient", size, least, contestants, agree_in(dtype))


def draw(record: dict[str, Any], path: Path) -> None:
    """The share of the device's copy bandwidth by K, a line a dtype."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in record["rows"]:
        found = re.fullmatch(r"[\d,]+ x (\d+) (\w+)", row["size"])
        if found and row["op"] == "focal loss + gradient":
            point = int(found[1]), row["timings"][OURS]["of_copy"]
            lines.setdefault(found[2], []).append(point)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for dtype, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=dtype)
    axes.axhline(1, color="gray", linewidth=1, linestyle=":")
    axes.set(
        title=f"Focal loss + gradient\n{record['device']}",
        xlabel="K, number of classes",
        ylabel="bandwidth over that of a copy",
        xscale="log",
        ylim=(0, None),
    )
    axes.set_xticks(CLASSES, [str(k) for k in CLASSES])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
