"""A detector that models/ does not know: one file, one row of the table, and every command takes it."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixtures import DISC, SQUARE, Killed, lines_of
from test_models_train import assert_same
from torch import Tensor, nn
from toy_detector import Toy, ToyConfig

import models
from models import deploy
from models.__main__ import main
from models.checkpoint import load_checkpoint, load_model
from models.commands import export
from models.config import CLASSIFICATION_LOSSES, LossConfig, MatchingConfig
from models.data import CocoDataset
from models.detectors import DETECTORS, create, from_json, to_json
from models.finetune import take_weights
from models.losses import LossStep
from models.losses.classification import LOSSES
from models.recipes import Recipe
from models.retinanet import RetinaNet, RetinaNetConfig
from models.train import train

pytest_plugins = ["models_runs"]


@pytest.fixture(scope="module", autouse=True)
def in_the_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "toy", (ToyConfig, Toy))
        yield


@pytest.fixture(scope="module")
def recipe(in_the_table: None) -> Recipe:
    return Recipe(
        model=ToyConfig(
            num_classes=2,
            min_size=(48, 64, 88),
            normalizer="batch",
            max_size=160,
            score_threshold=0.0,
            detections_per_image=20,
        ),
        steps=40,
        batch_size=2,
        optimizer="adamw",
        learning_rate=1e-2,
        warmup_steps=2,
        ema_decay=0.9,
    )


@pytest.fixture(scope="module")
def recipe_file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "toy.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return path


# ---- The commands --------------------------------------------------------------------------------


def test_it_trains_and_is_resumed_to_the_same_bits(recipe, run, kill_after, tmp_path: Path) -> None:
    options = ("--resume", "--checkpoint-every", "15", "--log-every", "1")
    run(*options, folder="whole")
    kill_after(20)
    with pytest.raises(Killed):
        run(*options)
    kill_after(0)
    run(*options, recipe=False)
    whole, resumed = tmp_path / "whole", tmp_path / "run"
    assert lines_of(resumed) == lines_of(whole)
    checkpoint = load_checkpoint(whole / "checkpoint.pt")
    assert_same(load_checkpoint(resumed / "checkpoint.pt"), checkpoint)
    assert checkpoint["recipe"] == recipe
    losses = [line["classification"] + line["bbox_regression"] for line in lines_of(whole)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])  # 0.66; without learning about 1


def test_it_validates_on_the_way(run, tmp_path: Path) -> None:
    printed = run("--val-split", "val", "--evaluate-every", "30")
    assert (tmp_path / "run" / "best.pt").exists() and "best: " in printed


def test_it_evaluates_and_predicts(finished: Path, coco_folder: Path, tmp_path: Path, capsys):
    checkpoint, out = str(finished / "checkpoint.pt"), tmp_path / "out"
    data = ["--data", str(coco_folder), "--out", str(out / "results.json")]
    assert main(["evaluate", checkpoint, *data, "--device", "cpu"]) == 0
    assert "Average Precision" in capsys.readouterr().out
    assert len(json.loads((out / "results.json").read_text())) == 40
    image = str(next((coco_folder / "val2017").iterdir()))
    options = ["--min-score", "0", "--format", "json", "--out", str(out / "pictures")]
    assert main(["predict", checkpoint, image, *options, "--device", "cpu"]) == 0
    found = json.loads((out / "pictures" / "predictions.json").read_text())["images"][0]
    assert len(found["detections"]) == 20


def test_it_is_studied(coco_folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    for name, more in (("seeds", ["--seeds", "1"]), ("distribution", ["--samples", "1"])):
        options = ["--data", str(coco_folder), "--recipe", str(recipe_file), "--steps", "1", *more]
        options += ["--no-pretrained", "--device", "cpu", "--out", str(tmp_path)]
        assert main(["study", name, *options]) == 0
    assert json.loads((tmp_path / "seeds.json").read_text())["recipe"]["model"]["kind"] == "toy"


@torch.no_grad()
def test_its_deployed_form_is_the_eager_model(finished: Path) -> None:
    model, _, _ = load_model(finished / "checkpoint.pt")
    detector = deploy.StaticDetector(model)
    assert detector.metadata == {"size_divisor": "16", "min_size": "88", "max_size": "160"}
    images = [torch.rand(3, 96, 120), torch.rand(3, 70, 50)]
    batch = detector.to_batch(images)
    assert batch[0].shape == (2, 3, 96, 128)
    # The first image becomes 88 x 110, the second 123 x 88.
    assert detector.prepare(*batch)[0].shape == (2, 3, 128, 112)
    assert model.transform(images)[0].tensors.shape == (2, 3, 128, 112)
    exported = deploy.export(detector, *batch).module()
    for image in (*images, torch.rand(3, 40, 77)):
        (expected,) = model([image])
        alone = detector.to_batch([image])
        for run in (detector, lambda *inputs: exported(*detector.prepare(*inputs))):
            boxes, scores, labels, counts = run(*alone)
            assert counts[0] == len(expected["scores"]) == 20
            # Normalising after the resize instead of before rounds otherwise.
            torch.testing.assert_close(boxes[0], expected["boxes"], rtol=0, atol=1e-3)
            torch.testing.assert_close(scores[0], expected["scores"], rtol=0, atol=1e-5)
            assert torch.equal(labels[0], expected["labels"])


def test_it_is_exported(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def forms(detector, images, sizes, path):  # without what takes minutes
        assert images.shape[-2:] == (48, 80)  # multiples of 16
        return {"torch.export": deploy.export(detector, images, sizes).module()}

    monkeypatch.setattr(export, "forms", forms)
    arguments = [str(finished / "checkpoint.pt"), "--out", str(tmp_path / "toy.pt2")]
    assert main(["export", *arguments, "--size", "40", "80", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "torch.export\n" in printed  # no disagreement
    assert "2 images of 80 x 160, milliseconds:" in printed


def test_its_weights_start_another_run(recipe: Recipe, finished: Path, data: CocoDataset) -> None:
    path = finished / "checkpoint.pt"
    source = load_checkpoint(path)
    model = create(recipe.model)
    swapped = {SQUARE: "square", DISC: "ring"}
    said = take_weights(model, path, source, swapped)
    assert said.endswith("the rows of 1 of 2 categories (not ring)")
    before = list(data.categories.values()).index("square")
    theirs = source["average"]["module.classes.weight"]
    assert torch.equal(model.state_dict()["classes.weight"][0::2], theirs[before::2])


# ---- Parts of the loss step ----------------------------------------------------------------------


class Balanced(LossStep):
    """The two losses with learned weights (Kendall et al., 2018)."""

    def __init__(self, matching: MatchingConfig, loss: LossConfig, finest_stride: int) -> None:
        super().__init__(matching, loss, finest_stride)
        self.logarithms = nn.Parameter(torch.zeros(2))

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        pairs = zip(super().forward(*inputs).items(), self.logarithms, strict=True)
        return {name: loss * (-s).exp() + s for (name, loss), s in pairs}


def test_a_part_of_the_loss_may_learn(
    recipe: Recipe, data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are trained, saved, averaged and resumed as the network's are."""
    monkeypatch.setattr("models.detector.LossStep", Balanced)
    recipe = dataclasses.replace(recipe, steps=4)
    whole, resumed = tmp_path / "whole.pt", tmp_path / "resumed.pt"

    def die(step: int, model: models.Detector) -> None:
        raise Killed

    train(recipe, data, whole)
    with pytest.raises(Killed):
        train(recipe, data, resumed, checkpoint_every=2, saved=die)
    train(recipe, data, resumed, resume=True)
    checkpoint = load_checkpoint(whole)
    assert_same(load_checkpoint(resumed), checkpoint)
    assert checkpoint["model"]["loss_step.logarithms"].all()
    assert checkpoint["average"]["module.loss_step.logarithms"].all()
    model, _, _ = load_model(whole)
    trained = [checkpoint[name]["state"] for name in ("optimizer", "loss_optimizer")]
    assert sum(map(len, trained)) == len([*model.parameters()])


