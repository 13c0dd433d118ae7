"""What the ops of boxes share of coordinates: dtypes, broadcasting, clipping, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from focalops._ops import check, check_same_device


def coordinates_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """In which they are computed together."""
    is_double = a.dtype == torch.float64 or b.dtype == torch.float64
    return torch.float64 if is_double else torch.float32


def as_coordinates(boxes: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype that they are computed in. What holds no coordinates stays, for the op to refuse."""
    return boxes if boxes.dtype in (dtype, torch.bool) else boxes.to(dtype)


def clip_to_images(boxes: Tensor, sizes: Tensor) -> Tensor:  # (B, ..., 4), (B, 2) -> (B, ..., 4)
    limit = sizes.to(boxes.dtype).flip(-1).repeat(1, 2)  # width, height, width, height
    limit = limit.reshape(len(sizes), *(1,) * (boxes.dim() - 2), 4)
    # Unlike that of torch.clamp with tensors, the gradient is 0 at a bound, as in the op.
    is_inside = (boxes > 0) & (boxes < limit)
    return boxes.where(is_inside, boxes.detach().clamp(torch.zeros_like(limit), limit))


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As views. Shapes that do not fit stay, for the op to refuse."""
    if a.shape == b.shape or a.shape[-1:] != (4,) or b.shape[-1:] != (4,):
        return a, b
    return torch.broadcast_tensors(a, b) if shapes_broadcast(a.shape, b.shape) else (a, b)


def shapes_broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(a[::-1], b[::-1], strict=False))


def check_coordinates(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.dtype in (torch.float32, torch.float64),
        lambda: f"{op}: {name} must be float32 or float64, got {tensor.dtype}",
    )


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check_same_device(op, name, tensor, like_name, like)
    check(
        tensor.dtype == like.dtype,
        lambda: f"{op}: {name} must be {like.dtype} like {like_name}, got {tensor.dtype}",
    )


def check_rows_of_4(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.shape[-1:] == (4,),
        lambda: f"{op}: {name} must have shape (..., 4), got {tuple(tensor.shape)}",
    )
