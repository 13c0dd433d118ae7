"""Non-maximum suppression (NMS)."""

from __future__ import annotations

import torch
from torch import Tensor

from focalops import reference
from focalops._ops import call, check, check_floating, check_same_device, ops, runs_reference


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that no kept box of a higher score overlaps by more than a threshold.

    A drop-in for ``torchvision.ops.nms``.

    Args:
        boxes: ``(N, 4)`` as xyxy, float16, bfloat16, float32 or float64; IoUs are computed in
            float32, those of float64 boxes in float64.
        scores: ``(N,)``, any of these dtypes.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.

    Returns:
        Indices of the kept boxes, int64, by descending score; of equal scores the lower index
        comes first. A box with a NaN score or coordinate is never kept, and suppresses nothing.

    Memory O(N), time O(N x kept boxes), no limit on N. The size of the result depends on the
    data, so that on CUDA the host waits for the device once, at the end. Nothing is
    differentiated.

    >>> keep = nms(boxes, scores, 0.5)  # (N, 4), (N,)
    """
    if runs_reference(boxes):
        return reference.nms(boxes, scores, iou_threshold)
    return call(ops.nms, boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """NMS inside each class: boxes of different ``idxs`` never suppress each other.

    A drop-in for ``torchvision.ops.batched_nms``, which moves each class to coordinates of its
    own, and so rounds them; here a box meets only the boxes of its class, wherever they lie.

    Args:
        boxes: ``(N, 4)``, as in :func:`nms`.
        scores: ``(N,)``, as in :func:`nms`.
        idxs: ``(N,)``, the class (or image) of each box: any integers.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.

    Returns:
        As :func:`nms`: the kept boxes of all classes together, by descending score.

    >>> keep = batched_nms(boxes, scores, labels, 0.5)  # (N, 4), (N,), (N,)
    """
    if runs_reference(boxes):
        return reference.batched_nms(boxes, scores, idxs, iou_threshold)
    if idxs.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        idxs = idxs.to(torch.int64)
    return call(ops.nms, boxes, scores, idxs, iou_threshold)


# ---- fake kernels -------------------------------------------------------------------------------


def _check(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> None:
    op = "nms" if idxs is None else "batched_nms"
    check_floating(op, "boxes", boxes)
    check(
        boxes.dim() == 2 and boxes.shape[1] == 4,
        lambda: f"{op}: boxes must have shape (N, 4), got {tuple(boxes.shape)}",
    )
    check_floating(op, "scores", scores)
    _check_one_for_each_box(op, "scores", scores, boxes)
    if idxs is not None:
        check(
            idxs.dtype in (torch.int32, torch.int64),
            lambda: f"{op}: idxs must be int32 or int64, got {idxs.dtype}",
        )
        _check_one_for_each_box(op, "idxs", idxs, boxes)


def _check_one_for_each_box(op: str, name: str, tensor: Tensor, boxes: Tensor) -> None:
    check_same_device(op, name, tensor, "boxes", boxes)
    check(
        tensor.dim() == 1 and tensor.shape[0] == boxes.shape[0],
        lambda: (
            f"{op}: {name} must have shape ({boxes.shape[0]},), one for each box, "
            f"got {tuple(tensor.shape)}"
        ),
    )


@torch.library.register_fake("focalops::nms")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    _check(boxes, scores, idxs)
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)
