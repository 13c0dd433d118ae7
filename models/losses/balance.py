"""What the equalization losses remember of the steps before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST = 1e-10  # what a divisor has added


class GradientBalance(nn.Module):
    """Of each class how large the gradients of its own anchors were, and those of all others, in all steps so far.

    The sums are in float64, in which those of a long run still grow, and in the model's state: a run that goes on has them.
    """

    gradient_sums: Tensor  # (2, K)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("gradient_sums", torch.zeros(2, num_classes, dtype=torch.float64))

    def ratio(self, before: float) -> Tensor:
        """(K,), 0 where a class has had no gradient of its own; `before` where it has had none at all."""
        own, others = self.gradient_sums
        return torch.where(own + others > 0, own / (others + LEAST), before)

    @torch.no_grad()
    def add(self, gradient_sums: Tensor) -> None:
        """Those of a step, of all processes; in training mode alone."""
        if not self.training:
            return
        if torch.distributed.is_initialized():
            gradient_sums = gradient_sums.clone()
            torch.distributed.all_reduce(gradient_sums)
        self.gradient_sums.add_(gradient_sums)
