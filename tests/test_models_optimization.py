"""The optimizer, the average of the weights, and batch norms of several processes."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder
from tiny_backbone import TINY_RECIPE
from torch import nn

from models.checkpoint import load_checkpoint, load_model
from models.data import CocoDataset
from models.detectors import create
from models.efficientdet import EfficientDetConfig
from models.optimization import average_of, build_optimizer, synchronised
from models.recipes import Recipe, with_model
from models.train import train

SMALL = EfficientDetConfig.named(
    "lite0", num_classes=2, cells=1, head_depth=1, pyramid_channels=16, min_size=96, max_size=96
)
NORMED = with_model(TINY_RECIPE, frozen_batch_norm=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(make_coco_folder(tmp_path_factory.mktemp("data") / "coco"), "train")


# ---- Weight decay --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_decays(optimizer: str) -> None:
    model = create(dataclasses.replace(SMALL, fusion="fast"))
    recipe = Recipe(model=SMALL, optimizer=optimizer, weight_decay=4e-5)  # type: ignore[arg-type]
    (one,) = build_optimizer(recipe, model).param_groups
    assert one["weight_decay"] == 4e-5 and len(one["params"]) == len([*model.parameters()])
    kernels, rest = build_optimizer(
        dataclasses.replace(recipe, decay_vectors=False), model
    ).param_groups
    assert (kernels["weight_decay"], rest["weight_decay"]) == (4e-5, 0)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {*map(id, kernels["params"])} == {*map(id, convolutions)}
    assert len(kernels["params"]) + len(rest["params"]) == len([*model.parameters()])
    names = {id(p): name for name, p in model.named_parameters()}
    assert any(names[id(p)].endswith(".weights") for p in rest["params"])  # of the fusions


# ---- The average ---------------------------------------------------------------------------------


def averages(recipe: Recipe, values: list[float]) -> tuple[float, float, int]:
    """The average of a weight and of a running mean that have these values after each step."""
    model = nn.BatchNorm2d(1)
    average = average_of(recipe, model)
    assert average is not None
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
            model.num_batches_tracked += 1
        average.update_parameters(model)
    norm = average.module
    return norm.weight.item(), norm.running_mean.item(), int(norm.num_batches_tracked)


def test_an_average_of_weights() -> None:
    values = [1.0, 5.0, 2.0]
    constant = dataclasses.replace(TINY_RECIPE, ema_decay=0.9)
    expected = (1.0 * 0.9 + 0.1 * 5) * 0.9 + 0.1 * 2
    assert averages(constant, values) == (pytest.approx(expected), 2.0, 3)
    buffers = dataclasses.replace(constant, ema_buffers=True)
    assert averages(buffers, values) == (pytest.approx(expected), pytest.approx(expected), 3)
    warmed = dataclasses.replace(buffers, ema_warmup=True)
    after_1, after_2 = 2 / 11, 3 / 12  # (1 + t) / (10 + t)
    expected = (1.0 * after_1 + (1 - after_1) * 5) * after_2 + (1 - after_2) * 2
    assert averages(warmed, values) == (pytest.approx(expected), pytest.approx(expected), 3)
    # Once the memory has grown to the recipe's, it stays there.
    values = [3.0] * 200 + [4.0]
    assert averages(warmed, values)[0] == pytest.approx(0.9 * 3 + 0.1 * 4)
    assert average_of(dataclasses.replace(TINY_RECIPE, ema_decay=None), nn.BatchNorm2d(1)) is None


def test_what_is_evaluated_has_the_averaged_statistics(data: CocoDataset, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    for buffers in (False, True):
        recipe = dataclasses.replace(NORMED, steps=3, ema_buffers=buffers)
        trained = train(recipe, data, file, pretrained=False)
        checkpoint, name = load_checkpoint(file), "backbone.body.bn1.running_mean"
        same = torch.equal(checkpoint["model"][name], checkpoint["average"][f"module.{name}"])
        assert same is not buffers
        loaded, _, _ = load_model(file)
        for key, value in trained.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


# ---- Batch norms of several processes ------------------------------------------------------------


@torch.no_grad()
def test_synchronised_batch_norms_are_the_same_layers() -> None:
    """Also those of timm, which have their activation in them."""
    torch.manual_seed(0)
    for config in (SMALL, NORMED.model):
        model = create(config).eval()
        images = torch.rand(1, 3, 96, 96)
        before, parameters = model.network(images), dict(model.named_parameters())
        state = copy.deepcopy(model.state_dict())
        synchronised(model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        for levels, expected in zip(model.network(images), before, strict=True):
            for a, b in zip(levels, expected, strict=True):
                assert torch.equal(a, b)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert state.keys() == model.state_dict().keys()


def test_where_they_are_synchronised(data: CocoDataset, tmp_path: Path, monkeypatch) -> None:
    recipe = dataclasses.replace(NORMED, steps=1, sync_batch_norm=True)
    train(recipe, data, tmp_path / "one.pt", pretrained=False)  # of one process: nothing to do
    monkeypatch.setattr("models.train.world_size", lambda: 2)
    with pytest.raises(
        ValueError, match="sync_batch_norm must be false for several processes on cpu, got True"
    ):
        train(recipe, data, tmp_path / "two.pt", pretrained=False)
    assert not (tmp_path / "two.pt").exists()


RANK = """
import dataclasses, sys
from pathlib import Path

import torch
from test_models_optimization import NORMED

from models.data import CocoDataset
from models.distributed import gather, process_group, rank
from models.train import train
from models.validation import Validation

seen = []


def evaluate(model):
    seen.append(torch.cat([b.flatten().double() for b in model.buffers()]))
    return {"AP": 0.0}


data, file = CocoDataset(sys.argv[1], "train"), Path(sys.argv[2])
with process_group("cpu"):
    for changes in ({"ema_buffers": True}, {"ema_decay": None}):
        recipe = dataclasses.replace(NORMED, **changes)
        model = train(recipe, data, file, pretrained=False, validation=Validation(evaluate, 2))
        seen.append(torch.cat([b.flatten().double() for b in model.buffers()]))
        parts = gather([torch.stack(seen)])
        if rank() == 0:
            assert len(seen) == 3 and torch.equal(*parts), (parts[0] - parts[1]).abs().amax(dim=1)
            print("the same")
        seen.clear()
"""


def test_all_processes_evaluate_one_model(data: CocoDataset, tmp_path: Path) -> None:
    """Each saw other images, and its batch norms have other statistics until they are rank 0's."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(data.root), str(tmp_path / "run.pt")]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("the same") == 2
