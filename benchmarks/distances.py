"""Heads that predict distances: decoding, and the distribution focal loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.assigners import SIZE, grid, random_boxes
from benchmarks.harness import OURS, Case, Contestant
from focalops import decode_distances, dense_box_loss, distribution_focal_loss, reference

STRIDES = [8, 16, 32]
BINS = 16


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for images in (1,) if quick else (1, 16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for with_gradient in (False, True):
                yield decode_case(images, layout, with_gradient, device, quick)
    for targets in (500,) if quick else (500, 8000):  # of the foreground of a batch
        yield loss_case(targets, device, quick)
    yield head_case(1 if quick else 16, device)


def decode_case(
    images: int,
    layout: torch.memory_format,
    with_gradient: bool,
    device: torch.device,
    quick: bool,
) -> Case:
    points, level_sizes = grid(STRIDES, device)
    levels = [
        torch.randn(images, 4 * BINS, SIZE // stride, SIZE // stride, device=device)
        .to(memory_format=layout)
        .requires_grad_(with_gradient)
        for stride in STRIDES
    ]
    upstream = torch.rand(images, len(points), 4, device=device)
    strides = torch.tensor(STRIDES, device=device).repeat_interleave(
        torch.tensor(level_sizes, device=device)
    )
    bins = torch.arange(float(BINS), device=device).view(1, BINS, 1, 1)

    def with_convolution() -> Tensor:
        """Concatenate, softmax over the bins, and a convolution with their numbers."""
        logits = torch.cat([level.flatten(2) for level in levels], dim=2)
        by_bin = logits.unflatten(1, (4, BINS)).transpose(1, 2).softmax(dim=1)
        distances = F.conv2d(by_bin, bins).squeeze(1) * strides
        before, after = distances.chunk(2, dim=1)
        return torch.cat((points.T - before, points.T + after), dim=1).transpose(1, 2)

    def step(decode: Callable[[], Tensor]) -> Contestant:
        def run() -> list[Tensor]:
            boxes = decode()
            grads = torch.autograd.grad(boxes, levels, upstream) if with_gradient else ()
            return [boxes.detach(), *grads]

        return run

    def in_plain_pytorch() -> Tensor:
        return reference.decode_distances(levels, points, STRIDES, bins=BINS)

    contestants = {
        OURS: step(lambda: decode_distances(levels, points, STRIDES, bins=BINS)),
        "reference": step(in_plain_pytorch),
        "softmax and convolution": step(with_convolution),
    }
    if not quick:
        contestants["reference, compiled"] = step(torch.compile(in_plain_pytorch))
    what = "decode_distances and gradient" if with_gradient else "decode_distances"
    how = "channels_last" if layout == torch.channels_last else "contiguous"
    size = f"{images} x {len(points):,} x 4 x {BINS} float32, {how}"
    logits, boxes = (4 * images * len(points) * 4 * n for n in (BINS, 1))
    # The gradient reads the logits again, and the boxes' own.
    least = 3 * logits + 2 * boxes if with_gradient else logits + boxes
    return Case(what, size, least, contestants, close)


def loss_case(targets: int, device: torch.device, quick: bool) -> Case:
    logits = torch.randn(targets, 4, BINS, device=device, requires_grad=True)
    distances = torch.rand(targets, 4, device=device) * (BINS - 1.1)

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> list[Tensor]:
            value = loss(logits, distances)
            return [value.detach(), *torch.autograd.grad(value, logits)]

        return run

    def in_plain_pytorch(x: Tensor, t: Tensor) -> Tensor:
        return reference.distribution_focal_loss(x, t, reduction="sum")

    contestants = {
        OURS: step(lambda x, t: distribution_focal_loss(x, t, reduction="sum")),
        "reference": step(in_plain_pytorch),
        "two cross entropies": step(two_cross_entropies),
    }
    if not quick:
        contestants["reference, compiled"] = step(torch.compile(in_plain_pytorch))
    size = f"{targets:,} x 4 x {BINS} float32"
    least = 2 * logits.numel() * 4 + 2 * distances.numel() * 4
    return Case("distribution_focal_loss and gradient", size, least, contestants, close)


def head_case(images: int, device: torch.device) -> Case:
    """Both losses of a head; as many foreground points as an assigner finds for 20 objects, ten of each."""
    points, level_sizes = grid(STRIDES, device)
    levels = [
        torch.randn(images, 4 * BINS, SIZE // s, SIZE // s, device=device, requires_grad=True)
        for s in STRIDES
    ]
    gt_boxes = torch.stack([random_boxes(20, device) for _ in range(images)])
    matches = torch.full((images, len(points)), -1, device=device)
    foreground = torch.rand(images, len(points), device=device).topk(200).indices
    matches.scatter_(1, foreground, torch.arange(200, device=device).expand(images, 200) // 10)
    strides = torch.tensor(STRIDES, device=device).repeat_interleave(
        torch.tensor(level_sizes, device=device)
    )[:, None]
    numbers = torch.arange(float(BINS), device=device)

    def decode_first() -> Tensor:
        """Decode all points, encode all targets, gather the foreground of both."""
        logits = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
        before, after = (logits.unflatten(2, (4, BINS)).softmax(3).matmul(numbers) * strides).chunk(
            2, dim=2
        )
        boxes = torch.cat((points - before, points + after), dim=2)
        truth = gt_boxes.gather(1, matches.clamp(min=0)[..., None].expand(-1, -1, 4))
        targets = torch.cat((points - truth[..., :2], truth[..., 2:] - points), dim=2) / strides
        is_foreground = matches >= 0
        targets = targets[is_foreground].clamp(0, BINS - 1.01)
        dfl = two_cross_entropies(logits[is_foreground].view(-1, 4, BINS), targets)
        iou = reference.complete_box_iou_loss(boxes[is_foreground], truth[is_foreground])
        return iou.sum() + 0.2 * dfl / 4

    def step(loss: Callable[[], Tensor]) -> Contestant:
        def run() -> list[Tensor]:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, levels)]

        return run

    def with_(function: Callable[..., Tensor]) -> Contestant:
        options = {"coding": "distance", "strides": STRIDES, "bins": BINS, "dfl_weight": 0.2}
        arguments = (levels, points, gt_boxes, matches)
        return step(lambda: function(*arguments, loss="ciou", **options))

    contestants = {
        OURS: with_(dense_box_loss),
        "reference": with_(reference.dense_box_loss),
        "decode first": step(decode_first),
    }
    size = f"{images} x {len(points):,} x 4 x {BINS} float32, 200 foreground"
    least = 4 * (sum(level.numel() for level in levels) + 2 * matches.numel())
    return Case("dense_box_loss of distances and gradient", size, least, contestants, agree)


def two_cross_entropies(x: Tensor, t: Tensor) -> Tensor:
    x, t = x.flatten(0, 1), t.flatten()
    left = t.long()
    share = t - left
    of_left, of_right = (F.cross_entropy(x, y, reduction="none") for y in (left, left + 1))
    return ((1 - share) * of_left + share * of_right).sum()


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    # The last bin is 0.01 of a bin further for one of them.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
