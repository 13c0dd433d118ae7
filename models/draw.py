"""Pictures of detections, alone or beside the ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from focalops import box_iou
from models.retinanet import Detections

TRUTH, CORRECT, WRONG, MISSED = "#00d5ff", "#7dff3a", "#ff4fd8", "#ff9d00"
MATCH_IOU = 0.5
DPI = 100
MARGIN, TOP, BOTTOM = 10, 75, 45  # pixels


def draw_detections(
    path: Path,
    title: str,
    image: Tensor,
    detections: Detections,
    names: list[str],
    min_score: float = 0.3,
) -> None:
    """One picture, one colour a category."""
    shown = _above(detections, min_score)
    figure, (axes,) = _canvas(image, columns=1)
    handles = []
    for label, name in enumerate(names):
        of_class = shown["labels"] == label
        if of_class.any():
            color = CORRECT if len(names) == 1 else f"C{label % 10}"
            _boxes(axes, shown["boxes"][of_class], color, shown["scores"][of_class])
            handles.append(Line2D([], [], color=color, label=f"{name} ({int(of_class.sum())})"))
    _finish(
        figure,
        path,
        f"{title}: {len(shown['scores'])} detections with a score above {min_score:g}",
        handles,
    )


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
    figure, (left, right) = _canvas(image, columns=2)
    left.set_title(f"ground truth: {len(found)} boxes", fontsize=13)
    _boxes(left, truth["boxes"], TRUTH)
    right.set_title(
        f"detections with a score above {min_score:g}: "
        f"{int(correct.sum())} right, {int((~correct).sum())} wrong, "
        f"{int((~found).sum())} boxes missed",
        fontsize=13,
    )
    _boxes(right, truth["boxes"][~found], MISSED, style="dashed")
    _boxes(right, shown["boxes"][~correct], WRONG, shown["scores"][~correct])
    _boxes(right, shown["boxes"][correct], CORRECT, shown["scores"][correct])
    handles = [
        Line2D([], [], color=TRUTH, label="ground truth"),
        Line2D(
            [],
            [],
            color=CORRECT,
            label=f"right (IoU >= {MATCH_IOU:g} with a box not yet found), with its score",
        ),
        Line2D([], [], color=WRONG, label="wrong, with its score"),
        Line2D([], [], color=MISSED, linestyle="dashed", label="missed"),
    ]
    _finish(figure, path, title, handles)


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


def _canvas(image: Tensor, columns: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side with room for a title above and a legend below, all laid out in pixels."""
    # One image pixel is at least one of the picture, and never so few that scores cannot be read.
    scale = max(1.0, 900 / max(image.shape[-2:]))
    height, width = (round(side * scale) for side in image.shape[-2:])
    total_width = columns * width + (columns + 1) * MARGIN
    total_height = height + TOP + BOTTOM
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    panels = []
    for column in range(columns):
        left = (MARGIN + column * (width + MARGIN)) / total_width
        bounds = (left, BOTTOM / total_height, width / total_width, height / total_height)
        axes = figure.add_axes(bounds)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        panels.append(axes)
    return figure, panels


def _boxes(
    axes: Axes, boxes: Tensor, color: str, scores: Tensor | None = None, style: str = "solid"
) -> None:
    outlines = [
        [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)] for x1, y1, x2, y2 in boxes.tolist()
    ]
    axes.add_collection(LineCollection(outlines, colors=color, linewidths=1.0, linestyles=style))
    if scores is None:
        return
    for (x1, y1, _, _), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        axes.text(
            x1 + 1,
            y1 + 1,
            f"{score:.2f}".removeprefix("0"),
            color=color,
            fontsize=7,
            va="top",
            clip_on=True,
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 0.6, "linewidth": 0},
        )


def _finish(figure: Figure, path: Path, title: str, handles: list[Line2D]) -> None:
    height = figure.get_size_inches()[1] * DPI
    figure.suptitle(title, fontsize=16, y=1 - MARGIN / height, va="top")
    if handles:
        figure.legend(
            handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=12
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_contact_sheet(path: Path, pictures: list[Path], columns: int = 4, side: int = 400) -> None:
    """Pictures in rows, each scaled down to a square of `side` pixels; the last row may be short."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for index, picture in enumerate(pictures):
        with Image.open(picture) as image:
            small = image.convert("RGB")
        small.thumbnail((side - MARGIN, side - MARGIN))
        left, top = index % columns * side, index // columns * side
        sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_curves(path: Path, title: str, categories: list[dict[str, Any]]) -> None:
    """Precision over recall at an IoU of 0.5, a line a category, and their mean if there are several."""
    figure = Figure(figsize=(8, 6), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    recall = [i / 100 for i in range(101)]
    many = len(categories) > 10  # more colours than can be told apart
    for index, category in enumerate(categories):
        label = None if many else f"{category['name']}: AP50 {category['AP50']:.3f}"
        color = "lightgrey" if many else f"C{index % 10}"
        axes.plot(recall, category["precision"], color=color, linewidth=1, label=label)
    if len(categories) > 1:
        columns = zip(*(category["precision"] for category in categories), strict=True)
        mean = [sum(column) / len(column) for column in columns]
        label = f"mean of {len(categories)} categories: AP50 {sum(mean) / len(mean):.3f}"
        axes.plot(recall, mean, color="black", linewidth=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=title)
    if categories:
        axes.legend(loc="lower left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
