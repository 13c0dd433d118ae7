"""Boxes: the pairwise IoU family, and the coding of boxes as deltas from anchors.

Boxes are ``(x1, y1, x2, y2)`` in absolute pixels with ``x1 <= x2`` and ``y1 <= y2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    as_sizes,
    choice,
    floats,
    number,
)
from focalops._coordinates import (
    as_coordinates,
    broadcast,
    check_coordinates,
    check_like,
    check_rows_of_4,
    clip_to_images,
    coordinates_dtype,
    shapes_broadcast,
)
from focalops._gradients import (
    differentiable_pair,
    pair_gradients,
    register_gradients,
    setup_pair,
)
from focalops._ops import (
    FLOATING,
    call,
    check,
    check_floating,
    check_same_device,
    compute_dtype,
    ops,
    require_tensor,
    runs_reference,
)


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy", *, mode: str = "iou") -> Tensor:
    """The intersection over union of every box of one set with every box of another.

    A drop-in for ``torchvision.ops.box_iou``, except that the IoU of two empty boxes is 0, not NaN, and that boxes are not
    rotated.

    Args:
        boxes1: ``(..., N, 4)``.
        boxes2: ``(..., M, 4)``; the batches broadcast.
        fmt: ``"xyxy"``, ``"xywh"`` (a corner, width and height) or ``"cxcywh"`` (the center, width and height).
        mode: ``"iou"``, or ``"iof"``: the intersection over the area of the box of ``boxes1``, mmdet's foreground; 0 where
            that is 0.

    Returns:
        ``(..., N, M)``: float64 if a set is float64, else float32, whatever the sets are, integers included.

    Differentiable in both sets. Nothing but the result is allocated, and its gradient is summed up without a matrix of its
    own (that of ``"iof"`` runs in plain PyTorch). Time O(N M). On one device and another, and at each SIMD width, the values
    have the same bits.

    >>> box_iou(detections, gt_boxes).max(dim=1)
    """
    return _iou_matrix(
        0 if choice("mode", mode, ("iou", "iof")) == "iou" else 4, boxes1, boxes2, fmt=fmt
    )


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    r"""The generalized IoU of every box of one set with every box of another.

    With C the smallest box that encloses both, :math:`IoU - (|C| - |A \cup B|) / |C|`, in (-1, 1]. A drop-in for
    ``torchvision.ops.generalized_box_iou``, except that a quotient of two zeros counts as 0, not NaN: that of two points
    at one place is 0. Everything else is as in :func:`box_iou`.

    Source: Rezatofighi et al., "Generalized Intersection over Union", arXiv 1902.09630.
    """
    return _iou_matrix(1, boxes1, boxes2)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    r"""The distance IoU of every box of one set with every box of another.

    With d the distance of the centers and c the diagonal of the smallest box that encloses both,
    :math:`IoU - d^2 / (c^2 + eps)`. A drop-in for ``torchvision.ops.distance_box_iou``, except that the IoU of two empty
    boxes is 0, not NaN. Everything else is as in :func:`box_iou`.

    Source: Zheng et al., "Distance-IoU Loss", arXiv 1911.08287.
    """
    return _iou_matrix(2, boxes1, boxes2, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    r"""The complete IoU of every box of one set with every box of another.

    The distance IoU less :math:`\alpha v`, where :math:`v = 4 / \pi^2 (\arctan(w_1 / h_1) - \arctan(w_2 / h_2))^2` and
    :math:`\alpha = v / (1 - IoU + v + eps)`, which counts as constant in the gradient. A drop-in for
    ``torchvision.ops.complete_box_iou``, except that the IoU of two empty boxes and the arctangent of a point are 0, not
    NaN. Everything else is as in :func:`box_iou`.

    Source: Zheng et al., "Distance-IoU Loss", arXiv 1911.08287.
    """
    return _iou_matrix(3, boxes1, boxes2, eps)


# In the order of IouKind in csrc/math/box.h; the last is that of mode "iof".
IOU_NAMES = (
    "box_iou",
    "generalized_box_iou",
    "distance_box_iou",
    "complete_box_iou",
    "box_iou",
)


def _iou_matrix(
    kind: int, boxes1: Tensor, boxes2: Tensor, eps: float = 0, fmt: str = "xyxy"
) -> Tensor:
    require_tensor("boxes1", boxes1)
    require_tensor("boxes2", boxes2)
    eps = number("eps", eps)
    choice("fmt", fmt, ("xyxy", "xywh", "cxcywh"))
    dtype = coordinates_dtype(boxes1, boxes2)
    boxes1, boxes2 = as_coordinates(boxes1, dtype), as_coordinates(boxes2, dtype)
    if fmt != "xyxy":
        boxes1, boxes2 = _corners(boxes1, fmt), _corners(boxes2, fmt)
    batch = None if boxes1.dim() == boxes2.dim() == 2 else _common_batch(boxes1, boxes2)
    if batch is not None:
        boxes1, boxes2 = (
            boxes.expand(*batch, -1, -1).reshape(math.prod(batch), *boxes.shape[-2:])
            for boxes in (boxes1, boxes2)
        )
    if runs_reference(boxes1):
        _check_box_iou(boxes1, boxes2, kind)
        matrix = _reference_iou(boxes1, boxes2, kind, eps)
    else:
        matrix = call(ops.box_iou, boxes1, boxes2, kind, eps)
    return matrix if batch is None else matrix.unflatten(0, batch)


def _common_batch(boxes1: Tensor, boxes2: Tensor) -> tuple[int, ...] | None:
    """Of batches that the op does not take as they are; None where it does, or has to refuse them."""
    if any(boxes.dim() < 2 or boxes.shape[-1] != 4 for boxes in (boxes1, boxes2)):
        return None
    batch1, batch2 = boxes1.shape[:-2], boxes2.shape[:-2]
    if batch1 == batch2 and len(batch1) <= 1:
        return None
    if not shapes_broadcast(batch1, batch2):
        return None
    return torch.broadcast_shapes(batch1, batch2)


def _corners(boxes: Tensor, fmt: str) -> Tensor:
    if boxes.shape[-1:] != (4,) or not boxes.is_floating_point():
        return boxes  # for the op to refuse: what holds coordinates is floating by now
    place, size = boxes[..., :2], boxes[..., 2:]
    if fmt == "cxcywh":
        place = place - 0.5 * size
    return torch.cat((place, place + size), dim=-1)


def _reference_iou(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float) -> Tensor:
    options: dict[str, Any] = {"eps": eps} if kind in (2, 3) else {}
    if kind == 4:
        options["mode"] = "iof"
    return getattr(reference, IOU_NAMES[kind])(boxes1, boxes2, **options)


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    r"""The deltas that lead from anchors to boxes: what a box head learns.

    With centers :math:`x, y` and sizes :math:`w, h`, those of the anchor with index a:
    :math:`w_x (x - x_a) / w_a`, :math:`w_y (y - y_a) / h_a`, :math:`w_w \log(w / w_a)`, :math:`w_h \log(h / h_a)`.

    Args:
        boxes: ``(..., 4)``.
        anchors: ``(..., 4)``; the shapes broadcast, ``(B, A, 4)`` with ``(A, 4)``, and nothing is copied for it.
        weights: the four factors.

    Returns:
        ``(..., 4)``: float64 if an argument is float64, else float32.

    Differentiable in both. Where the width or height of a box is 0 its delta is -inf, and where that of an anchor is 0 the
    deltas are infinite or NaN.

    >>> encode_boxes(gt_boxes[matches[foreground]], anchors[foreground])
    """
    require_tensor("boxes", boxes)
    require_tensor("anchors", anchors)
    weights = floats("weights", weights, "4 numbers")
    dtype = coordinates_dtype(boxes, anchors)
    boxes, anchors = broadcast(as_coordinates(boxes, dtype), as_coordinates(anchors, dtype))
    if runs_reference(boxes):
        _check_encode_boxes(boxes, anchors, weights)
        return reference.encode_boxes(boxes, anchors, weights)
    return call(ops.encode_boxes, boxes, anchors, weights)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = math.log(1000 / 16),
    image_size: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    *,
    ctr_clamp: float | None = None,
) -> Tensor:
    r"""The boxes to which deltas lead from anchors: the inverse of :func:`encode_boxes`.

    Args:
        deltas: ``(..., 4)``, such as the output of a box head, in its own dtype.
        anchors: ``(..., 4)``; the shapes broadcast, ``(B, A, 4)`` with ``(A, 4)``, and nothing is copied for it.
        weights: the four factors of :func:`encode_boxes`.
        clip: the largest :math:`\log(w / w_a)` and :math:`\log(h / h_a)`; larger ones are taken as this, so that the
            exponential stays finite.
        image_size: height and width; the boxes are clipped to ``[0, width]`` and ``[0, height]``. Or those of each image of
            deltas ``(B, ..., 4)``: ``(B, 2)``, a tensor, for which the host does not wait, or pairs of numbers.
        ctr_clamp: the largest shift of a center, in pixels and on each axis: ``add_ctr_clamp`` of mmdet's coder.

    Returns:
        ``(..., 4)``: float64 if an argument is float64, else float32, of half deltas too: bfloat16 above 256 has no
        place for single pixels.

    Differentiable in both; the gradient is 0 where a value is clipped. NaN deltas give NaN boxes.

    >>> decode_boxes(bbox_regression, anchors, image_size=images.shape[-2:])
    """
    require_tensor("deltas", deltas)
    require_tensor("anchors", anchors)
    weights = floats("weights", weights, "4 numbers")
    clip = number("clip", clip)
    if ctr_clamp is not None:
        ctr_clamp = _checked_ctr_clamp(ctr_clamp)
    size, sizes = _image_size(image_size, deltas)
    dtype = coordinates_dtype(deltas, anchors)
    anchors = as_coordinates(anchors, dtype)
    if runs_reference(deltas):
        deltas, anchors = broadcast(as_coordinates(deltas, dtype), anchors)
        _check_decode_boxes(deltas, anchors, weights, size or [])
        limits = sizes if size is None else size
        return reference.decode_boxes(deltas, anchors, weights, clip, limits, ctr_clamp=ctr_clamp)
    if ctr_clamp is not None:
        # Both ways to the anchors start behind their conversion, so that their gradients are added before they are rounded.
        deltas = _clamp_shifts(deltas, anchors, weights, ctr_clamp)
    if deltas.dtype not in FLOATING or dtype == torch.float64:
        deltas = as_coordinates(deltas, dtype)
    deltas, anchors = broadcast(deltas, anchors)
    boxes = call(ops.decode_boxes, deltas, anchors, weights, clip, size or [])
    return boxes if sizes is None else clip_to_images(boxes, sizes)


def _image_size(image_size: Any, deltas: Tensor) -> tuple[list[float] | None, Tensor | None]:
    """The size that all boxes share, or (B, 2): at most one of them."""
    if image_size is None:
        return None, None
    if isinstance(image_size, Tensor) and image_size.dim() != 1:
        require_tensor("image_size", image_size)
        sizes = image_size
    elif isinstance(image_size, Sequence) and any(
        isinstance(extent, (Sequence, Tensor)) for extent in image_size
    ):
        sizes = as_sizes("image_size", image_size, deltas.device)
    else:
        return floats("image_size", image_size, "2 numbers, height and width"), None
    wanted = (deltas.shape[0] if deltas.dim() else 0, 2)
    if deltas.dim() < 2 or sizes.shape != wanted:
        raise ValueError(
            f"image_size must be 2 numbers, height and width, or have shape {wanted}, those of each "
            f"image, got shape {tuple(sizes.shape)}"
        )
    check_same_device("decode_boxes", "image_size", sizes, "deltas", deltas)
    return None, sizes


def _checked_ctr_clamp(ctr_clamp: Any) -> float:
    ctr_clamp = number("ctr_clamp", ctr_clamp)
    if not ctr_clamp >= 0:
        raise ValueError(f"ctr_clamp must be >= 0, got {ctr_clamp}")
    return ctr_clamp


def _clamp_shifts(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float], ctr_clamp: float
) -> Tensor:
    fits = len(weights) == 4 and deltas.shape[-1:] == (4,) == anchors.shape[-1:]
    fits = fits and deltas.device == anchors.device
    fits = fits and torch.bool not in (deltas.dtype, anchors.dtype)
    if not fits or not shapes_broadcast(deltas.shape, anchors.shape):
        return deltas  # for the op to refuse
    dtype = coordinates_dtype(deltas, anchors)
    deltas, anchors = as_coordinates(deltas, dtype), as_coordinates(anchors, dtype)
    x1, y1, x2, y2 = anchors.unbind(-1)
    most_x, most_y = (abs(weight) * ctr_clamp for weight in weights[:2])
    most = torch.stack((most_x / (x2 - x1), most_y / (y2 - y1)), dim=-1)
    shifts, sizes = deltas[..., :2], deltas[..., 2:]
    shifts = torch.clamp(shifts, -most, most)
    return torch.cat((shifts, sizes.expand(*shifts.shape[:-1], 2)), dim=-1)


# ---- fake kernels -------------------------------------------------------------------------------


def _check_anchors(op: str, anchors: Tensor, like_name: str, like: Tensor) -> None:
    check_rows_of_4(op, "anchors", anchors)
    check(
        anchors.shape == like.shape,
        lambda: (
            f"{op}: anchors must have a shape that broadcasts with that of {like_name}, "
            f"{tuple(like.shape)}, got {tuple(anchors.shape)}"
        ),
    )


def _check_weights(op: str, weights: Sequence[float]) -> None:
    check(len(weights) == 4, lambda: f"{op}: weights must be 4 numbers, got {len(weights)}")


def _check_coder_gradient(op: str, grad_output: Tensor, anchors: Tensor) -> None:
    check_like(op, "grad_output", grad_output, "anchors", anchors)
    check(
        grad_output.shape == anchors.shape,
        lambda: (
            f"{op}: grad_output must have the shape of the output, {tuple(anchors.shape)}, "
            f"got {tuple(grad_output.shape)}"
        ),
    )


def _check_box_iou(boxes1: Tensor, boxes2: Tensor, kind: int) -> None:
    op = IOU_NAMES[kind]
    check_coordinates(op, "boxes1", boxes1)
    check(
        boxes1.dim() in (2, 3) and boxes1.shape[-1] == 4,
        lambda: f"{op}: boxes1 must have shape (..., N, 4), got {tuple(boxes1.shape)}",
    )
    check_like(op, "boxes2", boxes2, "boxes1", boxes1)
    check(
        boxes2.dim() == boxes1.dim()
        and boxes2.shape[-1] == 4
        and boxes2.shape[:-2] == boxes1.shape[:-2],
        lambda: (
            f"{op}: boxes2 must have shape (..., M, 4), a batch that broadcasts with that of boxes1, "
            f"{tuple(boxes1.shape)}, got {tuple(boxes2.shape)}"
        ),
    )


def _check_encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> None:
    op = "encode_boxes"
    check_coordinates(op, "boxes", boxes)
    check_rows_of_4(op, "boxes", boxes)
    check_like(op, "anchors", anchors, "boxes", boxes)
    _check_anchors(op, anchors, "boxes", boxes)
    _check_weights(op, weights)


def _check_decode_boxes(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float], image_size: Sequence[float]
) -> None:
    op = "decode_boxes"
    check_floating(op, "deltas", deltas)
    check_rows_of_4(op, "deltas", deltas)
    check_same_device(op, "anchors", anchors, "deltas", deltas)
    check(
        anchors.dtype == compute_dtype(deltas.dtype),
        lambda: f"{op}: anchors must be float32 (float64 for float64 deltas), got {anchors.dtype}",
    )
    _check_anchors(op, anchors, "deltas", deltas)
    _check_weights(op, weights)
    check(
        len(image_size) in (0, 2),
        lambda: f"{op}: image_size must be 2 numbers, height and width, got {len(image_size)}",
    )


@torch.library.register_fake("focalops::box_iou")
def _(boxes1: Tensor, boxes2: Tensor, kind: int = 0, eps: float = 0) -> Tensor:
    _check_box_iou(boxes1, boxes2, kind)
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]))


@torch.library.register_fake("focalops::_box_iou_backward")
def _(grad_output: Tensor, boxes1: Tensor, boxes2: Tensor, kind: int = 0, eps: float = 0) -> Tensor:
    op = IOU_NAMES[kind]
    _check_box_iou(boxes1, boxes2, kind)
    check_like(op, "grad_output", grad_output, "boxes1", boxes1)
    check(
        grad_output.shape == (*boxes1.shape[:-1], boxes2.shape[-2]),
        lambda: (
            f"{op}: grad_output must have the shape of the output, got {tuple(grad_output.shape)}"
        ),
    )
    return boxes1.new_empty(boxes1.shape)


@torch.library.register_fake("focalops::encode_boxes")
def _(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    _check_encode_boxes(boxes, anchors, weights)
    return boxes.new_empty(boxes.shape)


@torch.library.register_fake("focalops::_encode_boxes_backward")
def _(
    grad_output: Tensor, boxes: Tensor, anchors: Tensor, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    _check_encode_boxes(boxes, anchors, weights)
    _check_coder_gradient("encode_boxes", grad_output, anchors)
    return boxes.new_empty(boxes.shape), boxes.new_empty(boxes.shape)


@torch.library.register_fake("focalops::decode_boxes")
def _(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    clip: float,
    image_size: Sequence[float],
) -> Tensor:
    _check_decode_boxes(deltas, anchors, weights, image_size)
    return anchors.new_empty(deltas.shape)


@torch.library.register_fake("focalops::_decode_boxes_backward")
def _(
    grad_output: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    clip: float,
    image_size: Sequence[float],
    compute_grad_anchors: bool,
) -> tuple[Tensor, Tensor]:
    _check_decode_boxes(deltas, anchors, weights, image_size)
    _check_coder_gradient("decode_boxes", grad_output, anchors)
    grad_anchors = anchors.new_empty(deltas.shape if compute_grad_anchors else 0)
    return deltas.new_empty(deltas.shape), grad_anchors


# ---- autograd: each op takes two tensors, then its settings ---------------------------------------


def _backward_box_iou(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        return differentiable_pair(_reference_iou, ctx, grad_output)
    if ctx.settings[0] == 4:  # "iof"
        grads = differentiable_pair(_reference_iou, ctx, grad_output)
        return [None if grad is None else grad.detach() for grad in grads]
    boxes1, boxes2 = ctx.saved_tensors
    needs1, needs2 = ctx.needs_input_grad[:2]
    transposed = grad_output.transpose(-1, -2)  # the family is symmetric
    return pair_gradients(
        ctx,
        call(ops._box_iou_backward, grad_output, boxes1, boxes2, *ctx.settings) if needs1 else None,
        call(ops._box_iou_backward, transposed, boxes2, boxes1, *ctx.settings) if needs2 else None,
    )


def _backward_encode_boxes(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        return differentiable_pair(reference.encode_boxes, ctx, grad_output)
    grads = call(ops._encode_boxes_backward, grad_output, *ctx.saved_tensors, *ctx.settings)
    return pair_gradients(ctx, *grads)


def _backward_decode_boxes(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        return differentiable_pair(_reference_decode_boxes, ctx, grad_output)
    needs_anchors = ctx.needs_input_grad[1]
    arguments = (grad_output, *ctx.saved_tensors, *ctx.settings, needs_anchors)
    return pair_gradients(ctx, *call(ops._decode_boxes_backward, *arguments))


def _reference_decode_boxes(
    deltas: Tensor, anchors: Tensor, weights: list[float], clip: float, image_size: list[float]
) -> Tensor:
    return reference.decode_boxes(deltas, anchors, weights, clip, image_size or None)


for name, backward in (
    ("box_iou", _backward_box_iou),
    ("encode_boxes", _backward_encode_boxes),
    ("decode_boxes", _backward_decode_boxes),
):
    register_gradients(name, setup_pair, backward, num_inputs=2)
