"""EfficientDet's recipes: its models as published, and their training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder

from models.__main__ import main
from models.checkpoint import expected_bytes, load_checkpoint
from models.commands.common import for_data, with_given
from models.data import CocoDataset
from models.detector import Detector
from models.detectors import create
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
    size = name.removeprefix("efficientdet_")
    drop_path = 0 if size == "d0" else 0.2
    assert recipe.model == EfficientDetConfig.named(f"tf_{size}", drop_path=drop_path)
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


def test_residual_blocks_are_dropped_in_training_alone() -> None:
    small = {"cells": 1, "head_depth": 1, "pyramid_channels": 8, "min_size": 64, "max_size": 64}
    config = EfficientDetConfig.named("lite0", **small)
    torch.manual_seed(0)
    model, plain = create(dataclasses.replace(config, drop_path=0.5)), create(config)
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 64, 64)

    @torch.no_grad()
    def features(of: Detector, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return of.backbone(images)["c5"]  # type: ignore[operator, no-any-return]

    model.eval(), plain.eval()
    assert torch.equal(features(model, 0), features(plain, 1))
    model.train(), plain.train()
    assert torch.equal(features(plain, 0), features(plain, 1))
    assert not torch.equal(features(model, 0), features(model, 1))
    assert torch.equal(features(model, 1), features(model, 1))


def test_blocks_that_cannot_be_dropped() -> None:
    with pytest.raises(
        ValueError,
        match=r"^drop_path must be 0 with a backbone of torchvision's, resnet18, got 0.2$",
    ):
        EfficientDetConfig(backbone="resnet18", drop_path=0.2)
    with pytest.raises(
        ValueError, match=r"^drop_path must be 0 with backbone 'timm:vgg11', got 0.2$"
    ):
        create(EfficientDetConfig(backbone="timm:vgg11", drop_path=0.2))


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
