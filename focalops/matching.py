"""Which ground-truth box each anchor shall learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    as_sizes,
    choice,
    flag,
    host_sees,
    number,
    require_tensors,
    whole,
)
from focalops._coordinates import (
    as_coordinates,
    check_coordinates,
    coordinates_dtype,
)
from focalops._ops import (
    call,
    check,
    check_same_device,
    compute_dtype,
    ops,
    require_tensor,
    runs_reference,
)
from focalops._padding import (
    check_gt_boxes,
    check_labels,
    check_of_boxes,
    pad_boxes,
    pad_crowd,
    pad_labels,
)

RULES = ("torchvision", "detectron2", "mmdet", "efficientdet")


def match_anchors(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    counts: Tensor | None = None,
    rule: str = "torchvision",
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    crowd: Sequence[Tensor] | Tensor | None = None,
    crowd_threshold: float = 0.5,
    ignore_wrt_candidates: bool = True,
    image_sizes: Sequence[Sequence[float]] | Tensor | None = None,
) -> Tensor:
    """Matches the anchors with the ground-truth boxes of each image of a batch.

    An anchor gets the box that it overlaps most (of equal ones the first): its index if their IoU is at least
    ``fg_iou_threshold``, -1 (background) if it is below ``bg_iou_threshold``, -2 (neither) in between. With
    ``allow_low_quality_matches`` an anchor that no other anchor beats for some box is foreground whatever their IoU is, if
    it is above 0. The rule says of which box:

    - ``"torchvision"`` and ``"detectron2"``, whose Matchers agree: its own best box;
    - ``"mmdet"``, the MaxIoUAssigner: the last box that it is best for, even where it has a better one of its own, of the
      boxes whose best IoU is at least ``min_pos_iou``; with ``gt_max_assign_all=False`` a box takes only the first of its
      equally good anchors;
    - ``"efficientdet"``, automl's and effdet's: every box takes the first of its equally good anchors; of boxes that claim the
      same one the first has it.

    Unlike there, a box that overlaps no anchor does not make all of them foreground.

    Args:
        anchors: ``(A, 4)``, the same for all images.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        fg_iou_threshold: the least IoU of a foreground match.
        bg_iou_threshold: the IoU below which an anchor is background, at most ``fg_iou_threshold``.
        allow_low_quality_matches: give every box that overlaps an anchor at least one.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU; on CUDA, where looking would stop the device, the nearest.
        rule: by which low-quality matches are given.
        min_pos_iou: of the rule ``"mmdet"``.
        gt_max_assign_all: of the rule ``"mmdet"``.
        crowd: bool, a list with ``(M_i,)`` for each image or padded to ``(B, M)``: boxes around crowds. They match nothing;
            anchors inside, and be it of an object's own, are -2 and take no part in the matching, as in mmdet.
        crowd_threshold: an anchor is inside if more than this share of its area is.
        ignore_wrt_candidates: else, as in mmdet without it, if more than this share of the crowd's area is in the anchor.
        image_sizes: height and width of each image, ``(B, 2)`` or a sequence: boxes that lie outside match nothing.
            :func:`count_degenerate_boxes` tells how many.

    Returns:
        int64 ``(B, A)``: the index of a box of the image, -1 or -2.

    In an image without boxes every anchor is background. A NaN coordinate overlaps nothing. The IoUs are those of
    :func:`box_iou`, in float32 (float64 if an argument is float64), and so are the thresholds that they are compared with.
    No gradient is registered. All images are matched at once in O(B A) memory; no matrix of IoUs is made, and the host
    does not wait for the device. With padded boxes and counts the call can be captured in a CUDA graph.

    >>> matches = match_anchors(anchors, [target["boxes"] for target in targets])
    """
    min_pos_iou = number("min_pos_iou", min_pos_iou)
    low_quality = _low_quality(rule, allow_low_quality_matches, min_pos_iou, gt_max_assign_all)
    fg_iou_threshold = number("fg_iou_threshold", fg_iou_threshold)
    bg_iou_threshold = number("bg_iou_threshold", bg_iou_threshold)
    crowd_threshold = number("crowd_threshold", crowd_threshold)
    ignore_wrt_candidates = flag("ignore_wrt_candidates", ignore_wrt_candidates)
    require_tensor("anchors", anchors)
    require_tensors("gt_boxes", gt_boxes)
    if counts is not None:
        require_tensor("counts", counts)
    if crowd is not None:
        require_tensors("crowd", crowd)
    if image_sizes is not None:
        image_sizes = _as_sizes(image_sizes, anchors)
    if crowd is not None:
        crowd = pad_crowd("match_anchors", crowd, gt_boxes)
    if not isinstance(gt_boxes, Tensor):
        if counts is not None:
            raise ValueError("counts must be None unless gt_boxes is one padded tensor")
        gt_boxes, counts = pad_boxes("match_anchors", anchors, gt_boxes)
    roles = None
    if crowd is not None or image_sizes is not None:
        _check_padded(gt_boxes)
        roles = _roles(gt_boxes, crowd, image_sizes)
    dtype = coordinates_dtype(anchors, gt_boxes)
    anchors = as_coordinates(anchors.detach(), dtype)
    gt_boxes = as_coordinates(gt_boxes.detach(), dtype)
    arguments = (
        *(anchors, gt_boxes, counts, fg_iou_threshold, bg_iou_threshold),
        *(low_quality, min_pos_iou, roles, crowd_threshold, ignore_wrt_candidates),
    )
    if runs_reference(anchors):
        _check(*arguments)
        return reference.match_anchors(
            anchors,
            gt_boxes,
            fg_iou_threshold,
            bg_iou_threshold,
            allow_low_quality_matches,
            counts=counts,
            rule=rule,
            min_pos_iou=min_pos_iou,
            gt_max_assign_all=gt_max_assign_all,
            crowd=crowd,
            crowd_threshold=crowd_threshold,
            ignore_wrt_candidates=ignore_wrt_candidates,
            image_sizes=image_sizes,
        )
    return call(ops.match_anchors, *arguments)


def _low_quality(rule: str, allowed: bool, min_pos_iou: float, gt_max_assign_all: bool) -> int:
    """As LowQuality in csrc/matching.h."""
    choice("rule", rule, RULES)
    allowed = flag("allow_low_quality_matches", allowed)
    gt_max_assign_all = flag("gt_max_assign_all", gt_max_assign_all)
    if rule != "mmdet" and (min_pos_iou != 0 or not gt_max_assign_all):
        raise ValueError(
            f"min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got {rule!r}"
        )
    if not allowed:
        return 0
    if rule == "efficientdet":
        return 4
    return 1 if rule != "mmdet" else 2 if gt_max_assign_all else 3


def match_iou_matrix(
    iou: Tensor,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    rule: str = "torchvision",
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
) -> Tensor:
    """Matches by a given matrix of IoUs, or of another measure of how well boxes and anchors fit.

    torchvision's and detectron2's ``Matcher`` and mmdet's ``assign_wrt_overlaps``; the rules are those of
    :func:`match_anchors`, which needs no matrix. A box whose greatest value is not above 0 matches nothing by its low quality.

    Args:
        iou: ``(..., M, A)``, floating: of each box with each anchor. A NaN and what is below 0 count as 0.
        fg_iou_threshold: as in :func:`match_anchors`, and so are the others.

    Returns:
        int64 ``(..., A)``: the index of a box, -1 or -2.

    Plain PyTorch on every device; nothing waits for the device, and no gradient is registered. Memory and time O(M A).

    >>> matches = match_iou_matrix(box_iou(gt_boxes, anchors))
    """
    min_pos_iou = number("min_pos_iou", min_pos_iou)
    low_quality = _low_quality(rule, allow_low_quality_matches, min_pos_iou, gt_max_assign_all)
    fg_iou_threshold = number("fg_iou_threshold", fg_iou_threshold)
    bg_iou_threshold = number("bg_iou_threshold", bg_iou_threshold)
    require_tensor("iou", iou)
    if iou.dim() < 2 or not iou.is_floating_point():
        raise ValueError(
            f"iou must be floating and have shape (..., M, A), got {iou.dtype} of shape {tuple(iou.shape)}"
        )
    if not bg_iou_threshold <= fg_iou_threshold:
        raise ValueError(
            f"bg_iou_threshold must be <= fg_iou_threshold, {fg_iou_threshold:g}, "
            f"got {bg_iou_threshold:g}"
        )
    num_boxes, num_anchors = iou.shape[-2:]
    if num_boxes == 0 or num_anchors == 0:
        return iou.new_full((*iou.shape[:-2], num_anchors), -1, dtype=torch.int64)
    iou = iou.detach().to(compute_dtype(iou.dtype)).nan_to_num(0).clamp(min=0)
    best, best_box = iou.max(dim=-2)  # of equal boxes the first
    is_foreground = best >= fg_iou_threshold  # in the dtype of the IoUs, as in match_anchors
    matches = torch.where(best < bg_iou_threshold, -1, torch.where(is_foreground, best_box, -2))
    if low_quality == 0:
        return matches
    best_of_box, first_anchor = iou.max(dim=-1, keepdim=True)
    is_best = (iou == best_of_box) & (best_of_box > 0) & (best_of_box >= min_pos_iou)
    if low_quality >= 3:
        is_best &= torch.arange(num_anchors, device=iou.device) == first_anchor
    claimed = best_box
    if low_quality == 4:
        claimed = is_best.to(torch.uint8).argmax(dim=-2)  # the first
    elif low_quality != 1:
        claimed = num_boxes - 1 - is_best.flip(-2).to(torch.uint8).argmax(dim=-2)  # the last
    return torch.where(is_best.any(dim=-2), claimed, matches)


def count_degenerate_boxes(
    gt_boxes: Sequence[Tensor] | Tensor,
    image_sizes: Sequence[Sequence[float]] | Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """How many boxes of each image can match nothing, because their width or height is not above 0 or they lie outside.

    Args:
        gt_boxes: as in :func:`match_anchors`.
        image_sizes: as in :func:`match_anchors`; without it no box lies outside.
        counts: as in :func:`match_anchors`.

    Returns:
        int64 ``(B,)``, on the device, for which the host does not wait.

    >>> num_skipped += count_degenerate_boxes(gt_boxes, images.image_sizes).sum()
    """
    require_tensors("gt_boxes", gt_boxes)
    if counts is not None:
        require_tensor("counts", counts)
    if not isinstance(gt_boxes, Tensor):
        if counts is not None:
            raise ValueError("counts must be None unless gt_boxes is one padded tensor")
        if len(gt_boxes) == 0:
            return torch.zeros(0, dtype=torch.int64)
        gt_boxes, counts = pad_boxes("count_degenerate_boxes", gt_boxes[0], gt_boxes)
    _check_padded(gt_boxes)
    is_degenerate = _is_degenerate(gt_boxes, image_sizes)
    if counts is not None:
        check_same_device("count_degenerate_boxes", "counts", counts, "gt_boxes", gt_boxes)
        if counts.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"counts must be int32 or int64, got {counts.dtype}")
        if counts.shape != (len(gt_boxes),):
            raise ValueError(
                f"counts must have shape ({len(gt_boxes)},), one for each image, "
                f"got {tuple(counts.shape)}"
            )
        index = torch.arange(gt_boxes.shape[1], device=gt_boxes.device)
        is_degenerate = is_degenerate & (index < counts.unsqueeze(1))
    return is_degenerate.sum(dim=1)


def _is_degenerate(
    gt_boxes: Tensor,  # [B, M, 4]
    image_sizes: Sequence[Sequence[float]] | Tensor | None,
) -> Tensor:  # [B, M]
    x1, y1, x2, y2 = gt_boxes.detach().unbind(-1)
    is_sound = (x2 > x1) & (y2 > y1)
    if image_sizes is not None:
        image_sizes = _as_sizes(image_sizes, gt_boxes)
        if image_sizes.shape != (len(gt_boxes), 2):
            raise ValueError(
                f"image_sizes must have shape ({len(gt_boxes)}, 2), one for each image, "
                f"got {tuple(image_sizes.shape)}"
            )
        check_same_device("match_anchors", "image_sizes", image_sizes, "gt_boxes", gt_boxes)
        height, width = image_sizes.unsqueeze(2).unbind(1)  # [B, 1] each
        is_sound = is_sound & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
    return ~is_sound


def _as_sizes(image_sizes: Any, gt_boxes: Tensor) -> Tensor:
    if not isinstance(image_sizes, Tensor):
        return as_sizes("image_sizes", image_sizes, gt_boxes.device)
    require_tensor("image_sizes", image_sizes)
    return image_sizes


def _check_padded(gt_boxes: Tensor) -> None:
    if gt_boxes.dim() != 3 or gt_boxes.shape[2] != 4:
        raise ValueError(
            "gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), "
            f"got {tuple(gt_boxes.shape)}"
        )


def _roles(
    gt_boxes: Tensor,  # [B, M, 4]
    crowd: Tensor | None,
    image_sizes: Sequence[Sequence[float]] | Tensor | None,
) -> Tensor:
    """uint8 [B, M]: 0 an object, 1 a crowd, 2 nothing."""
    shape = tuple(gt_boxes.shape[:2])
    roles = torch.zeros(shape, dtype=torch.uint8, device=gt_boxes.device)
    if crowd is not None:
        if crowd.numel() == 0:
            crowd = crowd.to(gt_boxes.device)
        check_same_device("match_anchors", "crowd", crowd, "gt_boxes", gt_boxes)
        if crowd.dtype != torch.bool or crowd.shape != shape:
            raise ValueError(
                f"crowd must be bool, a list of (M_i,) or of shape {shape}, "
                f"got {crowd.dtype} of shape {tuple(crowd.shape)}"
            )
        roles = roles.masked_fill(crowd, 1)
    return roles.masked_fill(_is_degenerate(gt_boxes, image_sizes), 2)


def class_index_targets(
    matches: Tensor,
    gt_labels: Sequence[Tensor] | Tensor,
    num_classes: int,
    ignore_index: int = -100,
) -> Tensor:
    """The class-index targets of :func:`sigmoid_focal_loss` for the result of :func:`match_anchors`.

    Args:
        matches: int64 ``(B, A)``.
        gt_labels: a list with ``(M_i,)`` for each image, or padded to ``(B, M)``: integers in ``0..num_classes-1``.
        num_classes: the target of background.
        ignore_index: the target of anchors that are neither foreground nor background.

    Returns:
        int64 ``(B, A)``: the label of the matched box, ``num_classes`` or ``ignore_index``. A match whose label is no class, or
        which has none, is an error on the CPU; on CUDA, where looking would stop the device, a target that is no class
        either, of which the focal losses make NaN.

    >>> targets = class_index_targets(matches, [target["labels"] for target in targets], num_classes=80)
    """
    num_classes = whole("num_classes", num_classes)
    ignore_index = whole("ignore_index", ignore_index)
    if not 0 <= num_classes < 2**30:  # as the losses take them
        raise ValueError(f"num_classes must lie in [0, 2^30), got {num_classes}")
    require_tensor("matches", matches)
    require_tensors("gt_labels", gt_labels)
    if matches.dim() != 2 or matches.dtype != torch.int64:
        raise ValueError(
            "matches must be torch.int64 of shape (B, A), "
            f"got {matches.dtype} of shape {tuple(matches.shape)}"
        )
    num_images = len(matches)
    if isinstance(gt_labels, Tensor):
        check_labels("gt_labels", gt_labels)
        if gt_labels.dim() != 2 or gt_labels.shape[0] != num_images:
            raise ValueError(
                f"gt_labels must be a list of (M_i,) or have shape ({num_images}, M), "
                f"got {tuple(gt_labels.shape)}"
            )
        labels = gt_labels.to(torch.int64)
    else:
        labels = pad_labels("class_index_targets", gt_labels, matches, "matches")
    check_same_device("class_index_targets", "gt_labels", labels, "matches", matches)
    no_class = num_classes + (2 if ignore_index == num_classes + 1 else 1)
    is_class = (labels >= 0) & (labels < num_classes)
    # One row an image: the targets of what is wrong, of -2 and of -1, of the boxes, of what is wrong.
    table = torch.nn.functional.pad(labels.where(is_class, no_class), (3, 1), value=no_class)
    table[:, 1], table[:, 2] = ignore_index, num_classes
    targets = table.gather(1, (matches + 3).clamp_(0, table.shape[1] - 1))
    if host_sees(targets) and (targets == no_class).any():
        _refuse_label(matches, targets == no_class, gt_labels, num_classes)
    return targets


def _refuse_label(
    matches: Tensor, is_wrong: Tensor, gt_labels: Sequence[Tensor] | Tensor, num_classes: int
) -> None:
    image, anchor = is_wrong.nonzero()[0].tolist()
    match, labels = int(matches[image, anchor]), gt_labels[image]
    if -2 <= match < len(labels):
        raise ValueError(
            f"gt_labels[{image}] must lie in [0, {num_classes - 1}], got {labels[match].item()}"
        )
    raise ValueError(
        f"matches[{image}] must lie in [-2, {len(labels) - 1}], "
        f"as gt_labels[{image}] has {len(labels)} labels, got {match}"
    )


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::match_anchors")
def _(anchors: Tensor, gt_boxes: Tensor, *options: Any) -> Tensor:
    _check(anchors, gt_boxes, *options)
    return anchors.new_empty((gt_boxes.shape[0], anchors.shape[0]), dtype=torch.int64)


def _check(
    anchors: Tensor,
    gt_boxes: Tensor,
    counts: Tensor | None,
    fg_iou_threshold: float,
    bg_iou_threshold: float,
    low_quality: int,
    min_pos_iou: float = 0,
    roles: Tensor | None = None,
    crowd_threshold: float = 0,
    ignore_wrt_candidates: bool = True,
) -> None:
    op = "match_anchors"
    check_coordinates(op, "anchors", anchors)
    check(
        anchors.dim() == 2 and anchors.shape[1] == 4,
        lambda: f"{op}: anchors must have shape (A, 4), got {tuple(anchors.shape)}",
    )
    check_gt_boxes(op, gt_boxes, counts, "anchors", anchors)
    if roles is not None:
        check_of_boxes(op, "roles", roles, torch.uint8, gt_boxes, "anchors", anchors)
    check(
        bg_iou_threshold <= fg_iou_threshold,
        lambda: (
            f"{op}: bg_iou_threshold must be <= fg_iou_threshold, {fg_iou_threshold:g}, "
            f"got {bg_iou_threshold:g}"
        ),
    )
    check(0 <= low_quality <= 4, lambda: f"{op}: low_quality must lie in [0, 4], got {low_quality}")
    check(
        crowd_threshold >= 0,
        lambda: f"{op}: crowd_threshold must be >= 0, got {crowd_threshold:g}",
    )
