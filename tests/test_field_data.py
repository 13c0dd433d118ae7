"""Annotation files as users have them: each case stands for a kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import BOX, ONE, PART, PICTURE, kinds, sees_white, upright_picture, write

from models import evaluate as evaluation
from models import study
from models.__main__ import main
from models.data import (
    CocoDataset,
    DataError,
    TrainingStream,
    match_categories,
)
from models.data.check import check_data
from models.recipes import RECIPES

# ---- What the annotations say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        {"width": 0, "height": 0},
        {"width": -1, "height": 96},
        {"width": None, "height": None},
        {"width": "wide", "height": 96},
        {"width": float("nan"), "height": 96},
        {},
    ],
)
def test_no_usable_size(tmp_path: Path, size: dict[str, Any]) -> None:
    write(tmp_path, pictures=[{"id": 1, "file_name": "p.png", **size}])
    data = CocoDataset(tmp_path, "val")
    assert data.left_out == [] and sees_white(data)
    found = kinds(data)
    assert found["no size"] == ["p.png"] and "size" not in found and "left out" not in found


@pytest.mark.parametrize("size", [(20, 20), (1280, 1920), (96, 64)])
def test_a_size_that_the_file_contradicts(tmp_path: Path, size: tuple[int, int]) -> None:
    """The file's counts; (96, 64) is no turned image either, for EXIF turns none."""
    width, height = size
    write(tmp_path, pictures=[{"id": 1, "file_name": "p.png", "width": width, "height": height}])
    data = CocoDataset(tmp_path, "val")
    assert data.left_out == [] and sees_white(data)
    (odd,) = [f for f in CocoDataset(tmp_path, "val").survey() if f.kind == "size"]
    assert odd.items == ["p.png"] and odd.wrong


def test_sizes_of_other_types(tmp_path: Path) -> None:
    write(tmp_path, pictures=[{"id": 1, "file_name": "p.png", "width": "64", "height": 96.0}])
    assert kinds(CocoDataset(tmp_path, "val")) == {"area": [1]}


@pytest.mark.parametrize(
    "area", ["none", None, "large", 0, -576, float("nan"), 1e11, 0.01 * 1e9, [576]]
)
def test_areas_that_are_none(tmp_path: Path, area: Any) -> None:
    box = {key: value for key, value in BOX.items() if key != "iscrowd"}  # which is no must either
    write(tmp_path, [box if area == "none" else {**box, "area": area}])
    data = CocoDataset(tmp_path, "val")
    found = [{"image_id": 1, "category_id": 1, "bbox": BOX["bbox"], "score": 0.9}]
    assert evaluation.evaluate(data.coco, found, 100)["AP"] == ONE
    assert data.coco.anns[1]["area"] == 576 and kinds(data)["area"] == [1]


def test_areas_of_segments_stay(tmp_path: Path) -> None:
    write(tmp_path, [{**BOX, "area": 300}, {**BOX, "id": 2, "area": "300.5"}])
    data = CocoDataset(tmp_path, "val")
    assert [a["area"] for a in data.coco.anns.values()] == [300, 300.5]
    assert "area" not in kinds(data)


