"""The simulation of the DIoU paper: python -m models study box_regression.

Zheng et al., "Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression", 2020, Algorithm 1
and figures 3 and 4. Gradient descent moves boxes to their targets under each loss, all boxes at once: what is
left of their error tells how well the loss alone would teach a network where boxes are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_convert

from focalops import (
    box_iou_loss,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from focalops.info import describe

from .draw import save_figure
from .outputs import write_whole

BOX_REGRESSION = "box_regression"

CENTER, RADIUS = 10.0, 3.0  # of the disc in which boxes start; targets are in its middle
POSITIONS = 5000
AREAS = (0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0)  # of the boxes; a target's is 1
ASPECT_RATIOS = (1 / 4, 1 / 3, 1 / 2, 1.0, 2.0, 3.0, 4.0)  # of boxes and targets
ITERATIONS = 200
SHOWN = (0, 50, 100, 160, 200)  # iterations in the table
TOLERANCE = 0.1  # a box with a larger error has not arrived
SECTOR = 10.0  # degrees to either side of an axis, or of a diagonal

PairLoss = Callable[[Tensor, Tensor], Tensor]  # xyxy (N, 4), (N, 4) -> (N,)


def unclamped_giou_loss(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The GIoU loss that the authors' published script differentiates: what overlaps of boxes that lie apart
    counts in the union of its penalty as the product of the two sides, which are negative then."""
    low1, high1, low2, high2 = boxes1[:, :2], boxes1[:, 2:], boxes2[:, :2], boxes2[:, 2:]
    overlap = _area(low1.maximum(low2), high1.minimum(high2))
    union = _area(low1, high1) + _area(low2, high2) - overlap
    enclosing = _area(low1.minimum(low2), high1.maximum(high2))
    return box_iou_loss(boxes1, boxes2) + 1 - union / enclosing


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).unbind(dim=1)
    return width * height


@dataclass(frozen=True)
class Rival:
    loss: PairLoss
    paper: str  # what it says of the loss here


LOSSES = {
    "IoU": Rival(box_iou_loss, "a box without overlap never moves"),
    "GIoU": Rival(
        generalized_box_iou_loss, "reaches farther, and stays slow and far off along the axes"
    ),
    "DIoU": Rival(distance_box_iou_loss, "fast, small errors at every position"),
    "CIoU": Rival(complete_box_iou_loss, "faster than DIoU"),
    "GIoU, unclamped": Rival(unclamped_giou_loss, "its GIoU, by the script"),
}


def cases(positions: int) -> tuple[Tensor, Tensor]:
    """Boxes and their targets, cxcywh float32 (positions, 343, 4): 7 areas x 7 ratios x 7 targets each.

    The positions are uniform in the disc, and always the same.
    """
    random = torch.rand(positions, 2, generator=torch.Generator().manual_seed(0))
    radius, angle = RADIUS * random[:, 0].sqrt(), 2 * math.pi * random[:, 1]
    centers = CENTER + radius[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1)
    ratios, areas = torch.tensor(ASPECT_RATIOS), torch.tensor(AREAS)
    sides = torch.stack((ratios.sqrt(), ratios.rsqrt()), dim=1)  # of area 1
    sizes = (areas.sqrt()[:, None, None] * sides)[:, :, None].expand(-1, -1, len(sides), -1)
    sizes = sizes.reshape(1, -1, 2).expand(positions, -1, -1)
    boxes = torch.cat((centers[:, None].expand_as(sizes), sizes), dim=2)
    targets = torch.cat((torch.full_like(sides, CENTER), sides), dim=1)
    return boxes, targets.repeat(len(AREAS) * len(ASPECT_RATIOS), 1).expand_as(boxes)


def errors_of(boxes: Tensor, targets: Tensor) -> Tensor:
    """The L1 distance of center and size, which the paper sums."""
    return (boxes - targets).abs().sum(dim=-1)


def rate_of(iteration: int, iterations: int) -> float:
    return 0.1 if iteration < 0.8 * iterations else 0.01 if iteration < 0.9 * iterations else 0.001


def regress(
    loss: PairLoss, boxes: Tensor, targets: Tensor, iterations: int = ITERATIONS
) -> tuple[Tensor, list[float]]:
    """Moves boxes (N, 4) to their targets by the gradient of their centers and sizes.

    Returns the moved boxes and the mean error before the first and after each iteration.
    """
    goals = box_convert(targets, "cxcywh", "xyxy")
    means = [errors_of(boxes, targets).mean(dtype=torch.float64)]
    for iteration in range(iterations):
        start = boxes.detach().requires_grad_()
        corners = box_convert(start, "cxcywh", "xyxy")
        (gradient,) = torch.autograd.grad(loss(corners, goals).sum(), start)
        factor = 1 + box_iou_loss(corners.detach(), goals)  # 2 - IoU: slower, the better it fits
        boxes = boxes - rate_of(iteration, iterations) * factor[:, None] * gradient
        means.append(errors_of(boxes, targets).mean(dtype=torch.float64))
    return boxes, torch.stack(means).tolist()


