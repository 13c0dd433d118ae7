"""Windows cover an image of any size, and each place is one window's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.windows import windows

SIZES = st.integers(1, 200).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(max(0, size - 100), size - 1))
)  # of a window, and its overlap


@given(st.integers(1, 300), st.integers(1, 60), SIZES)
def test_windows_cover_every_pixel_once(height: int, width: int, sizes: tuple[int, int]) -> None:
    size, overlap = sizes
    cover = [(y, x, core.tolist()) for y, x, core in windows(height, width, size, overlap)]
    rows = {(y.start, y.stop, top, bottom) for y, _, (_, top, _, bottom) in cover}
    columns = {(x.start, x.stop, left, right) for _, x, (left, _, right, _) in cover}
    assert len(cover) == len(rows) * len(columns)  # a grid: what holds on both axes holds for all
    for length, parts in ((height, rows), (width, columns)):
        owned: list[int] = []
        for start, stop, low, high in parts:
            assert 0 <= start < stop <= length and stop - start <= size
            own = [place for place in range(length) if low <= place < high]
            owned += own
            # What a window answers for lies in it, half an overlap from its inner edges.
            assert min(own, default=stop) >= start + (overlap // 2 if start else 0)
            assert max(own, default=0) < stop - (overlap // 2 if stop < length else 0)
        assert sorted(owned) == list(range(length))


@pytest.mark.parametrize(("size", "overlap"), [(100, 128), (128, 128), (0, 0), (64, -1)])
def test_an_overlap_is_smaller_than_its_window(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=r"^window(_overlap)? must be a whole number .*got -?\d+$"):
        list(windows(400, 400, size, overlap))
