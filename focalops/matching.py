"""Which ground-truth box each anchor shall learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from focalops import reference
from focalops._ops import call, check, check_same_device, compute_dtype, ops, runs_reference
from focalops.boxes import as_coordinates, check_coordinates, check_like


def match_anchors(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """Matches the anchors with the ground-truth boxes of each image of a batch.

    An anchor gets the box that it overlaps most (of equal ones the first): its index if their IoU is at least
    ``fg_iou_threshold``, -1 (background) if it is below ``bg_iou_threshold``, -2 (neither) in between. With
    ``allow_low_quality_matches`` an anchor that no other anchor beats for some box gets its own best box whatever their
    IoU is, if it is above 0. These are the rules of torchvision's ``Matcher``, except that there a box that overlaps no
    anchor makes all of them foreground.

    Args:
        anchors: ``(A, 4)``, the same for all images.
        gt_boxes: a list with ``(M_i, 4)`` for each image, or padded to ``(B, M, 4)``.
        fg_iou_threshold: the least IoU of a foreground match.
        bg_iou_threshold: the IoU below which an anchor is background, at most ``fg_iou_threshold``.
        allow_low_quality_matches: give every box that overlaps an anchor at least one.
        counts: with padded boxes, ``(B,)``, int32 or int64: how many of each image's boxes there are; without it, all.
            A count outside [0, M] is an error on the CPU; on CUDA, where looking would stop the device, the nearest.

    Returns:
        int64 ``(B, A)``: the index of a box of the image, -1 or -2.

    In an image without boxes every anchor is background. A NaN coordinate overlaps nothing. The IoUs are those of
    :func:`box_iou`, in float32 (float64 if an argument is float64), and so are the thresholds that they are compared with.
    No gradient is registered. All images are matched at once in O(B A) memory; no matrix of IoUs is made, and the host
    does not wait for the device. With padded boxes and counts the call can be captured in a CUDA graph.

    >>> matches = match_anchors(anchors, [target["boxes"] for target in targets])
    """
    if runs_reference(anchors):
        return reference.match_anchors(
            anchors,
            gt_boxes,
            fg_iou_threshold,
            bg_iou_threshold,
            allow_low_quality_matches,
            counts=counts,
        )
    if not isinstance(gt_boxes, Tensor):
        if counts is not None:
            raise ValueError("counts must be None unless gt_boxes is one padded tensor")
        gt_boxes, counts = _pad(anchors, gt_boxes)
    dtype = compute_dtype(torch.promote_types(anchors.dtype, gt_boxes.dtype))
    return call(
        ops.match_anchors,
        as_coordinates(anchors.detach(), dtype),
        as_coordinates(gt_boxes.detach(), dtype),
        counts,
        fg_iou_threshold,
        bg_iou_threshold,
        allow_low_quality_matches,
    )


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


def _pad(anchors: Tensor, gt_boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded boxes and their counts, without waiting for the device."""
    for i, boxes in enumerate(gt_boxes):
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"gt_boxes[{i}] must have shape (M, 4), got {tuple(boxes.shape)}")
        check_same_device("match_anchors", f"gt_boxes[{i}]", boxes, "anchors", anchors)
    if len(gt_boxes) == 0:
        return anchors.new_empty((0, 0, 4)), anchors.new_empty(0, dtype=torch.int64)
    is_pinned = anchors.device.type == "cuda" and not torch.compiler.is_compiling()
    counts = torch.tensor([len(boxes) for boxes in gt_boxes], pin_memory=is_pinned)
    padded = pad_sequence(list(gt_boxes), batch_first=True)
    return padded, counts.to(anchors.device, non_blocking=True)


# ---- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("focalops::match_anchors")
def _(
    anchors: Tensor,
    gt_boxes: Tensor,
    counts: Tensor | None,
    fg_iou_threshold: float,
    bg_iou_threshold: float,
    allow_low_quality_matches: bool,
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
    check(
        bg_iou_threshold <= fg_iou_threshold,
        lambda: (
            f"{op}: bg_iou_threshold must be <= fg_iou_threshold, {fg_iou_threshold:g}, "
            f"got {bg_iou_threshold:g}"
        ),
    )
    return anchors.new_empty((num_images, anchors.shape[0]), dtype=torch.int64)
