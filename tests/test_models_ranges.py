"""Every field of a recipe and every option of training has a range, and says it in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixtures import make_coco_folder
from tiny_backbone import TINY_RECIPE

from models import recipes
from models.__main__ import main
from models.command_line import COMMANDS
from models.efficientdet import EfficientDetConfig
from models.recipes import RECIPES, Recipe
from models.retinanet import RetinaNetConfig

NAN, INF = math.nan, math.inf

# Of each field a value that is none of the default's, and some that mean nothing.
RECIPE_FIELDS: dict[str, tuple[Any, list[Any]]] = {
    "model": (RetinaNetConfig(num_classes=1), [None, {}]),
    "steps": (1, [0, -1, 2.0, True, None, "5"]),
    "batch_size": (1, [0, -8, 1.5]),
    "accumulate": (2, [0, -1, 3]),
    "precision": ("bfloat16", ["half", None]),
    "compile": (True, [1, None]),
    "sync_batch_norm": (True, [1, "cuda"]),
    "seed": (1, [-1, 0.5, 2**63]),
    "optimizer": ("adamw", ["adam"]),
    "learning_rate": (1, [0, -0.1, NAN, INF, 1e39, "0.1"]),
    "weight_decay": (0, [-1e-4, NAN]),
    "decay_vectors": (False, [0, None]),
    "schedule": ("cosine", ["linear"]),
    "drops": ((), [(0.9, 0.1), (1.5,), (-0.1,), 0.5, None]),
    "warmup_steps": (0, [-1, 2.5]),
    "clip_norm": (1.0, [0, -1, NAN]),
    "ema_decay": (0.5, [1, -0.1, NAN]),
    "ema_warmup": (True, [1, None]),
    "ema_buffers": (True, [0, "yes"]),
    "crop": (64, [0, -64, 2.5]),
    "crop_zoom": ((0.5, 2), [(2.0, 1.0), (0, 1), (1.0,), (1.0, INF), 1.0]),
    "scale_jitter": ((0.1, 2), [(2.0, 0.1), (0, 1), (1.0,), (1.0, INF), 1.0]),
    "dihedral": (True, ["yes"]),
    "photometric": (True, [0]),
    "window": (512, [0, -1, 128]),
    "window_overlap": (0, [-1, 0.5]),
    "symmetries": (True, [None]),
    "max_detections": (1, [0, -1]),
}
MODEL_FIELDS: dict[str, tuple[Any, list[Any]]] = {
    "num_classes": (1, [0, -1, None]),
    "backbone": ("timm:resnet18", ["vgg16", None, 18]),
    "trainable_stages": (0, [-1, 6]),
    "frozen_batch_norm": (False, [0]),
    "batch_norm_eps": (0, [-1e-5, NAN]),
    "min_level": (3, [1, 6, 8, None]),
    "max_level": (7, [6, 8, 2]),
    "pyramid_channels": (32, [0, -1]),
    "p6_from": ("c5", ["p6"]),
    "head_depth": (0, [-1]),
    "head_norm_groups": (32, [0, 3]),
    "head_std": (None, [0, NAN]),
    "prior_probability": (0.5, [0, 1, NAN]),
    "anchor_sizes": (
        ((1,),) * 5,
        [((1,),) * 4, ((0,),) * 5, ((1,),) * 4 + ((1, 2),), ((),) * 5, 3],
    ),
    "aspect_ratios": ((1,), [(), (0,), (-1.0,), (NAN,), 1.0]),
    "assigner": ("atss", ["ota", None]),
    "fg_iou_threshold": (1, [-0.1, 1.1, 0.3, NAN]),
    "bg_iou_threshold": (0, [-0.1, 1.1, 0.6, NAN]),
    "matching_rule": ("mmdet", ["detectron2", None]),
    "classification_loss": ("ohem", ["cross_entropy"]),
    "class_frequencies": (None, [(1.5,), (-0.1,), (NAN,), (0.5,), ()]),
    "rare_below": (0.5, [-1, 1.5, NAN]),
    "alpha": (-1, [7, -0.5, NAN]),
    "gamma": (0, [-1, NAN, INF]),
    "beta": (-1.5, [NAN, None]),
    "weighting": ("pisa", ["ghm"]),
    "normalizer": ("batch", ["mean"]),
    "box_loss": ("giou", ["l2"]),
    "box_loss_beta": (0.1, [0, -1, NAN]),
    "box_loss_weight": (0, [-1, NAN, INF]),
    "score_threshold": (0, [-0.1, 1.5, NAN]),
    "nms_threshold": (1, [-0.1, 50, NAN]),
    "topk_candidates": (1, [0, -1]),
    "topk": (1, [0, -1]),
    "nms_method": ("gaussian", ["soft", None]),
    "nms_sigma": (0.5, [0, -1, NAN]),
    "detections_per_image": (1, [0, -1]),
    "min_size": ((480, 800), [0, -1, 2000, (), (480, 2000), (0,), 80.5]),
    "max_size": (800, [0, 799]),
    "letterbox": (True, [1, None]),
    "image_mean": ((0, 0, 0), [(0.5,), (NAN, 0, 0), 0.5]),
    "image_std": ((1, 1, 1), [(0, 1, 1), (1, 1), (NAN, 1, 1)]),
}
# Of an EfficientDet, where they are not a RetinaNet's.
EFFICIENTDET_FIELDS: dict[str, tuple[Any, list[Any]]] = {
    name: row
    for name, row in MODEL_FIELDS.items()
    if name not in ("p6_from", "head_norm_groups", "head_std")
} | {
    "max_level": (7, [5, None]),
    "cells": (1, [0, -1]),
    "fusion": ("unbounded", ["mean"]),
    "activation": ("relu6", ["relu"]),
    "padding": ("same", ["valid"]),
    "redundant_bias": (True, [1]),
    "batch_norm_momentum": (0.1, [0.0, 1.5, math.nan, "0.1"]),
    "drop_path": (0.2, [1, -0.1, NAN]),
    "aspect_ratios": ((1, (1.4, 0.7)), [(), (0,), ((1, 2, 3),), (NAN,), 1.0]),
    "min_size": ((480, 512), [0, -1, 2000, (), (480, 2000), (0,), 80.5]),
    "max_size": (800, [0, 511]),
    "letterbox": (False, [0, None]),
}
# What has such a field, where the defaults have not what it needs.
NEEDED = {"scale_jitter": Recipe(model=EfficientDetConfig())}


@pytest.mark.parametrize(
    ("kind", "table", "ranges"),
    [
        (Recipe, RECIPE_FIELDS, recipes.RANGES),
        (RetinaNetConfig, MODEL_FIELDS, RetinaNetConfig.ranges()),
        (EfficientDetConfig, EFFICIENTDET_FIELDS, EfficientDetConfig.ranges()),
    ],
)
def test_every_field_has_a_range(kind: type, table: dict, ranges: dict) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert names == set(table) == set(ranges)
    for name, (good, bad) in table.items():
        base = NEEDED.get(name, kind())
        changed = dataclasses.replace(base, **{name: good})
        assert getattr(changed, name) == good
        for value in bad:
            with pytest.raises(ValueError, match=rf"(?s)^(?=.*\b{name}\b).* must .* got ") as error:
                dataclasses.replace(base, **{name: value})
            assert "\n" not in str(error.value)


def test_fields_that_depend_on_each_other() -> None:
    for model, sentence in (
        ({"classification_loss": "focal_star", "gamma": 0.0}, "gamma must be above 0 with"),
        (
            {"head_norm_groups": 3},
            "pyramid_channels must be a multiple of head_norm_groups, 3, got 256",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            RetinaNetConfig(**model)
    for recipe, sentence in (
        ({"window": 100}, "window must be larger than window_overlap, 128, got 100"),
        ({"crop": 1, "crop_zoom": (1.0, 4.0)}, "crop must be at least a pixel"),
        (
            {"batch_size": 6, "accumulate": 4},
            "batch_size must be a multiple of accumulate, 4, got 6",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            Recipe(**recipe)


def test_recipes_as_dictionaries() -> None:
    for recipe in (*RECIPES.values(), TINY_RECIPE):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        if isinstance(recipe.model, RetinaNetConfig):  # files of before had no kind
            values = json.loads(json.dumps(dataclasses.asdict(recipe)))
            assert Recipe.from_dict(values) == recipe
    good = dataclasses.asdict(TINY_RECIPE)
    for values, sentence in (
        (None, "Recipe must be a dictionary, got NoneType"),
        ([], "Recipe must be a dictionary, got list"),
        ({}, "RetinaNetConfig must be a dictionary, got NoneType"),
        ({**good, "model": 3}, "RetinaNetConfig must be a dictionary, got int"),
        ({**good, "momentum": 1, 5: 6}, "Recipe has no 5, momentum"),
        ({**good, "model": {"classes": 1}}, "RetinaNetConfig has no classes"),
        (
            {**good, "model": {"kind": "yolo"}},
            "kind must be one of retinanet, efficientdet, got 'yolo'",
        ),
        ({**good, "steps": None}, "steps must be a whole number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Recipe.from_dict(values)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco_folder(tmp_path_factory.mktemp("data") / "coco")


OPTIONS = {  # of train
    "--steps": ["0", "-5", "9999999999"],
    "--batch-size": ["0", "-8", "3 --accumulate 2"],
    "--accumulate": ["0"],
    "--learning-rate": ["0", "nan", "inf", "1e300"],
    "--warmup-steps": ["-1"],
    "--clip-norm": ["-1", "0", "nan"],
    "--ema-decay": ["1", "nan"],
    "--alpha": ["7", "nan"],
    "--gamma": ["nan", "-1"],
    "--seed": ["-1"],
    "--min-size": ["0", "0 80", "4000"],
    "--max-size": ["0", "100"],
    "--crop": ["0"],
    "--window": ["0", "100"],
    "--workers": ["-1"],
    "--checkpoint-every": ["0", "-1"],
    "--log-every": ["0"],
    "--evaluate-every": ["0 --val-split val", "5"],
    "--patience": ["0 --val-split val", "5"],
    "--device": ["foo", "meta", "cpu:foo", *([] if torch.cuda.is_available() else ["cuda"])],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_mean_nothing(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str
) -> None:
    """Refused in one sentence that names the option, before the folder is made."""
    for value in OPTIONS[option]:
        out = tmp_path / "run"
        command = ["train", "--data", str(coco_folder), "--out", str(out), "--no-pretrained"]
        device = [] if option == "--device" else ["--device", "cpu"]
        assert main([*command, *device, option, *value.split()]) == 1, value
        error = capsys.readouterr().err.strip()
        assert re.match(rf"error: .*{option}[ ,]", error) and "\n" not in error, error
        assert not out.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_checks_its_device(command: str, capsys: pytest.CaptureFixture) -> None:
    needed = {
        "train": ["--data", "d", "--out", "o"],
        "evaluate": ["c.pt", "--data", "d"],
        "predict": ["c.pt", "i.png"],
        "export": ["c.pt"],
        "study": ["loss"],
        "convert": ["d", "--out", "o"],
        "check": ["d"],
    }
    assert main([command, *needed.get(command, []), "--device", "foo"]) == 1
    error = capsys.readouterr().err.strip()
    assert error == (
        f"error: --device must be one that torch can use here, such as {available()}, got 'foo'"
    )


def available() -> str:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *(["cuda"] if cuda else []), *cuda])


def test_recipe_files_name_the_file(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "recipe.json"
    command = ["train", "--data", str(coco_folder), "--out", str(tmp_path / "run")]
    good = dataclasses.asdict(TINY_RECIPE)
    for content, sentence in (
        ({**good, "steps": 0}, "steps must be a whole number at least 1, got 0"),
        ({**good, "model": {**good["model"], "gamma": NAN}}, "gamma must be a finite number"),
        ({**good, "rate": 1}, "Recipe has no rate"),
        ([1], "Recipe must be a dictionary, got list"),
    ):
        file.write_text(json.dumps(content))
        assert main([*command, "--recipe", str(file), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: the file {file} is no recipe ({sentence}"), error


def test_a_billion_steps_start_at_once() -> None:
    """What a step reads is made when it is read."""
    from models.train import Batches

    recipe = dataclasses.replace(TINY_RECIPE, steps=2**31 - 1, batch_size=8, accumulate=2)
    shares = Batches(recipe, 5, rank=1, world_size=2)
    assert len(shares) == 2 * (2**31 - 6)
    assert shares[0] == next(iter(shares)) == [42, 43]
    assert shares.of_step(2**31 - 2) == [*shares[-2], *shares[-1]]
