"""How the weights change: optimizer, learning rate, the average of the weights, batch norms of several processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .detector import Detector
from .recipes import Recipe


def build_optimizers(recipe: Recipe, model: Detector) -> dict[str, torch.optim.Optimizer]:
    """By their names in a checkpoint: the recipe's, and where the loss step has parameters theirs, whose rate is constant."""
    optimizers = {"optimizer": build_optimizer(recipe, model)}
    of_losses = [*model.loss_step.parameters()]
    if of_losses:  # as the authors of the unified sample weighting network have it
        optimizers["loss_optimizer"] = torch.optim.Adam(of_losses, 1e-3, weight_decay=1e-4)
    return optimizers


def network_parameters(model: Detector) -> list[nn.Parameter]:
    """What the recipe's optimizer trains."""
    of_losses = {*model.loss_step.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p not in of_losses]


def build_optimizer(recipe: Recipe, model: Detector) -> torch.optim.Optimizer:
    parameters = network_parameters(model)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": decay}]
    if not recipe.decay_vectors:
        kernels, vectors = (
            [p for p in parameters if (p.ndim > 1) is kernel] for kernel in (True, False)
        )
        groups = [
            {"params": kernels, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=0.9)
    return torch.optim.AdamW(groups, rate)


def lr_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a half cosine to 0 or the recipe's drops."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 ** sum(step >= int(recipe.steps * drop) for drop in recipe.drops)


def average_of(recipe: Recipe, model: nn.Module) -> AveragedModel | None:
    """The running average of the weights; its state has the number of steps, so that it goes on where it was."""
    decay = recipe.ema_decay
    if not decay:
        return None
    average = AveragedModel(model, use_buffers=recipe.ema_buffers)

    def update(averaged: Any, current: Any, _: Any) -> None:
        if not averaged[0].is_floating_point():  # how many batches a norm has seen is no average
            torch._foreach_copy_(averaged, current)
            return
        steps = int(average.n_averaged)  # on the host; what is handed in is on the device
        now = min(decay, (1 + steps) / (10 + steps)) if recipe.ema_warmup else decay
        get_ema_multi_avg_fn(now)(averaged, current, _)

    average.multi_avg_fn = update
    return average


def synchronised(model: nn.Module) -> nn.Module:
    """The model with batch norms that see the batches of all processes, in place: parameters, buffers and names stay."""
    try:  # timm's batch norms have their activation in them, which torch's function would drop
        from timm.layers import convert_sync_batchnorm
    except ImportError:
        convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted
