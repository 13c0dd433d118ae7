"""Which ground-truth box each anchor shall learn, by what the network predicts there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import choice, number, require_tensors, whole
from focalops._coordinates import check_like
from focalops._ops import (
    call,
    check,
    check_floating,
    check_same_device,
    ops,
    require_tensor,
    runs_reference,
)
from focalops._padding import check_labels, check_of_boxes, pad_labels
from focalops.assigners import _check_boxes_and_crowd, _check_points, _ground_truth

TASK_RULES = ("ultralytics", "mmyolo", "tood")  # as TaskRule in csrc/assign.h
_OVERLAPS = {"iou": 0, "ciou": 3}  # of IouKind in csrc/math/box.h
MAX_TOPK = 32  # kMaxTopk in csrc/assign.h
SIMOTA_RULES = ("simota", "yolox", "rtmdet")  # as SimotaRule in csrc/math/simota.h
_RADIUS = {"simota": 2.5, "yolox": 1.5, "rtmdet": 3.0}
_CANDIDATES = {"simota": 10, "yolox": 10, "rtmdet": 13}


def assign_task_aligned(
    pred_scores: Tensor,
    pred_boxes: Tensor,
    points: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    gt_labels: Sequence[Tensor] | Tensor,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    *,
    counts: Tensor | None = None,
    rule: str = "ultralytics",
    overlap: str | None = None,
    min_side: float | None = None,
    final_topk: int | None = None,
    eps: float | None = None,
    crowd: Sequence[Tensor] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns anchors to the ground-truth boxes that they predict best, in class and place together.

    How well anchor and box do is ``score ** alpha * overlap ** beta``: the predicted probability of the box's class, and the
    overlap of predicted and ground-truth box. A box takes its ``topk`` best anchors where that is more than 0, of equal ones
    the first. An anchor that several boxes take goes to the one that it overlaps most, of equal ones the first; of which
    boxes, differs:

    - ``"ultralytics"`` (YOLOv8 to YOLO26): a box takes anchors whose point is inside, by more than 1e-9, of the box with each
      side of less than ``min_side`` made as long; rivals are all boxes that hold the point so, whether or not they took it;
    - ``"mmyolo"`` (YOLOv6, PP-YOLOE): anchors whose point is inside; rivals are all boxes of the image;
    - ``"tood"``, the original and mmdet's: of the best of all anchors those whose point is inside by more than 0.01; rivals
      are those that took it.

    The targets of the classification, ``scores``, are ``metric * greatest overlap / (greatest metric + eps)``, the greatest
    of all anchors that the box has in the end.

    Args:
        pred_scores: ``(B, N, K)``, probabilities of the classes, of any floating dtype and in any layout: read where they lie.
        pred_boxes: ``(B, N, 4)``, xyxy in pixels.
        points: ``(N, 2)``, x and y of the anchors' points in pixels, the same for all images.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        gt_labels: a list with ``(M_i,)`` for each image, or padded to ``(B, M)``: integers in ``0..K-1``. Another one is an
            error on the CPU; on CUDA, where looking would stop the device, its box takes nothing.
        topk: 1 to 32.
        alpha, beta: at least 0; more than 0.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU, on CUDA the nearest.
        rule: as above.
        overlap: ``"iou"`` or ``"ciou"``, negative ones 0; by default CIoU for ``"ultralytics"``, else IoU.
        min_side: in pixels, of ``"ultralytics"`` alone; 16 by default, the second stride there. 0 for its older versions.
        final_topk: of ``"ultralytics"`` alone, its ``topk2``: of the anchors that a box then has it keeps so many; None for
            all. 1 to 32.
        eps: by default 1e-9 for ``"ultralytics"``, else 1e-7.
        crowd: bool, a list with ``(M_i,)`` for each image or padded to ``(B, M)``: boxes around crowds. They take nothing;
            anchors whose points are inside are -2 and taken by none.

    Returns:
        matches, int64 ``(B, N)``: the index of a box of the image, -1 or -2, as :func:`match_anchors` gives them; and scores,
        float32 ``(B, N)``, 0 where there is no match. ``class_index_targets(matches, gt_labels, K)`` and scores are the
        targets of :func:`quality_focal_loss` and :func:`varifocal_loss`, scores the ``weight`` of :func:`dense_box_loss`.

    All is computed in float32, to which other dtypes are rounded. Where the peers take an anchor of metric 0 by a tie, which
    trains nothing, it stays background here; a NaN is a metric of 0, and a box with fewer than ``topk`` candidates takes what
    there is. No gradient is registered. All images are assigned at once in O(B N) memory, 24 bytes an anchor; time
    O(B M N / 256 + pairs), the pairs of boxes and anchors inside them. The host does not wait for the device; with padded
    boxes and counts the call can be captured in a CUDA graph, and two runs give the same bits. Feng et al., TOOD, 2021;
    ultralytics' ``TaskAlignedAssigner``, mmyolo's ``BatchTaskAlignedAssigner``, mmdet's ``TaskAlignedAssigner`` with the
    targets of its ``TOODHead``.

    >>> matches, scores = assign_task_aligned(logits.sigmoid(), boxes, points, gt_boxes, gt_labels)
    """
    op = "assign_task_aligned"
    choice("rule", rule, TASK_RULES)
    is_ultralytics = rule == "ultralytics"
    overlap = ("ciou" if is_ultralytics else "iou") if overlap is None else overlap
    choice("overlap", overlap, tuple(_OVERLAPS))
    topk, alpha, beta = whole("topk", topk), number("alpha", alpha), number("beta", beta)
    eps = (1e-9 if is_ultralytics else 1e-7) if eps is None else number("eps", eps)
    for name, value in (("min_side", min_side), ("final_topk", final_topk)):
        if value is not None and not is_ultralytics:
            raise ValueError(f"{name} must be None unless rule is 'ultralytics', got {value!r}")
    if min_side is None:
        min_side = 16.0 if is_ultralytics else -1.0
    elif not (min_side := number("min_side", min_side)) >= 0:
        raise ValueError(f"min_side must be >= 0, got {min_side:g}")
    if final_topk is not None and (final_topk := whole("final_topk", final_topk)) < 1:
        raise ValueError(f"final_topk must lie in [1, {MAX_TOPK}], got {final_topk}")
    for name, tensor in (
        ("pred_scores", pred_scores),
        ("pred_boxes", pred_boxes),
        ("points", points),
    ):
        require_tensor(name, tensor)
    require_tensors("gt_labels", gt_labels)
    listed = gt_boxes
    gt_boxes, counts, crowd = _ground_truth(op, points, gt_boxes, counts, crowd)
    labels = _labels(op, gt_labels, listed, gt_boxes)
    arguments = (
        *(pred_scores.detach(), _in_float32(pred_boxes), _in_float32(points)),
        *(_in_float32(gt_boxes), labels, counts, crowd, topk, alpha, beta),
        *(TASK_RULES.index(rule), _OVERLAPS[overlap], min_side, final_topk or 0, eps),
    )
    if runs_reference(points):
        _check_task_aligned(*arguments)
        return reference.assign_task_aligned(
            *arguments[:5],
            topk,
            alpha,
            beta,
            counts=counts,
            rule=rule,
            overlap=overlap,
            min_side=min_side if is_ultralytics else None,
            final_topk=final_topk,
            eps=eps,
            crowd=crowd,
        )
    return call(ops.assign_task_aligned, *arguments)


