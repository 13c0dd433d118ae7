"""The classification losses of a head's levels, one an anchor: of any member of the row losses that has a background."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import check_levels, check_num_levels, choice, flag, number
from focalops._gradients import differentiable, empty_gradients, register_gradients, scaled_rows
from focalops._loss_options import (
    LossOptions,
    check_class_weight,
    check_normalizer,
    check_row_numbers,
    to_dtype,
)
from focalops._ops import (
    call,
    check,
    check_same_device,
    compute_dtype,
    ops,
    register_vmap_as_loop,
    require_tensor,
    runs_reference,
)
from focalops.row_losses import ROW_LOSSES, check_parameters, row_loss_of

DENSE_REDUCTIONS = ("none", "sum")
# Those with a score, which dense_quality_loss takes.
QUALITY_LOSSES = tuple(
    name for name, loss in ROW_LOSSES.items() if loss.has_scores and not loss.is_softmax
)


def dense_quality_loss(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    scores: Tensor,
    loss: str = "quality_focal_loss",
    reduction: str = "sum",
    *,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    r"""A loss whose target is the quality of the box, of a head's outputs, read where the head left them.

    Args:
        cls_logits: as in :func:`dense_focal_loss`.
        labels: as in :func:`dense_focal_loss`.
        scores: ``(B, N)``, one an anchor: the score of its class, read where it has one.
        loss: the name of the loss of rows: ``"quality_focal_loss"``, ``"varifocal_loss"``, ``"soft_focal_loss"``,
            ``"matchability_aware_loss"`` or ``"ia_bce_loss"``.
        reduction: as in :func:`dense_focal_loss`, and so are the options from here on.
        parameters: the options of that function that its formula has, such as ``beta`` or ``alpha``, with its defaults.

    Returns:
        What :func:`dense_focal_loss` returns.

    One launch reads the logits of all levels once and, where they require a gradient, writes it in the same pass and in the
    same layout. Two runs give the same bits. Time O(logits).

    >>> dense_quality_loss(cls_logits, labels, ious, "varifocal_loss", alpha=0.75, normalizer=ious.sum())
    """
    cls_logits = checked_levels(cls_logits)
    choice("loss", loss, QUALITY_LOSSES)
    choice("reduction", reduction, DENSE_REDUCTIONS)
    numbers = _numbers(loss, parameters)
    options = LossOptions(
        reduction, ignore_index, normalizer, min_normalizer, weight, class_weight
    ).checked(constant_weight=False, labels=labels, scores=scores)
    check_num_levels("dense_quality_loss", "cls_logits", cls_logits)
    return dense_loss(cls_logits, labels, scores, loss, numbers, options)


def _numbers(loss: str, parameters: dict[str, float]) -> list[float]:
    """The parameters of its formula, in C++'s order."""
    defaults = ROW_LOSSES[loss].defaults()
    for name in parameters:
        if name not in defaults:
            raise TypeError(
                f"the parameters of {loss} must be among {', '.join(defaults)}, got {name!r}"
            )
    return [
        float(flag(name, value) if isinstance(default, bool) else number(name, value))
        for name, default in defaults.items()
        for value in [parameters.get(name, default)]
    ]


def checked_levels(cls_logits: Any) -> list[Tensor]:
    if isinstance(cls_logits, Tensor) or not isinstance(cls_logits, Iterable):
        given = type(cls_logits).__name__
        raise TypeError(f"cls_logits must be a list of Tensors, got {given}")
    cls_logits = list(cls_logits)
    for i, level in enumerate(cls_logits):
        require_tensor(f"cls_logits[{i}]", level)
    return cls_logits


def dense_loss(
    cls_logits: list[Tensor],
    labels: Tensor,
    scores: Tensor | None,
    name: str,  # of ROW_LOSSES
    numbers: list[float],
    options: LossOptions,  # checked
) -> Tensor:
    """What the public functions return, once they have checked the types of their arguments."""
    dtype = compute_dtype(cls_logits[0].dtype)
    scores, options = to_dtype(scores, dtype), options.in_dtype(dtype)
    weight, divisor = options.weight, options.divisor(dtype)
    # A weight with a gradient multiplies the losses where autograd sees it.
    outside = weight if weight is not None and weight.requires_grad else None
    inside = None if outside is not None else weight
    arguments = (labels, scores, name, numbers)
    others = (options.class_weight, options.ignore_index, *divisor)
    if runs_reference(cls_logits[0]):
        _check(cls_logits, *arguments, weight, options.class_weight, divisor[0])
        losses = _reference(cls_logits, *arguments, inside, *others)
    else:
        if outside is not None:
            _check(cls_logits, *arguments, weight, options.class_weight, divisor[0])
        compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in cls_logits)
        losses = call(ops.dense_row_losses, cls_logits, *arguments, inside, *others, compute_grad)[
            0
        ]
    losses = losses if outside is None else losses * outside
    return losses if options.reduction == "none" else losses.sum()


