"""Losses of predicted boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    check_are_constant,
    check_levels,
    check_like_levels,
    check_num_levels,
    checked_normalizer,
    choice,
    flag,
    floats,
    number,
    require_tensors,
    whole,
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
    divisor_of,
    empty_gradients,
    pair_gradients,
    register_gradients,
    scaled,
    scaled_rows,
    setup_pair,
)
from focalops._loss_options import (
    check_non_negative,
    check_normalizer,
    check_normalizes_a_sum,
    check_row_numbers,
    divisor,
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
from focalops._padding import pad_boxes
from focalops.boxes import IOU_NAMES
from focalops.distances import check_distances


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
FIRST_OF_PAIRS = DENSE_LOSSES.index("iou")
NO_LOSS = -1  # of matched_iou

Distances = tuple[list[float], int, float]  # strides, bins, dfl_weight
Numbers = tuple[Sequence[float], float, float, float]  # weights, clip, beta, eps
Head = tuple[list[Tensor], Tensor, Tensor, Tensor]  # deltas, anchors, padded gt_boxes, matches


@overload
def dense_box_loss(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
    *,
    loss: str = ...,
    weights: Sequence[float] = ...,
    clip: float = ...,
    beta: float = ...,
    eps: float = ...,
    reduction: str = ...,
    normalizer: Tensor | float | None = ...,
    min_normalizer: float = ...,
    weight: Tensor | None = ...,
    return_iou: Literal[False] = ...,
    coding: str = ...,
    strides: Sequence[float] | None = ...,
    bins: int = ...,
    dfl_weight: float = ...,
) -> Tensor: ...


@overload
def dense_box_loss(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
    *,
    loss: str = ...,
    weights: Sequence[float] = ...,
    clip: float = ...,
    beta: float = ...,
    eps: float = ...,
    reduction: str = ...,
    normalizer: Tensor | float | None = ...,
    min_normalizer: float = ...,
    weight: Tensor | None = ...,
    return_iou: Literal[True],
    coding: str = ...,
    strides: Sequence[float] | None = ...,
    bins: int = ...,
    dfl_weight: float = ...,
) -> tuple[Tensor, Tensor]: ...


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
    reduction: str = "sum",
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    return_iou: bool = False,
    coding: str = "deltas",
    strides: Sequence[float] | None = None,
    bins: int = 1,
    dfl_weight: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The box loss of a head's outputs, read where the head left them: no permute, no concatenation, no dense targets.

    Args:
        deltas: 1 to 8 levels ``(B, A * 4, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``a * 4 + i`` is delta i of anchor a. What lies otherwise is copied.
        anchors: ``(N, 4)``, in the order level, row, column, anchor.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        matches: int64 ``(B, N)``, the result of :func:`match_anchors`. Anchors whose match is negative have no loss. An index
            that is none of the padded boxes' is an error on the CPU; on CUDA, where looking would stop the device, the loss
            and the IoU are NaN.
        loss: ``"l1"`` or ``"smooth_l1"``, of the difference from the encoded box, summed over its four numbers; or ``"iou"``,
            ``"giou"``, ``"diou"`` or ``"ciou"``, the losses of pairs of boxes such as :func:`generalized_box_iou_loss`, of the
            decoded box.
        weights: the four factors of :func:`encode_boxes`.
        clip: as in :func:`decode_boxes`.
        beta: of ``"smooth_l1"``: below it the loss is quadratic (torch's default; detectron2's is 0.1).
        eps: of the losses of pairs.
        reduction: ``"sum"``, or ``"none"``: the loss of each anchor.
        normalizer: a number or 0-d tensor that divides the sum, such as the number of positive anchors; or ``(B,)``, one for
            each image. Read on the device.
        min_normalizer: least value of a divisor.
        weight: ``(B, N)``, one an anchor, which multiplies its loss. It may require a gradient, which is that loss: so the
            classification-aware regression loss (CARL) of PISA moves the scores that the weights are made of (Cao et al.,
            arXiv 1904.04821).
        return_iou: also return the IoU of each anchor's box with its match, as :func:`matched_iou` does, from the same pass.
        coding: ``"deltas"``, or ``"distance"``: of a head that :func:`decode_distances` decodes. ``deltas`` are then levels
            ``(B, 4 * bins, H, W)``, ``anchors`` are points ``(N, 2)``, the loss is one of pairs, and ``weights``, ``clip`` and
            ``beta`` are not looked at.
        strides: of distances, a number for each level.
        bins: of distances, as in :func:`decode_distances`.
        dfl_weight: of distances with bins: as many times the mean :func:`distribution_focal_loss` of the four sides is added to
            the loss of an anchor; ultralytics' ratio of ``dfl`` to ``box``, 0.2. What lies beyond the bins has the last one for
            a target.

    Returns:
        A 0-d tensor, float64 for float64 deltas, else float32: the sum over the images of their losses, each divided by its
        normalizer. Or ``(B, N)``, 0 where the match is negative. With ``return_iou`` the pair of it and the IoU, ``(B, N)``,
        of the same dtype and without a gradient.

    Differentiable in the deltas and the weight. One launch reads the matches, and of the foreground anchors the deltas; where
    they require a gradient, it is written in the same pass and in the same layout. That takes the only extra memory, and with
    ``"none"``, a weight, distances or the IoU, ``(B, N)`` for each. Two runs give the same bits. Time O(B N).

    >>> dense_box_loss(bbox_regression, anchors, gt_boxes, matches, loss="giou", normalizer=(matches >= 0).sum())
    >>> options = {"coding": "distance", "strides": [8, 16, 32], "bins": 16, "dfl_weight": 0.2, "weight": scores}
    >>> dense_box_loss(bbox_logits, points, gt_boxes, matches, loss="ciou", normalizer=scores.sum(), **options)
    """
    choice("coding", coding, ("deltas", "distance"))
    choice("loss", loss, DENSE_LOSSES if coding == "deltas" else DENSE_LOSSES[FIRST_OF_PAIRS:])
    distances = _checked_distances(coding, strides, bins, dfl_weight)
    choice("reduction", reduction, ("none", "sum"))
    return_iou = flag("return_iou", return_iou)
    _check_are_tensors(deltas, anchors, gt_boxes, matches)
    check_are_constant(anchors=anchors)
    for boxes in gt_boxes if not isinstance(gt_boxes, Tensor) else (gt_boxes,):
        check_are_constant(gt_boxes=boxes)
    if weight is not None:
        require_tensor("weight", weight)
    coder = floats("weights", weights, "4 numbers"), number("clip", clip)
    numbers = (*coder, number("beta", beta), number("eps", eps))
    check_normalizes_a_sum(normalizer, reduction)
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    kind = DENSE_LOSSES.index(loss)
    head, dtype = _head("dense_box_loss", deltas, anchors, gt_boxes, matches)
    divisors = divisor(normalizer, min_normalizer, dtype)
    weight = to_dtype(weight, dtype)
    if runs_reference(head[0][0]):
        if distances is None:
            _check_dense(*head, kind, numbers, divisors[0])
        else:
            _check_distances(*head, *distances[:2], kind, distances[2], divisors[0])
        _check_weight(weight, matches, dtype)
        return _reference_dense(
            *head,
            kind,
            numbers,
            divisors,
            distances,
            reduction=reduction,
            weight=weight,
            return_iou=return_iou,
        )
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in head[0])
    if distances is not None:
        strides, bins, dfl_weight = distances
        arguments = (strides, bins, kind, numbers[-1], dfl_weight, compute_grad, return_iou)
        losses, iou, _ = call(ops.dense_distance_losses, *head, *arguments)
    elif reduction == "sum" and weight is None and not return_iou:
        return call(ops.dense_box_loss, *head, kind, *numbers, *divisors, compute_grad)[0]
    else:
        losses, iou, _ = call(ops.dense_box_losses, *head, kind, *numbers, compute_grad, return_iou)
    _check_weight(weight, matches, dtype)
    if weight is not None:
        losses = losses * torch.where(matches < 0, 0, weight)  # which may be no number there
    if reduction == "sum":
        images = head[0][0].shape[0]
        check_normalizer("dense_box_loss", "deltas[0]", head[0][0], divisors[0], images)
        losses = (losses.sum(1, dtype=torch.float64) / divisor_of(*divisors)).sum().to(dtype)
    return (losses, iou) if return_iou else losses


