"""The fusion of maps in a node of a BiFPN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contestant
from focalops import fuse_features, reference

# Of EfficientDet: channels, and the size of P3.
DETECTORS = {"D0": (64, 64), "D4": (224, 128)}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    images = 1 if quick else 8 if device.type == "cuda" else 2
    for name in ("D0",) if quick else DETECTORS:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            for last in (False, True):
                for backward in (False, True):
                    yield node(name, images, dtype, last, backward, device, quick)


def node(
    name: str,
    images: int,
    dtype: torch.dtype,
    last: bool,
    backward: bool,
    device: torch.device,
    quick: bool,
) -> Case:
    """Node 9 of a cell: P4, its intermediate map, and P3 pooled."""
    channels, size = DETECTORS[name]
    layout = torch.channels_last if last else torch.contiguous_format
    maps = [
        torch.randn(images, channels, n, n, device=device, dtype=dtype)
        .contiguous(memory_format=layout)
        .requires_grad_(backward)
        for n in (size // 2, size // 2, size)
    ]
    weights = torch.tensor([1.0, 0.5, 0.7], device=device, requires_grad=backward)
    upstream = torch.randn_like(maps[0])

    def step(function: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, ...]:
            output = function(maps, weights, activation="silu")
            if not backward:
                return (output,)
            return (output.detach(), *torch.autograd.grad(output, [*maps, weights], upstream))

        return run

    contestants = {OURS: step(fuse_features), "reference": step(reference.fuse_features)}
    if not quick:
        compiled = torch.compile(reference.fuse_features)
        contestants["reference, compiled"] = step(compiled)
    numbers = sum(x.numel() for x in maps)
    # Forward: maps read, output written; backward: maps and upstream read, gradients written.
    moved = numbers + maps[0].numel() + backward * (2 * numbers + maps[0].numel())
    where = "channels_last" if last else "contiguous"
    size_name = f"{name}, {images} x {channels} x {size // 2}^2 {str(dtype)[6:]}, {where}"
    op = "fuse_features" + " + gradient" * backward
    return Case(op, size_name, moved * maps[0].element_size(), contestants, close)


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        half = a.dtype == torch.bfloat16
        # A rounding; the weights' gradient is a sum of many.
        tolerance = (2e-2 if half else 1e-4) if a.dim() > 1 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
