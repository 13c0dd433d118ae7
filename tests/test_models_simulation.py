"""Boxes moved by the gradient of each loss: python -m models study box_regression."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from models import simulation
from models.__main__ import main

NAMES = ("box_regression.md", "box_regression.png")


@pytest.fixture(scope="module")
def errors() -> dict[str, Tensor]:
    """The final errors of the boxes of 60 positions under each loss."""
    boxes, targets = (part.reshape(-1, 4) for part in simulation.cases(60))
    return {
        name: simulation.errors_of(simulation.regress(rival.loss, boxes, targets)[0], targets)
        for name, rival in simulation.LOSSES.items()
    }


def are_apart(boxes: Tensor, targets: Tensor) -> Tensor:
    gaps = (boxes - targets)[:, :2].abs() - (boxes[:, 2:] + targets[:, 2:]) / 2
    return (gaps >= 0).any(dim=1)


def test_cases_are_those_of_the_paper():
    boxes, targets = simulation.cases(1000)
    assert boxes.shape == targets.shape == (1000, 343, 4)
    assert simulation.POSITIONS * boxes.shape[1] == 1_715_000
    assert len(torch.cat((boxes, targets), dim=2)[0].unique(dim=0)) == 343
    # Areas and ratios are products of square roots in float32: a few roundings of 6e-8.
    torch.testing.assert_close(targets[0, :, 2:].prod(dim=1), torch.ones(343), rtol=1e-6, atol=0)
    areas = boxes[0, :, 2:].prod(dim=1)
    torch.testing.assert_close(
        areas.reshape(7, 49), torch.tensor(simulation.AREAS)[:, None].expand(7, 49)
    )
    ratios = (boxes[0, :, 2] / boxes[0, :, 3]).reshape(7, 7, 7)
    torch.testing.assert_close(
        ratios, torch.tensor(simulation.ASPECT_RATIOS)[None, :, None].expand(7, 7, 7)
    )
    assert (targets[..., :2] == 10).all()
    radius = (boxes[:, 0, :2] - 10).norm(dim=1)
    assert radius.max() <= 3
    # Uniform in the disc: a quarter lies within half the radius, of 1000 give or take 14.
    assert abs((radius < 1.5).sum().item() - 250) < 60


def test_the_rate_falls_after_160_and_180_iterations():
    rates = [simulation.rate_of(iteration, 200) for iteration in range(200)]
    assert rates == [0.1] * 160 + [0.01] * 20 + [0.001] * 20


def test_an_iteration_is_a_step_down_the_exact_gradient():
    """Against torchvision's loss, derived by center and size by hand."""
    boxes, targets = (part.reshape(-1, 4).double() for part in simulation.cases(3))
    corners = box_convert(boxes, "cxcywh", "xyxy").requires_grad_()
    goals = box_convert(targets, "cxcywh", "xyxy")
    generalized_box_iou_loss(corners, goals).sum().backward()
    low, high = corners.grad[:, :2], corners.grad[:, 2:]
    overlap = corners[:, 2:].minimum(goals[:, 2:]) - corners[:, :2].maximum(goals[:, :2])
    overlap = overlap.clamp(min=0).prod(dim=1)
    iou = overlap / (boxes[:, 2:].prod(dim=1) + targets[:, 2:].prod(dim=1) - overlap)
    gradient = torch.cat((low + high, (high - low) / 2), dim=1)
    expected = boxes - 0.1 * (2 - iou[:, None]) * gradient
    moved, means = simulation.regress(simulation.LOSSES["GIoU"].loss, boxes, targets, iterations=1)
    torch.testing.assert_close(moved, expected.detach(), rtol=0, atol=1e-6)  # the IoU's eps: 1e-7
    errors = [(at - targets).abs().sum(dim=1).mean().item() for at in (boxes, expected)]
    assert means == pytest.approx(errors, abs=1e-6)


def test_without_overlap_nothing_moves_under_the_iou_loss():
    boxes, targets = (part.reshape(-1, 4) for part in simulation.cases(20))
    moved, _ = simulation.regress(simulation.LOSSES["IoU"].loss, boxes, targets)
    apart = are_apart(boxes, targets)
    assert 0.5 < apart.float().mean() < 1
    assert torch.equal(moved[apart], boxes[apart])
    before, after = (
        simulation.errors_of(at[~apart], targets[~apart]).mean() for at in (boxes, moved)
    )
    assert after < 0.02 * before


def test_order_of_the_losses(errors):
    """The paper's, but for GIoU, which is behind DIoU there by its script's gradient."""
    mean = {name: value.mean().item() for name, value in errors.items()}
    assert mean["CIoU"] < mean["DIoU"] < 0.1
    assert mean["GIoU"] < 0.1 < 0.5 < mean["GIoU, unclamped"] < mean["IoU"]
    assert mean["IoU"] > 3


def test_unclamped_giou_is_giou_where_boxes_overlap():
    boxes, targets = (
        box_convert(part.reshape(-1, 4), "cxcywh", "xyxy") for part in simulation.cases(20)
    )
    apart = are_apart(*(box_convert(part, "xyxy", "cxcywh") for part in (boxes, targets)))
    ours = simulation.unclamped_giou_loss(boxes, targets)
    exact = generalized_box_iou_loss(boxes, targets)
    torch.testing.assert_close(ours[~apart], exact[~apart], rtol=0, atol=1e-5)
    # Unit squares apart by 1, diagonally and along an axis: overlaps of (-1)(-1) and (-1)(1).
    first = torch.tensor([[0.0, 0, 1, 1]])
    for second, unclamped, clamped in (([2.0, 2, 3, 3], 1, 2), ([2.0, 0, 3, 1], 3, 2)):
        pair, enclosing = (first, torch.tensor([second])), second[2] * second[3]
        ours, exact = simulation.unclamped_giou_loss(*pair), generalized_box_iou_loss(*pair)
        assert ours.item() == pytest.approx(2 - unclamped / enclosing)
        assert exact.item() == pytest.approx(2 - clamped / enclosing)


def test_the_study(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(simulation, "POSITIONS", 8)
    arguments = ["study", "box_regression", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    table = (tmp_path / NAMES[0]).read_text()
    assert table in capsys.readouterr().out and f"{8 * 343:,} boxes at 8 positions" in table
    rows = {row.split(" | ")[0].strip("| "): row for row in table.splitlines() if row[:2] == "| "}
    assert set(rows) == {"loss", *simulation.LOSSES}
    first = [float(rows[name].split(" | ")[1]) for name in simulation.LOSSES]
    assert len(set(first)) == 1 and not math.isnan(first[0])
    assert (tmp_path / NAMES[1]).stat().st_size > 10_000

    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    assert main(arguments) == 1
    assert "box_regression.md exists already; --overwrite replaces it" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == before
    assert main([*arguments, "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
    assert without_seconds((tmp_path / NAMES[0]).read_text()) == without_seconds(table)
    assert (tmp_path / NAMES[1]).read_bytes() == before[NAMES[1]]


def without_seconds(table: str) -> list[list[str]]:
    return [
        [cell for i, cell in enumerate(row.split(" | ")) if i != 10] for row in table.splitlines()
    ]