def assign_simota(
    cls_logits: Tensor,
    pred_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    gt_labels: Sequence[Tensor] | Tensor,
    *,
    objectness: Tensor | None = None,
    counts: Tensor | None = None,
    rule: str = "simota",
    center_radius: float | None = None,
    candidates: int | None = None,
    crowd: Sequence[Tensor] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns to each ground-truth box as many anchors as its predictions deserve, the cheapest ones.

    A box takes as many anchors as the sum of the ``candidates`` greatest overlaps of its image's predictions with it says,
    rounded down, at least one: those of least cost, of equal ones the first. An anchor that several boxes take goes to the
    one of all boxes of the image that costs least there, of equal ones the first. The cost is that of the classes, three
    times ``-log(overlap + eps)``, and what the place costs:

    - ``"simota"``, mmdet's: an anchor takes part whose point is inside of a box or within ``center_radius`` strides of a
      box's center, on both axes; for a box where not both hold it costs 1e5 more. The classes cost the binary cross entropy
      of their probabilities, at most 100 each: ``sigmoid(cls_logits)``, with ``objectness`` the root of the product with
      ``sigmoid(objectness)``, which mmdet's YOLOX hands to it;
    - ``"yolox"``: an anchor takes part that is so near to a box's center, and costs 1e6 more for other boxes; probabilities
      are the root of the product;
    - ``"rtmdet"``, mmdet's ``DynamicSoftLabelAssigner``: an anchor takes part whose point is inside of a box; the place costs
      ``10 ** (distance to the center in strides - center_radius)``; of the box's class the target is the overlap, and the
      cross entropies are weighted by ``(target - sigmoid(cls_logits)) ** 2``.

    Args:
        cls_logits: ``(B, N, K)``, of any floating dtype and in any layout: read where they lie.
        pred_boxes: ``(B, N, 4)``, xyxy in pixels.
        points: ``(N, 2)``, x and y of the anchors' points in pixels, the same for all images. YOLOX's are the centers of the
            cells, RTMDet's their corners.
        strides: ``(N,)``, in pixels, of each point's level.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        gt_labels: a list with ``(M_i,)`` for each image, or padded to ``(B, M)``: integers in ``0..K-1``. Another one is an
            error on the CPU; on CUDA, where looking would stop the device, its box is none.
        objectness: logits ``(B, N)`` of any floating dtype and in any layout; ``"yolox"`` needs them, ``"rtmdet"`` has none.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU, on CUDA the nearest.
        rule: as above.
        center_radius: in strides, by default 2.5, 1.5 and 3 of the rules in this order.
        candidates: 1 to 32, by default 10, 10 and 13.
        crowd: bool, a list with ``(M_i,)`` for each image or padded to ``(B, M)``: boxes around crowds. They take nothing;
            anchors whose points are inside are -2 and take no part.

    Returns:
        matches, int64 ``(B, N)``: the index of a box of the image, -1 or -2, as :func:`match_anchors` gives them; and ious,
        float32 ``(B, N)``, the overlap of a prediction and its match, 0 where there is none.
        ``class_index_targets(matches, gt_labels, K)`` and ious are the targets of :func:`quality_focal_loss` and
        :func:`varifocal_loss`.

    All is computed in float32, to which other dtypes are rounded. A box may end with nothing where others take its anchors,
    as there; one around no anchor takes those of others. A NaN is no overlap, and what costs a NaN is never taken. No
    gradient is registered. All images are assigned at once in O(B (N + M)) memory, about a byte an anchor beside the
    results; time O(V K + B M N / 256 + pairs), V the anchors that take part, and of pairs those of a box and the anchors
    that it may have without a penalty, or whose predictions it overlaps: all V M only for boxes that find too few there. The
    host does not wait for the device; with padded boxes and counts the call can be captured in a CUDA graph, and two runs
    give the same bits. Ge et al., YOLOX, 2021, and its ``get_assignments``; Lyu et al., RTMDet, 2022; mmdet's
    ``SimOTAAssigner`` and ``DynamicSoftLabelAssigner``.

    >>> matches, ious = assign_simota(logits, boxes, points, strides, gt_boxes, gt_labels, rule="rtmdet")
    """
    op = "assign_simota"
    choice("rule", rule, SIMOTA_RULES)
    radius = _RADIUS[rule] if center_radius is None else number("center_radius", center_radius)
    most = _CANDIDATES[rule] if candidates is None else whole("candidates", candidates)
    for name, tensor in (
        ("cls_logits", cls_logits),
        ("pred_boxes", pred_boxes),
        ("points", points),
        ("strides", strides),
    ):
        require_tensor(name, tensor)
    if objectness is not None:
        require_tensor("objectness", objectness)
    if rule == "yolox" and objectness is None:
        raise ValueError("objectness must be logits (B, N) where rule is 'yolox', got None")
    if rule == "rtmdet" and objectness is not None:
        raise ValueError(
            "objectness must be None where rule is 'rtmdet', "
            f"got a tensor of shape {tuple(objectness.shape)}"
        )
    require_tensors("gt_labels", gt_labels)
    listed = gt_boxes
    gt_boxes, counts, crowd = _ground_truth(op, points, gt_boxes, counts, crowd)
    arguments = (
        *(cls_logits.detach(), _in_float32(pred_boxes), _in_float32(points), _in_float32(strides)),
        *(_in_float32(gt_boxes), _labels(op, gt_labels, listed, gt_boxes)),
        *(None if objectness is None else objectness.detach(), counts, crowd),
        *(SIMOTA_RULES.index(rule), radius, most),
    )
    if runs_reference(points):
        _check_simota(*arguments)
        return reference.assign_simota(
            *arguments[:6],
            objectness=objectness,
            counts=counts,
            rule=rule,
            center_radius=radius,
            candidates=most,
            crowd=crowd,
        )
    return call(ops.assign_simota, *arguments)


def _in_float32(coordinates: Tensor) -> Tensor:
    """What holds none stays, for the op to refuse."""
    is_number = coordinates.dtype != torch.bool
    return coordinates.detach().to(torch.float32) if is_number else coordinates


def _labels(
    op: str,
    gt_labels: Sequence[Tensor] | Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    padded: Tensor,
) -> Tensor:
    """int64 (B, M)."""
    if isinstance(gt_labels, Tensor):
        check_labels("gt_labels", gt_labels)
        return gt_labels.to(torch.int64)
    labels = pad_labels(op, gt_labels, padded, "gt_boxes")
    for i, (of_image, boxes) in enumerate(zip(gt_labels, gt_boxes, strict=True)):
        if len(of_image) != len(boxes):
            raise ValueError(
                f"gt_labels[{i}] must have shape ({len(boxes)},), one for each box, "
                f"got {tuple(of_image.shape)}"
            )
    return labels


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::assign_task_aligned")
def _(pred_scores: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check_task_aligned(pred_scores, *options)
    shape = pred_scores.shape[:2]
    return (
        pred_scores.new_empty(shape, dtype=torch.int64),
        pred_scores.new_empty(shape, dtype=torch.float32),
    )


def _check_task_aligned(
    pred_scores: Tensor,
    pred_boxes: Tensor,
    points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    counts: Tensor | None,
    crowd: Tensor | None,
    topk: int,
    alpha: float,
    beta: float,
    rule: int,
    overlap: int,
    min_side: float,
    final_topk: int,
    eps: float,
) -> None:
    op = "assign_task_aligned"
    truth = (gt_boxes, gt_labels, counts, crowd)
    _check_predictions(op, "pred_scores", pred_scores, pred_boxes, points, *truth)
    check(
        1 <= topk <= MAX_TOPK,
        lambda: f"{op}: topk must lie in [1, {MAX_TOPK}], got {topk}",
    )
    check(
        0 <= final_topk <= MAX_TOPK,
        lambda: f"{op}: final_topk must lie in [1, {MAX_TOPK}], got {final_topk}",
    )
    check(alpha >= 0, lambda: f"{op}: alpha must be >= 0, got {alpha:g}")
    check(beta > 0, lambda: f"{op}: beta must be > 0, got {beta:g}")
    check(eps >= 0, lambda: f"{op}: eps must be >= 0, got {eps:g}")
    check(0 <= rule <= 2, lambda: f"{op}: rule must lie in [0, 2], got {rule}")
    check(overlap in (0, 3), lambda: f"{op}: overlap must be 0 or 3, got {overlap}")


@torch.library.register_fake("focalops::assign_simota")
def _(cls_logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check_simota(cls_logits, *options)
    shape = cls_logits.shape[:2]
    return (
        cls_logits.new_empty(shape, dtype=torch.int64),
        cls_logits.new_empty(shape, dtype=torch.float32),
    )


def _check_simota(
    cls_logits: Tensor,
    pred_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    objectness: Tensor | None,
    counts: Tensor | None,
    crowd: Tensor | None,
    rule: int,
    center_radius: float,
    candidates: int,
) -> None:
    op = "assign_simota"
    truth = (gt_boxes, gt_labels, counts, crowd)
    _check_predictions(op, "cls_logits", cls_logits, pred_boxes, points, *truth)
    check_like(op, "strides", strides, "points", points)
    check(
        strides.shape == points.shape[:1],
        lambda: (
            f"{op}: strides must have shape ({points.shape[0]},), one for each point, "
            f"got {tuple(strides.shape)}"
        ),
    )
    shape = cls_logits.shape[:2]
    if objectness is not None:
        check_same_device(op, "objectness", objectness, "points", points)
        check_floating(op, "objectness", objectness)
        check(
            objectness.shape == shape,
            lambda: (
                f"{op}: objectness must have shape ({shape[0]}, {shape[1]}), "
                f"got {tuple(objectness.shape)}"  # type: ignore[union-attr]
            ),
        )
    check(0 <= rule <= 2, lambda: f"{op}: rule must lie in [0, 2], got {rule}")
    check(
        center_radius >= 0,
        lambda: f"{op}: center_radius must be >= 0, got {center_radius:g}",
    )
    check(
        1 <= candidates <= MAX_TOPK,
        lambda: f"{op}: candidates must lie in [1, {MAX_TOPK}], got {candidates}",
    )


def _check_predictions(
    op: str,
    of_classes: str,
    classes: Tensor,  # its scores or logits
    pred_boxes: Tensor,
    points: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    counts: Tensor | None,
    crowd: Tensor | None,
) -> None:
    _check_points(op, points)
    check(
        points.dtype == torch.float32, lambda: f"{op}: points must be float32, got {points.dtype}"
    )
    _check_boxes_and_crowd(op, gt_boxes, counts, crowd, "points", points)
    check_of_boxes(op, "gt_labels", gt_labels, torch.int64, gt_boxes, "points", points)
    shape = (gt_boxes.shape[0], points.shape[0])
    check_same_device(op, of_classes, classes, "points", points)
    check_floating(op, of_classes, classes)
    check(
        classes.dim() == 3 and classes.shape[:2] == shape,
        lambda: (
            f"{op}: {of_classes} must have shape ({shape[0]}, {shape[1]}, K), "
            f"got {tuple(classes.shape)}"
        ),
    )
    check_like(op, "pred_boxes", pred_boxes, "points", points)
    check(
        pred_boxes.shape == (*shape, 4),
        lambda: (
            f"{op}: pred_boxes must have shape ({shape[0]}, {shape[1]}, 4), "
            f"got {tuple(pred_boxes.shape)}"
        ),
    )