def matched_iou(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = math.log(1000 / 16),
) -> Tensor:
    """The IoU of the box that a head gives each anchor with the box that the anchor is matched to.

    What methods that weight samples, soft labels and scores for :func:`quality_focal_loss` are made of. The arguments
    are those of :func:`dense_box_loss`, which returns the same beside its loss with ``return_iou=True``.

    Returns:
        ``(B, N)``, float64 for float64 deltas, else float32: 0 where the match is negative. It has no gradient.

    One launch reads the matches, and of the foreground anchors the deltas, where the head left them. Time O(B N).

    >>> iou = matched_iou(bbox_regression, anchors, gt_boxes, matches)
    >>> scores = iou[matches >= 0]
    """
    _check_are_tensors(deltas, anchors, gt_boxes, matches)
    numbers = (floats("weights", weights, "4 numbers"), number("clip", clip), 0.0, 0.0)
    levels = [level.detach() for level in deltas]
    head, _ = _head("matched_iou", levels, anchors, gt_boxes, matches)
    if runs_reference(levels[0]):
        _check_dense(*head, NO_LOSS, numbers)
        return reference.matched_iou(*head, weights=numbers[0], clip=numbers[1])
    return call(ops.dense_box_losses, *head, NO_LOSS, *numbers, False, True)[1]


