"""Which ground-truth box each point or anchor of a dense detector shall learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import MAX_LEVELS, choice, flag, floats, number, require_tensors, whole
from focalops._coordinates import as_coordinates, check_coordinates, coordinates_dtype
from focalops._ops import call, check, ops, require_tensor, runs_reference
from focalops._padding import check_gt_boxes, check_of_boxes, pad_boxes, pad_crowd

FCOS_RULES = ("torchvision", "mmdet")  # as FcosRule in csrc/assign.h
ATSS_RULES = ("atss", "mmyolo")  # as AtssRule there
MAX_ATSS_TOPK = 128  # kMaxAtssTopk there


def assign_fcos(
    points: Tensor,
    strides: Sequence[float],
    level_sizes: Sequence[int],
    gt_boxes: Sequence[Tensor] | Tensor,
    *,
    counts: Tensor | None = None,
    rule: str = "torchvision",
    center_radius: float | None = 1.5,
    ranges: Sequence[Sequence[float]] | None = None,
    crowd: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """Assigns the points of each image of a batch to the ground-truth boxes as FCOS does.

    A point gets, of the boxes that it lies in, whose center is near and whose greatest distance from the point to a side is
    in the range of the point's level, the smallest; of equal ones the first. The rules differ in three things:

    - ``"torchvision"``: near is less than ``center_radius`` strides from the center on both axes; the ranges are open; areas
      are compared by what they leave of 1e8, which in float32 has steps of 8;
    - ``"mmdet"``, the original: near is the box cut to ``center_radius`` strides around its center, None by default there;
      the ranges are closed, so that a box at a limit is of both levels; areas are compared as they are.

    Args:
        points: ``(N, 2)``, x and y of the points of all levels, level by level, the same for all images.
        strides: a number for each level; of torchvision's FCOS the size of its anchors.
        level_sizes: how many points each level has.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU; on CUDA, where looking would stop the device, the nearest.
        rule: as above.
        center_radius: in strides; None for the whole box.
        ranges: two numbers for each level; by default 4 and 8 strides, from 0 in the first and to infinity in the last.
        crowd: bool, a list with ``(M_i,)`` for each image or padded to ``(B, M)``: boxes around crowds. They match nothing;
            points inside are -2 and take no part.

    Returns:
        int64 ``(B, N)``: the index of a box of the image, -1 or -2, as :func:`match_anchors` gives them.

    In an image without boxes every point is background, and so is one whose boxes are all of area 1e8 or more. A NaN
    coordinate is inside nothing. All is computed in float32, float64 if an argument is. No gradient is registered. All
    images are assigned at once in O(B N) memory, time at most O(B N M): boxes are skipped where they miss the range of
    consecutive points. The host does not wait for the device; with padded boxes and counts the call can be captured in a
    CUDA graph. Tian et al., FCOS, 2019; torchvision's ``FCOS.compute_loss``, mmdet's ``FCOSHead.get_targets``.

    >>> matches = assign_fcos(points, [8, 16, 32, 64, 128], [h * w for h, w in sizes], [t["boxes"] for t in targets])
    """
    op = "assign_fcos"
    choice("rule", rule, FCOS_RULES)
    radius = math.inf if center_radius is None else number("center_radius", center_radius)
    strides = floats("strides", strides, "numbers, one for each level")
    level_sizes = _sizes(level_sizes)
    least, most = _ranges(ranges, strides)
    require_tensor("points", points)
    gt_boxes, counts, crowd = _ground_truth(op, points, gt_boxes, counts, crowd)
    dtype = coordinates_dtype(points, gt_boxes)
    points = as_coordinates(points.detach(), dtype)
    gt_boxes = as_coordinates(gt_boxes.detach(), dtype)
    arguments = (
        *(points, gt_boxes, counts, crowd, level_sizes, strides, least, most),
        *(radius, FCOS_RULES.index(rule)),
    )
    if runs_reference(points):
        _check_fcos(*arguments)
        return reference.assign_fcos(
            points,
            strides,
            level_sizes,
            gt_boxes,
            counts=counts,
            rule=rule,
            center_radius=radius,
            ranges=list(zip(least, most, strict=True)),
            crowd=crowd,
        )
    return call(ops.assign_fcos, *arguments)


def assign_atss(
    anchors: Tensor,
    level_sizes: Sequence[int],
    gt_boxes: Sequence[Tensor] | Tensor,
    topk: int = 9,
    *,
    counts: Tensor | None = None,
    rule: str = "atss",
    crowd: Sequence[Tensor] | Tensor | None = None,
    at_least_one: bool = False,
) -> Tensor:
    """Assigns the anchors of each image of a batch to the ground-truth boxes by adaptive training sample selection (ATSS).

    A box's candidates are, on each level, the ``topk`` anchors whose centers are nearest to its own, of equally near ones the
    first; a level with fewer gives all. Their IoUs with the box have a mean and a standard deviation (unbiased), whose sum is
    the box's threshold: candidates that reach it and whose center lies in the box are positive, all other anchors background.
    The rules differ in three things:

    - ``"atss"``, mmdet's: the IoU may equal the threshold; the center is inside by more than 0.01; an anchor that several boxes
      claim gets, of these, the one of the greatest IoU, of equal ones the first;
    - ``"mmyolo"``, YOLOv6's: the IoU is above the threshold; 1e-9; of all boxes of the image, whether they claim it or not.

    A box may end with nothing: where no IoU reaches the threshold, as none does of a single candidate, no center is inside,
    or other boxes have all its anchors.

    Args:
        anchors: ``(N, 4)``, xyxy, of all levels, level by level, the same for all images.
        level_sizes: how many anchors each level has.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        topk: candidates a level, 1 to 128; with A anchors at a location ``9 * A`` are the original's. Up to 32 are fastest.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU; on CUDA, where looking would stop the device, the nearest.
        rule: as above.
        crowd: bool, a list with ``(M_i,)`` for each image or padded to ``(B, M)``: boxes around crowds. They match nothing;
            anchors whose center is inside are -2 and no candidates.
        at_least_one: a rule of focalops: in the end each box without an anchor, in ascending order, takes of its candidates
            that overlap it the one of the greatest IoU that is no other box's only one, if there is one.

    Returns:
        int64 ``(B, N)``: the index of a box of the image, -1 or -2, as :func:`match_anchors` gives them.

    A NaN coordinate matches nothing. All is computed in float32, float64 if an argument is; mean and deviation in float64. No
    gradient is registered. All images are assigned at once, in O(B M L (N / 256 + topk)) where anchors that follow each other lie
    close together, at most O(B M N topk); on the CPU in O(N + B M L topk) where the centers of each level are those of a grid, row by
    row. Memory is the result and about 9 bytes an anchor, the same for all images. The host does not wait for the device; with padded boxes and counts the call can be captured in a CUDA graph. Zhang et al., Bridging the Gap
    Between Anchor-based and Anchor-free Detection, 2020; mmdet's ``ATSSAssigner``, mmyolo's ``BatchATSSAssigner``.

    >>> matches = assign_atss(anchors, [h * w for h, w in sizes], [t["boxes"] for t in targets])
    """
    op = "assign_atss"
    choice("rule", rule, ATSS_RULES)
    level_sizes, topk = _sizes(level_sizes), whole("topk", topk)
    at_least_one = flag("at_least_one", at_least_one)
    require_tensor("anchors", anchors)
    gt_boxes, counts, crowd = _ground_truth(op, anchors, gt_boxes, counts, crowd, "anchors")
    dtype = coordinates_dtype(anchors, gt_boxes)
    anchors = as_coordinates(anchors.detach(), dtype)
    gt_boxes = as_coordinates(gt_boxes.detach(), dtype)
    arguments = (
        *(anchors, gt_boxes, counts, crowd, level_sizes, topk),
        *(ATSS_RULES.index(rule), at_least_one),
    )
    if runs_reference(anchors):
        _check_atss(*arguments)
        return reference.assign_atss(
            anchors,
            level_sizes,
            gt_boxes,
            topk,
            counts=counts,
            rule=rule,
            crowd=crowd,
            at_least_one=at_least_one,
        )
    return call(ops.assign_atss, *arguments)


def _sizes(level_sizes: Any) -> list[int]:
    try:
        sizes = list(level_sizes)
    except TypeError:
        raise TypeError(
            f"level_sizes must be integers, one for each level, got {level_sizes!r}"
        ) from None
    return [whole(f"level_sizes[{i}]", size) for i, size in enumerate(sizes)]


def _ranges(ranges: Any, strides: list[float]) -> tuple[list[float], list[float]]:
    """The least and the greatest of each level."""
    if ranges is None:
        least, most = [4 * stride for stride in strides], [8 * stride for stride in strides]
        least[:1], most[-1:] = [0.0] * len(least[:1]), [math.inf] * len(most[-1:])
        return least, most
    what = "pairs of numbers, one for each level"
    try:
        pairs = [floats("ranges", pair, what) for pair in ranges]
    except TypeError:
        pairs = [[]]
    if not all(len(pair) == 2 for pair in pairs):
        raise TypeError(f"ranges must be {what}, got {ranges!r}")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _ground_truth(
    op: str,
    points: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    counts: Tensor | None,
    crowd: Sequence[Tensor] | Tensor | None,
    like_name: str = "points",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Padded."""
    require_tensors("gt_boxes", gt_boxes)
    if counts is not None:
        require_tensor("counts", counts)
    if crowd is not None:
        require_tensors("crowd", crowd)
        crowd = pad_crowd(op, crowd, gt_boxes)
        crowd = crowd if crowd.numel() else crowd.to(points.device)
    if not isinstance(gt_boxes, Tensor):
        if counts is not None:
            raise ValueError("counts must be None unless gt_boxes is one padded tensor")
        gt_boxes, counts = pad_boxes(op, points, gt_boxes, like_name)
    return gt_boxes, counts, crowd


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::assign_fcos")
def _(points: Tensor, gt_boxes: Tensor, *options: Any) -> Tensor:
    _check_fcos(points, gt_boxes, *options)
    return points.new_empty((gt_boxes.shape[0], points.shape[0]), dtype=torch.int64)


