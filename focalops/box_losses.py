"""Losses of predicted boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._ops import call, check, compute_dtype, ops, runs_reference
from focalops.boxes import (
    IOU_NAMES,
    as_coordinates,
    check_coordinates,
    check_like,
    check_rows_of_4,
    differentiable,
    gradients,
    setup_context,
)


def box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the IoU of pairs of boxes.

    Args:
        boxes1: ``(..., 4)``.
        boxes2: of the same shape.
        reduction: ``"none"``, ``"mean"`` (0 of no boxes) or ``"sum"``.
        eps: added to the union, so that empty boxes have an IoU of 0.

    Returns:
        ``(...)``, or 0-d: float64 if a set is float64, else float32, whatever the sets are, as in torchvision.

    Differentiable in both sets; a set's gradient is computed only where it is wanted. One pass over the boxes forward and
    one backward, and nothing is saved in between but the boxes. Time O(N).

    >>> box_iou_loss(decode_boxes(deltas, anchors), gt_boxes, reduction="sum")
    """
    return _pair_loss(0, boxes1, boxes2, reduction, eps)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the generalized IoU of pairs of boxes: a drop-in for ``torchvision.ops.generalized_box_iou_loss``.

    ``eps`` is added to the areas of the union and of the enclosing box. Arguments and result are those of
    :func:`box_iou_loss`.
    """
    return _pair_loss(1, boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the distance IoU of pairs of boxes: a drop-in for ``torchvision.ops.distance_box_iou_loss``.

    ``eps`` is added to the area of the union and to the squared diagonal of the enclosing box. Arguments and result are
    those of :func:`box_iou_loss`.
    """
    return _pair_loss(2, boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the complete IoU of pairs of boxes: a drop-in for ``torchvision.ops.complete_box_iou_loss``.

    As there the weight of the aspect ratio's term counts as constant in the gradient. ``eps`` is added to each divisor
    (torchvision takes 1e-7 for all but that weight's); the angle of a point is 0, not NaN. Arguments and result are those
    of :func:`box_iou_loss`.
    """
    return _pair_loss(3, boxes1, boxes2, reduction, eps)


def _pair_loss(kind: int, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be one of 'none', 'mean', 'sum', got {reduction!r}")
    if runs_reference(boxes1):
        loss = _reference_pair_loss(boxes1, boxes2, kind, eps)
    else:
        dtype = compute_dtype(torch.promote_types(boxes1.dtype, boxes2.dtype))
        boxes1, boxes2 = as_coordinates(boxes1, dtype), as_coordinates(boxes2, dtype)
        loss = call(ops.box_pair_loss, boxes1, boxes2, kind, float(eps))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or loss.numel() == 0 else loss.mean()


def _reference_pair_loss(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    return getattr(reference, f"{IOU_NAMES[kind]}_loss")(boxes1, boxes2, eps=eps)


# ---- fake kernels -------------------------------------------------------------------------------


def _check_pair_loss(boxes1: Tensor, boxes2: Tensor, kind: int) -> None:
    op = f"{IOU_NAMES[kind]}_loss"
    check_coordinates(op, "boxes1", boxes1)
    check_rows_of_4(op, "boxes1", boxes1)
    check_like(op, "boxes2", boxes2, "boxes1", boxes1)
    check(
        boxes2.shape == boxes1.shape,
        lambda: (
            f"{op}: boxes2 must have the shape of boxes1, {tuple(boxes1.shape)}, "
            f"got {tuple(boxes2.shape)}"
        ),
    )


@torch.library.register_fake("focalops::box_pair_loss")
def _(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    _check_pair_loss(boxes1, boxes2, kind)
    return boxes1.new_empty(boxes1.shape[:-1])


@torch.library.register_fake("focalops::_box_pair_loss_backward")
def _(
    grad_output: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: int,
    eps: float,
    compute_grad1: bool,
    compute_grad2: bool,
) -> tuple[Tensor, Tensor]:
    _check_pair_loss(boxes1, boxes2, kind)
    op = f"{IOU_NAMES[kind]}_loss"
    check_like(op, "grad_output", grad_output, "boxes1", boxes1)
    check(
        grad_output.shape == boxes1.shape[:-1],
        lambda: (
            f"{op}: grad_output must have the shape of the output, got {tuple(grad_output.shape)}"
        ),
    )
    return (
        boxes1.new_empty(boxes1.shape if compute_grad1 else 0),
        boxes2.new_empty(boxes2.shape if compute_grad2 else 0),
    )


# ---- autograd -----------------------------------------------------------------------------------


def _backward_pair_loss(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:
        return gradients(ctx, None, None)
    if torch.is_grad_enabled():
        return differentiable(_reference_pair_loss, ctx, grad_output)
    arguments = (grad_output, *ctx.saved_tensors, *ctx.settings, *ctx.needs_input_grad[:2])
    return gradients(ctx, *call(ops._box_pair_loss_backward, *arguments))


torch.library.register_autograd(
    "focalops::box_pair_loss", _backward_pair_loss, setup_context=setup_context
)
