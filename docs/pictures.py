"""Draws the pictures of these pages with the project's own code, each time they are built, and asks `train` for its help."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models import command_line, curves, distribution, simulation
from models.draw import save_figure

POSITIONS = 8  # of the simulation; `study box_regression` has 5,000


def draw_all(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Callable[[Path], None]] = {
        "focal": draw_focal,
        "shares": draw_shares,
        "box_losses": draw_box_losses,
        "aspect": draw_aspect,
        "regression": draw_regression,
    }
    for name, draw in pictures.items():
        draw(folder / f"{name}.png")
    os.environ["COLUMNS"] = "90"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        command_line.parser().parse_args(["train", "--help"])
    text = re.sub(r"usage: \S+", "usage: python -m models", said.getvalue())
    (folder / "train.txt").write_text(text)


def panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(path: Path, figure: Figure, axes: list[Axes]) -> None:
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    save_figure(path, figure)


def draw_focal(path: Path) -> None:
    figure, axes = panels(2, 2)
    curves.draw_focal(*axes)
    save(path, figure, axes)


def draw_shares(path: Path) -> None:
    """Logits that are drawn from normal distributions; those of a trained model are in the studies."""
    generator = torch.Generator().manual_seed(0)
    positives = (torch.randn(20_000, generator=generator) * 1.5 + 0.5).sigmoid()
    negatives = (torch.randn(200_000, generator=generator) * 1.5 + 4).sigmoid()
    distribution.draw(path, positives, negatives, "drawn logits")


def draw_box_losses(path: Path) -> None:
    figure, axes = panels(1, 2)
    curves.draw_shift(*axes)
    save(path, figure, axes)


def draw_aspect(path: Path) -> None:
    figure, axes = panels(1, 1)
    curves.draw_aspect(*axes)
    save(path, figure, axes)


def draw_regression(path: Path) -> None:
    figure, (axes,) = panels(1, 1)
    boxes, targets = (part.reshape(-1, 4) for part in simulation.cases(POSITIONS))
    for name, rival in simulation.LOSSES.items():
        _, means = simulation.regress(rival.loss, boxes, targets)
        axes.plot(means, label=name)
    axes.set(yscale="log", xlabel="iteration", ylabel="mean error of a box")
    save(path, figure, [axes])
