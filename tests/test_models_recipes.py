"""EfficientDet's recipes: its models as published, and their training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from models_fixtures import make_coco_folder

from models.__main__ import main
from models.checkpoint import expected_bytes, load_checkpoint
from models.commands.common import for_data, with_given
from models.data import CocoDataset
from models.efficientdet import SCALES, EfficientDetConfig
from models.optimization import lr_factor
from models.recipes import RECIPES, Recipe
from models.train import train

PUBLISHED = [f"efficientdet_{name}" for name in SCALES if not name.startswith("lite")]


def test_every_published_size_has_one() -> None:
    names = [f"efficientdet_d{n}" for n in (*range(8), "7x")]
    assert names == PUBLISHED
    assert {*names, "efficientdet_small"} <= {*RECIPES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_training(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.model == EfficientDetConfig.named(f"tf_{name.removeprefix('efficientdet_')}")
    assert recipe.model.letterbox and recipe.model.gamma == 1.5
    epoch = 120_000 // 128
    epochs = 600 if "d7" in name else 300
    assert (recipe.batch_size, recipe.warmup_steps, recipe.steps) == (128, epoch, epochs * epoch)
    assert (recipe.optimizer, recipe.schedule, recipe.learning_rate) == ("sgd", "cosine", 0.16)
    assert (recipe.weight_decay, recipe.decay_vectors, recipe.clip_norm) == (4e-5, False, 10)
    assert (recipe.ema_decay, recipe.ema_warmup, recipe.ema_buffers) == (0.9998, True, True)
    assert (recipe.scale_jitter, recipe.dihedral, recipe.photometric) == ((0.1, 2.0), False, False)
    assert recipe.sync_batch_norm
    assert lr_factor(recipe, epoch) == 1 and lr_factor(recipe, recipe.steps - 1) < 1e-9
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_small_one_trains_and_its_checkpoint_is_as_large_as_said(tmp_path: Path) -> None:
    data = CocoDataset(make_coco_folder(tmp_path / "coco"), "train")
    recipe = with_given(for_data(RECIPES["efficientdet_small"], data), {"steps": 2})
    recipe = dataclasses.replace(recipe, batch_size=2)
    file = tmp_path / "checkpoint.pt"
    train(recipe, data, file, pretrained=False)
    assert load_checkpoint(file)["recipe"] == recipe
    assert expected_bytes(recipe) == pytest.approx(file.stat().st_size, rel=0.1)


def test_configs_prints_them(capsys) -> None:
    assert main(["configs", "efficientdet_d7x"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["kind"] == "efficientdet" and printed["model"]["max_level"] == 8
    assert Recipe.from_dict(printed) == RECIPES["efficientdet_d7x"]
