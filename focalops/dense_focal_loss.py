"""The sigmoid focal loss of a head's levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import check_are_constant, check_num_levels, choice, number
from focalops._gradients import (
    differentiable,
    empty_gradients,
    loss_over_its_logits,
    register_gradients,
    scaled,
)
from focalops._loss_options import (
    LossOptions,
    check_non_negative,
    check_unit,
    check_unit_or_none,
)
from focalops._ops import (
    call,
    compute_dtype,
    ops,
    register_vmap_as_loop,
    runs_reference,
)
from focalops.dense_row_losses import (
    DENSE_REDUCTIONS,
    check_class_head,
    checked_levels,
    dense_loss,
)


def dense_focal_loss(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "sum",
    *,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0,
    inplace_backward: bool = False,
) -> Tensor:
    r"""The focal loss of a head's outputs, read where the head left them: no permute, no concatenation.

    Args:
        cls_logits: 1 to 8 levels ``(B, A * K, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``a * K + k`` is class ``k`` of anchor ``a``. What lies otherwise is copied.
        labels: ``(B, N)``, int32 or int64, the class indices of :func:`sigmoid_focal_loss`, one an anchor, in the order
            level, row, column, anchor. N tells A: the number of anchors over the number of positions.
        alpha: as in :func:`sigmoid_focal_loss`.
        gamma: as in :func:`sigmoid_focal_loss`.
        reduction: ``"sum"``; or ``"none"``: one loss an anchor, the sum of those of its classes.
        normalizer: a number or 0-d tensor that divides the loss, such as the number of positive anchors; or ``(B,)``, one for
            each image. Read on the device.
        min_normalizer: least value of a divisor.
        ignore_index: label of anchors to leave out.
        weight: ``(B, N)``, one an anchor. It may require grad: its gradient is the loss of the anchor.
        class_weight: ``(K,)`` or ``(3, K)``, as in :func:`sigmoid_focal_loss`.
        label_smoothing: as in :func:`sigmoid_focal_loss`.
        inplace_backward: write the gradients over ``cls_logits``, as in :func:`sigmoid_focal_loss`; each level must be
            contiguous or channels_last and require a gradient.

    Returns:
        A 0-d tensor, float64 for float64 logits, else float32: the sum over the images of their losses, each divided by its
        normalizer. With ``reduction="none"`` ``(B, N)``.

    One launch reads the logits of all levels once and, where they require a gradient, writes it in the same pass and in the
    same layout. It takes the only extra memory, or none with ``inplace_backward``. Two runs give the same bits. Time O(logits).
    Losses of anchors, and a weight that requires grad, take a second pass over the gradient, which multiplies it in place by
    what comes from behind.

    >>> dense_focal_loss(cls_logits, labels, normalizer=(labels < num_classes).sum(1)) / batch_size
    """
    cls_logits = checked_levels(cls_logits)
    choice("reduction", reduction, DENSE_REDUCTIONS)
    alpha, gamma = number("alpha", alpha), number("gamma", gamma)
    label_smoothing = number("label_smoothing", label_smoothing)
    options = LossOptions(
        reduction,
        ignore_index,
        normalizer,
        min_normalizer,
        weight,
        class_weight,
        inplace_backward,
    ).checked(constant_weight=False, labels=labels)
    check_num_levels("dense_focal_loss", "cls_logits", cls_logits)
    numbers = (alpha, gamma, label_smoothing)
    weight_is_constant = weight is None or not weight.requires_grad
    if options.inplace_backward and not weight_is_constant:
        check_are_constant(weight=weight)
    if options.reduction != "sum" or not weight_is_constant:
        return dense_loss(
            cls_logits, labels, None, "sigmoid_focal_loss", [*map(float, numbers)], options
        )
    dtype = compute_dtype(cls_logits[0].dtype)
    options = options.in_dtype(dtype)
    weights = options.weight, options.class_weight
    divisor = options.divisor(dtype)
    if runs_reference(cls_logits[0]):
        _check(cls_logits, labels, *numbers, *weights, divisor[0])
        return _reference(cls_logits, labels, numbers, *weights, options.ignore_index, divisor)
    arguments = (labels, *numbers, *weights, options.ignore_index, *divisor)
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in cls_logits)
    if options.inplace_backward and compute_grad:
        if len(set(map(id, cls_logits))) < len(cls_logits):
            raise ValueError("inplace_backward needs different tensors for different levels")

        def loss(*levels: Tensor) -> Tensor:
            return call(ops._dense_focal_loss_, levels, *arguments)

        names = {f"cls_logits[{i}]": level for i, level in enumerate(cls_logits)}
        return loss_over_its_logits(loss, names, divisor)
    return call(ops.dense_focal_loss, cls_logits, *arguments, compute_grad)[0]


def _reference(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    numbers: tuple[float, float, float],  # alpha, gamma, label_smoothing
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    divisor: tuple[Tensor | None, float],
) -> Tensor:
    alpha, gamma, label_smoothing = numbers
    normalizer, min_normalizer = divisor
    return reference.dense_focal_loss(
        cls_logits,
        labels,
        alpha,
        gamma,
        normalizer=min_normalizer if normalizer is None else normalizer,
        min_normalizer=min_normalizer,
        ignore_index=ignore_index,
        weight=weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
    )


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::dense_focal_loss")
def _(
    cls_logits: list[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    numbers = (alpha, gamma, label_smoothing)
    _check(cls_logits, labels, *numbers, weight, class_weight, normalizer)
    loss = cls_logits[0].new_empty((), dtype=compute_dtype(cls_logits[0].dtype))
    return loss, empty_gradients(cls_logits) if compute_grad else []


def _check(
    cls_logits: list[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    op = "dense_focal_loss"
    check_class_head(op, cls_logits, labels, weight, class_weight, normalizer)
    check_unit_or_none(op, "alpha", alpha)
    check_non_negative(op, "gamma", gamma)
    check_unit(op, "label_smoothing", label_smoothing)


@torch.library.register_fake("focalops::_dense_focal_loss_")
def _(cls_logits: list[Tensor], *_: Any) -> Tensor:
    return cls_logits[0].new_empty((), dtype=compute_dtype(cls_logits[0].dtype))


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    cls_logits, labels, *ctx.numbers, weight, class_weight, ctx.ignore_index = inputs[:8]
    normalizer, ctx.min_normalizer, _ = inputs[8:]
    ctx.num_levels = len(cls_logits)
    ctx.save_for_backward(labels, weight, class_weight, normalizer, *cls_logits, *output[1])


def _backward(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    labels, weight, class_weight, normalizer, *tensors = ctx.saved_tensors
    cls_logits, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    divisor = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled(grads, grad_loss, *divisor)

    def formula(*x: Tensor) -> Tensor:
        return _reference(x, labels, ctx.numbers, weight, class_weight, ctx.ignore_index, divisor)

    return differentiable(formula, cls_logits, grad_loss)


register_gradients("dense_focal_loss", _setup, _backward)
register_vmap_as_loop("dense_focal_loss")