def _check_fcos(
    points: Tensor,
    gt_boxes: Tensor,
    counts: Tensor | None,
    crowd: Tensor | None,
    level_sizes: Sequence[int],
    strides: Sequence[float],
    least: Sequence[float],
    most: Sequence[float],
    center_radius: float,
    rule: int,
) -> None:
    op = "assign_fcos"
    _check_points(op, points)
    _check_boxes_and_crowd(op, gt_boxes, counts, crowd, "points", points)
    _check_level_sizes(op, level_sizes, "points", points.shape[0])
    levels = len(level_sizes)
    check(
        len(strides) == levels,
        lambda: f"{op}: strides must be {levels} numbers, one for each level, got {len(strides)}",
    )
    check(
        len(least) == len(most) == levels,
        lambda: (
            f"{op}: ranges must be {levels} pairs of numbers, one for each level, got {len(least)}"
        ),
    )
    check(
        center_radius >= 0,
        lambda: f"{op}: center_radius must be >= 0, got {center_radius:g}",
    )
    check(0 <= rule <= 1, lambda: f"{op}: rule must lie in [0, 1], got {rule}")


@torch.library.register_fake("focalops::assign_atss")
def _(anchors: Tensor, gt_boxes: Tensor, *options: Any) -> Tensor:
    _check_atss(anchors, gt_boxes, *options)
    return anchors.new_empty((gt_boxes.shape[0], anchors.shape[0]), dtype=torch.int64)


