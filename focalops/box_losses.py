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
    check_image_size,
    checked_normalizer,
    choice,
    floats,
    number,
    require_tensors,
)
from focalops._ops import (
    as_own_input,
    call,
    check,
    check_floating,
    check_same_device,
    compute_dtype,
    ops,
    register_vmap_as_loop,
    require_tensor,
    runs_reference,
)
from focalops.boxes import (
    IOU_NAMES,
    as_coordinates,
    broadcast,
    check_coordinates,
    check_like,
    check_rows_of_4,
    coordinates_dtype,
    differentiable,
    gradients,
    setup_context,
)
from focalops.focal_loss import (
    _contiguous_like,
    _divisor,
    _is_channels_last,
    _scaled,
)
from focalops.matching import pad_boxes


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
    deltas, weights = list(deltas), floats("weights", weights, "4 numbers")
    clip, beta, eps = number("clip", clip), number("beta", beta), number("eps", eps)
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    check_are_constant(anchors=anchors)
    for boxes in gt_boxes if not isinstance(gt_boxes, Tensor) else (gt_boxes,):
        check_are_constant(gt_boxes=boxes)
    if deltas and runs_reference(deltas[0]):
        return reference.dense_box_loss(
            deltas,
            anchors,
            gt_boxes,
            matches,
            loss=loss,
            weights=weights,
            clip=clip,
            beta=beta,
            eps=eps,
            normalizer=normalizer,
            min_normalizer=min_normalizer,
        )
    if not isinstance(gt_boxes, Tensor):
        gt_boxes, _ = pad_boxes("dense_box_loss", anchors, gt_boxes)
    if deltas:
        dtype = compute_dtype(deltas[0].dtype)
        anchors, gt_boxes = as_coordinates(anchors, dtype), as_coordinates(gt_boxes, dtype)
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(dtype)
    if not isinstance(normalizer, Tensor):
        min_normalizer = 1 if normalizer is None else max(normalizer, min_normalizer)
        normalizer = None
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in deltas)
    value, _ = call(
        ops.dense_box_loss,
        deltas,
        anchors,
        gt_boxes,
        matches,
        DENSE_LOSSES.index(loss),
        weights,
        clip,
        beta,
        eps,
        normalizer,
        min_normalizer,
        compute_grad,
    )
    return value


def _pair_loss(kind: int, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    choice("reduction", reduction, ("none", "mean", "sum"))
    require_tensor("boxes1", boxes1)
    require_tensor("boxes2", boxes2)
    eps = number("eps", eps)
    if runs_reference(boxes1):
        loss = _reference_pair_loss(boxes1, boxes2, kind, eps)
    else:
        dtype = coordinates_dtype(boxes1, boxes2)
        boxes1, boxes2 = as_coordinates(boxes1, dtype), as_coordinates(boxes2, dtype)
        boxes1, boxes2 = broadcast(boxes1, boxes2)
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
    _check_dense(deltas, anchors, gt_boxes, matches, loss, weights, beta, normalizer)
    value = anchors.new_empty(())
    if not compute_grad:
        return value, []
    return value, [
        torch.empty_like(level) if _is_channels_last(level) else _contiguous_like(level)
        for level in deltas
    ]


def _check_dense(
    deltas: list[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    loss: int,
    weights: list[float],
    beta: float,
    normalizer: Tensor | None,
) -> None:
    op = "dense_box_loss"
    check(1 <= len(deltas) <= 8, lambda: f"{op}: deltas must be 1 to 8 levels, got {len(deltas)}")
    first = deltas[0]
    dtype = compute_dtype(first.dtype)
    check_floating(op, "deltas[0]", first)
    for i, level in enumerate(deltas):
        name, shape = f"deltas[{i}]", tuple(level.shape)
        check_like(op, name, level, "deltas[0]", first)
        check(
            level.dim() == 4 and level.shape[1] % 4 == 0 and level.shape[:2] == first.shape[:2],
            lambda: (
                f"{op}: {name} must have shape (B, A * 4, H, W), "  # noqa: B023
                f"B and A the same in all levels, got {shape}"  # noqa: B023
            ),
        )
        check_image_size(op, name, level, "deltas")
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
    if normalizer is not None:
        size, given = tuple(normalizer.shape), normalizer.dtype
        check_same_device(op, "normalizer", normalizer, "deltas[0]", first)
        check(
            size in ((), (images,)),
            lambda: (
                f"{op}: normalizer must be a number, a 0-d tensor or a tensor of shape "
                f"({images},), got a tensor of shape {size}"
            ),
        )
        check(
            given == dtype,
            lambda: f"{op}: normalizer must be float32 (float64 for float64 deltas), got {given}",
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


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    deltas, anchors, gt_boxes, matches, *ctx.arguments, normalizer, ctx.min_normalizer, _ = inputs
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
    if torch.is_grad_enabled() or not grads:
        kind, weights, clip, beta, eps = ctx.arguments
        with torch.enable_grad():
            x = [as_own_input(t) for t in deltas]
            loss = reference.dense_box_loss(
                x,
                anchors,
                gt_boxes,
                matches,
                loss=DENSE_LOSSES[kind],
                weights=weights,
                clip=clip,
                beta=beta,
                eps=eps,
                normalizer=ctx.min_normalizer if normalizer is None else normalizer,
                min_normalizer=ctx.min_normalizer,
            )
            return list(torch.autograd.grad(loss, x, grad_loss, create_graph=True)), *nothing
    factor = grad_loss
    if deltas[0].dtype == torch.float16:
        factor = factor / _divisor(normalizer, ctx.min_normalizer)
    return [_scaled(grad, factor) for grad in grads], *nothing


torch.library.register_autograd(
    "focalops::dense_box_loss", _backward_dense, setup_context=_setup_dense
)

register_vmap_as_loop("dense_box_loss")
