"""Focal loss and its gradient, summed: the loss step of a detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor

from benchmarks.harness import OURS, Case, Contestant
from focalops import reference, sigmoid_focal_loss

BATCH_OF_16 = 16 * 201_600  # anchors of 16 images of 800 x 1344


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if quick:
        sizes = [(50_000, 80, torch.float32)]
    elif device.type == "cpu":
        sizes = [
            (200_000, 80, torch.float32),
            (200_000, 91, torch.float32),
            (200_000, 80, torch.bfloat16),
        ]
    else:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        sizes = [(BATCH_OF_16, k, dtype) for k in (80, 91, 264, 1203) for dtype in dtypes]
    for rows, classes, dtype in sizes:
        yield case(rows, classes, dtype, device, quick)


def case(rows: int, classes: int, dtype: torch.dtype, device: torch.device, quick: bool) -> Case:
    # Logits of a network at its start (pi = 0.01) and later, one anchor in 200 positive, one in 50 ignored.
    logits = (torch.randn(rows, classes, device=device) * 2 - 4).to(dtype).requires_grad_()
    kind = torch.rand(rows, device=device)
    classes_of = torch.randint(0, classes, (rows,), device=device)
    targets = torch.where(kind < 0.005, classes_of, torch.where(kind < 0.025, -100, classes))
    normalizer = ((targets >= 0) & (targets < classes)).sum().float()

    def step(loss: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, Tensor]:
            total = loss(logits, targets, reduction="sum", normalizer=normalizer)
            return total.detach(), torch.autograd.grad(total, logits)[0]

        return run

    def torchvision_loss(
        logits: Tensor, targets: Tensor, reduction: str, normalizer: Tensor
    ) -> Tensor:
        kept = targets >= 0
        one_hot = torch.zeros_like(logits)
        positive = kept & (targets < classes)
        one_hot[positive, targets[positive]] = 1
        loss = torchvision.ops.sigmoid_focal_loss(logits[kept], one_hot[kept], reduction="sum")
        return loss / normalizer

    contestants = {OURS: step(sigmoid_focal_loss), "reference": step(reference.sigmoid_focal_loss)}
    if not quick:
        contestants["reference, compiled"] = step(torch.compile(reference.sigmoid_focal_loss))
        contestants["torchvision"] = step(torchvision_loss)

    def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
        coarse = dtype != torch.float32
        # Half the digits of the dtype: the rivals round every intermediate to it.
        torch.testing.assert_close(
            ours[0], theirs[0].float(), rtol=2e-2 if coarse else 1e-4, atol=0
        )
        torch.testing.assert_close(
            ours[1], theirs[1], rtol=5e-2 if coarse else 1e-3, atol=1e-4 if coarse else 1e-9
        )

    size = f"{rows:,} x {classes} {str(dtype).removeprefix('torch.')}"
    least = 2 * logits.numel() * logits.element_size()
    return Case("focal loss + gradient", size, least, contestants, agree)
