"""Pictures: bounded, and legible on green, at every size and with any name."""

from __future__ import annotations

import colorsys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from models import draw


def detections(
    boxes: list[list[float]], labels: list[int] | None = None
) -> dict[str, torch.Tensor]:
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.linspace(0.99, 0.5, count),
        "labels": torch.tensor(labels or [0] * count),
    }


def grass(height: int, width: int) -> torch.Tensor:
    color = torch.tensor([70, 130, 50], dtype=torch.uint8)
    return color[:, None, None].expand(3, height, width).contiguous()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    "shape", [(64, 64), (1, 1), (3000, 2), (2, 3000), (5000, 4000), (900, 1400)]
)
def test_pictures_are_bounded(shape: tuple[int, int], tmp_path: Path) -> None:
    image, found = grass(*shape), detections([[0, 0, shape[1], shape[0]]])
    draw.draw_detections(tmp_path / "a.png", "a", image, found, ["tree"])
    draw.draw_comparison(tmp_path / "b.png", "b", image, found, found)
    for name, panels in (("a.png", 1), ("b.png", 2)):
        height, width, _ = pixels(tmp_path / name).shape
        assert height < draw.LARGEST + 150 and width <= panels * (draw.LARGEST + 40)
        assert max(height, width) >= draw.SMALLEST
    assert draw.draw_tile("a", image, found, ["tree"]).size == (draw.TILE, draw.TILE)
    assert draw.is_ours(tmp_path / "a.png")


def test_no_colour_is_a_green() -> None:
    for color in {*draw.PALETTE, draw.TRUTH, draw.CORRECT, draw.WRONG, draw.MISSED}:
        red, green, blue = (value / 255 for value in ImageColor.getrgb(color))
        hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        assert lightness >= 0.5 and (saturation == 0 or not 60 < 360 * hue < 180), color


@pytest.mark.parametrize("label", range(len(draw.PALETTE)))
@pytest.mark.parametrize("shape", [(64, 64), (1500, 1500)])
def test_lines_have_a_dark_outline(shape: tuple[int, int], label: int, tmp_path: Path) -> None:
    """Across each side of a box: ground, dark, two pixels or more of the colour, dark, ground; in tiles too."""
    height, width = shape
    found = detections([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], [label])
    names = [f"name {i}" for i in range(len(draw.PALETTE))]
    draw.draw_detections(tmp_path / "a.png", "a", grass(*shape), found, names)
    sheet = tmp_path / "sheet.png"
    draw.draw_contact_sheet(sheet, [draw.draw_tile("a", grass(*shape), found, names)])
    color, halo = (ImageColor.getrgb(c) for c in (draw.PALETTE[label], draw.HALO))
    for path in (tmp_path / "a.png", sheet):
        picture = pixels(path)
        middle = picture[picture.shape[0] // 2]  # a row across the box
        kinds = [
            "C"
            if tuple(p) == color
            else "H"
            if tuple(p) == halo
            else "G"
            if tuple(p) == (70, 130, 50)
            else "."
            for p in middle
        ]
        runs = "".join(k for i, k in enumerate(kinds) if not i or kinds[i - 1] != k)
        assert "GHCHGHCHG" in runs, runs
        assert kinds.count("C") >= 4


def test_scores_are_written_and_cover_each_other_nowhere(tmp_path: Path) -> None:
    image = grass(64, 64)
    bare, marked = detections([]), detections([[4, 4, 60, 60], [5, 5, 60, 60], [6, 6, 60, 60]])
    one = {name: value[:1] for name, value in marked.items()}
    tiles = [
        np.asarray(draw.draw_tile("", image, d, ["t"])).astype(int) for d in (bare, one, marked)
    ]
    text = draw.Panel.of(image, 368, 368)
    text.draw([draw.Mark([4, 4, 60, 60], "#ffffff", ".99")])
    line = draw.Panel.of(image, 368, 368)
    line.draw([draw.Mark([4, 4, 60, 60], "#ffffff")])
    written = (np.asarray(text.picture) != np.asarray(line.picture)).any(axis=2)
    assert 60 < written.sum() < 600
    rows, columns = np.where(written)
    assert np.ptp(rows) >= 8 and np.ptp(columns) >= 12  # of letters that can be read
    assert (tiles[0] != tiles[1]).any() and (tiles[1] != tiles[2]).any()


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    names = [
        "x" * 300,
        "дерево",
        "樹木",
        "",
        "_a$b^$",
        "two\nlines",
        "\udcff",
        *(f"class {i}" for i in range(200)),
    ]
    boxes = [[float(i % 20), float(i // 20), 64.0, 64.0] for i in range(len(names))]
    found = detections(boxes, list(range(len(names))))
    rows = [{"name": n, "AP50": 0.5, "precision": [0.5] * 101} for n in names[:7]]
    title = "\\frac$ " * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.draw_detections(tmp_path / "a.png", title, grass(64, 64), found, names)
        draw.draw_tile(title, grass(64, 64), found, names)
        draw.draw_comparison(tmp_path / "b.png", title, grass(64, 64), found, found)
        draw.draw_curves(tmp_path / "c.png", title, rows)
    assert draw._writable("樹a") == "\\u6a39a"


def test_only_what_we_made_is_ours(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    for name in ("photo.png", "text.png", "missing.png"):
        assert not draw.is_ours(tmp_path / name)


def test_a_box_of_the_whole_image_can_be_seen(tmp_path: Path) -> None:
    """Its line lies inside the picture, where half of it would be cut off."""
    draw.draw_detections(
        tmp_path / "a.png", "a", grass(64, 64), detections([[0, 0, 64, 64]]), ["tree"]
    )
    color = np.array(ImageColor.getrgb(draw.PALETTE[0]))
    panel = draw.Panel.of(grass(64, 64))
    of_color = (pixels(tmp_path / "a.png") == color).all(axis=2)
    longest = of_color.sum(axis=1) > 0.8 * panel.picture.width
    assert longest.sum() == 2 * panel.line  # above and below