def _check_are_tensors(deltas: Any, anchors: Any, gt_boxes: Any, matches: Any) -> None:
    require_tensors("deltas", deltas)
    require_tensor("anchors", anchors)
    require_tensors("gt_boxes", gt_boxes)
    require_tensor("matches", matches)


def _head(
    op: str,
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
) -> tuple[Head, torch.dtype]:
    """As the ops take them, and the dtype that is computed in."""
    deltas = list(deltas)
    check_num_levels(op, "deltas", deltas)
    dtype = compute_dtype(deltas[0].dtype)
    if not isinstance(gt_boxes, Tensor):
        gt_boxes, _ = pad_boxes(op, anchors, gt_boxes)
    boxes = as_coordinates(anchors, dtype), as_coordinates(gt_boxes, dtype)
    return (deltas, *boxes, matches), dtype


def _checked_distances(coding: str, strides: Any, bins: Any, dfl_weight: Any) -> Distances | None:
    """What else distances have; None of deltas, which have none of it."""
    if strides is not None:
        strides = floats("strides", strides, "numbers, one for each level")
    bins, dfl_weight = whole("bins", bins), number("dfl_weight", dfl_weight)
    if coding == "distance":
        return strides or [], bins, dfl_weight
    for name, given, left_alone in (
        ("strides", strides, None),
        ("bins", bins, 1),
        ("dfl_weight", dfl_weight, 0),
    ):
        if given != left_alone:
            raise ValueError(
                f"{name} must be {left_alone} unless coding is 'distance', got {given}"
            )
    return None


def _check_weight(weight: Tensor | None, matches: Tensor, dtype: torch.dtype) -> None:
    check_row_numbers("dense_box_loss", "weight", weight, "matches", matches, dtype, "deltas")


def _reference_dense(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    kind: int,
    numbers: Numbers,
    divisors: tuple[Tensor | None, float] = (None, 1),
    distances: Distances | None = None,
    **options: Any,
) -> Any:
    weights, clip, beta, eps = numbers
    if distances is not None:
        names = ("strides", "bins", "dfl_weight")
        options |= {"coding": "distance", **dict(zip(names, distances, strict=True))}
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
        **options,
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
    check(loss >= 0, lambda: f"dense_box_loss: loss must lie in [0, 5], got {loss}")
    return anchors.new_empty(()), empty_gradients(deltas) if compute_grad else []


@torch.library.register_fake("focalops::dense_box_losses")
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
    compute_grad: bool,
    compute_iou: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_dense(deltas, anchors, gt_boxes, matches, loss, (weights, clip, beta, eps))
    losses = anchors.new_empty(0 if loss == NO_LOSS else matches.shape)
    iou = anchors.new_empty(matches.shape if compute_iou else 0)
    return losses, iou, empty_gradients(deltas) if compute_grad else []


