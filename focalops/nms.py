"""Non-maximum suppression (NMS)."""

from __future__ import annotations

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import choice, number, whole
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
from focalops.boxes import box_iou


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, overlap: str = "iou") -> Tensor:
    """The boxes that no kept box of a higher score overlaps by more than a threshold.

    A drop-in for ``torchvision.ops.nms``.

    Args:
        boxes: ``(N, 4)`` as xyxy, float16, bfloat16, float32 or float64; IoUs are computed in
            float32, those of float64 boxes in float64.
        scores: ``(N,)``, any of these dtypes.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.
        overlap: ``"iou"``, or ``"diou"``: IoU less the squared distance of the centers over that of the corners of the box
            around both (Zheng et al., "Distance-IoU Loss", 2020), so that of boxes with different centers more are kept.

    Returns:
        Indices of the kept boxes, int64, by descending score; of equal scores the lower index
        comes first. A box with a NaN score or coordinate is never kept, and suppresses nothing.

    Memory O(N), time O(N x kept boxes), no limit on N. The size of the result depends on the
    data, so that on CUDA the host waits for the device once, at the end. Nothing is
    differentiated.

    >>> keep = nms(boxes, scores, 0.5)  # (N, 4), (N,)
    """
    boxes, iou_threshold = _as_rows(boxes, scores), number("iou_threshold", iou_threshold)
    is_diou = by_distance(overlap)
    if runs_reference(boxes):
        _check(boxes, scores, None)
        return reference.nms(boxes, scores, iou_threshold, overlap=overlap)
    return call(ops.nms, boxes, scores, None, iou_threshold, is_diou)


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, overlap: str = "iou"
) -> Tensor:
    """NMS inside each class: boxes of different ``idxs`` never suppress each other.

    A drop-in for ``torchvision.ops.batched_nms``, which moves each class to coordinates of its
    own, and so rounds them; here a box meets only the boxes of its class, wherever they lie.

    Args:
        boxes: ``(N, 4)``, as in :func:`nms`.
        scores: ``(N,)``, as in :func:`nms`.
        idxs: ``(N,)``, the class (or image) of each box: any numbers.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.
        overlap: as in :func:`nms`.

    Returns:
        As :func:`nms`: the kept boxes of all classes together, by descending score.

    >>> keep = batched_nms(boxes, scores, labels, 0.5)  # (N, 4), (N,), (N,)
    """
    boxes, iou_threshold = _as_rows(boxes, scores), number("iou_threshold", iou_threshold)
    is_diou = by_distance(overlap)
    require_tensor("idxs", idxs)
    if idxs.is_floating_point():
        idxs = (idxs.to(torch.float64) + 0.0).view(
            torch.int64
        )  # -0 + 0 is 0, whose bits are others
    if idxs.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        idxs = idxs.to(torch.int64)
    if runs_reference(boxes):
        _check(boxes, scores, idxs)
        return reference.batched_nms(boxes, scores, idxs, iou_threshold, overlap=overlap)
    return call(ops.nms, boxes, scores, idxs, iou_threshold, is_diou)