# ---- The study ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    means: list[float]  # before the first and after each iteration
    errors: Tensor  # (positions, boxes of a position), after the last
    seconds: float


def run_box_regression(out: Path, device: str) -> Path:
    """Writes BOX_REGRESSION.md and .png. Returns the table."""
    boxes, targets = (part.to(device) for part in cases(POSITIONS))
    outcomes = {}
    for name, rival in LOSSES.items():
        start = time.perf_counter()
        moved, means = regress(rival.loss, boxes.reshape(-1, 4), targets.reshape(-1, 4))
        errors = errors_of(moved, targets.reshape(-1, 4)).reshape(boxes.shape[:2]).cpu()
        outcomes[name] = Outcome(means, errors, time.perf_counter() - start)
        print(f"{BOX_REGRESSION}: {name}, {outcomes[name].seconds:.0f} s")
    table = out / f"{BOX_REGRESSION}.md"
    write_whole(table, to_table(outcomes, boxes.cpu(), targets.cpu(), device))
    draw(out / f"{BOX_REGRESSION}.png", outcomes, boxes[:, 0, :2].cpu())
    return table


def to_table(outcomes: dict[str, Outcome], boxes: Tensor, targets: Tensor, device: str) -> str:
    where = describe(torch.device(device))
    corners, goals = (box_convert(part, "cxcywh", "xyxy") for part in (boxes, targets))
    apart = box_iou_loss(corners, goals) == 1
    x, y = (boxes[:, 0, :2] - CENTER).unbind(dim=1)
    angle = torch.atan2(y, x).rad2deg() % 90
    axes = (angle < SECTOR) | (angle > 90 - SECTOR)
    diagonals = (angle - 45).abs() < SECTOR
    lines = [
        f"**How does each loss move a box?** {where['device']}, torch {where['torch']}, {where['date']}, "
        f"commit {where['commit']}: {boxes[..., 0].numel():,} boxes at {len(boxes):,} positions, {ITERATIONS} "
        "iterations of gradient descent. The error of a box is the L1 distance of its center and size from "
        f"its target's, and the mean is over all boxes, those that lie apart from their targets at first "
        f"({100 * apart.float().mean():.0f} %), and those that start within {SECTOR:g} degrees of an axis or of "
        f"a diagonal. The paper: Zheng et al., 2020, Algorithm 1.",
        "",
        "| loss | "
        + " | ".join(f"after {iteration}" for iteration in SHOWN)
        + f" | apart | axes | diagonals | above {TOLERANCE:g} | seconds | the paper |",
        "|---|" + "--:|" * (len(SHOWN) + 5) + "---|",
    ]
    for name, outcome in outcomes.items():
        parts = (outcome.errors[apart], outcome.errors[axes], outcome.errors[diagonals])
        cells = [
            name,
            *(f"{outcome.means[iteration]:.3f}" for iteration in SHOWN),
            *(f"{part.mean(dtype=torch.float64):.3f}" for part in parts),
            f"{100 * (outcome.errors > TOLERANCE).float().mean():.1f} %",
            f"{outcome.seconds:.0f}",
            LOSSES[name].paper,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The last row is the GIoU loss whose gradient the script published with the paper has: it does not "
        "clamp the overlap of boxes that lie apart to 0. The losses above it are those of focalops.",
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, outcomes: dict[str, Outcome], positions: Tensor) -> None:
    """The mean error by iteration, and a map of each loss's final error by position."""
    figure = Figure(figsize=(14, 8.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    curves, *maps = figure.subplots(2, 3).flat
    for name, outcome in outcomes.items():
        curves.plot(outcome.means, label=name)
    curves.set(
        xlabel="iteration", ylabel="mean error of a box", yscale="log", title="error by iteration"
    )
    curves.grid(alpha=0.3)
    curves.legend()
    for axes, (name, outcome) in zip(maps, outcomes.items(), strict=True):
        errors = outcome.errors.mean(dim=1)
        levels = torch.logspace(-3, 1, 33, dtype=torch.float64)
        shown = axes.tricontourf(*positions.T, errors, levels, norm=LogNorm(), extend="both")
        axes.set(title=f"{name}: final error by position", aspect="equal")
    figure.colorbar(
        shown, ax=maps, ticks=[1e-3, 1e-2, 0.1, 1, 10], label="mean error of a position's boxes"
    )
    figure.suptitle(
        "Boxes moved to targets at (10, 10) by gradient descent (Zheng et al., 2020, figures 3 and 4)"
    )
    save_figure(path, figure)