# ---- Kinds in files ------------------------------------------------------------------------------


def test_a_run_goes_on_as_its_own_kind(run, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    said = run("--resume", "--recipe", "small", recipe=False, fails=True)
    assert "must go on with its own recipe: kind toy, got retinanet" in said
    said = run("--backbone", "resnet18", folder="other", fails=True)
    assert said == "error: --backbone is nothing that a toy has"
    assert not (tmp_path / "other").exists()


def test_a_model_and_its_kind() -> None:
    for kind, (config, _) in DETECTORS.items():
        assert config.kind == kind and "kind" not in {f.name for f in dataclasses.fields(config)}
        values = json.loads(json.dumps(to_json(config())))
        assert values["kind"] == kind and from_json(values) == config()
        model = create(dataclasses.replace(config(), num_classes=3))
        assert isinstance(model, models.Detector) and model.config.num_classes == 3
        assert any(name.startswith(model.class_layers) for name, _ in model.named_parameters())
    assert type(create(RetinaNetConfig())) is RetinaNet
    old = dataclasses.asdict(RetinaNetConfig(num_classes=7))
    assert from_json(old) == RetinaNetConfig(num_classes=7)
    for values, sentence in (
        ({"kind": "yolo"}, "kind must be one of retinanet, efficientdet, toy, got 'yolo'"),
        ({"kind": ["toy"]}, "kind must be one of"),
        ({"kind": "toy", "backbone": "resnet18"}, "ToyConfig has no backbone"),
        ({"kind": "toy", "width": 0}, "width must be a whole number at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            from_json(values)


def test_a_recipe_needs_a_row_of_the_table() -> None:
    class Unknown(ToyConfig):
        kind = "unknown"

    with pytest.raises(ValueError, match="model must be the configuration of a detector that"):
        Recipe(model=Unknown())


def test_a_detector_without_a_network_says_so() -> None:
    model = models.Detector(ToyConfig(), create(ToyConfig()).anchor_generator)
    with pytest.raises(NotImplementedError, match="Detector has no network"):
        model.eval()([torch.rand(3, 64, 64)])


def test_every_loss_is_a_row() -> None:
    assert tuple(LOSSES) == CLASSIFICATION_LOSSES


# ---- The house -----------------------------------------------------------------------------------


def test_files_are_no_circle() -> None:
    """What they import where they are imported; config.py lies on the ground floor."""
    root = Path(models.__file__).parent
    graph = {}
    for file in root.rglob("*.py"):
        own = file.relative_to(root).with_suffix("").parts
        graph[own] = {
            found
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
            for found in [_file(root, own, node, alias.name)]
            if found != own
        }
    assert graph[("config",)] == {("ranges",)}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def _file(root: Path, own: tuple[str, ...], node: ast.ImportFrom, name: str) -> tuple[str, ...]:
    package = own[: len(own) - node.level] + tuple((node.module or "").split("."))
    found = tuple(part for part in package if part)
    for parts in ((*found, name), found, (*found, "__init__")):
        if root.joinpath(*parts).with_suffix(".py").is_file():
            return parts
    raise AssertionError(f"{own} imports {found}")


def test_names_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, models; assert 'torch' not in sys.modules, 'torch is imported at once'\n"
        "from models import *; print(RetinaNet(RetinaNetConfig(backbone='resnet18')).config.kind)"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "retinanet\n", result.stderr
    assert {*models.__all__} <= {*dir(models)}
    with pytest.raises(AttributeError, match="module 'models' has no attribute 'nothing'"):
        models.nothing  # noqa: B018
