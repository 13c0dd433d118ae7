"""What the losses look like: python -m models study curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from models import curves
from models.__main__ import main
from models.commands import study

NAMES = ("curves.md", "curves.png")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("x", curves.LOGITS)
def test_curves_at_known_points(x):
    p = sigmoid(x)
    expected = {
        "CE": (-math.log(p), p - 1),
        "FL, gamma 2": (
            -((1 - p) ** 2) * math.log(p),
            (1 - p) ** 2 * (2 * p * math.log(p) + p - 1),  # the paper's appendix B
        ),
        "FL*, gamma 2, beta 1": (-math.log(sigmoid(2 * x + 1)) / 2, sigmoid(2 * x + 1) - 1),
        "FL*, gamma 4, beta 0": (-math.log(sigmoid(4 * x)) / 4, sigmoid(4 * x) - 1),
    }
    assert set(expected) == set(curves.CLASSIFICATION)
    for name, (value, slope) in expected.items():
        logit = torch.tensor([x], dtype=torch.float64)
        found = curves.with_slope(curves.CLASSIFICATION[name], logit)
        assert [part.item() for part in found] == pytest.approx([value, slope], rel=1e-9), name


def test_pairs_are_equally_far_and_overlap_differently():
    found = curves.pairs()
    assert len(found) == 6
    for coded in curves.PAIRS:
        of_code = [pair for pair in found if pair.coded == coded]
        assert len({tuple(pair.distances.values()) for pair in of_code}) == 1
        for name in ("IoU", "GIoU"):
            assert len({round(pair.losses[name], 2) for pair in of_code}) == 3, name
    # The second: two squares of side 10 that share one of 7, in an enclosing one of 13.
    second = found[1]
    assert second.box == [3, 3, 13, 13]
    assert second.distances == pytest.approx({"L1": 12, "L2": 6, "smooth L1": 10})
    iou = 49 / 151
    diou = iou - 18 / (2 * 13**2)
    giou = iou - (169 - 151) / 169
    expected = {"IoU": 1 - iou, "GIoU": 1 - giou, "DIoU": 1 - diou, "CIoU": 1 - diou}
    assert second.losses == pytest.approx(expected, abs=1e-6)  # eps of 1e-7


def test_where_the_losses_of_boxes_are_flat():
    inside, apart = (torch.tensor([x], dtype=torch.float64) for x in (0.1, 1.5))
    slopes = {
        name: [curves.with_slope(curves.moved(name), x)[1].item() for x in (inside, apart)]
        for name in ("IoU", "GIoU", "DIoU")
    }
    assert slopes["IoU"] == pytest.approx([0, 0], abs=1e-12)
    assert slopes["GIoU"][0] == pytest.approx(0, abs=1e-6)  # eps of 1e-7
    assert slopes["GIoU"][1] > 0.1 and min(slopes["DIoU"]) > 0.05


def test_aspect_ratio_term():
    """A box of half the height and twice the width on a square: IoU 1/3 for ratio 4."""
    v, term = curves.aspect_ratio_term(torch.tensor([4.0], dtype=torch.float64))
    expected = 4 / math.pi**2 * (math.pi / 4 - math.atan(4)) ** 2
    assert v.item() == pytest.approx(expected)
    assert term.item() == pytest.approx(expected**2 / (1 - 1 / 3 + expected), rel=1e-5)


def test_every_detector_has_a_cost_and_an_ap():
    for series in (*curves.TIMES, *curves.MULTIPLY_ADDS):
        assert len(series.detectors) == len(series.costs) == len(series.aps), series.name


def test_the_study(tmp_path: Path, capsys):
    arguments = ["study", "curves", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    table = (tmp_path / NAMES[0]).read_text()
    assert table in capsys.readouterr().out
    assert "100 times smaller than CE at p_t = 0.9 and 977 times at 0.968" in table
    assert "| corners | 3, 3, 13, 13 | 12 | 6 | 10 | 0.675 | 0.782 | 0.729 | 0.729 |" in table
    assert "measured by none of this" in table and "608: 33.0 at 51 ms" in table
    assert (tmp_path / NAMES[1]).stat().st_size > 10_000

    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    (tmp_path / NAMES[1]).unlink()
    assert main(arguments) == 1
    assert "curves.md exists already; --overwrite replaces it" in capsys.readouterr().err
    assert not (tmp_path / NAMES[1]).exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_study_of_losses_speaks_of_no_record(tmp_path, monkeypatch, capsys):
    def interrupt(*_) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setitem(study.OF_LOSSES, "curves", interrupt)
    assert main(["study", "curves", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    assert [*tmp_path.iterdir()] == []


def test_a_study_of_losses_takes_no_checkpoint(tmp_path, capsys):
    arguments = ["study", "curves", "--checkpoint", "a.pt", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "error: --checkpoint is of distribution, not of curves" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
