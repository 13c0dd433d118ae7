"""Overlapping windows that cover a large image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .ranges import check, whole


def windows(
    height: int, width: int, size: int, overlap: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Windows of at most size x size that cover an image and overlap by at least `overlap` pixels.

    Each comes with the part of the image that it alone answers for, as a box (4,): the borders lie
    in the middle of the overlaps, so that an object at a window's edge is left to the neighbour
    that sees all of it.

    Raises:
        ValueError: the overlap is not smaller than the size.
    """
    check("window", size, whole(1))
    check("window_overlap", overlap, whole(0, size - 1))
    rows, columns = _cover(height, size, overlap), _cover(width, size, overlap)
    for top, bottom, core_top, core_bottom in rows:
        for left, right, core_left, core_right in columns:
            core = torch.tensor([core_left, core_top, core_right, core_bottom])
            yield slice(top, bottom), slice(left, right), core


def _cover(length: int, size: int, overlap: int) -> list[tuple[int, int, float, float]]:
    if length <= size:
        return [(0, length, -math.inf, math.inf)]
    steps = math.ceil((length - size) / (size - overlap))
    # Whole numbers, evenly apart: no step is longer than size - overlap.
    starts = [i * (length - size) // steps for i in range(steps + 1)]
    borders = [(a + size + b) / 2 for a, b in itertools.pairwise(starts)]
    ends = [start + size for start in starts]
    return list(zip(starts, ends, [-math.inf, *borders], [*borders, math.inf], strict=True))
