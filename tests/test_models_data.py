from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models_fixtures import DISC, SQUARE, make_coco_folder
from PIL import Image

from models.data import (
    CocoDataset,
    DataError,
    TrainingStream,
    convert_voc,
    find_split,
    random_crop,
)
from models.data.voc import voc_to_coco


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    return make_coco_folder(tmp_path / "coco")


def test_cocos_layout(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "train")
    assert len(data) == 4
    assert data.categories == {DISC: "disc", SQUARE: "square"}
    assert data.labels == {DISC: 0, SQUARE: 1}
    image, target = data[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 96)
    assert target["labels"].tolist() == [0, 1, 0]
    x, y, w, h = data.coco.imgToAnns[100][0]["bbox"]
    assert target["boxes"][0].tolist() == [x, y, x + w, y + h]


def test_images_without_boxes_and_crowds(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "train")
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data[1][1]["labels"].shape == (0,)
    assert len(data.coco.imgToAnns[120]) == 4
    assert len(data[2][1]["boxes"]) == 3
    assert data[2][1]["crowd_boxes"].tolist() == [[60, 60, 90, 90]]
    assert data[0][1]["crowd_boxes"].shape == (0, 4)


def test_crowd_regions_follow_the_augmented_image(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "train")
    stream = TrainingStream(data, 200, seed=0, crop=70, dihedral=True)
    found = 0
    for n in range(200):
        target = stream[n][1]
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert target["iscrowd"].dtype == torch.bool and target["iscrowd"].sum() <= 1
        assert (target["labels"] >= 0).all()
        for x1, y1, x2, y2 in target["boxes"][target["iscrowd"]].tolist():
            assert 0 <= x1 < x2 <= 70 and 0 <= y1 < y2 <= 70
            assert x2 - x1 <= 30 and y2 - y1 <= 30
            found += 1
    assert found > 30


def test_simple_layout(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text("{}")
    file, folders = find_split(tmp_path, "val")
    assert (file, folders[0]) == (tmp_path / "val.json", tmp_path / "images")


def test_boxes_are_clipped_to_the_image(coco_folder: Path) -> None:
    file = coco_folder / "annotations" / "instances_val2017.json"
    dataset = json.loads(file.read_text())
    dataset["annotations"] = [
        {"id": 1, "image_id": 100, "category_id": SQUARE, "bbox": [-5, 90, 20, 20], "area": 1},
        {"id": 2, "image_id": 100, "category_id": SQUARE, "bbox": [200, 0, 20, 20], "area": 1},
        {"id": 3, "image_id": 100, "category_id": SQUARE, "bbox": [10, 10, 0, 20], "area": 1},
    ]
    file.write_text(json.dumps(dataset))
    data = CocoDataset(coco_folder, "val")
    assert data[0][1]["boxes"].tolist() == [[0, 90, 15, 96]]
    assert data.left_out == [2, 3]


def edit(file: Path, change: str) -> None:
    dataset = json.loads(file.read_text())
    if change == "category":
        dataset["annotations"][2]["category_id"] = 55
    elif change == "image":
        dataset["annotations"][2]["image_id"] = 1
    elif change == "bbox":
        dataset["annotations"][2]["bbox"] = [1, 2, 3]
    elif change == "no image":
        del dataset["annotations"][2]["image_id"]
    elif change == "twice":
        dataset["annotations"][2]["id"] = 1
    elif change == "name":
        del dataset["images"][1]["file_name"]
    elif change == "list":
        del dataset["categories"]
    file.write_text("{" if change == "json" else json.dumps(dataset))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("category", r"instances_val2017.json: annotation 3 has an unknown category_id, 55"),
        ("image", r"instances_val2017.json: annotation 3 has an unknown image_id, 1"),
        ("no image", r"instances_val2017.json: annotation 3 has an unknown image_id, None"),
        ("twice", r"instances_val2017.json: the id 1 stands twice in 'annotations'"),
        ("name", r"instances_val2017.json: image 110 has no 'file_name'$"),
        ("bbox", r"annotation 3 must have a bbox of four numbers, got \[1, 2, 3\]"),
        ("list", r"instances_val2017.json is not a COCO annotation file: .* list 'categories'"),
        ("json", r"instances_val2017.json is not valid JSON \(.*line 1 column 2"),
    ],
)
def test_broken_annotations(coco_folder: Path, change: str, message: str) -> None:
    edit(coco_folder / "annotations" / "instances_val2017.json", change)
    with pytest.raises(DataError, match=message):
        CocoDataset(coco_folder, "val")


