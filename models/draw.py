"""Pictures of detections, alone or beside the ground truth.

A picture's longer side has SMALLEST to LARGEST pixels whatever the image has, so that boxes and scores can be
read and memory is bounded. Boxes have a dark outline, and no colour is a green: photographs of land are green.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from focalops import box_iou

from .outputs import write_whole
from .structures import Detections

TRUTH, CORRECT, WRONG, MISSED = "#00d5ff", "#ffe119", "#ff4fd8", "#ff6a3d"
PALETTE = (
    *("#ffe119", "#ff4fd8", "#00d5ff", "#ff8c1a", "#ffffff"),
    *("#ff5050", "#b79cff", "#4d9fff", "#ffb8c6", "#d9a066"),
)
HALO = "#101010"
MATCH_IOU = 0.5
DPI = 100
SMALLEST, LARGEST = 900, 2000  # pixels of a picture's longer side
MARGIN = 10  # pixels
TILE = 400  # pixels of a contact sheet's squares
LONGEST_NAME = 24  # characters of a category beside a box
MADE_BY = "focalops predict"  # a PNG's Software, by which predict knows its own pictures
FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def draw_detections(
    path: Path,
    title: str,
    image: Tensor,  # uint8 (3, H, W)
    detections: Detections,
    names: list[str],
    min_score: float = 0.3,
) -> None:
    """One picture, one colour a category."""
    shown = _above(detections, min_score)
    panel = Panel.of(image)
    marks = _marks(shown, names)
    panel.draw(marks)
    counts = torch.bincount(shown["labels"], minlength=len(names)).tolist()
    legend = [
        (_color(label), f"{names[label]} ({count})") for label, count in enumerate(counts) if count
    ]
    heading = f"{title}: {len(marks)} detections with a score above {min_score:g}"
    _save(path, _sheet(heading, [(None, panel.picture)], legend))


def draw_comparison(
    path: Path,
    title: str,
    image: Tensor,  # uint8 (3, H, W)
    detections: Detections,
    truth: dict[str, Tensor],  # "boxes", "labels"
    min_score: float = 0.3,
) -> None:
    """The ground truth on the left, on the right the detections, coloured by right and wrong."""
    shown = _above(detections, min_score)
    correct, found = _match(shown, truth)
    left, right = Panel.of(image), Panel.of(image)
    left.draw([Mark(box, TRUTH) for box in truth["boxes"].tolist()])
    missed = [Mark(box, MISSED, dashed=True) for box in truth["boxes"][~found].tolist()]
    marks = [
        Mark(box, CORRECT if is_right else WRONG, _figure(score))
        for box, score, is_right in zip(
            shown["boxes"].tolist(), shown["scores"].tolist(), correct.tolist(), strict=True
        )
    ]
    right.draw([*marks, *missed])
    panels = [
        (f"ground truth: {len(found)} boxes", left.picture),
        (
            f"detections with a score above {min_score:g}: {int(correct.sum())} right, "
            f"{int((~correct).sum())} wrong, {int((~found).sum())} boxes missed",
            right.picture,
        ),
    ]
    legend = [
        (TRUTH, "ground truth"),
        (CORRECT, f"right (IoU >= {MATCH_IOU:g} with a box not yet found), with its score"),
        (WRONG, "wrong, with its score"),
        (MISSED, "missed (dashed)"),
    ]
    _save(path, _sheet(title, panels, legend))


def draw_tile(
    title: str, image: Tensor, detections: Detections, names: list[str], min_score: float = 0.3
) -> Image.Image:
    """A square of a contact sheet: the detections drawn at its size, the title below."""
    font, caption = _font(12), 12
    side = TILE - 2 * MARGIN - caption
    panel = Panel.of(image, side, side)
    panel.draw(_marks(_above(detections, min_score), names))
    tile = Image.new("RGB", (TILE, TILE), "white")
    picture = panel.picture
    top = (TILE - caption - picture.height) // 2
    tile.paste(picture, ((TILE - picture.width) // 2, top))
    text = _elided(title, TILE - 2 * MARGIN, font)
    ImageDraw.Draw(tile).text((TILE / 2, TILE - 2), text, "black", font, "md")
    return tile


def draw_contact_sheet(path: Path, tiles: list[Image.Image], columns: int = 4) -> None:
    """Tiles in rows; the last row may be short."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * TILE), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * TILE, index // columns * TILE))
    _save(path, sheet)


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that this module made."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == MADE_BY
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