def _check_dense(
    deltas: list[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    loss: int,
    numbers: Numbers,
    normalizer: Tensor | None = None,
) -> None:
    op = "matched_iou" if loss == NO_LOSS else "dense_box_loss"
    weights, _, beta, _ = numbers
    check_levels(op, "deltas", deltas, channels="A * 4", multiple=4, same="A", what="deltas")
    first = deltas[0]
    rows = sum(level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in deltas)
    check_like_levels(op, "anchors", anchors, "deltas", first)
    check(
        anchors.shape == (rows, 4),
        lambda: (
            f"{op}: anchors must have shape ({rows}, 4), one for every 4 channels at each position, "
            f"got {tuple(anchors.shape)}"
        ),
    )
    _check_matched_boxes(op, first, gt_boxes, matches, rows)
    check(-1 <= loss <= 5, lambda: f"{op}: loss must lie in [-1, 5], got {loss}")
    check(len(weights) == 4, lambda: f"{op}: weights must be 4 numbers, got {len(weights)}")
    check(beta >= 0, lambda: f"{op}: beta must be >= 0, got {beta:g}")
    check_normalizer(op, "deltas[0]", first, normalizer, first.shape[0])


def _check_matched_boxes(
    op: str, first: Tensor, gt_boxes: Tensor, matches: Tensor, rows: int
) -> None:
    images = first.shape[0]
    check_like_levels(op, "gt_boxes", gt_boxes, "deltas", first)
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


@torch.library.register_fake("focalops::dense_distance_losses")
def _(
    levels: list[Tensor],
    points: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    strides: list[float],
    bins: int,
    loss: int,
    eps: float,
    dfl_weight: float,
    compute_grad: bool,
    compute_iou: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_distances(levels, points, gt_boxes, matches, strides, bins, loss, dfl_weight)
    losses = points.new_empty(matches.shape)
    iou = points.new_empty(matches.shape if compute_iou else 0)
    return losses, iou, empty_gradients(levels) if compute_grad else []


def _check_distances(
    levels: list[Tensor],
    points: Tensor,
    gt_boxes: Tensor,
    matches: Tensor,
    strides: Sequence[float],
    bins: int,
    loss: int,
    dfl_weight: float,
    normalizer: Tensor | None = None,
) -> None:
    op = "dense_box_loss"
    check_distances(op, "deltas", levels, "anchors", points, strides, bins)
    _check_matched_boxes(op, levels[0], gt_boxes, matches, points.shape[0])
    check(2 <= loss <= 5, lambda: f"{op}: loss must lie in [2, 5], got {loss}")
    check_non_negative(op, "dfl_weight", dfl_weight)
    check(
        bins > 1 or dfl_weight == 0,
        lambda: f"{op}: dfl_weight must be 0 unless there are bins, got {dfl_weight:g}",
    )
    check_normalizer(op, "deltas[0]", levels[0], normalizer, levels[0].shape[0])


# ---- autograd -----------------------------------------------------------------------------------


def _backward_pair_loss(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        return differentiable_pair(_reference_pair_loss, ctx, grad_output)
    arguments = (grad_output, *ctx.saved_tensors, *ctx.settings, *ctx.needs_input_grad[:2])
    return pair_gradients(ctx, *call(ops._box_pair_loss_backward, *arguments))


register_gradients("box_pair_loss", setup_pair, _backward_pair_loss, num_inputs=2)


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    deltas, anchors, gt_boxes, matches, ctx.kind, *ctx.numbers = inputs[:9]
    normalizer, ctx.min_normalizer, _ = inputs[9:]
    ctx.num_levels = len(deltas)
    ctx.save_for_backward(anchors, gt_boxes, matches, normalizer, *deltas, *output[1])


def _backward_dense(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    anchors, gt_boxes, matches, normalizer, *tensors = ctx.saved_tensors
    deltas, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    divisors = normalizer, ctx.min_normalizer
    if grads and not torch.is_grad_enabled():
        return scaled(grads, grad_loss, *divisors)

    def formula(*x: Tensor) -> Tensor:
        return _reference_dense(x, anchors, gt_boxes, matches, ctx.kind, ctx.numbers, divisors)

    return differentiable(formula, deltas, grad_loss)


register_gradients("dense_box_loss", _setup_dense, _backward_dense)


def _setup_dense_rows(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]
) -> None:
    deltas, anchors, gt_boxes, matches, ctx.kind, *ctx.numbers = inputs[:9]
    ctx.num_levels = len(deltas)
    ctx.save_for_backward(anchors, gt_boxes, matches, *deltas, *output[2])


def _backward_dense_rows(ctx: Any, grad_losses: Tensor) -> Sequence[Tensor]:
    anchors, gt_boxes, matches, *tensors = ctx.saved_tensors
    deltas, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    if grads and not torch.is_grad_enabled():
        return scaled_rows(grads, grad_losses)

    def formula(*x: Tensor) -> Tensor:
        tensors = (x, anchors, gt_boxes, matches)
        return _reference_dense(*tensors, ctx.kind, ctx.numbers, reduction="none")

    return differentiable(formula, deltas, grad_losses)


register_gradients("dense_box_losses", _setup_dense_rows, _backward_dense_rows)


def _setup_distances(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]
) -> None:
    levels, points, gt_boxes, matches, *ctx.options = inputs[:9]
    ctx.num_levels = len(levels)
    ctx.save_for_backward(points, gt_boxes, matches, *levels, *output[2])


def _backward_distances(ctx: Any, grad_losses: Tensor) -> Sequence[Tensor]:
    points, gt_boxes, matches, *tensors = ctx.saved_tensors
    logits, grads = tensors[: ctx.num_levels], tensors[ctx.num_levels :]
    if grads and not torch.is_grad_enabled():
        return scaled_rows(grads, grad_losses)
    strides, bins, kind, eps, dfl_weight = ctx.options

    def formula(*x: Tensor) -> Tensor:
        arguments = (x, points, gt_boxes, matches, kind, ((1.0,) * 4, 0.0, 0.0, eps))
        distances = (strides, bins, dfl_weight)
        return _reference_dense(*arguments, distances=distances, reduction="none")

    return differentiable(formula, logits, grad_losses)


register_gradients("dense_distance_losses", _setup_distances, _backward_distances)

register_vmap_as_loop("dense_distance_losses")
register_vmap_as_loop("dense_box_loss")
register_vmap_as_loop("dense_box_losses")
