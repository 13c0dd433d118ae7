"""What these pages show beside their text is made by the project's own code, each time they are built."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models import command_line, curves, distribution, simulation
from models.draw import save_figure

STUDIES = Path(__file__).parents[1] / "benchmarks" / "results" / "study"
POSITIONS = 8  # of the simulation; `study box_regression` has 5,000


def all_of(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for draw in (draw_focal, draw_shares, draw_box_losses, draw_aspect, draw_regression):
        draw(folder / f"{draw.__name__.removeprefix('draw_')}.png")
    (folder / "train.txt").write_text(help_of("train"))
    for table in STUDIES.rglob("*.md"):
        page = folder / "study" / table.relative_to(STUDIES)
        page.parent.mkdir(parents=True, exist_ok=True)
        title = str(table.relative_to(STUDIES).with_suffix(""))
        page.write_text(f"---\norphan: true\n---\n# Record: {title}\n\n{table.read_text()}")


def help_of(command: str) -> str:
    os.environ["COLUMNS"] = "90"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        command_line.parser().parse_args([command, "--help"])
    return said.getvalue()


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