# ---- Boxes ---------------------------------------------------------------------------------------


def _above(detections: Detections, min_score: float) -> Detections:
    keep = detections["scores"] > min_score
    return {name: value[keep] for name, value in detections.items()}


def _match(detections: Detections, truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which detections are right and which boxes found: best score first, each box once."""
    correct = torch.zeros(len(detections["boxes"]), dtype=torch.bool)
    found = torch.zeros(len(truth["boxes"]), dtype=torch.bool)
    if len(correct) and len(found):
        iou = box_iou(detections["boxes"], truth["boxes"])
        iou[detections["labels"][:, None] != truth["labels"][None, :]] = 0
        for index, row in enumerate(iou):
            best = torch.where(found, 0, row).argmax()
            if row[best] >= MATCH_IOU and not found[best]:
                correct[index] = found[best] = True
    return correct, found


@dataclass(frozen=True)
class Mark:
    box: list[float]  # xyxy in pixels of the image
    color: str
    text: str | None = None
    short_text: str | None = None  # where the text finds no room
    dashed: bool = False


def _marks(shown: Detections, names: list[str]) -> list[Mark]:
    """Best first. A box has its score beside it and, if there are several categories, its name."""
    marks = []
    for box, score, label in zip(
        shown["boxes"].tolist(), shown["scores"].tolist(), shown["labels"].tolist(), strict=True
    ):
        score_text = _figure(score)
        full = f"{_shortened_name(names[label])} {score_text}" if len(names) > 1 else score_text
        marks.append(Mark(box, _color(label), full, score_text))
    return marks


def _color(label: int) -> str:
    return PALETTE[label % len(PALETTE)]


def _figure(score: float) -> str:
    return f"{score:.2f}".removeprefix("0")


@dataclass(frozen=True)
class Panel:
    """An image at the size of its picture; line widths and text follow it."""

    picture: Image.Image
    scale: tuple[float, float]  # of x and y
    line: int
    font: ImageFont.FreeTypeFont

    @classmethod
    def of(cls, image: Tensor, smallest: int = SMALLEST, largest: int = LARGEST) -> Panel:
        height, width = image.shape[-2:]
        longest = max(height, width)
        side = min(max(longest, smallest), largest)
        size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
        step = max(1, longest // (2 * side))  # of an image much larger a part of the pixels will do
        pixels = np.ascontiguousarray(image[:, ::step, ::step].permute(1, 2, 0).numpy())
        enlarged = side >= longest
        picture = Image.fromarray(pixels).resize(
            size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR
        )
        scale = (size[0] / width, size[1] / height)
        return cls(picture, scale, max(2, round(side / 450)), _font(max(11, round(side / 70))))

    def draw(self, marks: list[Mark]) -> None:
        """Outlines first, so that none hides a box's line; the best mark, the first, lies on top."""
        canvas = ImageDraw.Draw(self.picture)
        edges = [self._edges(mark.box) for mark in marks]
        halo = max(1, self.line // 2)
        for x1, y1, x2, y2 in edges:
            outer = (x1 - halo, y1 - halo, x2 + halo, y2 + halo)
            canvas.rectangle(outer, outline=HALO, width=self.line + 2 * halo)
        for mark, (x1, y1, x2, y2) in reversed([*zip(marks, edges, strict=True)]):
            if not mark.dashed:
                canvas.rectangle((x1, y1, x2, y2), outline=mark.color, width=self.line)
                continue
            for dash in _dashes(x1, y1, x2, y2, self.line):
                canvas.rectangle(dash, fill=mark.color)
        self._write(canvas, marks, edges)

    def _edges(self, box: list[float]) -> tuple[int, int, int, int]:
        """The outer pixels of a box's line, whose middle is the box's border, as far as that is in the picture."""
        x1, y1, x2, y2 = (round(v * s) for v, s in zip(box, self.scale * 2, strict=True))
        half = self.line // 2
        left, top = max(x1 - half, 0), max(y1 - half, 0)
        right, bottom = (max(x2 - half, left) + self.line - 1, max(y2 - half, top) + self.line - 1)
        return left, top, min(right, self.picture.width - 1), min(bottom, self.picture.height - 1)

    def _write(
        self, canvas: ImageDraw.ImageDraw, marks: list[Mark], edges: list[tuple[int, int, int, int]]
    ) -> None:
        """The texts, best mark first, as far as they cover no other: what overlaps cannot be read."""
        stroke = max(1, round(self.font.size / 8))
        taken = np.empty((0, 4))
        for mark, (x1, y1, _, _) in zip(marks, edges, strict=True):
            for text in dict.fromkeys((mark.text, mark.short_text)):
                if not text:
                    continue
                left, top, right, bottom = canvas.textbbox(
                    (0, 0), text, self.font, stroke_width=stroke
                )
                x = min(x1 + self.line + 1, self.picture.width - right)
                y = min(y1 + self.line + 1, self.picture.height - bottom)
                place = np.array([x + left, y + top, x + right, y + bottom])
                free = (
                    (taken[:, :2] >= place[2:]).any(axis=1)
                    | (taken[:, 2:] <= place[:2]).any(axis=1)
                ).all()
                if free and x + left >= 0 and y + top >= 0:
                    taken = np.vstack([taken, place])
                    canvas.text(
                        (x, y), text, mark.color, self.font, stroke_width=stroke, stroke_fill=HALO
                    )
                    break


def _dashes(x1: int, y1: int, x2: int, y2: int, line: int) -> Iterable[tuple[int, int, int, int]]:
    """The rectangles of a dashed frame, from its outer pixels."""
    dash, last = 4 * line, line - 1
    for x in range(x1, x2 + 1, 2 * dash):
        end = min(x + dash, x2)
        yield x, y1, end, y1 + last
        yield x, y2 - last, end, y2
    for y in range(y1, y2 + 1, 2 * dash):
        end = min(y + dash, y2)
        yield x1, y, x1 + last, end
        yield x2 - last, y, x2, end


# ---- The picture around them ---------------------------------------------------------------------


def _sheet(
    title: str, panels: Sequence[tuple[str | None, Image.Image]], legend: list[tuple[str, str]]
) -> Image.Image:
    """Panels side by side, a title above, a legend below."""
    pictures = [picture for _, picture in panels]
    content = sum(picture.width + MARGIN for picture in pictures) + MARGIN
    font = _font(max(14, min(28, content // 75)))
    small = _font(max(12, min(24, content // 90)))
    width = max(content, SMALLEST)
    rows = _legend_rows(legend, width - 2 * MARGIN, small)
    head = MARGIN + round(1.5 * font.size)
    subtitles = round(1.5 * small.size) if any(text for text, _ in panels) else 0
    top = head + subtitles
    tallest = max(picture.height for picture in pictures)
    step = round(1.6 * small.size)
    sheet = Image.new("RGB", (width, top + tallest + MARGIN + step * len(rows)), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((width / 2, MARGIN), _elided(title, width - 2 * MARGIN, font), "black", font, "ma")
    left = (width - content) // 2 + MARGIN
    for text, picture in panels:
        sheet.paste(picture, (left, top))
        if text:
            middle = left + picture.width / 2
            shown = _elided(text, max(picture.width, width // len(panels) - 2 * MARGIN), small)
            canvas.text((middle, head), shown, "black", small, "ma")
        left += picture.width + MARGIN
    for number, row in enumerate(rows):
        y = top + tallest + MARGIN // 2 + number * step
        x = float(MARGIN)
        for color, text in row:
            box = (x, y, x + small.size, y + small.size)
            canvas.rectangle(box, fill=color, outline=HALO, width=2)
            canvas.text((x + 1.4 * small.size, y - 1), text, "black", small)
            x += _entry_width(text, small)
    return sheet


LEGEND_ROWS = 6


def _legend_rows(
    legend: list[tuple[str, str]], width: int, font: ImageFont.FreeTypeFont
) -> list[list[tuple[str, str]]]:
    rows: list[list[tuple[str, str]]] = []
    room = 0.0
    for number, (color, text) in enumerate(legend):
        shown = _elided(text, width // 2, font)
        needed = _entry_width(shown, font)
        if needed > room:
            if len(rows) == LEGEND_ROWS:
                rows.append([("white", f"and {len(legend) - number} more categories")])
                break
            rows.append([])
            room = width
        rows[-1].append((color, shown))
        room -= needed
    return rows


def _entry_width(text: str, font: ImageFont.FreeTypeFont) -> float:
    return 1.4 * font.size + font.getlength(text) + 1.5 * font.size


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


@functools.cache
def _known_characters() -> frozenset[int]:
    return frozenset(FT2Font(FONT).get_charmap())


def _writable(text: str) -> str:
    """The text, with an escape for each character that the font has not: boxes would all look alike."""
    known = _known_characters()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)


def _elided(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text on one line, without its middle where it would be too wide."""
    text = _writable(text)
    if font.getlength(text) <= width:
        return text
    least, most = 0, len(text)  # the number of characters that stay
    while most - least > 1:
        kept = (least + most) // 2
        fits = font.getlength(_shortened(text, kept)) <= width
        least, most = (kept, most) if fits else (least, kept)
    return _shortened(text, least)


def _shortened_name(name: str) -> str:
    return _writable(name if len(name) <= LONGEST_NAME else _shortened(name, LONGEST_NAME - 1))


def _shortened(text: str, kept: int) -> str:
    tail = kept // 2
    return text[: kept - tail] + "…" + (text[-tail:] if tail else "")


def _save(path: Path, picture: Image.Image) -> None:
    mark = PngInfo()
    mark.add_text("Software", MADE_BY)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=mark)
    write_whole(path, file.getvalue())


def draw_curves(path: Path, title: str, categories: list[dict[str, Any]]) -> None:
    """Precision over recall at an IoU of 0.5, a line a category, and their mean if there are several."""
    figure = Figure(figsize=(8, 6), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    recall = [i / 100 for i in range(101)]
    many = len(categories) > 10  # more colours than can be told apart
    for index, category in enumerate(categories):
        label = None if many else _curve_label(category)
        color = "lightgrey" if many else f"C{index % 10}"
        axes.plot(recall, category["precision"], color=color, linewidth=1, label=label)
    if len(categories) > 1:
        columns = zip(*(category["precision"] for category in categories), strict=True)
        mean = [sum(column) / len(column) for column in columns]
        label = f"mean of {len(categories)} categories: AP50 {sum(mean) / len(mean):.3f}"
        axes.plot(recall, mean, color="black", linewidth=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    texts = [axes.set_title(_writable(title))]
    if categories:
        texts += axes.legend(loc="lower left", fontsize=9).get_texts()
    for text in texts:
        text.set_parse_math(False)  # dollars in names are dollars
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    file = io.BytesIO()
    figure.savefig(file)
    write_whole(path, file.getvalue())


def _curve_label(category: dict[str, Any]) -> str:
    """Not beginning with the name: matplotlib leaves out what begins with an underscore."""
    return f"AP50 {category['AP50']:.3f}: {_shortened_name(category['name'])}"
