from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from models_fixtures import DISC, SQUARE, make_coco_folder
from PIL import Image

from focalops import AnchorGenerator, batched_nms
from models import evaluate as evaluation
from models.__main__ import main
from models.bench import PHASES
from models.checkpoint import load_checkpoint, load_model
from models.config import DetectorConfig
from models.data import CocoDataset
from models.detector import Detector
from models.draw import draw_comparison, draw_curves, draw_detections
from models.recipes import RECIPES, Recipe
from models.retinanet import RetinaNetConfig
from models.train import train

RECIPE = Recipe(
    model=RetinaNetConfig(
        num_classes=2,
        backbone="resnet18",
        trainable_stages=2,
        max_level=5,
        pyramid_channels=32,
        head_depth=1,
        anchor_sizes=((16,), (32,), (64,)),
        aspect_ratios=(1.0,),
        min_size=None,
    ),
    steps=4,
    batch_size=2,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="cosine",
    ema_decay=0.9,
    crop=64,
    window=64,
    window_overlap=16,
)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco_folder(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def checkpoint(coco_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    train(RECIPE, CocoDataset(coco_folder, "train"), path, pretrained=False)
    return path


def test_load_model_takes_the_averaged_weights(checkpoint: Path) -> None:
    model, recipe, categories = load_model(checkpoint)
    assert recipe == RECIPE
    assert categories == {DISC: "disc", SQUARE: "square"}
    saved = load_checkpoint(checkpoint)
    name = "head.regression_head.bbox_reg.weight"
    assert torch.equal(model.state_dict()[name], saved["average"][f"module.{name}"])
    assert not torch.equal(model.state_dict()[name], saved["model"][name])


def test_evaluate_writes_results_for_pycocotools(
    coco_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "out" / "results.json"
    arguments = ["evaluate", str(checkpoint), "--data", str(coco_folder), "--out", str(path)]
    assert main([*arguments, "--device", "cpu", "--max-detections", "250"]) == 0
    table = capsys.readouterr().out
    assert table.count("Average Precision") == table.count("Average Recall") == 6
    assert "| maxDets=250 ] = " in table
    json.loads(path.read_text())
    figures = json.loads(path.with_name("results-figures.json").read_text())
    assert [row["name"] for row in figures["categories"]] == ["disc", "square"]
    assert figures["AP"] == pytest.approx(sum(row["AP"] for row in figures["categories"]) / 2)
    assert all(len(row["precision"]) == 101 for row in figures["categories"])
    assert re.search(r"\n +[01]\.\d{3} +[01]\.\d{3}  square\n", table)
    with Image.open(path.with_name("results-curves.png")) as picture:
        assert picture.size == (800, 600)


def test_figures_by_category(coco_folder: Path, tmp_path: Path) -> None:
    """All discs are found and no square: curves of one and of zero."""
    data = CocoDataset(coco_folder, "val")
    results = []
    for index, image_id in enumerate(data.image_ids):
        _, target = data[index]
        disc = target["labels"] == data.labels[DISC]
        found = {"boxes": target["boxes"][disc], "labels": target["labels"][disc]}
        found["scores"] = torch.ones(int(disc.sum()))
        results += evaluation.to_results(image_id, found, list(data.categories))
    discs, squares = evaluation.compare(data.coco, results, 100).by_category(data.categories)
    assert discs["AP"] == discs["AP50"] == 1 and discs["precision"] == [1] * 101
    assert squares["AP"] == squares["AP50"] == 0 and squares["id"] == SQUARE
    for rows in ([discs, squares], [discs], [], [discs] * 12):
        draw_curves(tmp_path / "curves.png", "title", rows)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (800, 600)


def test_perfect_results_score_one(coco_folder: Path, tmp_path: Path) -> None:
    """Category ids and boxes come back as they were, and pycocotools reads the file."""
    data = CocoDataset(coco_folder, "val")
    results = []
    for index, image_id in enumerate(data.image_ids):
        _, target = data[index]
        found = {**target, "scores": torch.ones(len(target["boxes"]))}
        results += evaluation.to_results(image_id, found, list(data.categories))
    figures = evaluation.evaluate(data.coco, results, 100)
    assert figures == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    assert evaluation.evaluate(data.coco, [], 100)["AP"] == 0

    path = tmp_path / "results.json"
    evaluation.save_results(path, results)
    loaded = data.coco.loadRes(str(path))
    assert {a["category_id"] for a in loaded.anns.values()} == {DISC, SQUARE}


def test_crowd_regions_excuse_detections(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "train")
    results = []
    for index, image_id in enumerate(data.image_ids):
        _, target = data[index]
        found = {**target, "scores": torch.ones(len(target["boxes"]))}
        results += evaluation.to_results(image_id, found, list(data.categories))
    in_crowd = {"image_id": 120, "category_id": DISC, "bbox": [62, 62, 9, 9], "score": 1.0}
    assert evaluation.evaluate(data.coco, [in_crowd, *results], 100)["AP"] == 1.0


def test_table_is_pycocotools_own(
    coco_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    """With the usual limit of 100 detections, figures and lines are those of COCOeval itself."""
    model, recipe, categories = load_model(checkpoint)
    data = CocoDataset(coco_folder, "val")
    recipe = dataclasses.replace(recipe, max_detections=100)
    results = evaluation.detect_all(model, recipe, list(categories), data)
    for index, image_id in enumerate(data.image_ids):
        _, target = data[index]
        found = {**target, "scores": torch.linspace(0.9, 0.1, len(target["boxes"]))}
        results += evaluation.to_results(image_id, found, list(data.categories))[1:]
    evaluation.evaluate(data.coco, results, 100)
    ours = capsys.readouterr().out
    theirs = evaluation.COCOeval(data.coco, data.coco.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    capsys.readouterr()
    theirs.summarize()
    assert ours == capsys.readouterr().out


class Bright(Detector):
    """Sees bright pixels as boxes."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config, AnchorGenerator(((8,),)))
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images, targets=None):
        outputs = []
        for image in images:
            y, x = torch.where(image[0] > 0.5)
            boxes = torch.stack((x, y, x + 1, y + 1), dim=1).float()
            labels = torch.zeros(len(boxes), dtype=torch.int64)
            outputs.append({"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": labels})
        return outputs


@pytest.mark.parametrize("symmetries", [False, True])
@pytest.mark.parametrize("window", [64, None])
def test_each_object_is_found_once(window: int | None, symmetries: bool) -> None:
    """Wherever windows meet, and however the image is turned."""
    image = torch.zeros(3, 150, 170, dtype=torch.uint8)
    points = torch.randperm(150 * 170, generator=torch.Generator().manual_seed(0))[:300]
    image.view(3, -1)[:, points] = 255
    recipe = dataclasses.replace(
        RECIPE, max_detections=1000, window=window, window_overlap=16, symmetries=symmetries
    )
    found = evaluation.detect(Bright(recipe.model), recipe, image)
    places = found["boxes"][:, 1] * 170 + found["boxes"][:, 0]
    assert sorted(places.round().tolist()) == sorted(points.tolist())
    assert (found["boxes"][:, 2:] - found["boxes"][:, :2] - 1).abs().max() < 1e-3
    torch.testing.assert_close(found["scores"], torch.ones(300))


def test_boxes_vote() -> None:
    def part(*rows: tuple[float, float, int]) -> dict[str, torch.Tensor]:
        left, scores, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
        boxes = torch.stack((left, left * 0, left + 10, left * 0 + 10), dim=1)
        return {"boxes": boxes, "scores": scores, "labels": labels}

    def kept(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return batched_nms(found["boxes"], found["scores"], found["labels"], 0.5)

    found = evaluation.vote(
        [part((0.0, 0.6, 0), (50.0, 0.9, 0)), part((1.0, 0.3, 0), (0.5, 0.8, 1))], kept
    )
    # Two of one object, weighted 2 to 1; one that only one part sees; one of another class.
    torch.testing.assert_close(found["boxes"][:, 0], torch.tensor([1 / 3, 50, 0.5]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.45, 0.45, 0.4]))
    assert found["labels"].tolist() == [0, 0, 1]

    point = torch.tensor([[3.0, 4, 3, 4]])
    for score in (0.5, 0.0):
        alone = {"boxes": point, "scores": torch.tensor([score]), "labels": torch.tensor([0])}
        found = evaluation.vote([alone], kept)
        assert torch.equal(found["boxes"], point) and found["scores"].tolist() == [score]
    nothing = {"boxes": point[:0], "scores": torch.empty(0), "labels": torch.empty(0).long()}
    assert evaluation.vote([nothing, nothing], kept)["boxes"].shape == (0, 4)


def test_train_and_predict(coco_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--data", str(coco_folder), "--out", str(out), "--device", "cpu"]
    recipe = "--recipe trees --backbone resnet18 --no-pretrained --steps 2 --batch-size 2 --crop 64"
    assert main([*arguments, *recipe.split()]) == 0
    saved = load_checkpoint(out / "checkpoint.pt")
    assert saved["step"] == 2
    assert saved["recipe"].model.num_classes == 2
    assert saved["recipe"].crop == 64
    assert saved["recipe"].model.min_size is None
    assert main([*arguments, "--resume"]) == 0

    image = str(coco_folder / "val2017" / "000000000100.png")
    pictures = tmp_path / "pictures"
    predict = ["predict", str(out / "checkpoint.pt"), image, "--out", str(pictures)]
    assert main([*predict, "--min-score", "0", "--device", "cpu"]) == 0
    with Image.open(pictures / "000000000100.png") as picture:
        assert min(picture.size) >= 900
    assert not (pictures / "contact-sheet.png").exists()

    folder = coco_folder / "val2017"
    for images in (str(folder), str(folder / "*.png")):
        predict[2:3] = [images]
        (pictures / "contact-sheet.png").unlink(missing_ok=True)
        assert main([*predict, "--overwrite", "--device", "cpu"]) == 0
        with Image.open(pictures / "contact-sheet.png") as sheet:
            assert sheet.size == (800, 400)


def test_configs_are_recipes(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["configs"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {name: Recipe.from_dict(values) for name, values in printed.items()} == RECIPES
    assert main(["configs", "trees"]) == 0
    file = tmp_path / "recipe.json"
    recipe = json.loads(capsys.readouterr().out)
    file.write_text(json.dumps({**recipe, "learning_rate": 0.125}))
    out = tmp_path / "run"
    arguments = ["train", "--data", str(coco_folder), "--out", str(out), "--device", "cpu"]
    arguments += ["--recipe", str(file), *["--no-pretrained", "--steps", "1", "--batch-size", "1"]]
    assert main([*arguments, *["--crop", "64", "--min-size", "64", "80"]]) == 0
    trained = load_checkpoint(out / "checkpoint.pt")["recipe"]
    assert trained.learning_rate == 0.125
    assert trained.model.min_size == (64, 80)


def test_bench(coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "--rounds", "1", "--device", "cpu", "--out", str(out)]
    for noise in (True, False):
        source = [] if noise else ["--data", str(coco_folder)]
        assert main([*arguments, "--size", "64", "96", "--overwrite", *source]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"training step +\d+\.\d ms +\d+\.\d ms +\d+\.\d\d\n", printed)
        assert set(json.loads(out.read_text())["ms"]) == set(PHASES)


def test_pictures(tmp_path: Path) -> None:
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    truth = {
        "boxes": torch.tensor([[10.0, 10, 50, 50], [100, 100, 150, 150]]),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    found = {
        "boxes": torch.tensor([[12.0, 10, 52, 50], [200, 20, 240, 60], [0, 0, 5, 5]]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    none = {name: value[:0] for name, value in found.items()}
    for index, detections in enumerate((found, none)):
        path = tmp_path / f"{index}.png"
        draw_comparison(path, "title", image, detections, truth)
        assert path.stat().st_size > 0
        draw_detections(path, "title", image, detections, ["tree"])
        assert path.stat().st_size > 0


def test_errors_are_one_sentence(
    coco_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    other = tmp_path / "other.pt"
    torch.save({"model": {}, "recipe": {"model": {}, "momentum": 1}, "categories": {}}, other)
    folder, run, nowhere = str(coco_folder), str(checkpoint.parent), str(tmp_path / "nowhere")
    cases = {
        f"evaluate {nowhere} --data {folder}": "nowhere does not exist",
        f"evaluate {broken} --data {folder}": "broken.pt is not a checkpoint",
        f"evaluate {other} --data {folder}": "other.pt was written by another version",
        f"evaluate {checkpoint} --data {nowhere}": "nowhere is not a folder",
        f"predict {checkpoint} {nowhere}": "the image .*nowhere does not exist",
        f"predict {checkpoint} {broken}": "the image .*broken.pt cannot be read",
        f"train --data {folder} --out {run} --backbone vgg16": "--backbone must be one of .* 'vgg16'",
        f"train --data {folder} --out {run} --recipe {broken}": "broken.pt is no recipe",
        f"train --data {folder} --out {run} --recipe v9": "must be one of coco, .* got 'v9'",
        f"train --data {folder} --out {run} --resume --steps 9": "own recipe: --steps 4, got 9",
        f"predict {checkpoint} {checkpoint.parent}": "the folder .* holds no images",
        f"predict {checkpoint} {nowhere}*": r"no file matches .*nowhere\*",
    }
    for command, message in cases.items():
        assert main([*command.split(), "--device", "cpu"]) == 1, command
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error, error
        assert re.search(message, error), error