def _as_rows(boxes: Tensor, scores: Tensor) -> Tensor:
    require_tensor("boxes", boxes)
    require_tensor("scores", scores)
    if boxes.dim() == 1 and len(boxes) == 0:  # as torchvision takes them
        return boxes.reshape(0, 4)
    return boxes


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which kept box each box goes with after NMS: itself, or the one that suppressed it.

    mmcv's ``nms_match``, as a tensor rather than a list of groups. There a box is suppressed where ``iou >= iou_threshold``:
    ``nms_match(boxes, scores, math.nextafter(iou_threshold, 0))``, with a threshold that float32 holds.

    Args:
        boxes: ``(N, 4)``, as in :func:`nms`.
        scores: ``(N,)``, as in :func:`nms`.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.

    Returns:
        int64 ``(N,)``: the index of a kept box, of several that overlap a box the one with the best score; -1 for a box with a
        NaN score or coordinate.

    Memory and time O(N x kept boxes). On CUDA the host waits for the device once. Nothing is differentiated.

    >>> group = nms_match(boxes, scores, 0.5)
    >>> kept, sizes = group.unique(return_counts=True)
    """
    boxes, iou_threshold = _as_rows(boxes, scores).detach(), number("iou_threshold", iou_threshold)
    if runs_reference(boxes):
        _check(boxes, scores, None)
        return reference.nms_match(boxes, scores, iou_threshold)
    keep = nms(boxes, scores, iou_threshold)
    iou = box_iou(boxes[keep], boxes)
    suppresses = (iou.double() > iou_threshold).to(torch.uint8)  # as NMS compares
    # Behind the kept boxes one that takes all, of no index.
    first = torch.nn.functional.pad(suppresses, (0, 0, 0, 1), value=1).argmax(dim=0)
    group = torch.nn.functional.pad(keep, (0, 1), value=-1)[first]
    return group.masked_fill(scores.isnan(), -1).index_copy(0, keep, keep)


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int = 100,
    *,
    counts: Tensor | None = None,
    overlap: str = "iou",
) -> tuple[Tensor, Tensor]:
    """The best boxes of each image of a batch after NMS inside each class, padded to one size.

    All images are done at once, and nothing waits for the device: the form for compiled graphs,
    CUDA graphs and deployment. A box predicted for several classes is given once for each.

    Args:
        boxes: ``(B, N, 4)``, as in :func:`nms`.
        scores: ``(B, N)``, as in :func:`nms`.
        labels: ``(B, N)``, the class of each box, int32 or int64; None: all are of one class.
        iou_threshold: a box is suppressed where ``iou > iou_threshold``.
        max_detections: how many boxes of an image are kept at most. NMS stops there.
        counts: ``(B,)``, int32 or int64, how many of its N boxes each image has; what comes after
            them is padding, and may hold anything. None: all N.
        overlap: as in :func:`nms`.

    Returns:
        ``indices (B, max_detections)``, int64: the kept boxes of each image by descending score, in
        [0, N), then -1; and ``num_kept (B,)``, int64.

    Memory O(B (N + max_detections)), time O(N x max_detections) an image.

    >>> indices, num_kept = multiclass_nms(boxes, scores, labels, 0.5)
    >>> kept_scores = scores.gather(1, indices.clamp(min=0))  # padding: that of box 0
    """
    _require_tensors(boxes=boxes, scores=scores, labels=labels, counts=counts)
    iou_threshold = number("iou_threshold", iou_threshold)
    max_detections = whole("max_detections", max_detections)
    is_diou = by_distance(overlap)
    if runs_reference(boxes):
        _check_padded(boxes, scores, labels, counts, max_detections)
        return reference.multiclass_nms(
            boxes, scores, labels, iou_threshold, max_detections, counts=counts, overlap=overlap
        )
    return call(
        ops.multiclass_nms,
        boxes,
        scores,
        labels,
        counts,
        iou_threshold,
        max_detections,
        is_diou,
    )


def _require_tensors(**arguments: Tensor | None) -> None:
    for name, tensor in arguments.items():
        if tensor is not None or name in ("boxes", "scores"):
            require_tensor(name, tensor)


def by_distance(overlap: str) -> bool:
    """Whether the overlap is DIoU, as the native ops ask."""
    return choice("overlap", overlap, ("iou", "diou")) == "diou"


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    iou_threshold: float = 0.3,
    max_detections: int = 100,
    *,
    method: str = "linear",
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""NMS that lowers the score of a box beside a better one of its class, rather than remove it.

    Bodla et al., "Improving Object Detection With One Line of Code", 2017. Again and again the best box that is left is kept,
    and the scores s of the others decay by their IoU with it.

    Args:
        boxes: ``(B, N, 4)`` as xyxy, float16, bfloat16, float32 or float64.
        scores: ``(B, N)``, any of these dtypes. A box to be left out, such as padding, has a NaN.
        labels: ``(B, N)``, the class of each box, int32 or int64; None: all are of one class.
        iou_threshold: with ``"linear"``, an IoU up to it does no harm.
        max_detections: how many boxes of an image are kept at most.
        method: ``"linear"``: :math:`s (1 - \mathrm{iou})` where ``iou > iou_threshold``; ``"gaussian"``:
            :math:`s \exp(-\mathrm{iou}^2 / \sigma)`.
        sigma: of the gaussian, > 0.
        score_threshold: a box is kept while its score is above it, as it has become.

    Returns:
        ``indices (B, max_detections)``, int64, of the kept boxes in the order in which they were taken, then -1; their scores,
        as they have become, then 0, float64 if an argument is float64, else float32; and ``num_kept (B,)``, int64. Of equal
        scores the lower index comes first. A box with a NaN score or coordinate is never kept, and lowers nothing.

    All images are done at once, and nothing waits for the device. Memory O(B N), time O(N x max_detections) an image. Nothing is
    differentiated.

    >>> indices, kept_scores, num_kept = soft_nms(boxes, scores, labels, method="gaussian")
    """
    choice("method", method, ("linear", "gaussian"))
    _require_tensors(boxes=boxes, scores=scores, labels=labels)
    iou_threshold = number("iou_threshold", iou_threshold)
    sigma, score_threshold = number("sigma", sigma), number("score_threshold", score_threshold)
    max_detections = whole("max_detections", max_detections)
    boxes, scores = _in_one_dtype(boxes.detach(), scores.detach())
    if runs_reference(boxes):
        _check_decayed("soft_nms", boxes, scores, labels, sigma, max_detections)
        return reference.soft_nms(
            boxes,
            scores,
            labels,
            iou_threshold,
            max_detections,
            method=method,
            sigma=sigma,
            score_threshold=score_threshold,
        )
    return call(
        ops.soft_nms,
        boxes,
        scores,
        labels,
        iou_threshold,
        sigma,
        method == "gaussian",
        score_threshold,
        max_detections,
    )


