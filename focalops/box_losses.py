"""Losses of predicted boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    check_are_constant,
    check_levels,
    check_num_levels,
    checked_normalizer,
    choice,
    floats,
    number,
    require_tensors,
)
from focalops._coordinates import (
    as_coordinates,
    broadcast,
    check_coordinates,
    check_like,
    check_rows_of_4,
    coordinates_dtype,
)
from focalops._gradients import (
    differentiable,
    differentiable_pair,
    empty_gradients,
    pair_gradients,
    scaled,
    setup_pair,
)
from focalops._loss_options import check_normalizer, divisor
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
from focalops._padding import pad_boxes
from focalops.boxes import IOU_NAMES


def box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """One minus the IoU of pairs of boxes.

    Args:
        boxes1: ``(..., 4)``.
        boxes2: ``(..., 4)``; the shapes broadcast.
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


# In the order of BoxLossKind in csrc/math/box_loss.h.
DENSE_LOSSES = ("l1", "smooth_l1", "iou", "giou", "diou", "ciou")

Numbers = tuple[Sequence[float], float, float, float]  # weights, clip, beta, eps


def dense_box_loss(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
    *,
    loss: str = "l1",
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = math.log(1000 / 16),
    beta: float = 1.0,
    eps: float = 1e-7,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
) -> Tensor:
    r"""The box loss of a head's outputs, read where the head left them: no permute, no concatenation, no dense targets.

    Args:
        deltas: 1 to 8 levels ``(B, A * 4, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``a * 4 + i`` is delta i of anchor a. What lies otherwise is copied.
        anchors: ``(N, 4)``, in the order level, row, column, anchor.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        matches: int64 ``(B, N)``, the result of :func:`match_anchors`. Anchors whose match is negative have no loss. An index
            that is none of the padded boxes' is an error on the CPU; on CUDA, where looking would stop the device, the loss
            is NaN.
        loss: ``"l1"`` or ``"smooth_l1"``, of the difference from the encoded box, summed over its four numbers; or ``"iou"``,
            ``"giou"``, ``"diou"`` or ``"ciou"``, the losses of pairs of boxes such as :func:`generalized_box_iou_loss`, of the
            decoded box.
        weights: the four factors of :func:`encode_boxes`.
        clip: as in :func:`decode_boxes`.
        beta: of ``"smooth_l1"``: below it the loss is quadratic (torch's default; detectron2's is 0.1).
        eps: of the losses of pairs.
        normalizer: a number or 0-d tensor that divides the loss, such as the number of positive anchors; or ``(B,)``, one for
            each image. Read on the device.
        min_normalizer: least value of a divisor.

    Returns:
        A 0-d tensor, float64 for float64 deltas, else float32: the sum over the images of their losses, each divided by its
        normalizer.

    Differentiable in the deltas alone. One launch reads the matches, and of the foreground anchors the deltas; where they
    require a gradient, it is written in the same pass and in the same layout, and takes the only extra memory. Two runs give
    the same bits. Time O(B N).

    >>> dense_box_loss(bbox_regression, anchors, gt_boxes, matches, loss="giou", normalizer=(matches >= 0).sum())
    """
    choice("loss", loss, DENSE_LOSSES)
    require_tensors("deltas", deltas)
    require_tensor("anchors", anchors)
    require_tensors("gt_boxes", gt_boxes)
    require_tensor("matches", matches)
    check_are_constant(anchors=anchors)
    for boxes in gt_boxes if not isinstance(gt_boxes, Tensor) else (gt_boxes,):
        check_are_constant(gt_boxes=boxes)
    coder = floats("weights", weights, "4 numbers"), number("clip", clip)
    numbers = (*coder, number("beta", beta), number("eps", eps))
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    deltas, kind = list(deltas), DENSE_LOSSES.index(loss)
    check_num_levels("dense_box_loss", "deltas", deltas)
    dtype = compute_dtype(deltas[0].dtype)
    if not isinstance(gt_boxes, Tensor):
        gt_boxes, _ = pad_boxes("dense_box_loss", anchors, gt_boxes)
    anchors, gt_boxes = as_coordinates(anchors, dtype), as_coordinates(gt_boxes, dtype)
    tensors = (deltas, anchors, gt_boxes, matches)
    divisors = divisor(normalizer, min_normalizer, dtype)
    if runs_reference(deltas[0]):
        _check_dense(*tensors, kind, numbers, divisors[0])
        return _reference_dense(*tensors, kind, numbers, divisors)
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in deltas)
    return call(ops.dense_box_loss, *tensors, kind, *numbers, *divisors, compute_grad)[0]


def _reference_dense(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    kind: int,
    numbers: Numbers,
    divisors: tuple[Tensor | None, float],
) -> Tensor:
    weights, clip, beta, eps = numbers
    normalizer, min_normalizer = divisors
    return reference.dense_box_loss(
        deltas,
        anchors,
        gt_boxes,
        matches,
        loss=DENSE_LOSSES[kind],
        weights=weights,
        clip=clip,
        beta=beta,
        eps=eps,
        normalizer=min_normalizer if normalizer is None else normalizer,
        min_normalizer=min_normalizer,
    )


