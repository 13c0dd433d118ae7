"""The sigmoid focal loss of a head's levels with a gamma of each class, and what equalization losses accumulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import check_num_levels, number
from focalops._gradients import differentiable, empty_gradients, register_gradients, scaled
from focalops._loss_options import LossOptions, check_unit_or_none
from focalops._ops import (
    call,
    check,
    check_same_device,
    compute_dtype,
    ops,
    register_vmap_as_loop,
    runs_reference,
)
from focalops.dense_row_losses import check_class_head, checked_levels


def dense_equalized_focal_loss(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    gamma: Tensor,
    alpha: float = 0.25,
    *,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The focal loss of a head's outputs with a gamma of each class, and the sums of the gradients of each class, which say
    how far its objects and all else are in balance.

    With these sums, added up over the steps, ``g`` their ratio, this is

    - the Equalized Focal Loss (Li et al., 2022): ``gamma = 2 + 8 * (1 - g)``, ``class_weight = gamma / 2``, g clamped to 0 .. 1;
    - EQLv2 (Tan et al., 2021) of a focal loss: ``class_weight = torch.stack((1 + 4 * (1 - r), r, r))``,
      ``r = torch.sigmoid(12 * (g - 0.8))``.

    Args:
        cls_logits: as in :func:`dense_focal_loss`.
        labels: as in :func:`dense_focal_loss`.
        gamma: ``(K,)``, one a class, finite and >= 0, which is not looked at.
        alpha: as in :func:`dense_focal_loss`, and so are ``normalizer``, ``min_normalizer`` and ``ignore_index``.
        weight: ``(B, N)``, one an anchor, without a gradient.
        class_weight: ``(K,)`` or ``(3, K)``, as in :func:`sigmoid_focal_loss`.

    Returns:
        What :func:`dense_focal_loss` returns, and the gradient sums, float64 ``(2, K)``, which have no gradient: of each class
        the sum of ``|dL / dx|`` over the anchors that have it, and over all others that are not ignored. L is the loss with its
        alpha and weights, not divided by the normalizer: sums of parts of a batch add up to those of the batch. A NaN among
        the logits of a class is in both.

    One launch reads the logits of all levels once and, where they require a gradient, writes it in the same pass and in the
    same layout. Two runs give the same bits. Time O(logits).
    """
    cls_logits = checked_levels(cls_logits)
    alpha = number("alpha", alpha)
    options = LossOptions(
        "sum", ignore_index, normalizer, min_normalizer, weight, class_weight
    ).checked(labels=labels, gamma=gamma)
    check_num_levels("dense_equalized_focal_loss", "cls_logits", cls_logits)
    dtype = compute_dtype(cls_logits[0].dtype)
    options, gamma = options.in_dtype(dtype), gamma.to(dtype)
    weights = options.weight, options.class_weight
    divisor = options.divisor(dtype)
    if runs_reference(cls_logits[0]):
        _check(cls_logits, labels, gamma, alpha, *weights, divisor[0])
        return _reference(
            cls_logits, labels, gamma, alpha, *weights, options.ignore_index, *divisor
        )
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in cls_logits)
    arguments = (labels, gamma, alpha, *weights, options.ignore_index, *divisor, compute_grad)
    loss, gradient_sums, _ = call(ops.dense_equalized_focal_loss, cls_logits, *arguments)
    return loss, gradient_sums


def _reference(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    gamma: Tensor,
    alpha: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
) -> tuple[Tensor, Tensor]:
    return reference.dense_equalized_focal_loss(
        cls_logits,
        labels,
        gamma,
        alpha,
        normalizer=min_normalizer if normalizer is None else normalizer,
        min_normalizer=min_normalizer,
        ignore_index=ignore_index,
        weight=weight,
        class_weight=class_weight,
    )


# ---- fake kernel --------------------------------------------------------------------------------


@torch.library.register_fake("focalops::dense_equalized_focal_loss")
def _(
    cls_logits: list[Tensor],
    labels: Tensor,
    gamma: Tensor,
    alpha: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check(cls_logits, labels, gamma, alpha, weight, class_weight, normalizer)
    loss = cls_logits[0].new_empty((), dtype=compute_dtype(cls_logits[0].dtype))
    sums = cls_logits[0].new_empty((2, gamma.shape[0]), dtype=torch.float64)
    return loss, sums, empty_gradients(cls_logits) if compute_grad else []


def _check(
    cls_logits: list[Tensor],
    labels: Tensor,
    gamma: Tensor,
    alpha: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    op = "dense_equalized_focal_loss"
    check_unit_or_none(op, "alpha", alpha)
    check_class_head(op, cls_logits, labels, weight, class_weight, normalizer)
    first = cls_logits[0]
    check_same_device(op, "gamma", gamma, "the logits", first)
    positions = sum(level.shape[2] * level.shape[3] for level in cls_logits)
    anchors = labels.shape[1] // positions if positions > 0 else 0
    classes = str(first.shape[1] // anchors) if anchors > 0 else "K"
    shape, dtype = tuple(gamma.shape), gamma.dtype
    has_shape = len(shape) == 1 and (anchors == 0 or shape[0] == first.shape[1] // anchors)
    check(
        has_shape and dtype == compute_dtype(first.dtype),
        lambda: (
            f"{op}: gamma must have shape ({classes},) "
            f"and be float32 (float64 for float64 logits), got {shape} and {dtype}"
        ),
    )


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    cls_logits, labels, gamma, ctx.alpha, weight, class_weight, ctx.ignore_index = inputs[:7]
    normalizer, ctx.min_normalizer, _ = inputs[7:]
    ctx.num_levels = len(cls_logits)
    ctx.save_for_backward(labels, gamma, weight, class_weight, normalizer, *cls_logits, *output[2])


def _backward(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    labels, gamma, weight, class_weight, normalizer, *tensors = ctx.saved_tensors
    cls_logits, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    divisor = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled(grads, grad_loss, *divisor)
    arguments = (labels, gamma, ctx.alpha, weight, class_weight, ctx.ignore_index, *divisor)

    def formula(*x: Tensor) -> Tensor:
        return _reference(x, *arguments)[0]

    return differentiable(formula, cls_logits, grad_loss)


register_gradients("dense_equalized_focal_loss", _setup, _backward)
register_vmap_as_loop("dense_equalized_focal_loss")