@pytest.mark.parametrize("first", [0, 1, 5, "text"])
def test_annotation_ids(tmp_path: Path, first: Any, capsys: pytest.CaptureFixture) -> None:
    """pycocotools takes a match with id 0 for none."""
    boxes = [[5, 5, 20, 20], [40, 5, 20, 20], [40, 60, 20, 20], [400, 5, 20, 20]]
    ids = [f"a-{n}" for n in range(4)] if first == "text" else range(first, first + 4)
    annotations = [{**BOX, "id": id, "bbox": box} for id, box in zip(ids, boxes, strict=True)]
    write(tmp_path, annotations[:3])
    data = CocoDataset(tmp_path, "val")
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes[:3]]
    assert evaluation.evaluate(data.coco, found, 100)["AP"] == ONE
    theirs = evaluation.COCOeval(data.coco, data.coco.loadRes(found), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert theirs.stats[0] == ONE
    write(tmp_path, annotations)
    assert CocoDataset(tmp_path, "val").left_out == [ids[3]]


@pytest.mark.parametrize(
    ("image_ids", "category_ids"),
    [
        (["p", "q"], ["c-7f3a", "b"]),
        ([7, "7"], ["1", 1]),
        (["b", 2], [0, "x"]),
        ([0, 1.5], [2.0, 1]),
    ],
)
def test_ids_of_any_kind(tmp_path: Path, image_ids: list[Any], category_ids: list[Any]) -> None:
    pictures = [{**PICTURE, "id": id, "file_name": f"{n}.png"} for n, id in enumerate(image_ids)]
    categories = [{"id": id, "name": f"name {n}"} for n, id in enumerate(category_ids)]
    annotations = [
        {
            **BOX,
            "id": f"{image_id!r} {category_id!r}",
            "image_id": image_id,
            "category_id": category_id,
        }
        for image_id in image_ids
        for category_id in category_ids[: 1 + (image_id == image_ids[0])]
    ]
    write(tmp_path, annotations, pictures, categories)
    for n in range(2):
        upright_picture().save(tmp_path / "images" / f"{n}.png")
    data = CocoDataset(tmp_path, "val")
    results = []
    for index, image_id in enumerate(data.image_ids):
        target = data[index][1]
        found = {**target, "scores": torch.ones(len(target["boxes"]))}
        results += evaluation.to_results(image_id, found, list(data.categories))
    key = lambda a: (repr(a["image_id"]), repr(a["category_id"]))  # noqa: E731
    assert sorted(map(key, results)) == sorted(map(key, annotations))
    compared = evaluation.compare(data.coco, results, 100)
    rows = compared.by_category(data.categories)
    assert {repr(row["id"]): row["name"] for row in rows} == {
        repr(c["id"]): c["name"] for c in categories
    }
    assert [row["AP"] for row in rows] == [ONE, ONE]
    wrong = [{**result, "category_id": category_ids[0]} for result in results]
    rows = evaluation.compare(data.coco, wrong, 100).by_category(data.categories)
    assert {repr(row["id"]): row["AP"] for row in rows}[repr(category_ids[1])] == 0


@pytest.mark.parametrize(
    ("flag", "crowd"),
    [
        ("0", 0),
        ("1", 1),
        ("false", 0),
        ("True", 1),
        (False, 0),
        (True, 1),
        (None, 0),
        (1.0, 1),
        ("", 0),
    ],
)
def test_flags_of_other_types(tmp_path: Path, flag: Any, crowd: int) -> None:
    write(tmp_path, [{**BOX, "iscrowd": flag}])
    data = CocoDataset(tmp_path, "val")
    assert len(data[0][1]["crowd_boxes"]) == crowd and len(data[0][1]["boxes"]) == 1 - crowd
    assert data.coco.anns[1]["iscrowd"] == crowd


def test_boxes_of_text(tmp_path: Path) -> None:
    write(tmp_path, [{**BOX, "bbox": ["10", "60.0", " 24", "2.4e1"]}])
    assert sees_white(CocoDataset(tmp_path, "val"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [float("nan"), 0, 5, 5]}, "annotation 1 must have a bbox of four numbers, got"),
        ({"bbox": [float("inf"), 0, 5, 5]}, "bbox of four numbers"),
        ({"bbox": [1, 0, 10**400, 5]}, "bbox of four numbers"),
        ({"bbox": [0, 0, 1e300, 5]}, "bbox of four numbers"),
        ({"bbox": ["a", 0, 5, 5]}, "bbox of four numbers"),
        ({"bbox": [True, 0, 5, 5]}, "bbox of four numbers"),
        ({"bbox": None}, "bbox of four numbers, got None"),
        ({"bbox": []}, "bbox of four numbers"),
        ({"iscrowd": 2}, "annotation 1 must have 0 or 1 as iscrowd, got 2"),
        ({"iscrowd": "maybe"}, "iscrowd, got 'maybe'"),
        ({"image_id": "1"}, "annotation 1 has an unknown image_id, '1'"),
        ({"category_id": [1]}, r"unknown category_id, \[1\]"),
        ({"id": None}, "entry 0 of 'annotations' must have a number or text as id, got None"),
        ({"id": [1]}, "number or text as id"),
        ({"id": True}, "number or text as id"),
    ],
)
def test_annotations_without_a_meaning(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, [{**BOX, **change}])
    with pytest.raises(DataError, match=rf"val\.json: .*{message}"):
        CocoDataset(tmp_path, "val")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": None}, "image 1 has no 'file_name'"),
        ({"file_name": 12}, "image 1 must have a text as file_name, got 12"),
        ({"file_name": " "}, "must have a text as file_name"),
        ({"file_name": "a\0b"}, "must have a text as file_name"),
        ({"id": {}}, "entry 0 of 'images' must have a number or text as id"),
    ],
)
def test_images_without_a_meaning(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    write(tmp_path, pictures=[{**PICTURE, **entry}])
    with pytest.raises(DataError, match=message) as error:
        CocoDataset(tmp_path, "val")
    assert ("more such faults" in str(error.value)) == ("id" in entry)


def test_names_of_categories(tmp_path: Path) -> None:
    write(tmp_path, categories=[{"id": 1, "name": 7}])
    assert CocoDataset(tmp_path, "val").categories == {1: "7"}
    for name, message in ((None, "category 1 has no 'name'"), (["a"], "must have a text as name")):
        write(tmp_path, categories=[{"id": 1, "name": name}])
        with pytest.raises(DataError, match=message):
            CocoDataset(tmp_path, "val")


def test_odd_boxes_are_counted(tmp_path: Path) -> None:
    boxes = {
        "fine": [10, 60, 24, 24],
        "rounded": [-0.5, 0, 64.9, 96.5],
        "clipped": [-5, 60, 24, 24],
        "beyond": [50, 60, 24, 24],
        "outside": [70, 60, 24, 24],
        "empty": [10, 60, 0, 24],
        "negative": [34, 84, -24, -24],
        "tiny": [10, 60, 0.5, 24],
    }
    write(tmp_path, [{**BOX, "id": name, "bbox": box} for name, box in boxes.items()])
    found = kinds(CocoDataset(tmp_path, "val"))
    assert found["left out"] == ["outside", "empty", "negative"]
    assert found["clipped"] == ["clipped", "beyond"] and found["tiny"] == ["tiny"]


def test_ignore_is_counted(tmp_path: Path) -> None:
    write(tmp_path, [{**BOX, "ignore": 1}, {**BOX, "id": 2, "ignore": 0}])
    assert kinds(CocoDataset(tmp_path, "val"))["ignore"] == [1]


# ---- Annotation files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"val\.json is empty$"),
        (b" \n", r"val\.json is empty$"),
        (b"[]", r"val\.json is not a COCO annotation file: it is a list, as COCO's results are"),
        (b"3", "it has no list 'images'"),
        (b'{"images": {}}', "it has no list 'images'"),
        (b'{"images": [], "annotations": null}', "it has no list 'annotations'"),
        (b'{"images": [], "annotations": []}', "it has no list 'categories'"),
        (b'{"id": 1}\n{"id": 2}', r"is not valid JSON \(Extra data: line 2"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"images": ["\xe4"]}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_files_that_are_no_annotations(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        CocoDataset(tmp_path, "val")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    file = write(tmp_path, categories=[{"id": 1, "name": "Bär"}])
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False), encoding)
    assert CocoDataset(tmp_path, "val").categories == {1: "Bär"}


def test_lists_of_images(tmp_path: Path) -> None:
    """As COCO publishes its test sets."""
    for folder in ("annotations", "test2017"):
        (tmp_path / folder).mkdir()
    upright_picture().save(tmp_path / "test2017" / "p.png")
    file = tmp_path / "annotations" / "image_info_test-dev2017.json"
    file.write_text(json.dumps({"images": [PICTURE], "categories": [PART]}))
    for split in ("test-dev", "test-dev2017", "test"):
        data = CocoDataset(tmp_path, split)
        assert data[0][0].shape == (3, 96, 64) and len(data[0][1]["boxes"]) == 0
        assert not data.has_annotations and data.survey() == []
        assert match_categories({1: "part"}, data) == ([1], [])
    with pytest.raises(DataError, match=r"test-dev2017\.json has no annotations to train on"):
        TrainingStream(data, 1, seed=0)
    file.write_text(
        json.dumps({"images": [PICTURE]})
    )  # without categories the model's ids are right
    assert match_categories({5: "part"}, CocoDataset(tmp_path, "test")) == ([5], [])
    (tmp_path / "annotations" / "image_info_test2017.json").write_bytes(file.read_bytes())
    with pytest.raises(
        DataError, match="several splits 'test': name one of test-dev2017, test2017"
    ):
        CocoDataset(tmp_path, "test")
    assert len(CocoDataset(tmp_path, "test2017")) == 1
    with pytest.raises(DataError, match="its splits are test-dev2017, test2017"):
        CocoDataset(tmp_path, "train")