def _check_atss(
    anchors: Tensor,
    gt_boxes: Tensor,
    counts: Tensor | None,
    crowd: Tensor | None,
    level_sizes: Sequence[int],
    topk: int,
    rule: int,
    at_least_one: bool,
) -> None:
    op = "assign_atss"
    check_coordinates(op, "anchors", anchors)
    check(
        anchors.dim() == 2 and anchors.shape[1] == 4,
        lambda: f"{op}: anchors must have shape (N, 4), got {tuple(anchors.shape)}",
    )
    check(
        anchors.shape[0] < 2**31,
        lambda: f"{op}: anchors must be fewer than 2^31, got {anchors.shape[0]}",
    )
    _check_boxes_and_crowd(op, gt_boxes, counts, crowd, "anchors", anchors)
    _check_level_sizes(op, level_sizes, "anchors", anchors.shape[0])
    check(
        1 <= topk <= MAX_ATSS_TOPK,
        lambda: f"{op}: topk must lie in [1, {MAX_ATSS_TOPK}], got {topk}",
    )
    check(0 <= rule <= 1, lambda: f"{op}: rule must lie in [0, 1], got {rule}")


def _check_points(op: str, points: Tensor) -> None:
    check_coordinates(op, "points", points)
    check(
        points.dim() == 2 and points.shape[1] == 2,
        lambda: f"{op}: points must have shape (N, 2), got {tuple(points.shape)}",
    )
    check(
        points.shape[0] < 2**31,
        lambda: f"{op}: points must be fewer than 2^31, got {points.shape[0]}",
    )


def _check_boxes_and_crowd(
    op: str,
    gt_boxes: Tensor,
    counts: Tensor | None,
    crowd: Tensor | None,
    like_name: str,
    like: Tensor,
) -> None:
    check_gt_boxes(op, gt_boxes, counts, like_name, like)
    if crowd is not None:
        check_of_boxes(op, "crowd", crowd, torch.bool, gt_boxes, like_name, like)


def _check_level_sizes(op: str, level_sizes: Sequence[int], what: str, number: int) -> None:
    check(
        1 <= len(level_sizes) <= MAX_LEVELS,
        lambda: f"{op}: level_sizes must be 1 to {MAX_LEVELS} levels, got {len(level_sizes)}",
    )
    for size in level_sizes:
        check(
            0 <= size <= number,
            lambda: (
                f"{op}: level_sizes must lie in [0, {number}], the number of {what}, got {size}"  # noqa: B023
            ),
        )
    total = sum(level_sizes)
    check(
        total == number,
        lambda: f"{op}: level_sizes must add up to the number of {what}, {number}, got {total}",
    )
