"""What the losses look like: python -m models study curves.

The curves of the focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017, figures 1 and 5 to 7), pairs
of boxes at equal distances and with unequal IoU (Rezatofighi et al., "Generalized Intersection over Union", 2019,
figure 1), where the losses of boxes are flat, and the aspect-ratio term of CIoU: all computed by the ops. Beside
them detectors' published speeds and accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_convert

from focalops import (
    box_iou_loss,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
)
from focalops.info import describe

from .draw import save_figure
from .outputs import write_whole

CURVES = "curves"
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # of figure 1
STAR_GAMMAS, STAR_BETAS = (1.0, 2.0, 4.0), (-1.0, 0.0, 1.0, 2.0)
LOGITS = (-4.0, -2.0, 0.0, 2.0, 4.0)  # of the table

Loss = Callable[[Tensor], Tensor]


def of_truth(gamma: float, beta: float | None = None) -> Loss:
    """The loss of the true answer's logits x_t, without alpha: FL, or FL* where there is a beta."""
    if beta is None:
        return lambda x: sigmoid_focal_loss(x, torch.ones_like(x), -1, gamma)
    return lambda x: sigmoid_focal_loss_star(x, torch.ones_like(x), -1, gamma, beta=beta)


CLASSIFICATION = {
    "CE": of_truth(0),
    "FL, gamma 2": of_truth(2),
    "FL*, gamma 2, beta 1": of_truth(2, 1),
    "FL*, gamma 4, beta 0": of_truth(4, 0),
}
BOX_LOSSES = {
    "IoU": box_iou_loss,
    "GIoU": generalized_box_iou_loss,
    "DIoU": distance_box_iou_loss,
    "CIoU": complete_box_iou_loss,
}