def matrix_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    max_detections: int = 100,
    *,
    method: str = "gaussian",
    sigma: float = 2.0,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""NMS that lowers the score of a box beside all better boxes of its class at once.

    Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", 2020, for boxes (as in PP-YOLO). Nothing is done one after
    another, as in :func:`soft_nms`: what a better box i does to box j is lessened by what boxes better still may have done to i,
    by its greatest IoU :math:`c_i` with one of them. The least factor over all i counts, and none is above 1.

    Args:
        boxes: ``(B, N, 4)`` as xyxy, float16, bfloat16, float32 or float64.
        scores: ``(B, N)``, any of these dtypes. A box to be left out, such as padding, has a NaN.
        labels: ``(B, N)``, the class of each box, int32 or int64; None: all are of one class.
        max_detections: how many boxes of an image are kept at most.
        method: ``"gaussian"``: a factor :math:`\exp(-\sigma (\mathrm{iou}_{ij}^2 - c_i^2))`; ``"linear"``:
            :math:`(1 - \mathrm{iou}_{ij}) / (1 - c_i)`, and 1 where :math:`c_i` is 1.
        sigma: of the gaussian, > 0.
        score_threshold: a box is kept where its score, as it has become, is above it.

    Returns:
        ``indices (B, max_detections)``, int64, of the kept boxes by descending score, then -1; their scores, as they have
        become, then 0, float64 if an argument is float64, else float32; and ``num_kept (B,)``, int64. Of equal scores the lower
        index comes first. A box with a NaN score or coordinate is never kept, and lowers nothing.

    All images are done at once, and nothing waits for the device. Memory O(B N), time O(B N^2). Nothing is differentiated.

    >>> indices, kept_scores, num_kept = matrix_nms(boxes, scores, labels)
    """
    choice("method", method, ("linear", "gaussian"))
    _require_tensors(boxes=boxes, scores=scores, labels=labels)
    sigma, score_threshold = number("sigma", sigma), number("score_threshold", score_threshold)
    max_detections = whole("max_detections", max_detections)
    boxes, scores = _in_one_dtype(boxes.detach(), scores.detach())
    if runs_reference(boxes):
        _check_decayed("matrix_nms", boxes, scores, labels, sigma, max_detections)
        return reference.matrix_nms(
            boxes,
            scores,
            labels,
            max_detections,
            method=method,
            sigma=sigma,
            score_threshold=score_threshold,
        )
    return call(
        ops.matrix_nms,
        boxes,
        scores,
        labels,
        sigma,
        method == "gaussian",
        score_threshold,
        max_detections,
    )


def _in_one_dtype(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    if boxes.dtype in FLOATING and scores.dtype in FLOATING:
        dtype = compute_dtype(torch.promote_types(boxes.dtype, scores.dtype))
        return boxes.to(dtype), scores.to(dtype)
    return boxes, scores


# ---- fake kernels -------------------------------------------------------------------------------


def _check(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> None:
    op = "nms" if idxs is None else "batched_nms"
    check_floating(op, "boxes", boxes)
    check(
        boxes.dim() == 2 and boxes.shape[1] == 4,
        lambda: f"{op}: boxes must have shape (N, 4), got {tuple(boxes.shape)}",
    )
    check_floating(op, "scores", scores)
    _check_one_for_each(op, "scores", scores, boxes, 1, "box")
    if idxs is not None:
        _check_one_for_each(op, "idxs", idxs, boxes, 1, "box")


def _check_one_for_each(
    op: str, name: str, tensor: Tensor, boxes: Tensor, dims: int, what: str
) -> None:
    """All but the scores are integers, and have the leading `dims` dimensions of the boxes."""
    check(
        name == "scores" or tensor.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: {name} must be int32 or int64, got {tensor.dtype}",
    )
    check_same_device(op, name, tensor, "boxes", boxes)
    check(
        tensor.shape == boxes.shape[:dims],
        lambda: (
            f"{op}: {name} must have shape {tuple(boxes.shape[:dims])}, one for each {what}, "
            f"got {tuple(tensor.shape)}"
        ),
    )


@torch.library.register_fake("focalops::nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    by_distance: bool = False,
) -> Tensor:
    _check(boxes, scores, idxs)
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)


@torch.library.register_fake("focalops::multiclass_nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    by_distance: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_padded(boxes, scores, labels, counts, max_detections)
    indices = boxes.new_empty((boxes.shape[0], max_detections), dtype=torch.int64)
    return indices, boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _check_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    max_detections: int,
) -> None:
    op = "multiclass_nms"
    check_floating(op, "boxes", boxes)
    check(
        boxes.dim() == 3 and boxes.shape[2] == 4,
        lambda: f"{op}: boxes must have shape (B, N, 4), got {tuple(boxes.shape)}",
    )
    check_floating(op, "scores", scores)
    for name, tensor, dims, what in (
        ("scores", scores, 2, "box"),
        ("labels", labels, 2, "box"),
        ("counts", counts, 1, "image"),
    ):
        if tensor is not None:
            _check_one_for_each(op, name, tensor, boxes, dims, what)
    check(max_detections >= 0, lambda: f"{op}: max_detections must be >= 0, got {max_detections}")


@torch.library.register_fake("focalops::soft_nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    sigma: float,
    is_gaussian: bool,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _decayed("soft_nms", boxes, scores, labels, sigma, max_detections)


@torch.library.register_fake("focalops::matrix_nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    sigma: float,
    is_gaussian: bool,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _decayed("matrix_nms", boxes, scores, labels, sigma, max_detections)


def _decayed(
    op: str,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    sigma: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_decayed(op, boxes, scores, labels, sigma, max_detections)
    padded = (boxes.shape[0], max_detections)
    indices = boxes.new_empty(padded, dtype=torch.int64)
    return indices, boxes.new_empty(padded), boxes.new_empty(padded[:1], dtype=torch.int64)


def _check_decayed(
    op: str,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    sigma: float,
    max_detections: int,
) -> None:
    check(
        boxes.dtype in (torch.float32, torch.float64),
        lambda: f"{op}: boxes must be float32 or float64, got {boxes.dtype}",
    )
    check(
        boxes.dim() == 3 and boxes.shape[2] == 4,
        lambda: f"{op}: boxes must have shape (B, N, 4), got {tuple(boxes.shape)}",
    )
    check_same_device(op, "scores", scores, "boxes", boxes)
    check(
        scores.dtype == boxes.dtype,
        lambda: f"{op}: scores must be {boxes.dtype} like boxes, got {scores.dtype}",
    )
    _check_one_for_each(op, "scores", scores, boxes, 2, "box")
    if labels is not None:
        _check_one_for_each(op, "labels", labels, boxes, 2, "box")
    check(sigma > 0, lambda: f"{op}: sigma must be > 0, got {sigma:g}")
    check(max_detections >= 0, lambda: f"{op}: max_detections must be >= 0, got {max_detections}")