def _pair_loss(kind: int, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    choice("reduction", reduction, ("none", "mean", "sum"))
    require_tensor("boxes1", boxes1)
    require_tensor("boxes2", boxes2)
    eps = number("eps", eps)
    dtype = coordinates_dtype(boxes1, boxes2)
    boxes1, boxes2 = as_coordinates(boxes1, dtype), as_coordinates(boxes2, dtype)
    boxes1, boxes2 = broadcast(boxes1, boxes2)
    if runs_reference(boxes1):
        _check_pair_loss(boxes1, boxes2, kind)
        loss = _reference_pair_loss(boxes1, boxes2, kind, eps)
    else:
        loss = call(ops.box_pair_loss, boxes1, boxes2, kind, eps)
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
            f"{op}: boxes2 must have a shape that broadcasts with that of boxes1, {tuple(boxes1.shape)}, "
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


@torch.library.register_fake("focalops::dense_box_loss")
def _(
    deltas: list[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    loss: int,
    weights: list[float],
    clip: float,
    beta: float,
    eps: float,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    numbers = (weights, clip, beta, eps)
    _check_dense(deltas, anchors, gt_boxes, matches, loss, numbers, normalizer)
    return anchors.new_empty(()), empty_gradients(deltas) if compute_grad else []


def _check_dense(
    deltas: list[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    loss: int,
    numbers: Numbers,
    normalizer: Tensor | None,
) -> None:
    op = "dense_box_loss"
    weights, _, beta, _ = numbers
    check_levels(op, "deltas", deltas, channels="A * 4", multiple=4, same="A", what="deltas")
    first = deltas[0]
    dtype = compute_dtype(first.dtype)
    images = first.shape[0]
    rows = sum(level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in deltas)
    for name, boxes in (("anchors", anchors), ("gt_boxes", gt_boxes)):
        given = boxes.dtype
        check_same_device(op, name, boxes, "deltas[0]", first)
        check(
            given == dtype,
            lambda: f"{op}: {name} must be float32 (float64 for float64 deltas), got {given}",  # noqa: B023
        )
    check(
        anchors.shape == (rows, 4),
        lambda: (
            f"{op}: anchors must have shape ({rows}, 4), one for every 4 channels at each position, "
            f"got {tuple(anchors.shape)}"
        ),
    )
    check(
        gt_boxes.dim() == 3 and gt_boxes.shape[0] == images and gt_boxes.shape[2] == 4,
        lambda: (
            f"{op}: gt_boxes must be a list of {images} (M_i, 4) or have shape ({images}, M, 4), "
            f"got {tuple(gt_boxes.shape)}"
        ),
    )
    check_same_device(op, "matches", matches, "deltas[0]", first)
    check(
        matches.dtype == torch.int64 and matches.shape == (images, rows),
        lambda: (
            f"{op}: matches must be torch.int64 of shape ({images}, {rows}), "
            f"got {matches.dtype} of shape {tuple(matches.shape)}"
        ),
    )
    check(0 <= loss <= 5, lambda: f"{op}: loss must lie in [0, 5], got {loss}")
    check(len(weights) == 4, lambda: f"{op}: weights must be 4 numbers, got {len(weights)}")
    check(beta >= 0, lambda: f"{op}: beta must be >= 0, got {beta:g}")
    check_normalizer(op, "deltas[0]", first, normalizer, images)


# ---- autograd -----------------------------------------------------------------------------------


def _backward_pair_loss(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:
        return pair_gradients(ctx, None, None)
    if torch.is_grad_enabled():
        return differentiable_pair(_reference_pair_loss, ctx, grad_output)
    arguments = (grad_output, *ctx.saved_tensors, *ctx.settings, *ctx.needs_input_grad[:2])
    return pair_gradients(ctx, *call(ops._box_pair_loss_backward, *arguments))


torch.library.register_autograd(
    "focalops::box_pair_loss", _backward_pair_loss, setup_context=setup_pair
)


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    deltas, anchors, gt_boxes, matches, ctx.kind, *ctx.numbers = inputs[:9]
    normalizer, ctx.min_normalizer, _ = inputs[9:]
    ctx.save_for_backward(anchors, gt_boxes, matches, normalizer, *deltas, *output[1])
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)


def _backward_dense(ctx: Any, grad_loss: Tensor | None, _: list[Tensor | None]) -> tuple[Any, ...]:
    nothing = (None,) * 11
    anchors, gt_boxes, matches, normalizer, *tensors = ctx.saved_tensors
    levels = len(ctx.needs_input_grad[0])
    deltas, grads = tensors[:levels], tensors[levels:]
    if grad_loss is None:
        return [None] * levels, *nothing
    divisors = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled(grads, grad_loss, *divisors), *nothing

    def formula(*x: Tensor) -> Tensor:
        return _reference_dense(x, anchors, gt_boxes, matches, ctx.kind, ctx.numbers, divisors)

    return list(differentiable(formula, deltas, grad_loss)), *nothing


torch.library.register_autograd(
    "focalops::dense_box_loss", _backward_dense, setup_context=_setup_dense
)

register_vmap_as_loop("dense_box_loss")
