"""The bench: contestants with the same weights agree, and are timed phase by phase."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from models import bench
from models.__main__ import main
from models.contestants import contestants

pytest.importorskip("timm")
HAS_EFFDET = importlib.util.find_spec("effdet") is not None
needs_effdet = pytest.mark.skipif(not HAS_EFFDET, reason="effdet is not installed")


def figures_of(name: str, size: int, folder: Path) -> dict:
    out = folder / "bench.json"
    arguments = ["bench", "--model", name, "--size", str(size), str(size), "--rounds", "1"]
    arguments += ["--batch-size", "2"]  # P7 is one position of 128 pixels, too few for a batch norm
    assert main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())


@needs_effdet
@pytest.mark.parametrize(("name", "size"), [("efficientdet_d0", 128), ("efficientdet_lite0", 320)])
def test_beside_effdet(name: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = figures_of(name, size, tmp_path)
    assert set(record["ms"]) == {*bench.PHASES, *bench.OF_EFFICIENTDET}
    for of_phase in (*record["ms"].values(), *record["gib"].values()):
        assert list(of_phase) == ["effdet", "focalops"] and min(of_phase.values()) > 0
    assert "BiFPN, share" in capsys.readouterr().out


@needs_effdet
def test_another_loss_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments):
        both = contestants(*arguments)
        loss_step = both["focalops"].model.loss_step
        loss_step.register_forward_hook(
            lambda m, i, losses: {n: 1.1 * x for n, x in losses.items()}
        )
        return both

    monkeypatch.setattr(bench, "contestants", other)
    with pytest.raises(RuntimeError, match=r"^effdet and focalops must agree: "):
        figures_of("efficientdet_d0", 128, tmp_path)


def test_without_effdet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "effdet", None)
    record = figures_of("efficientdet_d0", 128, tmp_path)
    assert set(record["ms"]) == {*bench.PHASES}
    assert all(list(of_phase) == ["focalops"] for of_phase in record["ms"].values())


@pytest.mark.parametrize(
    "other",
    [bench.Outcome(1.02, 100, 50.0), bench.Outcome(1.0, 90, 50.0), bench.Outcome(1.0, 100, 51.0)],
)
def test_what_is_no_agreement(other: bench.Outcome) -> None:
    first = bench.Outcome(1.0, 100, 50.0)
    bench._check({"theirs": first, "focalops": bench.Outcome(1.005, 101, 50.2)})
    with pytest.raises(RuntimeError, match=r"^theirs and focalops must agree"):
        bench._check({"theirs": first, "focalops": other})


def test_memory_that_is_kept() -> None:
    """That of a storage once, however many tensors of the graph are of it."""

    class Squares:
        model = torch.nn.Identity()

        def forward(self, images, targets):
            self.x = images[0].requires_grad_()
            return [self.x * self.x]  # keeps x twice

        def loss(self, outputs):
            return (outputs[0] * outputs[0]).sum()  # and its square

    kept = bench._kept_for_backward(Squares(), [torch.rand(1000)], [])
    assert kept == 2 * 4000 / 2**30