def test_missing_files(coco_folder: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        CocoDataset(coco_folder / "nowhere", "val")
    with pytest.raises(DataError, match=r"neither test\.json nor annotations/instances_test"):
        CocoDataset(coco_folder, "test")
    annotations = coco_folder / "annotations"
    (annotations / "instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match="several splits 'val': name one of val2014, val2017"):
        CocoDataset(coco_folder, "val")
    assert len(CocoDataset(coco_folder, "val2017")) == 2
    image = coco_folder / "val2017" / "000000000100.png"
    image.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000000000100\.png cannot be read"):
        CocoDataset(coco_folder, "val2017")[0]
    image.unlink()
    with pytest.raises(DataError, match=r"000000000100\.png does not exist"):
        CocoDataset(coco_folder, "val2017")[0]


def test_samples_do_not_depend_on_the_way_to_them(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "train")

    def stream() -> TrainingStream:
        return TrainingStream(
            data, 12, seed=1, crop=64, crop_zoom=(0.7, 1.4), dihedral=True, photometric=True
        )

    in_order = [stream()[n] for n in range(12)]
    torch.manual_seed(123)
    shared = stream()
    for n in (7, 2, 11, 7):
        image, target = shared[n]
        assert torch.equal(image, in_order[n][0])
        assert torch.equal(target["boxes"], in_order[n][1]["boxes"])
    assert len({image.sum().item() for image, _ in in_order}) == 12


def test_boxes_follow_the_augmented_image(coco_folder: Path) -> None:
    """However a square is flipped, turned and cropped, its box holds its colour to the edges."""
    data = CocoDataset(coco_folder, "train")
    stream = TrainingStream(data, 100, seed=0, crop=80, crop_zoom=(0.9, 1.25), dihedral=True)
    checked = 0
    for n in range(100):
        image, target = stream[n]
        assert image.shape == (3, 80, 80)
        red = (image[0] > 0.6) & (image[1] < 0.4)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            assert 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 80
            if label == data.labels[SQUARE]:
                assert red[round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1].all()
                assert x1 < 2 or not red[round(y1) : round(y2), round(x1) - 2].any()
                assert x2 > 78 or not red[round(y1) : round(y2), round(x2) + 1].any()
                assert y1 < 2 or not red[round(y1) - 2, round(x1) : round(x2)].any()
                assert y2 > 78 or not red[round(y2) + 1, round(x1) : round(x2)].any()
                checked += 1
    assert checked > 20


def test_random_crop_drops_what_is_hardly_visible() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes, labels = torch.tensor([[40.0, 40.0, 60.0, 60.0]]), torch.tensor([1])
    for _ in range(50):
        crop, kept, kept_labels = random_crop(image, boxes, labels, 50, (1.0, 1.0))
        assert crop.shape == (3, 50, 50)
        assert len(kept) == len(kept_labels)
        for x1, y1, x2, y2 in kept.tolist():
            assert (x2 - x1) * (y2 - y1) >= 0.4 * 400


def test_voc_to_coco() -> None:
    xml = """<annotation><size><width>40</width><height>30</height></size>
    <object><name>Alive</name><bndbox>
    <xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object></annotation>"""
    dataset = voc_to_coco([("a.png", xml), ("b.png", xml)], "tree")
    assert [image["id"] for image in dataset["images"]] == [1, 2]
    assert dataset["images"][0] == {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    assert [a["id"] for a in dataset["annotations"]] == [1, 2]
    assert dataset["annotations"][1]["image_id"] == 2
    assert dataset["annotations"][1]["bbox"] == [1, 2, 10, 20]
    assert dataset["categories"] == [{"id": 1, "name": "tree"}]


def test_convert_voc(tmp_path: Path) -> None:
    voc, out = tmp_path / "voc", tmp_path / "out"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (voc / folder).mkdir(parents=True)
    xml = """<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size>
    <object><name>dog</name><difficult>1</difficult><bndbox>
    <xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object>
    <object><name>cat</name><bndbox>
    <xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"""
    (voc / "Annotations" / "a.xml").write_text(xml)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (voc / "ImageSets" / "Main" / "dog_train.txt").write_text("a 1\n")
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages" / "a.jpg")
    assert convert_voc(voc, out) == {"train": 1}
    data = CocoDataset(out, "train")
    assert data.categories == {1: "cat", 2: "dog"}
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[4, 5, 40, 30]] and target["labels"].tolist() == [0]
    assert target["crowd_boxes"].tolist() == [[0, 1, 11, 22]]

    (voc / "Annotations" / "a.xml").write_text(xml.replace("<xmin>5", "<xmin>five"))
    with pytest.raises(DataError, match=r"a\.xml is no Pascal VOC annotation .*five"):
        convert_voc(voc, out)
    with pytest.raises(DataError, match="is no Pascal VOC folder"):
        convert_voc(tmp_path, out)


def test_image_cache_serves_repeated_reads(coco_folder: Path) -> None:
    data = CocoDataset(coco_folder, "val")
    assert data[0][0] is data[0][0]
    with Image.open(data.image_path(0)) as image:
        assert image.size == (96, 96)