def test_nothing_to_train_on(tmp_path: Path) -> None:
    write(tmp_path, [], more=1)
    dataset = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**dataset, "categories": []}))
    with pytest.raises(DataError, match=r"val\.json has no categories to train on"):
        TrainingStream(CocoDataset(tmp_path, "val"), 1, seed=0)


@pytest.mark.parametrize(
    ("annotations", "folder", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "images/train2017", "train"),
        ("annotations/instances_train2017.json", "images/train", "train"),
        ("annotations/instances_train2017.json", "images", "train"),
        ("annotations/instances_default.json", "images/default", "default"),
        ("annotations/train.json", "train", "train"),
        ("annotations/my_train.json", "images", "my_train"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "valid"),
        ("valid/_annotations.coco.json", "valid", "val"),
        ("train.json", "images", "train"),
        ("train.json", "images/train", "train"),
        ("train.json", "train", "train"),
        ("train.json", ".", "train"),
    ],
)
def test_layouts(tmp_path: Path, annotations: str, folder: str, split: str) -> None:
    for path in ((tmp_path / annotations).parent, tmp_path / folder, tmp_path / "images"):
        path.mkdir(parents=True, exist_ok=True)
    dataset = {"images": [PICTURE], "annotations": [BOX], "categories": [PART]}
    (tmp_path / annotations).write_text(json.dumps(dataset))
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    upright_picture().save(tmp_path / folder / "p.png")
    data = CocoDataset(tmp_path, split)
    assert sees_white(data) and "renamed" not in kinds(data)
    assert list(check_data(str(tmp_path)).summary) == [
        {"val": "valid", "train": data.annotation_file.stem.removeprefix("instances_")}.get(
            split, split
        )
        if annotations.startswith("annotations/")
        else data.annotation_file.parent.name
        if annotations.endswith("coco.json")
        else split
    ]