def with_slope(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each number and its derivative."""
    x = x.clone().requires_grad_()
    values = loss(x)
    (slope,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slope


# ---- Boxes --------------------------------------------------------------------------------------

TARGET = (0.0, 0.0, 10.0, 10.0)  # xyxy
# Differences from the target that have the same sizes and so, whatever the norm, the same distance.
PAIRS = {
    "corners": ((3, 3, -3, -3), (3, 3, 3, 3), (-3, -3, 3, 3)),  # x1, y1, x2, y2
    "center and size": ((2, 2, -4, -4), (2, 2, 4, -4), (2, 2, 4, 4)),  # cx, cy, w, h
}


@dataclass(frozen=True)
class Pair:
    coded: str  # a key of PAIRS
    box: list[float]  # xyxy
    distances: dict[str, float]  # of what is coded
    losses: dict[str, float]


def pairs() -> list[Pair]:
    target = torch.tensor(TARGET, dtype=torch.float64)
    found = []
    for coded, differences in PAIRS.items():
        form = "xyxy" if coded == "corners" else "cxcywh"
        goal = box_convert(target, "xyxy", form)
        for difference in differences:
            other = goal + torch.tensor(difference)
            box = box_convert(other, form, "xyxy")
            distances = {
                "L1": F.l1_loss(other, goal, reduction="sum"),
                "L2": torch.dist(other, goal),
                "smooth L1": F.smooth_l1_loss(other, goal, reduction="sum"),
            }
            losses = {name: loss(box, target) for name, loss in BOX_LOSSES.items()}
            found.append(
                Pair(
                    coded,
                    box.tolist(),
                    {name: value.item() for name, value in distances.items()},
                    {name: value.item() for name, value in losses.items()},
                )
            )
    return found


def moved(name: str) -> Loss:
    """The loss of a square of half the target's side whose center is x sides from the target's, to the right."""
    target = torch.tensor([-0.5, -0.5, 0.5, 0.5], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        corners = (x - 0.25, torch.full_like(x, -0.25), x + 0.25, torch.full_like(x, 0.25))
        return BOX_LOSSES[name](torch.stack(corners, dim=1), target)

    return loss


def aspect_ratio_term(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """v and alpha v of CIoU for boxes of ratios w / h on a square of the same area and center."""
    half = torch.stack((ratios.sqrt(), ratios.rsqrt()), dim=1) / 2
    boxes = torch.cat((-half, half), dim=1)
    square = boxes.new_tensor([-0.5, -0.5, 0.5, 0.5])
    v = 4 / torch.pi**2 * (torch.pi / 4 - ratios.atan()) ** 2
    return v, complete_box_iou_loss(boxes, square) - distance_box_iou_loss(boxes, square)


# ---- Published figures --------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    name: str
    source: str
    detectors: tuple[str, ...]
    costs: tuple[float, ...]
    aps: tuple[float, ...]  # of COCO test-dev, in %


LIN, TAN = "Lin et al., 2017", "Tan et al., 2020"
OTHERS = "others"
TIMES = (  # milliseconds an image, on an M40 or a Titan X
    Series(
        "RetinaNet R50",
        f"{LIN}, table 1e",
        ("400", "500", "600", "700", "800"),
        (64, 72, 98, 121, 153),
        (30.5, 32.5, 34.3, 35.1, 35.7),
    ),
    Series(
        "RetinaNet R101",
        f"{LIN}, table 1e",
        ("400", "500", "600", "700", "800"),
        (81, 90, 122, 154, 198),
        (31.9, 34.4, 36.0, 37.1, 37.8),
    ),
    Series(
        "YOLOv3",
        "Redmon and Farhadi, 2018, figure 1",
        ("320", "416", "608"),
        (22, 29, 51),
        (28.2, 31.0, 33.0),
    ),
    Series(
        OTHERS,
        f"{LIN}, figure 2",
        ("YOLOv2", "SSD321", "DSSD321", "R-FCN", "SSD513", "DSSD513", "FPN FRCN"),
        (25, 61, 85, 85, 125, 156, 172),
        (21.6, 28.0, 28.0, 29.9, 31.2, 33.2, 36.2),
    ),
)
MULTIPLY_ADDS = (  # billions an image
    Series("RetinaNet R50", f"{TAN}, table 2", ("640",), (97,), (39.2,)),
    Series(
        "EfficientDet",
        f"the README of {TAN}",
        ("D0", "D1", "D2", "D3", "D4", "D5", "D6", "D7", "D7x"),
        (2.54, 6.1, 11, 24.9, 55.2, 130, 226, 325, 410),
        (34.6, 40.5, 43.9, 47.2, 49.7, 51.5, 52.6, 53.7, 55.1),
    ),
    Series("YOLOv3", f"{TAN}, table 2", ("608",), (71,), (33.0,)),
)


# ---- The study ----------------------------------------------------------------------------------


def run_curves(out: Path, device: str) -> Path:
    """Writes CURVES.md and .png. Returns the table."""
    table = out / f"{CURVES}.md"
    with torch.device(device):
        write_whole(table, to_table(device))
        draw(out / f"{CURVES}.png")
    return table


def to_table(device: str) -> str:
    where = describe(torch.device(device))
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    lines = [
        f"**What do the losses look like?** {where['device']}, torch {where['torch']}, {where['date']}, "
        f"commit {where['commit']}; the ops of focalops in float64.",
        "",
        "Loss and derivative by the logit x_t of the true answer, without alpha (Lin et al., 2017, figures 5 and 6):",
        "",
        "| | " + " | ".join(f"x_t = {x:g}" for x in LOGITS) + " |",
        "|---|" + "--:|" * len(LOGITS),
    ]
    for name, loss in CLASSIFICATION.items():
        values, slopes = (part.tolist() for part in with_slope(loss, logits))
        cells = [f"{value:.3g}, {slope:.3g}" for value, slope in zip(values, slopes, strict=True)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    p = torch.tensor([0.9, 0.968, 0.5], dtype=torch.float64)
    less = (of_truth(0)(p.logit()) / of_truth(2)(p.logit())).tolist()
    lines += [
        "",
        f"FL with gamma = 2 is {less[0]:.0f} times smaller than CE at p_t = 0.9 and {less[1]:.0f} times at "
        f"0.968 (the paper: 100 and 1000), and at p_t = 0.5 and below at most {less[2]:.0f} times (the paper: 4).",
        "",
        "Boxes as far from the square (0, 0, 10, 10) as each other (the figure of Rezatofighi et al., 2019, has "
        "other boxes):",
        "",
        "| distance of | box | L1 | L2 | smooth L1 | "
        + " | ".join(f"{name} loss" for name in BOX_LOSSES)
        + " |",
        "|---|---|" + "--:|" * 7,
    ]
    for pair in pairs():
        cells = [pair.coded, ", ".join(f"{x:g}" for x in pair.box)]
        cells += [f"{value:.3g}" for value in pair.distances.values()]
        cells += [f"{value:.3f}" for value in pair.losses.values()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Published speeds and accuracies, measured by none of this: the sources are the papers.",
        "",
        "| | AP of COCO test-dev | source |",
        "|---|---|---|",
    ]
    for unit, plots in (("ms", TIMES), ("G multiply-adds", MULTIPLY_ADDS)):
        for series in plots:
            points = zip(series.detectors, series.aps, series.costs, strict=True)
            listing = ", ".join(f"{name}: {ap:.1f} at {cost:g} {unit}" for name, ap, cost in points)
            lines.append(f"| {series.name} | {listing} | {series.source} |")
    return "\n".join(lines) + "\n"


# ---- The picture --------------------------------------------------------------------------------


def draw(path: Path) -> None:
    figure = Figure(figsize=(15, 18), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    rows: list[list[Any]] = [
        ["probability"] * 2 + ["logit"] * 2 + ["slope"] * 2,
        ["star"] * 2 + ["shift"] * 2 + ["pull"] * 2,
        [f"pair {index}" for index in range(6)],
        ["times"] * 2 + ["multiply-adds"] * 2 + ["aspect"] * 2,
    ]
    panels = figure.subplot_mosaic(rows, height_ratios=[1, 1, 0.6, 1])
    draw_focal(panels["probability"], panels["logit"], panels["slope"], panels["star"])
    draw_shift(panels["shift"], panels["pull"])
    for index, pair in enumerate(pairs()):
        draw_pair(panels[f"pair {index}"], pair)
    draw_published(panels["times"], TIMES, "ms an image (M40, Titan X)")
    draw_published(panels["multiply-adds"], MULTIPLY_ADDS, "billions of multiply-adds an image")
    panels["multiply-adds"].set_xscale("log")
    draw_aspect(panels["aspect"])
    for name, axes in panels.items():
        if not name.startswith("pair"):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    save_figure(path, figure)


def line(axes: Axes, x: Tensor, y: Tensor, label: str, **style: Any) -> None:
    axes.plot(x.cpu(), y.cpu(), label=label, **style)


def dashed(name: str) -> dict[str, str]:
    """Cross entropy stands out."""
    return {"color": "black", "linestyle": "--"} if name == "CE" else {}


def draw_focal(probability: Axes, logit: Axes, slope: Axes, star: Axes) -> None:
    p = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    for gamma in GAMMAS:
        name = "CE" if gamma == 0 else f"gamma = {gamma:g}"
        line(probability, p, of_truth(gamma)(p.logit()), name, **dashed(name))
    probability.set(title="FL (figure 1)", xlabel="p_t", ylabel="loss", ylim=(0, 5))
    x = torch.linspace(-5, 5, 201, dtype=torch.float64)
    for name, loss in CLASSIFICATION.items():
        values, slopes = with_slope(loss, x)
        line(logit, x, values, name, **dashed(name))
        line(slope, x, slopes, name, **dashed(name))
    logit.set(title="FL and FL* (figure 5)", xlabel="x_t", ylabel="loss")
    slope.set(title="their derivatives (figure 6)", xlabel="x_t", ylabel="derivative")
    for color, gamma in enumerate(STAR_GAMMAS):
        for style, beta in zip((":", "-", "--", "-."), STAR_BETAS, strict=True):
            label = f"gamma {gamma:g}, beta {beta:g}"
            line(star, x, of_truth(gamma, beta)(x), label, color=f"C{color}", linestyle=style)
    title = "FL* by gamma and beta (figure 7); 1 and 0: CE"
    star.set(title=title, xlabel="x_t", ylabel="loss", ylim=(0, 5))


def draw_shift(loss: Axes, slope: Axes) -> None:
    x = torch.linspace(0, 2, 401, dtype=torch.float64)
    for name in ("IoU", "GIoU", "DIoU"):
        label = "DIoU, CIoU" if name == "DIoU" else name  # the ratios are equal
        values, slopes = with_slope(moved(name), x)
        line(loss, x, values, label)
        line(slope, x, slopes, label)
    for axes in (loss, slope):
        for edge in (0.25, 0.75):  # inside until the first, apart from the second on
            axes.axvline(edge, color="grey", linewidth=0.8)
        axes.set(xlabel="distance of the centers, in sides of the target")
    loss.set(title="a square of half the side: inside, across, apart", ylabel="loss")
    slope.set(title="the derivative by the distance", ylabel="derivative")


def draw_pair(axes: Axes, pair: Pair) -> None:
    for (x1, y1, x2, y2), color in ((TARGET, "C2"), (pair.box, "black")):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2)
        )
    distances = ", ".join(f"{name} {value:.3g}" for name, value in pair.distances.items())
    iou, giou = 1 - pair.losses["IoU"], 1 - pair.losses["GIoU"]
    axes.set(xlim=(-4, 15), ylim=(15, -4), aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"{pair.coded}\n{distances}", fontsize=8)
    axes.set_xlabel(f"IoU {iou:.2f}, GIoU {giou:.2f}")


def draw_published(axes: Axes, plots: tuple[Series, ...], unit: str) -> None:
    for series in plots:
        joined = "" if series.name == OTHERS else "-"
        label = f"{series.name} ({series.source})"
        axes.plot(series.costs, series.aps, f"o{joined}", markersize=4, linewidth=1, label=label)
        for name, cost, ap in zip(series.detectors, series.costs, series.aps, strict=True):
            axes.annotate(name, (cost, ap), (3, -9), textcoords="offset points", fontsize=7)
    axes.set(title="published figures, not measured here", xlabel=unit, ylabel="AP, COCO test-dev")


def draw_aspect(axes: Axes) -> None:
    logs = torch.linspace(-4, 4, 400, dtype=torch.float64)  # of 2; not 0, where alpha is 0 / 0
    v, term = aspect_ratio_term(logs.exp2())
    line(axes, logs, v, "v")
    line(axes, logs, term / v, "alpha, a constant in the gradient")
    line(axes, logs, term, "alpha v")
    axes.set(title="CIoU's aspect-ratio term, on a square", xlabel="log2(w / h)")