def _reference(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    scores: Tensor | None,
    name: str,
    numbers: Sequence[float],
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
) -> Tensor:
    """Each anchor's loss over its image's divisor."""
    rows = reference._dense_rows(cls_logits, labels)
    losses = (
        ROW_LOSSES[name]
        .evaluate(
            rows,
            labels,
            scores,
            numbers,
            ignore_index=ignore_index,
            weight=weight,
            class_weight=class_weight,
        )
        .sum(dim=2)
    )
    if normalizer is None:
        return losses / min_normalizer
    return losses / normalizer.clamp(min=min_normalizer).reshape(-1, 1)


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::dense_row_losses")
def _(
    cls_logits: list[Tensor],
    labels: Tensor,
    scores: Tensor | None,
    loss: str,
    parameters: list[float],
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    _check(cls_logits, labels, scores, loss, parameters, weight, class_weight, normalizer)
    losses = labels.new_empty(labels.shape, dtype=compute_dtype(cls_logits[0].dtype))
    return losses, empty_gradients(cls_logits) if compute_grad else []


def _check(
    cls_logits: list[Tensor],
    labels: Tensor,
    scores: Tensor | None,
    loss: str,
    parameters: list[float],
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    op = "dense_focal_loss" if loss == "sigmoid_focal_loss" else "dense_quality_loss"
    check(
        not row_loss_of("dense_row_losses", loss).is_softmax,
        lambda: f"dense_row_losses: loss must be one of sigmoids, got {loss!r}",
    )
    check_class_head(op, cls_logits, labels, weight, class_weight, normalizer)
    check_row_numbers(op, "scores", scores, "labels", labels, compute_dtype(cls_logits[0].dtype))
    check_parameters("dense_row_losses", op, loss, parameters)


def check_class_head(
    op: str,
    cls_logits: list[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    """What the losses of a head's classes have in common."""
    check_levels(
        op,
        "cls_logits",
        cls_logits,
        channels="A * K",
        multiple=1,
        same="A * K",
        what="logits",
    )
    first = cls_logits[0]
    check_same_device(op, "labels", labels, "cls_logits[0]", first)
    check(
        labels.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: labels must be int32 or int64, got {labels.dtype}",
    )
    images, channels = first.shape[:2]
    positions = sum(level.shape[2] * level.shape[3] for level in cls_logits)
    has_rows = labels.dim() == 2 and labels.shape[0] == images
    rows = labels.shape[1] if has_rows else 0
    anchors = rows // positions if positions > 0 else 0
    check(
        has_rows and rows == anchors * positions and (positions == 0 or anchors > 0),
        lambda: (
            f"{op}: labels must have shape ({images}, A * {positions}), "
            f"A anchors at each position of the levels, got {tuple(labels.shape)}"
        ),
    )
    check(
        anchors == 0 or channels % anchors == 0,
        lambda: (
            f"{op}: cls_logits must have A * K channels, A = {anchors} by the shape of labels, "
            f"got {channels}"
        ),
    )
    check(
        anchors == 0 or channels // anchors < 2**30,
        lambda: f"{op}: cls_logits must have fewer than 2^30 classes, got {channels // anchors}",
    )
    check_row_numbers(op, "weight", weight, "labels", labels, compute_dtype(first.dtype))
    if anchors > 0:
        check_class_weight(op, class_weight, first, channels // anchors)
    check_normalizer(op, "cls_logits[0]", first, normalizer, images)


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    cls_logits, labels, scores, ctx.name, ctx.numbers, weight, class_weight = inputs[:7]
    ctx.ignore_index, normalizer, ctx.min_normalizer, _ = inputs[7:]
    ctx.num_levels = len(cls_logits)
    ctx.save_for_backward(labels, scores, weight, class_weight, normalizer, *cls_logits, *output[1])


def _backward(ctx: Any, grad_losses: Tensor) -> Sequence[Tensor]:
    labels, scores, weight, class_weight, normalizer, *tensors = ctx.saved_tensors
    cls_logits, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    divisor = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled_rows(grads, grad_losses, *divisor)
    weights = weight, class_weight

    def formula(*x: Tensor) -> Tensor:
        targets = labels, scores, ctx.name, ctx.numbers
        return _reference(x, *targets, *weights, ctx.ignore_index, *divisor)

    return differentiable(formula, cls_logits, grad_losses)


register_gradients("dense_row_losses", _setup, _backward)
register_vmap_as_loop("dense_row_losses")
