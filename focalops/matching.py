"""Which ground-truth box each anchor shall learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from focalops import reference
from focalops._ops import call, check, check_same_device, compute_dtype, ops, runs_reference
from focalops.boxes import as_coordinates, check_coordinates, check_like

RULES = ("torchvision", "detectron2", "mmdet")


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
      equally good anchors.

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
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if rule != "mmdet" and (min_pos_iou != 0 or not gt_max_assign_all):
        raise ValueError(
            f"min_pos_iou and gt_max_assign_all must be left alone unless rule is 'mmdet', got {rule!r}"
        )
    if runs_reference(anchors):
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
            image_sizes=image_sizes,
        )
    if not isinstance(gt_boxes, Tensor):
        if counts is not None:
            raise ValueError("counts must be None unless gt_boxes is one padded tensor")
        gt_boxes, counts = pad_boxes("match_anchors", anchors, gt_boxes)
    if crowd is not None and not isinstance(crowd, Tensor):
        crowd = (
            pad_sequence(list(crowd), batch_first=True)
            if len(crowd)
            else gt_boxes.new_empty((0, 0), dtype=torch.bool)
        )
    roles = None
    if crowd is not None or image_sizes is not None:
        roles = _roles(gt_boxes, crowd, image_sizes)
    low_quality = 0
    if allow_low_quality_matches:
        low_quality = 1 if rule != "mmdet" else 2 if gt_max_assign_all else 3
    dtype = compute_dtype(torch.promote_types(anchors.dtype, gt_boxes.dtype))
    return call(
        ops.match_anchors,
        as_coordinates(anchors.detach(), dtype),
        as_coordinates(gt_boxes.detach(), dtype),
        counts,
        fg_iou_threshold,
        bg_iou_threshold,
        low_quality,
        min_pos_iou,
        roles,
        crowd_threshold,
    )


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
    if not isinstance(gt_boxes, Tensor):
        if len(gt_boxes) == 0:
            return torch.zeros(0, dtype=torch.int64)
        gt_boxes, counts = pad_boxes("count_degenerate_boxes", gt_boxes[0], gt_boxes)
    is_degenerate = _is_degenerate(gt_boxes, image_sizes)
    if counts is not None:
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
        if not isinstance(image_sizes, Tensor):
            image_sizes = on_device(torch.tensor(image_sizes), gt_boxes.device).reshape(-1, 2)
        if image_sizes.shape != (len(gt_boxes), 2):
            raise ValueError(
                f"image_sizes must have shape ({len(gt_boxes)}, 2), one for each image, "
                f"got {tuple(image_sizes.shape)}"
            )
        height, width = image_sizes.unsqueeze(2).unbind(1)  # [B, 1] each
        is_sound = is_sound & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
    return ~is_sound


def _roles(
    gt_boxes: Tensor,  # [B, M, 4]
    crowd: Tensor | None,
    image_sizes: Sequence[Sequence[float]] | Tensor | None,
) -> Tensor:
    """uint8 [B, M]: 0 an object, 1 a crowd, 2 nothing."""
    shape = tuple(gt_boxes.shape[:2])
    roles = torch.zeros(shape, dtype=torch.uint8, device=gt_boxes.device)
    if crowd is not None:
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
        int64 ``(B, A)``: the label of the matched box, ``num_classes`` or ``ignore_index``.

    >>> targets = class_index_targets(matches, [target["labels"] for target in targets], num_classes=80)
    """
    if not isinstance(gt_labels, Tensor):
        if len(gt_labels) != len(matches):
            raise ValueError(
                f"gt_labels must have one entry for each of the {len(matches)} images, got {len(gt_labels)}"
            )
        gt_labels = (
            pad_sequence(list(gt_labels), batch_first=True)
            if len(gt_labels)
            else matches.new_empty((0, 0))
        )
    if gt_labels.dim() != 2 or gt_labels.shape[0] != matches.shape[0]:
        raise ValueError(
            f"gt_labels must be a list of (M_i,) or have shape ({matches.shape[0]}, M), "
            f"got {tuple(gt_labels.shape)}"
        )
    # Column 0 is the target of background (-1); those of the boxes follow. What is ignored (-2) takes background's first.
    labels = torch.nn.functional.pad(gt_labels.to(torch.int64), (1, 0), value=num_classes)
    targets = labels.gather(1, (matches + 1).clamp(min=0))
    return targets.masked_fill(matches == -2, ignore_index)


