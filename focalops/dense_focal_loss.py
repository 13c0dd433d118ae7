"""The sigmoid focal loss of a head's levels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import check_levels, check_num_levels, number
from focalops._gradients import (
    differentiable,
    empty_gradients,
    loss_over_its_logits,
    scaled,
)
from focalops._loss_options import (
    LossOptions,
    check_class_weight,
    check_non_negative,
    check_normalizer,
    check_row_numbers,
    check_unit,
    check_unit_or_none,
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


def dense_focal_loss(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
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
        normalizer: a number or 0-d tensor that divides the loss, such as the number of positive anchors; or ``(B,)``, one for
            each image. Read on the device.
        min_normalizer: least value of a divisor.
        ignore_index: label of anchors to leave out.
        weight: ``(B, N)``, one an anchor.
        class_weight: ``(K,)``, as in :func:`sigmoid_focal_loss`.
        label_smoothing: as in :func:`sigmoid_focal_loss`.
        inplace_backward: write the gradients over ``cls_logits``, as in :func:`sigmoid_focal_loss`; each level must be
            contiguous or channels_last and require a gradient.

    Returns:
        A 0-d tensor, float64 for float64 logits, else float32: the sum over the images of their losses, each divided by its
        normalizer.

    One launch reads the logits of all levels once and, where they require a gradient, writes it in the same pass and in the
    same layout. It takes the only extra memory, or none with ``inplace_backward``. Two runs give the same bits. Time O(logits).

    >>> dense_focal_loss(cls_logits, labels, normalizer=(labels < num_classes).sum(1)) / batch_size
    """
    if isinstance(cls_logits, Tensor) or not isinstance(cls_logits, Iterable):
        given = type(cls_logits).__name__
        raise TypeError(f"cls_logits must be a list of Tensors, got {given}")
    cls_logits = list(cls_logits)
    for i, level in enumerate(cls_logits):
        require_tensor(f"cls_logits[{i}]", level)
    alpha, gamma = number("alpha", alpha), number("gamma", gamma)
    label_smoothing = number("label_smoothing", label_smoothing)
    options = LossOptions(
        "sum",
        ignore_index,
        normalizer,
        min_normalizer,
        weight,
        class_weight,
        inplace_backward,
    ).checked(labels=labels)
    check_num_levels("dense_focal_loss", "cls_logits", cls_logits)
    dtype = compute_dtype(cls_logits[0].dtype)
    options = options.in_dtype(dtype)
    weights = options.weight, options.class_weight
    divisor = options.divisor(dtype)
    numbers = (alpha, gamma, label_smoothing)
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
    check_unit_or_none(op, "alpha", alpha)
    check_non_negative(op, "gamma", gamma)
    check_unit(op, "label_smoothing", label_smoothing)
    check_row_numbers(op, "weight", weight, "labels", labels, compute_dtype(first.dtype))
    if anchors > 0:
        check_class_weight(op, class_weight, first, channels // anchors)
    check_normalizer(op, "cls_logits[0]", first, normalizer, images)


@torch.library.register_fake("focalops::_dense_focal_loss_")
def _(cls_logits: list[Tensor], *_: Any) -> Tensor:
    return cls_logits[0].new_empty((), dtype=compute_dtype(cls_logits[0].dtype))


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    cls_logits, labels, *ctx.numbers, weight, class_weight, ctx.ignore_index = inputs[:8]
    normalizer, ctx.min_normalizer, _ = inputs[8:]
    ctx.save_for_backward(labels, weight, class_weight, normalizer, *cls_logits, *output[1])
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_loss: Tensor | None, _: list[Tensor | None]
) -> tuple[Sequence[Tensor | None] | None, ...]:
    nothing = (None,) * 10
    labels, weight, class_weight, normalizer, *tensors = ctx.saved_tensors
    levels = len(ctx.needs_input_grad[0])
    cls_logits, grads = tensors[:levels], tensors[levels:]
    if grad_loss is None:
        return [None] * levels, *nothing
    divisor = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled(grads, grad_loss, *divisor), *nothing

    def formula(*x: Tensor) -> Tensor:
        return _reference(x, labels, ctx.numbers, weight, class_weight, ctx.ignore_index, divisor)

    return list(differentiable(formula, cls_logits, grad_loss)), *nothing


torch.library.register_autograd("focalops::dense_focal_loss", _backward, setup_context=_setup)

register_vmap_as_loop("dense_focal_loss")
