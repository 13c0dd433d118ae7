"""Boxes as distances from a point to their sides, and the distributions over bins that such distances are learnt as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    as_sizes,
    check_levels,
    check_like_levels,
    check_num_levels,
    floats,
    number,
    require_tensors,
    whole,
)
from focalops._coordinates import (
    as_coordinates,
    check_coordinates,
    check_like,
    check_rows_of_4,
    coordinates_dtype,
    shapes_broadcast,
)
from focalops._gradients import (
    differentiable,
    divisor_of,
    empty_gradient,
    empty_gradients,
    register_gradients,
    scaled,
)
from focalops._loss_options import LossOptions, check_normalizer, check_row_numbers
from focalops._ops import (
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


def decode_distances(
    levels: Sequence[Tensor],
    points: Tensor,
    strides: Sequence[float],
    *,
    bins: int = 1,
    image_sizes: Tensor | Sequence[Sequence[float]] | None = None,
) -> Tensor:
    r"""The boxes of a head that predicts how far the four sides are from a point, read where the head left them.

    A distance is one number, as of FCOS, or as of Generalized Focal Loss, YOLOv8 and their like the expectation
    :math:`\sum_i i \, \mathrm{softmax}(x)_i` of the logits of its bins. Times the stride, left and top go off the point, right
    and bottom are added to it.

    Args:
        levels: 1 to 8 levels ``(B, 4 * bins, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``side * bins + i`` is bin i of a side: left, top, right, bottom. What lies otherwise is copied.
        points: ``(N, 2)``, x and y in pixels, in the order level, row, column.
        strides: a number for each level, what a distance of 1 is in pixels.
        bins: how many a distance has; 1: levels are the distances themselves, as ``relu`` or ``exp`` have left them.
        image_sizes: ``(B, 2)``, a tensor or numbers, the height and width of each image, to which its boxes are clipped; None:
            no clipping. Numbers have to be copied to the device.

    Returns:
        ``(B, N, 4)``, ``(x1, y1, x2, y2)`` in pixels: float64 for float64 levels, else float32.

    Differentiable in the levels; the gradient lies as they do, and is 0 where a coordinate is clipped. One launch reads each
    logit once, and nothing but the boxes is allocated: no permute, no concatenation, no probabilities. The backward computes
    them again. A NaN, or an infinite greatest logit, makes that side a NaN. Time O(B N bins). An image has fewer than 2^31 logits.

    Source: Tian et al., FCOS, arXiv 1904.01355; Li et al., "Generalized Focal Loss", arXiv 2006.04388. The same as mmdet's
    ``distance2bbox`` of ``Integral``, and ultralytics' ``dist2bbox`` of ``DFL``, times the stride.

    >>> boxes = decode_distances(bbox_logits, points, [8, 16, 32], bins=16)
    """
    require_tensors("levels", levels)
    require_tensor("points", points)
    _check_has_no_gradient("points", points)
    strides = floats("strides", strides, "numbers, one for each level")
    bins = whole("bins", bins)
    levels = list(levels)
    check_num_levels("decode_distances", "levels", levels)
    dtype = compute_dtype(levels[0].dtype)
    if isinstance(image_sizes, Tensor):
        require_tensor("image_sizes", image_sizes)
        _check_has_no_gradient("image_sizes", image_sizes)
    elif image_sizes is not None:
        image_sizes = as_sizes("image_sizes", image_sizes, levels[0].device)
    if image_sizes is not None:
        image_sizes = image_sizes.to(dtype)
    arguments = (levels, as_coordinates(points, dtype), strides, bins, image_sizes)
    if runs_reference(levels[0]):
        _check_decode(*arguments)
        return _reference_decode(*arguments)
    return call(ops.decode_distances, *arguments)


def encode_distances(points: Tensor, boxes: Tensor, *, max_distance: float | None = None) -> Tensor:
    """How far the four sides of boxes are from points: what a head that :func:`decode_distances` decodes learns.

    Args:
        points: ``(..., 2)``, x and y.
        boxes: ``(..., 4)``; the shapes before the last dimension broadcast, ``(N, 2)`` with ``(B, N, 4)``. Points and boxes in
            units of the stride give such distances.
        max_distance: distances are clamped to [0, max_distance], those of points outside of their box included: bins - 1 is
            all that :func:`distribution_focal_loss` tells apart. mmdet's ``bbox2distance`` has ``max_dis - 0.1`` here,
            ultralytics' ``bbox2dist`` ``reg_max - 0.01``. None: no clamping.

    Returns:
        ``(..., 4)``, left, top, right and bottom: float64 if an argument is float64, else float32. They are targets: without
        a gradient.

    Plain PyTorch.

    >>> targets = encode_distances(points / stride, gt_boxes[matches] / stride, max_distance=15)
    """
    op = "encode_distances"
    require_tensor("points", points)
    require_tensor("boxes", boxes)
    max_distance = None if max_distance is None else number("max_distance", max_distance)
    dtype = coordinates_dtype(points, boxes)
    points, boxes = (as_coordinates(t.detach(), dtype) for t in (points, boxes))
    check_coordinates(op, "points", points)
    check(
        points.shape[-1:] == (2,),
        lambda: f"{op}: points must have shape (..., 2), got {tuple(points.shape)}",
    )
    check_rows_of_4(op, "boxes", boxes)
    check_like(op, "boxes", boxes, "points", points)
    check(
        shapes_broadcast(points.shape[:-1], boxes.shape[:-1]),
        lambda: (
            f"{op}: boxes must have a shape that but for the last dimension broadcasts with that of points, "
            f"{tuple(points.shape)}, got {tuple(boxes.shape)}"
        ),
    )
    check(
        max_distance is None or max_distance >= 0,
        lambda: f"{op}: max_distance must be >= 0, got {max_distance:g}",
    )
    return reference.encode_distances(points, boxes, max_distance=max_distance)


def distribution_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "none",
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
) -> Tensor:
    r"""DFL of Generalized Focal Loss: the cross entropy of a distance's bins with the two bins that the target lies between.

    With :math:`j = \lfloor t \rfloor` and :math:`w = t - j` it is
    :math:`-(1 - w) \log \mathrm{softmax}(x)_j - w \log \mathrm{softmax}(x)_{j + 1}`.

    Args:
        inputs: ``(..., bins)``, the logits of 2 bins at least.
        targets: ``(...)``, distances in units of a bin. What lies outside [0, bins - 1] counts as the nearest of it, and a
            NaN gives a NaN loss and gradient. (mmdet clamps its targets to 0.1 below the last bin, ultralytics to 0.01.)
        weight: ``(...)``, one a target, which multiplies its loss. It may require a gradient.
        reduction: ``"none"``, ``"mean"`` (0 of no targets) or ``"sum"``.
        normalizer: a number or 0-d tensor that divides the sum: mmdet's ``avg_factor``. Read on the device.
        min_normalizer: least value of the divisor.

    Returns:
        ``(...)``, or 0-d: float64 for float64 inputs, else float32.

    Differentiable in the inputs and the weight. The logits are read once; where they require a gradient, it is written in the
    same pass, which takes the only extra memory but that of a number a target. A logit of -inf is a bin of probability 0.
    Time O(inputs).

    Source: Li et al., "Generalized Focal Loss", arXiv 2006.04388. mmdet's ``distribution_focal_loss`` takes the same logits,
    ``(n, bins)``, and targets, ``(n,)``; ultralytics' ``DFLoss`` is the mean over the four sides:

    >>> distribution_focal_loss(logits.view(-1, 4, 16), distances).mean(-1, keepdim=True)  # distances: (n, 4)
    """
    options = LossOptions(
        reduction, normalizer=normalizer, min_normalizer=min_normalizer, weight=weight
    ).checked(constant_weight=False, inputs=inputs, targets=targets)
    dtype = compute_dtype(inputs.dtype)
    targets, options = as_coordinates(targets, dtype), options.in_dtype(dtype)
    divisors = options.divisor(dtype)
    if runs_reference(inputs):
        _check_loss(inputs, targets)
        losses = reference.distribution_focal_loss(inputs, targets)
    else:
        compute_grad = torch.is_grad_enabled() and inputs.requires_grad
        losses, _ = call(ops.distribution_focal_loss, inputs, targets, compute_grad)
    op = "distribution_focal_loss"
    check_row_numbers(op, "weight", options.weight, "targets", targets, dtype, "inputs")
    check_normalizer(op, "inputs", inputs, divisors[0])
    if options.weight is not None:
        losses = losses * options.weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum() / divisor_of(*divisors)
    return losses.sum() if losses.numel() == 0 else losses.mean()


def _check_has_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad: boxes are differentiated by the levels alone"
        )


def _reference_decode(
    levels: Sequence[Tensor],
    points: Tensor,
    strides: Sequence[float],
    bins: int,
    image_sizes: Tensor | None,
) -> Tensor:
    return reference.decode_distances(levels, points, strides, bins=bins, image_sizes=image_sizes)


# ---- fake kernels -------------------------------------------------------------------------------


def check_distances(
    op: str,
    name: str,
    levels: Sequence[Tensor],
    points_name: str,
    points: Tensor,
    strides: Sequence[float],
    bins: int,
) -> None:
    """Levels of distances with their points and strides."""
    check_levels(op, name, levels, channels="4 * bins", multiple=4, same="bins", what="logits")
    first = levels[0]
    channels = first.shape[1]
    rows = sum(level.shape[2] * level.shape[3] for level in levels)
    check(bins >= 1, lambda: f"{op}: bins must be >= 1, got {bins}")
    check(
        channels // 4 == bins,
        lambda: f"{op}: {name} must have 4 channels for each of {bins} bins, got {channels}",
    )
    check_like_levels(op, points_name, points, name, first)
    check(
        points.shape == (rows, 2),
        lambda: (
            f"{op}: {points_name} must have shape ({rows}, 2), one for each position of the levels, "
            f"got {tuple(points.shape)}"
        ),
    )
    check(
        len(strides) == len(levels),
        lambda: (
            f"{op}: strides must be {len(levels)} numbers, one for each level, got {len(strides)}"
        ),
    )


def _check_decode(
    levels: Sequence[Tensor],
    points: Tensor,
    strides: Sequence[float],
    bins: int,
    image_sizes: Tensor | None,
) -> None:
    op = "decode_distances"
    check_distances(op, "levels", levels, "points", points, strides, bins)
    if image_sizes is not None:
        images = levels[0].shape[0]
        check_like_levels(op, "image_sizes", image_sizes, "levels", levels[0])
        check(
            image_sizes.shape == (images, 2),
            lambda: (
                f"{op}: image_sizes must have shape ({images}, 2), height and width of each image, "
                f"got {tuple(image_sizes.shape)}"
            ),
        )


def _check_loss(inputs: Tensor, targets: Tensor) -> None:
    op, shape = "distribution_focal_loss", tuple(inputs.shape)
    check_floating(op, "inputs", inputs)
    check(
        inputs.dim() > 0 and 2 <= inputs.shape[-1] < 2**30,
        lambda: (
            f"{op}: inputs must have shape (..., bins), 2 bins at least and fewer than 2^30, got {shape}"
        ),
    )
    check_same_device(op, "targets", targets, "inputs", inputs)
    check(
        targets.dtype == compute_dtype(inputs.dtype),
        lambda: f"{op}: targets must be float32 (float64 for float64 inputs), got {targets.dtype}",
    )
    check(
        targets.shape == inputs.shape[:-1],
        lambda: (
            f"{op}: targets must have the shape of inputs, {shape}, without its last dimension, "
            f"got {tuple(targets.shape)}"
        ),
    )


@torch.library.register_fake("focalops::decode_distances")
def _(
    levels: list[Tensor],
    points: Tensor,
    strides: list[float],
    bins: int,
    image_sizes: Tensor | None,
) -> Tensor:
    _check_decode(levels, points, strides, bins, image_sizes)
    return points.new_empty((levels[0].shape[0], points.shape[0], 4))


@torch.library.register_fake("focalops::_decode_distances_backward")
def _(
    grad_output: Tensor,
    levels: list[Tensor],
    points: Tensor,
    strides: list[float],
    bins: int,
    image_sizes: Tensor | None,
) -> list[Tensor]:
    op = "decode_distances"
    _check_decode(levels, points, strides, bins, image_sizes)
    check_like(op, "grad_output", grad_output, "points", points)
    shape = (levels[0].shape[0], points.shape[0], 4)
    check(
        grad_output.shape == shape,
        lambda: (
            f"{op}: grad_output must have the shape of the output, {shape}, "
            f"got {tuple(grad_output.shape)}"
        ),
    )
    return empty_gradients(levels)


@torch.library.register_fake("focalops::distribution_focal_loss")
def _(inputs: Tensor, targets: Tensor, compute_grad: bool) -> tuple[Tensor, Tensor]:
    _check_loss(inputs, targets)
    losses = empty_gradient(targets)
    return losses, empty_gradient(inputs) if compute_grad else inputs.new_empty(0)


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, points, ctx.strides, ctx.bins, image_sizes = inputs
    ctx.save_for_backward(points, image_sizes, *levels)


def _backward_decode(ctx: Any, grad_output: Tensor) -> Sequence[Tensor]:
    points, image_sizes, *levels = ctx.saved_tensors
    arguments = (points, ctx.strides, ctx.bins, image_sizes)
    if torch.is_grad_enabled():

        def formula(*x: Tensor) -> Tensor:
            return _reference_decode(x, *arguments)

        return differentiable(formula, levels, grad_output)
    return call(ops._decode_distances_backward, grad_output, levels, *arguments)


register_gradients("decode_distances", _setup_decode, _backward_decode)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, _ = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _backward_loss(ctx: Any, grad_losses: Tensor) -> Sequence[Tensor]:
    inputs, targets, grad = ctx.saved_tensors
    if torch.is_grad_enabled() or grad.numel() != inputs.numel():

        def formula(x: Tensor) -> Tensor:
            return reference.distribution_focal_loss(x, targets)

        return differentiable(formula, [inputs], grad_losses)
    rows = grad.view(-1, grad.shape[-1])
    is_of_sum = grad_losses.numel() > 0 and not any(grad_losses.stride())
    factor = grad_losses.flatten()[0] if is_of_sum else grad_losses.reshape(-1)
    (rows,) = scaled([rows], factor, None, 1)
    return [rows.view(inputs.shape)]


register_gradients("distribution_focal_loss", _setup_loss, _backward_loss)
register_vmap_as_loop("decode_distances")
register_vmap_as_loop("_decode_distances_backward")
