"""The drawn shapes with a long tail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from models_fixtures import contents

from models.data import CocoDataset, open_data
from models.data.shapes import CLASSES, COLORS, EXPONENT, SIDE, apportioned, draw_shapes
from models.measures import thirds
from models.recipes import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCALOPS_CACHE", str(cache))
        open_data("shapes", "train")
    assert [path.name for path in cache.iterdir()] == ["shapes"]
    return cache / "shapes"


def counts(data: CocoDataset) -> list[int]:
    found = Counter(a["category_id"] for a in data.coco.anns.values())
    return sorted((found[id] for id in data.categories), reverse=True)


def test_frequencies_follow_zipf_s_law(folder: Path) -> None:
    data = CocoDataset(folder, "train")
    assert len(data) == 600 and [*data.categories.values()] == CLASSES
    objects = counts(data)
    assert sum(objects) == 1800 and min(objects) == 9
    for rank, count in enumerate(objects, start=1):
        share = rank**-EXPONENT / sum(r**-EXPONENT for r in range(1, 31))
        assert abs(count - 1800 * share) < 1
    rare = thirds(data.class_frequencies())["rare"]
    below = RECIPES["shapes"].model.rare_below
    assert {*rare} == {n for n, share in enumerate(data.class_frequencies()) if share < below}
    assert len(rare) == 10 and RECIPES["shapes"].model.num_classes == 30


def test_all_classes_are_evaluated_alike(folder: Path) -> None:
    data = CocoDataset(folder, "val")
    assert len(data) == 210 and counts(data) == [21] * 30


def test_boxes_are_tight_and_apart(folder: Path) -> None:
    data = CocoDataset(folder, "val")
    for n in range(20):
        image, target = data[n]
        assert image.shape == (3, SIDE, SIDE)
        taken = np.zeros((SIDE, SIDE), dtype=int)
        boxes, labels = target["boxes"].int().tolist(), target["labels"].tolist()
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE and max(x2 - x1, y2 - y1) >= 15
            taken[y1:y2, x1:x2] += 1
            shape, color = divmod(label, len(COLORS))
            if shape in (0, 2):  # the middle of discs and squares is theirs
                y, x = (y1 + y2) // 2, (x1 + x2) // 2
                middle = image[:, y - 2 : y + 3, x - 2 : x + 3].float().mean(dim=(1, 2)).numpy()
                distance = [np.abs(middle - np.array(c)).sum() for c in COLORS.values()]
                assert int(np.argmin(distance)) == color
        assert taken.max() == 1


def test_they_are_always_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw_shapes(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_apportioned() -> None:
    assert apportioned(np.array([3.0, 2.0, 1.0]), 10).tolist() == [5, 3, 2]
    assert apportioned(np.ones(3), 7).tolist() == [3, 2, 2]
