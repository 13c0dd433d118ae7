"""The study command, and the losses that it compares."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_fixtures import make_coco_folder
from test_models_retinanet import TINY

from models import distribution, study
from models.__main__ import main
from models.commands.common import for_data
from models.config import CLASSIFICATION_LOSSES
from models.data import open_data
from models.detectors import create
from models.efficientdet import EfficientDetConfig
from models.losses import Matched
from models.losses.balance import GradientBalance
from models.losses.classification import OHEM_BATCH, classification_loss, rows_of
from models.measures import THIRDS, thirds
from models.recipes import RECIPES, Recipe
from models.structures import HeadOutputs
from models.train import TrainingInterrupted, training_stream

RECIPE = Recipe(
    model=dataclasses.replace(TINY, min_size=None, frozen_batch_norm=True),
    steps=1,
    batch_size=2,
    warmup_steps=0,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(dataclasses.asdict(RECIPE)))
    return path


def run_study(name: str, coco: Path, recipe: Path, out: Path, *more: str) -> int:
    splits = ["--split", "train2017", "--val-split", "val2017"]
    arguments = ["study", name, "--data", str(coco), *splits, "--recipe", str(recipe)]
    return main([*arguments, "--no-pretrained", "--device", "cpu", "--out", str(out), *more])


def head(classes: int = 2) -> Matched:
    levels = [torch.randn(2, 3 * classes, 6, 4) * 3, torch.randn(2, 3 * classes, 3, 2) * 3]
    anchors = torch.rand(90, 2).repeat(1, 2) * 90 + torch.tensor([-9.0, -9, 9, 9])
    labels = torch.randint(0, classes + 1, (2, 90))
    labels[:, ::7] = -100
    outputs = HeadOutputs(levels, [])
    matches = labels.where(labels < classes, -1)  # the losses of the classes do not look at them
    return Matched(
        outputs,
        anchors,
        [],
        matches,
        labels,
        torch.tensor([3, 0]),
        balance=GradientBalance(classes),
    )


def check_loss(name: str, expected_of, **config) -> None:
    """expected_of(p of the truth (kept anchors, K), truth, index of the kept anchors) of each image."""
    matched = head()
    labels, counts = matched.classes, matched.normalizers
    total = torch.zeros((), dtype=torch.float64)
    for i, rows in enumerate(rows_of(matched.outputs.cls_logits, 2).double()):
        kept = (labels[i] != -100).nonzero().squeeze(1)
        truth = F.one_hot(labels[i, kept], 3)[:, :2].bool()
        x_t = torch.where(truth, rows[kept], -rows[kept])
        total += expected_of(x_t, truth, kept, matched.anchors, max(int(counts[i]), 1))
    model = dataclasses.replace(TINY, classification_loss=name, **config)
    loss = classification_loss(matched, model)
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-5)


def test_focal_without_gamma_and_alpha_is_cross_entropy():
    check_loss("focal", lambda x, t, k, a, n: -F.logsigmoid(x).sum() / n, gamma=0.0, alpha=-1.0)


def test_focal_star():
    def expected(x, truth, kept, anchors, count):
        return -(torch.where(truth, 0.25, 0.75) * F.logsigmoid(2 * x + 1) / 2).sum() / count

    check_loss("focal_star", expected, gamma=2.0, beta=1.0, alpha=0.25)


def test_hinge():
    check_loss("hinge", lambda x, t, k, a, n: (0.5 - x.sigmoid()).clamp(min=0).sum() / n)


def test_ohem_takes_the_hardest_of_each_place():
    def expected(x, truth, kept, anchors, count):
        losses = -F.logsigmoid(x).sum(dim=1)
        corners = anchors[kept]
        chosen: list[int] = []
        for i in losses.argsort(descending=True).tolist():
            inter = (18 - (corners[i, :2] - corners[chosen, :2]).abs()).clamp(min=0).prod(dim=1)
            if not (inter / (2 * 18**2 - inter) > 0.5).any():
                chosen.append(i)
        return losses[chosen[:OHEM_BATCH]].mean()

    check_loss("ohem", expected)


@pytest.mark.parametrize("loss", CLASSIFICATION_LOSSES)
def test_losses_are_differentiable(loss):
    matched = head()
    matched = matched._replace(scores=torch.rand(matched.classes.shape))
    levels = [level.requires_grad_() for level in matched.outputs.cls_logits]
    model = dataclasses.replace(TINY, classification_loss=loss)
    classification_loss(matched, model).backward()
    assert all(level.grad.isfinite().all() and level.grad.any() for level in levels)


@pytest.mark.parametrize("name", study.STUDIES)
def test_variants_differ_in_what_is_compared(name):
    own = study.STUDIES[name].recipe
    for recipe in (
        (RECIPE, dataclasses.replace(RECIPE, crop=64), Recipe()) if own is None else [RECIPES[own]]
    ):
        variants = study.STUDIES[name].variants(recipe)
        least = {"seeds": 1, "fusion": 4, "scaling": 3}.get(name, 5)
        assert len({variant.name for variant in variants}) == len(variants) >= least
        configs = {json.dumps(dataclasses.asdict(variant.recipe)) for variant in variants}
        assert len(configs) == len(variants)


def test_study_goes_on_where_it_was(coco, recipe_file, tmp_path, capsys):
    assert run_study("box_loss", coco, recipe_file, tmp_path, "--seeds", "1") == 0
    first = json.loads((tmp_path / "box_loss.json").read_text())["runs"]
    assert run_study("box_loss", coco, recipe_file, tmp_path, "--seeds", "2") == 0
    record = json.loads((tmp_path / "box_loss.json").read_text())
    for name, runs in record["runs"].items():
        assert runs["0"] == first[name]["0"] and runs.keys() == {"0", "1"}
    table = (tmp_path / "box_loss.md").read_text()
    assert table.count("\n| ") == 1 + len(first) and "2 seeds" in table
    assert (tmp_path / "box_loss.png").stat().st_size > 10_000
    capsys.readouterr()
    assert run_study("box_loss", coco, recipe_file, tmp_path, "--steps", "2") == 1
    assert "holds runs of another recipe" in capsys.readouterr().err


def test_older_records_go_on(coco, recipe_file, tmp_path):
    """They say less of their runs; nothing contradicts them."""
    assert run_study("seeds", coco, recipe_file, tmp_path, "--seeds", "1") == 0
    file = tmp_path / "seeds.json"
    record = json.loads(file.read_text())
    for name in ("pair of annotation files", "start of the backbone"):
        del record[name]
    del record["recipe"]["model"]["kind"]
    file.write_text(json.dumps(record))
    assert run_study("seeds", coco, recipe_file, tmp_path, "--seeds", "2") == 0
    after = json.loads(file.read_text())
    assert after["runs"]["the recipe"]["0"] == record["runs"]["the recipe"]["0"]
    assert after.keys() == record.keys() and len(after["runs"]["the recipe"]) == 2


def test_an_interrupted_study_names_its_record(
    coco, recipe_file, tmp_path, capsys, monkeypatch
) -> None:
    def train(recipe: Recipe, *_, **__) -> None:
        raise TrainingInterrupted("interrupted after step 1 of 4")

    monkeypatch.setattr(study, "train", train)
    assert run_study("seeds", coco, recipe_file, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: interrupted after step 1 of 4: the record holds the runs")
    assert "resume" not in error and [*tmp_path.iterdir()] == []


def test_a_study_holds_its_folder(coco, recipe_file, tmp_path, capsys, monkeypatch) -> None:
    def train(recipe: Recipe, *_, **__) -> None:
        assert run_in_another_process(tmp_path) == "held"
        raise TrainingInterrupted("seen")

    monkeypatch.setattr(study, "train", train)
    assert run_study("seeds", coco, recipe_file, tmp_path) == 1
    assert "error: seen" in capsys.readouterr().err
    assert run_in_another_process(tmp_path) == "free"


def run_in_another_process(folder: Path) -> str:
    code = (
        "import pathlib, sys; from models.outputs import locked; from models.data import DataError\n"
        "try:\n  with locked(pathlib.Path(sys.argv[1])): print('free')\n"
        "except DataError: print('held')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def test_data_in_the_current_folder(coco, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(coco)
    assert run_study("seeds", Path(), recipe_file, tmp_path, "--seeds", "1") == 0
    record = json.loads((tmp_path / "seeds.json").read_text())
    assert record["val"] == f"{coco.name}/instances_val2017"


def test_a_study_needs_boxes_to_compare_with(coco, recipe_file, tmp_path, capsys):
    data = tmp_path / "coco"
    shutil.copytree(coco, data)
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    assert run_study("seeds", data, recipe_file, tmp_path / "out") == 1
    assert "has no boxes to evaluate against" in capsys.readouterr().err


def test_the_distribution_leaves_a_run_alone(coco, recipe_file, tmp_path, capsys):
    """--overwrite replaces what an earlier one wrote, not what train did."""
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"of a run")
    for more in ((), ("--overwrite",)):
        assert (
            run_study("distribution", coco, recipe_file, tmp_path, "--samples", "1", *more) == 0
        ), capsys.readouterr().err
    assert checkpoint.read_bytes() == b"of a run"
    assert run_study("seeds", coco, recipe_file, tmp_path, "--checkpoint", str(checkpoint)) == 1
    assert "error: --checkpoint is of distribution" in capsys.readouterr().err


def test_loss_study(coco, recipe_file, tmp_path):
    assert run_study("loss", coco, recipe_file, tmp_path, "--seeds", "1") == 0
    table = (tmp_path / "loss.md").read_text()
    assert "| FL, gamma 2, alpha .25 |" in table and "| 34.0 |" in table and "| diverges |" in table


def test_thirds_of_the_classes() -> None:
    assert thirds((0.5, 0.1, 0.3, 0.2, 0.4, 0.1, 0.9)) == {
        "rare": [1, 5],
        "common": [3, 2, 4],
        "frequent": [0, 6],
    }


def test_weighting_study(tmp_path, monkeypatch):
    """With at least three classes AP by their frequency, and the time of the losses beside that of the step."""
    data = make_coco_folder(tmp_path / "coco")
    for split in ("train2017", "val2017"):
        file = data / "annotations" / f"instances_{split}.json"
        dataset = json.loads(file.read_text())
        dataset["categories"].append({"id": 9, "name": "ring"})
        dataset["annotations"][0]["category_id"] = 9
        file.write_text(json.dumps(dataset))
    train, val = (open_data(data, split) for split in ("train2017", "val2017"))
    recipe = for_data(RECIPE, train)
    names = [variant.name for variant in study.weighting_variants(recipe)]
    assert {"none", "isr_n", "unified", "unified_mean", "eql"} <= {*names}
    ours = [v for v in study.weighting_variants(recipe) if v.name in ("none", "unified")]
    weighting = dataclasses.replace(study.STUDIES["weighting"], variants=lambda recipe: ours)
    monkeypatch.setitem(study.STUDIES, "weighting", weighting)
    out = tmp_path / "out"
    out.mkdir()
    table = study.run_study("weighting", recipe, train, val, out, seeds=2, pretrained=False)
    text = table.read_text()
    assert (
        "| AP, rare | AP, common | AP, frequent |" in text and "| loss, ms | of the step |" in text
    )
    record = json.loads((out / "weighting.json").read_text())
    assert (
        record["images of rare and common classes"]
        == sorted(round(f * len(train)) for f in train.class_frequencies())[:2]
    )
    for runs in record["runs"].values():
        for run in runs.values():
            assert 0 < run["loss_seconds"] < run["step_seconds"]
            mean = sum(run[f"AP_{name}"] for name in THIRDS) / 3
            assert mean == pytest.approx(run["AP"])


def test_a_run_that_diverges_is_a_result(coco, tmp_path, monkeypatch):
    diverging = dataclasses.replace(RECIPE, learning_rate=1e30, weight_decay=1e30)
    monkeypatch.setitem(
        study.STUDIES,
        "loss",
        dataclasses.replace(
            study.STUDIES["loss"],
            variants=lambda recipe: [
                study.Variant("a", recipe, 1.0),
                study.Variant("b", diverging),
            ],
        ),
    )
    train, val = (open_data(coco, split) for split in ("train2017", "val2017"))
    table = study.run_study("loss", RECIPE, train, val, tmp_path, seeds=1, pretrained=False)
    assert "| b (diverged with 1 of 1 seeds) | 0.0 | 0.0 |" in table.read_text()


def test_distribution_study(coco, recipe_file, tmp_path):
    assert run_study("distribution", coco, recipe_file, tmp_path, "--samples", "3") == 0
    table = (tmp_path / "distribution.md").read_text()
    assert table.count("\n| ") == 1 + len(distribution.GAMMAS)
    assert (tmp_path / "distribution.png").exists()


def test_the_distribution_is_of_the_model_as_it_detects(coco):
    """Its batch norms keep their statistics, and one image is no batch to take others from."""
    torch.manual_seed(0)
    config = dataclasses.replace(RECIPE.model, frozen_batch_norm=False)
    model, data = create(config), open_data(coco, "train2017")
    before = copy.deepcopy(model.state_dict())
    stream = training_stream(dataclasses.replace(RECIPE, model=config), data)
    distribution.probabilities_of_the_truth(model, stream, 2, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())


def test_cumulative_share():
    p = torch.tensor([0.5] * 4 + [1.0] * 4)
    share = distribution.cumulative_share(p, 0.0)
    assert share[0] == 0 and share[-1] == 1 and share[500] == 0
    torch.testing.assert_close(share[750].item(), 0.5)
    hard, easy = torch.tensor([0.1]), torch.tensor([0.9])
    both = torch.cat((hard, easy))
    for gamma in (0.0, 2.0):
        losses = [(1 - q) ** gamma * -math.log(q) for q in (0.1, 0.9)]
        easiest = distribution.cumulative_share(both, gamma)[500].item()
        assert easiest == pytest.approx(losses[1] / sum(losses), rel=1e-5)


# ---- EfficientDet's -------------------------------------------------------------------------------

TINY_EFFICIENTDET = Recipe(
    model=EfficientDetConfig.named(
        "lite0", num_classes=2, cells=1, head_depth=1, pyramid_channels=16, min_size=64, max_size=64
    ),
    steps=1,
    batch_size=2,
    warmup_steps=0,
)


@pytest.fixture(scope="module")
def efficientdet_file(tmp_path_factory) -> Path:
    pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("recipe") / "efficientdet.json"
    path.write_text(json.dumps(TINY_EFFICIENTDET.to_dict()))
    return path


def test_fusion_study(coco, efficientdet_file, tmp_path):
    assert run_study("fusion", coco, efficientdet_file, tmp_path, "--seeds", "1") == 0
    table = (tmp_path / "fusion.md").read_text()
    assert "| softmax |" in table and "| 33.85, 43.77, 48.74; 1.26 to 1.31 times" in table
    assert (tmp_path / "fusion.png").stat().st_size > 10_000
    variants = study.fusion_variants(TINY_EFFICIENTDET)
    assert {variant.recipe.model.fusion for variant in variants} == {
        *("softmax", "fast", "sum", "unbounded")
    }


def test_scaling_study(coco, efficientdet_file, tmp_path):
    assert run_study("scaling", coco, efficientdet_file, tmp_path, "--seeds", "1") == 0
    record = json.loads((tmp_path / "scaling.json").read_text())
    costs = [study.cost_of(runs) for runs in record["runs"].values()]
    assert costs == sorted(costs) and [c.multiply_adds for c in costs] == sorted(
        c.multiply_adds for c in costs
    )
    table = (tmp_path / "scaling.md").read_text()
    assert "| phi 2: lite2, 96 pixels |" in table and "| 43.9 | 8.1 M | 11 G |" in table
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_scaled_models_are_the_published_ones():
    """But for the size of the images, here half of D0's."""
    config = EfficientDetConfig.named("tf_d0", min_size=256, max_size=256)
    variants = study.scaling_variants(Recipe(model=config))
    for phi, variant in enumerate(variants):
        size = 256 + 64 * phi
        published = EfficientDetConfig.named(f"tf_d{phi}", min_size=size, max_size=size)
        assert variant.recipe.model == published


def test_costs_are_the_published_ones():
    pytest.importorskip("timm")
    found = study.cost(Recipe(model=EfficientDetConfig.named("tf_d0")))
    assert found.parameters == pytest.approx(3.880067)
    # The package automl says 2.54: it counts batch norms and the like, too.
    assert found.multiply_adds == pytest.approx(2.54, rel=0.03)


def test_what_they_cannot_compare(coco, recipe_file, tmp_path, capsys):
    for name in ("fusion", "scaling"):
        assert run_study(name, coco, recipe_file, tmp_path / "out") == 1
        assert (
            "error: the recipe's model must be an EfficientDet for this study, got retinanet"
            in (capsys.readouterr().err)
        )
    with pytest.raises(ValueError, match=r"^letterbox must be true to scale the images"):
        study.scaling_variants(RECIPES["efficientdet_trees"])
