"""Lists of one tensor an image, padded to one tensor without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from focalops._arguments import on_device
from focalops._coordinates import check_like
from focalops._ops import check, check_same_device


def pad_boxes(
    op: str, anchors: Tensor, gt_boxes: Sequence[Tensor], like_name: str = "anchors"
) -> tuple[Tensor, Tensor | None]:
    """Padded boxes, in a dtype that holds those of all images, and their counts; None where all have as many."""
    for i, boxes in enumerate(gt_boxes):
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"gt_boxes[{i}] must have shape (M, 4), got {tuple(boxes.shape)}")
        check_same_device(op, f"gt_boxes[{i}]", boxes, like_name, anchors)
    if len(gt_boxes) == 0:
        return anchors.new_empty((0, 0, 4)), anchors.new_empty(0, dtype=torch.int64)
    gt_boxes = in_one_dtype(gt_boxes)
    counts = [boxes.shape[0] for boxes in gt_boxes]
    # A compiled graph is not made anew where images that had as many boxes have no longer.
    if not torch.compiler.is_compiling() and counts.count(counts[0]) == len(counts):
        return torch.stack(gt_boxes), None
    padded = pad_sequence(gt_boxes, batch_first=True)
    return padded, on_device(torch.tensor(counts), anchors.device)


def in_one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """pad_sequence takes the first tensor's, to which it would round those of the others."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, dtypes)
    return [tensor.to(dtype) for tensor in tensors]


def pad_crowd(
    op: str, crowd: Sequence[Tensor] | Tensor, gt_boxes: Sequence[Tensor] | Tensor
) -> Tensor:
    if isinstance(crowd, Tensor):
        return crowd
    if len(crowd) != len(gt_boxes):
        raise ValueError(
            f"crowd must have one entry for each of the {len(gt_boxes)} images, got {len(crowd)}"
        )
    for i, (flags, boxes) in enumerate(zip(crowd, gt_boxes, strict=True)):
        if flags.dtype != torch.bool or flags.shape != boxes.shape[:1]:
            raise ValueError(
                f"crowd[{i}] must be bool of shape {tuple(boxes.shape[:1])}, one for each box, "
                f"got {flags.dtype} of shape {tuple(flags.shape)}"
            )
        if len(flags):
            check_same_device(op, f"crowd[{i}]", flags, "gt_boxes", boxes)
    if len(crowd) == 0:
        return torch.zeros((0, 0), dtype=torch.bool)
    return pad_sequence(list(crowd), batch_first=True)


def check_gt_boxes(
    op: str, gt_boxes: Tensor, counts: Tensor | None, like_name: str, like: Tensor
) -> None:
    """Padded ones."""
    check_like(op, "gt_boxes", gt_boxes, like_name, like)
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
        check_same_device(op, "counts", counts, like_name, like)
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


def check_of_boxes(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    gt_boxes: Tensor,
    like_name: str,
    like: Tensor,
) -> None:
    """One a padded box, of the dtype."""
    shape = tuple(gt_boxes.shape[:2])
    check_same_device(op, name, tensor, like_name, like)
    check(
        tensor.dtype == dtype and tuple(tensor.shape) == shape,
        lambda: (
            f"{op}: {name} must be {dtype} of shape {shape}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        ),
    )


def check_labels(name: str, labels: Tensor) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")


def pad_labels(op: str, gt_labels: Sequence[Tensor], like: Tensor, like_name: str) -> Tensor:
    """int64 (B, M), -1 where an image has none. Of ``like`` each image has a row."""
    if len(gt_labels) != len(like):
        raise ValueError(
            f"gt_labels must have one entry for each of the {len(like)} images, got {len(gt_labels)}"
        )
    for i, labels in enumerate(gt_labels):
        check_labels(f"gt_labels[{i}]", labels)
        if labels.dim() != 1:
            raise ValueError(f"gt_labels[{i}] must have shape (M,), got {tuple(labels.shape)}")
        check_same_device(op, f"gt_labels[{i}]", labels, like_name, like)
    if len(gt_labels) == 0:
        return like.new_empty((0, 0), dtype=torch.int64)
    in_int64 = [labels.to(torch.int64) for labels in gt_labels]
    return pad_sequence(in_int64, batch_first=True, padding_value=-1)