def pad_boxes(op: str, anchors: Tensor, gt_boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded boxes and their counts, without waiting for the device."""
    for i, boxes in enumerate(gt_boxes):
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"gt_boxes[{i}] must have shape (M, 4), got {tuple(boxes.shape)}")
        check_same_device(op, f"gt_boxes[{i}]", boxes, "anchors", anchors)
    if len(gt_boxes) == 0:
        return anchors.new_empty((0, 0, 4)), anchors.new_empty(0, dtype=torch.int64)
    counts = torch.tensor([len(boxes) for boxes in gt_boxes])
    return pad_sequence(list(gt_boxes), batch_first=True), on_device(counts, anchors.device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU, copied without waiting."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::match_anchors")
def _(
    anchors: Tensor,
    gt_boxes: Tensor,
    counts: Tensor | None,
    fg_iou_threshold: float,
    bg_iou_threshold: float,
    low_quality: int,
    min_pos_iou: float = 0,
    roles: Tensor | None = None,
    crowd_threshold: float = 0,
) -> Tensor:
    op = "match_anchors"
    check_coordinates(op, "anchors", anchors)
    check(
        anchors.dim() == 2 and anchors.shape[1] == 4,
        lambda: f"{op}: anchors must have shape (A, 4), got {tuple(anchors.shape)}",
    )
    check_like(op, "gt_boxes", gt_boxes, "anchors", anchors)
    check(
        gt_boxes.dim() == 3 and gt_boxes.shape[2] == 4,
        lambda: (
            f"{op}: gt_boxes must be a list of (M_i, 4) or have shape (B, M, 4), "
            f"got {tuple(gt_boxes.shape)}"
        ),
    )
    num_images, most = gt_boxes.shape[:2]
    check(
        most < 2**31,
        lambda: f"{op}: gt_boxes must have fewer than 2^31 boxes an image, got {most}",
    )
    if counts is not None:
        dtype, shape = counts.dtype, tuple(counts.shape)
        check_same_device(op, "counts", counts, "anchors", anchors)
        check(
            dtype in (torch.int32, torch.int64),
            lambda: f"{op}: counts must be int32 or int64, got {dtype}",
        )
        check(
            shape == (num_images,),
            lambda: (
                f"{op}: counts must have shape ({num_images},), one for each image, got {shape}"
            ),
        )
    if roles is not None:
        role_dtype, role_shape = roles.dtype, tuple(roles.shape)
        check_same_device(op, "roles", roles, "anchors", anchors)
        check(
            role_dtype == torch.uint8 and role_shape == (num_images, most),
            lambda: (
                f"{op}: roles must be torch.uint8 of shape ({num_images}, {most}), "
                f"got {role_dtype} of shape {role_shape}"
            ),
        )
    check(
        bg_iou_threshold <= fg_iou_threshold,
        lambda: (
            f"{op}: bg_iou_threshold must be <= fg_iou_threshold, {fg_iou_threshold:g}, "
            f"got {bg_iou_threshold:g}"
        ),
    )
    check(0 <= low_quality <= 3, lambda: f"{op}: low_quality must lie in [0, 3], got {low_quality}")
    check(
        crowd_threshold >= 0,
        lambda: f"{op}: crowd_threshold must be >= 0, got {crowd_threshold:g}",
    )
    return anchors.new_empty((num_images, anchors.shape[0]), dtype=torch.int64)