@pytest.mark.parametrize("below", ["", "val"])
def test_images_in_another_folder(tmp_path: Path, below: str) -> None:
    write(tmp_path / "set")
    elsewhere = tmp_path / "elsewhere" / below
    elsewhere.mkdir(parents=True)
    (tmp_path / "set" / "images" / "p.png").rename(elsewhere / "p.png")
    assert sees_white(CocoDataset(tmp_path / "set", "val", tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"--images must be a folder, got .*nowhere"):
        CocoDataset(tmp_path / "set", "val", tmp_path / "nowhere")


# ---- Categories -----------------------------------------------------------------------------------


def dataset_of(root: Path, categories: dict[Any, str]) -> CocoDataset:
    entries = [{"id": id, "name": name} for id, name in categories.items()]
    annotations = [{**BOX, "category_id": next(iter(categories))}]
    write(root, annotations, categories=entries)
    return CocoDataset(root, "val")


def test_categories_are_matched_by_name(tmp_path: Path) -> None:
    trained = {1: "cat", 2: "dog", 3: "bird"}
    assert match_categories(trained, dataset_of(tmp_path, trained)) == ([1, 2, 3], [])
    assert match_categories(trained, dataset_of(tmp_path, {2: "dog"})) == ([1, 2, 3], [])
    ids, (note,) = match_categories(trained, dataset_of(tmp_path, {1: "dog", 2: "cat"}))
    assert ids == [2, 1, 3] and "matched by name" in note
    ids, (_, lost) = match_categories(trained, dataset_of(tmp_path, {1: "dog", 3: "cat"}))
    assert ids == [3, 1, None] and "no categories bird: what is detected of them is dropped" in lost
    ids, _ = match_categories(trained, dataset_of(tmp_path, {"x": "dog"}))
    assert ids == [1, "x", 3]
    with pytest.raises(DataError, match="was not trained on: cow; it knows cat, dog, bird"):
        match_categories(trained, dataset_of(tmp_path, {1: "cat", 2: "cow"}))
    with pytest.raises(DataError, match="the file has several dog"):
        match_categories(trained, dataset_of(tmp_path, {1: "dog", 2: "dog"}))
    same = {1: "dog", 2: "dog"}
    assert match_categories(same, dataset_of(tmp_path, same)) == ([1, 2], [])


class Oracle(torch.nn.Module):
    """Sees the box, as the label 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        box = {"boxes": torch.tensor([[10.0, 60, 34, 84]]), "scores": torch.ones(1)}
        return [{**box, "labels": torch.zeros(1, dtype=torch.int64)} for _ in pictures]


def test_results_have_the_ids_of_the_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = dataset_of(tmp_path, {"c": "cat", "d": "dog"})
    ids = evaluation.category_ids({1: "cat", 2: "dog"}, data)
    (result,) = evaluation.detect_all(Oracle(), RECIPES["coco"], ids, data) or []
    assert result["category_id"] == "c" and "matched by name" in capsys.readouterr().err
    assert evaluation.evaluate(data.coco, [result], 100)["AP"] == ONE


def test_a_study_of_another_numbering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation split's ids are not those that the model was trained with."""
    train = dataset_of(tmp_path / "train", {1: "cat", 2: "dog"})
    val = dataset_of(tmp_path / "val", {2: "cat", 1: "dog"})
    monkeypatch.setattr(study, "train", lambda *arguments, **more: Oracle())
    assert [a["category_id"] for a in val.coco.anns.values()] == [2]
    ids = evaluation.category_ids(train.categories, val)
    figures = study._run(
        study.STUDIES["seeds"], RECIPES["coco"], train, val, ids, tmp_path, "cpu", False
    )
    assert figures["AP"] == ONE


def test_commands_say_what_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before they start; and training goes on only with the categories that it began with."""
    root, out = tmp_path / "set", tmp_path / "run"
    write(root, [BOX, {**BOX, "id": 7, "bbox": [70, 0, 5, 5]}], split="train")
    (root / "images").rename(tmp_path / "pictures")
    where = f"--data {root} --images {tmp_path / 'pictures'} --device cpu".split()
    values = dataclasses.asdict(RECIPES["small"]) | {"steps": 1, "batch_size": 1, "crop": 64}
    values["symmetries"] = False
    values["model"] |= {"backbone": "resnet18", "pyramid_channels": 32, "head_depth": 1}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    recipe = ["--recipe", str(tmp_path / "recipe.json"), "--no-pretrained"]
    assert main(["train", *where, "--out", str(out), *recipe]) == 0
    said = "train.json: 1 boxes without an area inside their image are left out"
    assert capsys.readouterr().err.count(said) == 1
    results = str(tmp_path / "results.json")
    evaluate = ["evaluate", str(out / "checkpoint.pt"), *where, "--split", "train"]
    assert main([*evaluate, "--out", results]) == 0
    assert said in capsys.readouterr().err
    write(root, categories=[{"id": 1, "name": "other"}], split="train")
    assert main(["train", *where, "--out", str(out), "--resume"]) == 1
    assert "was trained on the categories 1 part, and that has 1 other" in capsys.readouterr().err
    (tmp_path / "pictures" / "p.png").unlink()
    (root / "images" / "p.png").unlink()
    assert main(["train", *where, "--out", str(tmp_path / "new"), *recipe]) == 1
    assert "p.png does not exist" in capsys.readouterr().err
