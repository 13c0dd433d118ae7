"""--model: the model in place of a recipe's, by the name of its kind or of a published size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixtures import make_coco_folder
from tiny_backbone import TINY_RECIPE

from models.__main__ import main
from models.checkpoint import load_checkpoint
from models.command_line import parser
from models.commands import demo
from models.commands.train import new_run, recipe_options
from models.detectors import DETECTORS, PUBLISHED, create
from models.efficientdet import SCALES, EfficientDetConfig
from models.recipes import RECIPES, Recipe
from models.retinanet import RetinaNetConfig


def of_train(*words: str, data: str = "d") -> Recipe:
    options = parser().parse_args(["train", "--data", data, "--out", "o", *words])
    return new_run(options, recipe_options(options))[0]


def test_names() -> None:
    """Those of DETECTORS, of torchvision, and of the original EfficientDets."""
    assert {f"efficientdet_{size}" for size in SCALES} <= {*PUBLISHED}
    for name, config in PUBLISHED.items():
        assert name.startswith(f"{config.kind}_") and name not in DETECTORS
    d0 = of_train("--model", "efficientdet_d0", "--recipe", "coco")
    classes = {"num_classes": RECIPES["coco"].model.num_classes}
    assert d0.model == dataclasses.replace(PUBLISHED["efficientdet_d0"], **classes)  # type: ignore[arg-type]
    assert PUBLISHED["efficientdet_d0"] == EfficientDetConfig.named("tf_d0")
    assert d0.learning_rate == RECIPES["coco"].learning_rate and d0.steps == 90_000
    assert of_train("--model", "efficientdet").model == EfficientDetConfig(**classes)
    v2 = of_train("--model", "retinanet_resnet50_fpn_v2", "--recipe", "small")
    assert v2.model == RECIPES["coco_v2"].model and v2.steps == RECIPES["small"].steps


def test_the_recipe_behind_it() -> None:
    """Without --recipe the published training, where there is one; else that of the data."""
    assert of_train("--model", "efficientdet_d3") == RECIPES["efficientdet_d3"]
    assert of_train("--model", "retinanet") == RECIPES["coco"]
    assert of_train("--model", "efficientdet_lite1").steps == RECIPES["coco"].steps
    on_trees = of_train("--model", "efficientdet_d0", data="trees")
    assert on_trees.crop == RECIPES["trees"].crop and on_trees.model.kind == "efficientdet"


def test_a_recipe_that_crops_keeps_the_size_of_its_crops() -> None:
    model = of_train("--model", "efficientdet_d0", "--recipe", "trees").model
    assert (model.min_size, model.letterbox) == (None, False)
    model = of_train("--model", "efficientdet_lite0", "--recipe", "coco", "--crop", "128").model
    assert (model.min_size, model.letterbox) == (None, False)


def test_options_change_the_model_that_is_named() -> None:
    changed = of_train("--model", "efficientdet_d0", "--cells", "1", "--steps", "5")
    assert changed.model.cells == 1 and changed.steps == 5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="--cells is nothing that a retinanet has"):
        of_train("--model", "retinanet", "--cells", "1")
    jittered = ["--recipe", "efficientdet_d0", "--model", "retinanet"]
    with pytest.raises(ValueError, match="scale_jitter must be nothing without the model's letter"):
        of_train(*jittered)
    plain = of_train(*jittered, "--scale-jitter", "none").model
    assert plain == RetinaNetConfig(num_classes=90)
    assert of_train(*jittered, "--letterbox").model.letterbox


COMMANDS = {
    "train": "train --data missing --out {out}",
    "train --resume": "train --data missing --out {out} --resume",
    "study": "study loss --data missing --out {out}",
    "bench": "bench --out {out}/figures.json",
    "demo": "demo --out {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_name_is_a_sentence(command: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = COMMANDS[command].format(out=out).split()
    assert main([*arguments, "--model", "yolo", "--device", "cpu"]) == 1
    names = ", ".join([*DETECTORS, *PUBLISHED])
    assert capsys.readouterr().err == f"error: --model must be one of {names}, got 'yolo'\n"
    assert not out.exists()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A published size that trains in seconds."""
    model: dict[str, Any] = {"cells": 1, "head_depth": 1, "pyramid_channels": 16}
    config = EfficientDetConfig.named("lite0", min_size=64, max_size=64, **model)
    monkeypatch.setitem(PUBLISHED, "efficientdet_tiny", config)
    monkeypatch.setitem(RECIPES, "tiny", TINY_RECIPE)
    return "efficientdet_tiny"


def test_a_run_of_it(tiny: str, tmp_path: Path, capsys) -> None:
    """Trained, gone on with, refused as another, studied."""
    data = str(make_coco_folder(tmp_path / "coco"))
    common = ["--data", data, "--recipe", "tiny", "--no-pretrained", "--device", "cpu"]
    run = ["train", *common, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*run, "--model", tiny]) == 0
    trained = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["recipe"]
    assert trained.model.kind == "efficientdet" and trained.model.num_classes == 2
    assert main([*run, "--model", tiny, "--resume"]) == 0
    capsys.readouterr()
    assert main([*run, "--model", "retinanet", "--resume"]) == 1
    assert "its own recipe: kind efficientdet, got retinanet" in capsys.readouterr().err
    study = ["study", "seeds", *common, "--seeds", "1", "--steps", "1"]
    assert main([*study, "--out", str(tmp_path / "study"), "--model", tiny]) == 0
    record = json.loads((tmp_path / "study" / "seeds.json").read_text())
    assert record["recipe"]["model"]["kind"] == "efficientdet"


def test_bench_of_it(tiny: str, tmp_path: Path, capsys) -> None:
    """Beside torchvision's where torchvision has it, else alone."""
    out = tmp_path / "bench.json"
    arguments = ["bench", "--model", tiny, "--rounds", "1", "--device", "cpu", "--out", str(out)]
    assert main([*arguments, "--size", "48", "80", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "torchvision" not in printed and "focalops" in printed and "training step" in printed
    record = json.loads(out.read_text())
    assert record["model"] == tiny
    assert all([*times] == ["focalops"] for times in record["ms"].values())


def test_the_demo_of_it(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(demo, "show", lambda options, recipe: trained.append(recipe))
    assert main(["demo", "--model", tiny, "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    (recipe,) = trained
    assert recipe.model.kind == "efficientdet" and recipe.model.num_classes == 1
    with torch.device("meta"):
        create(recipe.model)
