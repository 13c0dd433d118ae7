"""Overlapping windows that cover a large image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def windows(
    height: int, width: int, size: int, overlap: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Windows of at most size x size that cover an image and overlap by at least `overlap` pixels.

    Each comes with the part of the image that it alone answers for, as a box (4,): the borders lie
    in the middle of the overlaps, so that an object at a window's edge is left to the neighbour
    that sees all of it.
    """
    rows, columns = _cover(height, size, overlap), _cover(width, size, overlap)
    for top, bottom, core_top, core_bottom in rows:
        for left, right, core_left, core_right in columns:
            core = torch.tensor([core_left, core_top, core_right, core_bottom])
            yield slice(top, bottom), slice(left, right), core


def _cover(length: int, size: int, overlap: int) -> list[tuple[int, int, float, float]]:
    count = max(1, math.ceil((length - overlap) / (size - overlap)))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)] if count > 1 else [0]
    ends = [min(start + size, length) for start in starts]
    borders = [(end + start) / 2 for end, start in zip(ends[:-1], starts[1:], strict=True)]
    return list(zip(starts, ends, [-math.inf, *borders], [*borders, math.inf], strict=True))
