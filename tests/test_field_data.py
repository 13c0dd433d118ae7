"""What users' own data files hold: each case stands for a kind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from models import evaluate as evaluation
from models.__main__ import main
from models.data import (
    CocoDataset,
    DataError,
    TrainingStream,
    check_categories,
    convert_voc,
    images,
    match_categories,
    read_image,
)
from models.data.check import check_data

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 60, 24, 24], "iscrowd": 0}
PICTURE = {"id": 1, "file_name": "p.png", "width": 64, "height": 96}
PART = {"id": 1, "name": "part"}
ONE = pytest.approx(1, abs=1e-15)  # pycocotools adds 2e-16 to what it divides by


def upright_picture() -> Image.Image:
    """64 x 96, black, white in the box."""
    image = Image.new("RGB", (64, 96))
    ImageDraw.Draw(image).rectangle((10, 60, 33, 83), fill="white")
    return image


def write(
    root: Path,
    annotations: list[dict[str, Any]] | None = None,
    pictures: list[dict[str, Any]] | None = None,
    categories: list[dict[str, Any]] | None = None,
    split: str = "val",
    **more: Any,
) -> Path:
    """A data set of one picture with its box, but for what is given; returns the annotation file."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    upright_picture().save(root / "images" / "p.png")
    file = root / f"{split}.json"
    dataset = {
        "images": pictures or [PICTURE],
        "annotations": [BOX] if annotations is None else annotations,
        "categories": categories or [PART],
    }
    file.write_text(json.dumps(dataset | more))
    return file


def kinds(data: CocoDataset) -> dict[str, list[Any]]:
    return {finding.kind: list(finding.items) for finding in data.survey()}


def sees_white(data: CocoDataset, index: int = 0) -> bool:
    """Whether the box is where the picture is white, to the pixel."""
    image, target = data[index]
    inside = torch.zeros_like(image, dtype=torch.bool)
    for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
        inside[:, y1:y2, x1:x2] = True
    return bool(inside.any() and (image[inside] > 200).all() and (image[~inside] < 60).all())


# ---- EXIF ---------------------------------------------------------------------------------------

STORED = {  # how the upright picture is stored, so that the orientation turns it back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save_turned(path: Path, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright_picture().transpose(STORED[orientation])
    stored.save(path, exif=exif, **({"quality": 95} if path.suffix in (".jpg", ".webp") else {}))
    return stored


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_upright(tmp_path: Path, ending: str) -> None:
    for orientation in STORED:
        name = f"{orientation}.{ending}"
        write(tmp_path, pictures=[{**PICTURE, "file_name": name}])
        save_turned(tmp_path / "images" / name, orientation)
        data = CocoDataset(tmp_path, "val")
        assert sees_white(data), orientation
        assert kinds(data) == {"area": [1]}


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_boxes_of_stored_pixels_are_turned(tmp_path: Path, ending: str) -> None:
    for orientation in (5, 6, 7, 8):
        name = f"{orientation}.{ending}"
        write(tmp_path)
        stored = save_turned(tmp_path / "images" / name, orientation)
        left, top, right, bottom = stored.convert("L").point(lambda v: 255 * (v > 127)).getbbox()
        box = {**BOX, "bbox": [left, top, right - left, bottom - top]}
        width, height = stored.size
        write(tmp_path, [box], [{"id": 1, "file_name": name, "width": width, "height": height}])
        data = CocoDataset(tmp_path, "val")
        assert sees_white(data), orientation  # also without the survey
        assert data.coco.anns[1]["bbox"] == BOX["bbox"]  # what evaluation compares with
        data = CocoDataset(tmp_path, "val")
        assert kinds(data)["turned"] == [name]
        assert sees_white(data) and data.coco.anns[1]["bbox"] == BOX["bbox"]


def test_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    upright_picture().save(tmp_path / "p.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert read_image(tmp_path / "p.jpg").shape == (3, 96, 64)


# ---- Pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_are_scaled_by_their_range(tmp_path: Path, ending: str, order: str) -> None:
    values = np.array([[0, 257, 300, 3800], [32896, 65278, 65407, 65535]], order)
    Image.fromarray(values).save(tmp_path / f"p.{ending}")
    expected = np.rint(values / 257).astype(np.uint8)
    assert read_image(tmp_path / f"p.{ending}").numpy().tolist() == [expected.tolist()] * 3


def write_tiff(
    path: Path, content: bytes, width: int, bits: int, sample_format: int = 1, photometric: int = 1
) -> None:
    """One row of pixels in one strip, with the tags in the order that TIFF asks for."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: 1, 279: len(content), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(content)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, start) + content + directory)


def test_what_a_tiff_says_about_its_range(tmp_path: Path) -> None:
    words = {"unsigned": [0, 32896, 65535], "signed": [-32768, 128, 32767]}
    path = tmp_path / "p.tif"
    write_tiff(path, struct.pack("<3H", *words["unsigned"]), 3, 16)
    assert read_image(path)[0].tolist() == [[0, 128, 255]]
    write_tiff(path, struct.pack("<3H", *words["unsigned"]), 3, 16, photometric=0)  # white is zero
    os.utime(path, ns=(0, 1))
    assert read_image(path)[0].tolist() == [[255, 127, 0]]
    write_tiff(path, struct.pack("<3h", *words["signed"]), 3, 16, sample_format=2)
    os.utime(path, ns=(0, 2))
    assert read_image(path)[0].tolist() == [[0, 128, 255]]
    write_tiff(path, bytes.fromhex("000 808 fff 000".replace(" ", "")), 4, 12)
    assert read_image(path)[0].tolist() == [[0, 128, 255, 0]]


def test_floating_point(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)).save(tmp_path / "p.tif")
    assert read_image(tmp_path / "p.tif")[0].tolist() == [[0, 64, 128, 255]]
    for values in ([[0, 3800]], [[-1, 1]], [[0, np.nan]]):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "p.tif")
        os.utime(tmp_path / "p.tif", ns=(0, hash(str(values)) % 10**15))
        with pytest.raises(DataError, match=r"p\.tif cannot be read \(floating-point .* 0 to 1"):
            read_image(tmp_path / "p.tif")


def test_32_bit_integers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3800]], np.int32)).save(tmp_path / "p.tif")
    with pytest.raises(DataError, match=r"p\.tif cannot be read \(32-bit integers have no known"):
        read_image(tmp_path / "p.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    grey = upright_picture().convert("L")
    image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else grey.convert(mode)
    if mode in ("LA", "RGBA"):  # transparent or not, the colours stay
        image.putalpha(Image.new("L", image.size, 10))
    if mode == "P":
        image.info["transparency"] = bytes(256)
    ending = "tif" if mode in ("CMYK", "YCbCr") else "png"
    image.save(tmp_path / f"p.{ending}")
    found = read_image(tmp_path / f"p.{ending}")
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(upright_picture()))


def test_deep_images_are_reported(tmp_path: Path) -> None:
    write(
        tmp_path,
        pictures=[
            {**PICTURE, "file_name": name} | {"id": n}
            for n, name in enumerate(("a.png", "p.png"), 1)
        ],
    )
    Image.fromarray(np.full((96, 64), 3800, np.uint16)).save(tmp_path / "images" / "a.png")
    assert kinds(CocoDataset(tmp_path, "val"))["deep"] == ["a.png"]
    (dark,) = [f for f in check_data(str(tmp_path)).findings["val"] if f.kind == "dark"]
    assert dark.items == ["a.png"] and dark.wrong


# ---- Files of images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>"), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], message: str, workers: int
) -> None:
    write(tmp_path, pictures=[{**PICTURE, "file_name": "q.jpg"}])
    Image.effect_noise((64, 96), 50).save(tmp_path / "images" / "q.jpg")
    damage(tmp_path / "images" / "q.jpg")
    data = CocoDataset(tmp_path, "val")
    with pytest.raises(DataError) as error:
        list(torch.utils.data.DataLoader(data, num_workers=workers))
    assert str(error.value).startswith("the image ") and "\n" not in str(error.value)
    assert message in str(error.value) and "q.jpg" in str(error.value)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    for value in (10, 20):
        Image.new("RGB", (8, 8), (value,) * 3).save(path)
        os.utime(path, ns=(0, value))
        assert read_image(path).unique().tolist() == [value]
    assert read_image(path) is read_image(str(path))


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CACHED_BYTES", 3 * 8 * 8 * 2)
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        read_image(tmp_path / f"{name}.png")
    assert [Path(path).stem for path in images._cache] == ["b", "c"]
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    read_image(tmp_path / "large.png")
    assert [Path(path).stem for path in images._cache] == ["large"]  # whoever crops it again has it


def test_images_above_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    write(tmp_path)  # 6144 pixels
    with pytest.raises(DataError, match=r"p\.png has more than 6,000 pixels; --large-images reads"):
        CocoDataset(tmp_path, "val")[0]
    assert sees_white(CocoDataset(tmp_path, "val", large_images=True))


@pytest.mark.parametrize(
    ("named", "there"),
    [
        ("sub\\p.jpg", "images/sub/p.jpg"),
        ("C:\\Users\\me\\p.jpg", "images/p.jpg"),
        ("/home/me/set/p.jpg", "images/p.jpg"),
        ("my%20picture%20%281%29.jpg", "images/my picture (1).jpg"),
        ("https://host/data/p.jpg?size=full", "images/p.jpg"),
        ("images/p.jpg", "images/p.jpg"),
        ("../set/images/p.jpg", "images/p.jpg"),
        ("a.JPG", "images/a.jpg"),
        ("a.jpg", "images/a.JPG"),
        ("ba\u0308r.jpg", "images/b\u00e4r.jpg"),
        ("b\u00e4r.jpg", "images/ba\u0308r.jpg"),
        ("50%25 #1?.jpg", "images/50%25 #1?.jpg"),
        ("in root.jpg", "in root.jpg"),
    ],
)
def test_names_that_were_written_elsewhere(tmp_path: Path, named: str, there: str) -> None:
    root = tmp_path / "set"
    write(root, pictures=[{**PICTURE, "file_name": named}])
    (root / there).parent.mkdir(exist_ok=True)
    upright_picture().save(root / there, quality=95)
    data = CocoDataset(root, "val")
    assert sees_white(data)
    exact = (data.image_dir / named).is_file()
    assert kinds(data).get("renamed", []) == ([] if exact else [named])


def test_absolute_names_and_twins(tmp_path: Path) -> None:
    write(tmp_path, pictures=[{**PICTURE, "file_name": str(tmp_path / "images" / "p.png")}])
    assert sees_white(CocoDataset(tmp_path, "val"))
    names = ("left/p.png", "right/p.png")  # neither is the p.png of the folder above
    write(
        tmp_path,
        pictures=[{**PICTURE, "id": n, "file_name": name} for n, name in enumerate(names, 1)],
    )
    with pytest.raises(DataError, match=r"left/p\.png does not exist, and 1 more"):
        CocoDataset(tmp_path, "val").survey()


def test_one_file_for_several_images(tmp_path: Path) -> None:
    write(tmp_path, [BOX, {**BOX, "id": 2, "image_id": 2}], [PICTURE, {**PICTURE, "id": 2}])
    (twice,) = [f for f in CocoDataset(tmp_path, "val").survey() if f.kind == "twice"]
    assert twice.items == ["p.png"] and twice.wrong


# ---- What the annotations say -------------------------------------------------------------------


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


# ---- Annotation files ---------------------------------------------------------------------------


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


# ---- Categories ---------------------------------------------------------------------------------


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


def test_training_goes_on_with_its_categories(tmp_path: Path) -> None:
    data = dataset_of(tmp_path, {1: "dog", 2: "cat"})
    check_categories({4: "dog", 7: "cat"}, data)  # the same labels
    for trained in ({1: "cat", 2: "dog"}, {1: "dog"}, {1: "dog", 2: "cat", 3: "cow"}):
        with pytest.raises(DataError, match=r"must have the categories .* and has dog, cat$"):
            check_categories(trained, data)


class Oracle(torch.nn.Module):
    """Sees the box, as the label 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        box = {"boxes": torch.tensor([[10.0, 60, 34, 84]]), "scores": torch.ones(1)}
        return [{**box, "labels": torch.zeros(1, dtype=torch.int64)} for _ in pictures]


def test_results_have_the_ids_of_the_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from models.recipes import RECIPES

    data = dataset_of(tmp_path, {"c": "cat", "d": "dog"})
    (result,) = evaluation.detect_all(Oracle(), RECIPES["coco"], {1: "cat", 2: "dog"}, data) or []
    assert result["category_id"] == "c" and "matched by name" in capsys.readouterr().err
    assert evaluation.evaluate(data.coco, [result], 100)["AP"] == ONE


# ---- check --------------------------------------------------------------------------------------


def test_check_of_a_good_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, [{**BOX, "area": 576}], split="train")
    write(tmp_path, [{**BOX, "area": 576}], [{**PICTURE, "file_name": "q.png"}])
    Image.new("RGB", (64, 96), "white").save(tmp_path / "images" / "q.png")
    (tmp_path / "results.json").write_text("[]")  # none of its business
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "val: " in printed and "odd" not in printed and "wrong" not in printed
    assert "nothing stands against training" in printed


def test_check_finds_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pictures = [{**PICTURE, "id": n, "file_name": f"{n}.png"} for n in range(1, 8)]
    annotations = [
        {**BOX, "bbox": [float("nan"), 0, 1, 1]},
        {**BOX, "id": 2, "image_id": 99},
        {**BOX, "id": 3},
        {**BOX, "id": 4},
        {**BOX, "id": 5, "image_id": 3, "bbox": [100, 0, 5, 5]},
        {**BOX, "id": 6, "image_id": 4},
    ]
    write(tmp_path, annotations, pictures, [PART, {"id": 2, "name": "unused"}], split="train")
    for n in range(1, 7):
        Image.effect_noise((64, 96), 10 * n).save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    (tmp_path / "images" / "4.png").write_bytes((tmp_path / "images" / "4.png").read_bytes()[:700])
    (tmp_path / "images" / "6.png").write_bytes((tmp_path / "images" / "5.png").read_bytes())
    pages = [Image.new("L", (64, 96), value) for value in (1, 2)]
    pages[0].save(tmp_path / "images" / "p.tif", save_all=True, append_images=pages[1:])
    pictures = [
        {**PICTURE, "id": 1, "file_name": "5.png", "width": 640},
        {**PICTURE, "id": 2, "file_name": "p.tif"},
    ]
    write(
        tmp_path,
        pictures=pictures,
        categories=[{"id": 2, "name": "part"}, {"id": 1, "name": "new"}],
    )
    out = tmp_path / "report" / "all.json"
    assert main(["check", str(tmp_path), "--device", "cpu", "--json", str(out)]) == 1
    printed, error = capsys.readouterr()
    assert "needs mending" in error
    report = json.loads(out.read_text())
    faults = "\n".join(report["faults"]["train"])
    for part in (
        "annotation 1 must have a bbox of four numbers",
        "annotation 2 has an unknown image_id, 99",
        "2.png cannot be read",
        "4.png cannot be read",
        "7.png does not exist",
    ):
        assert faults.count(part) == 1 and part in printed, part
    found = {f["kind"]: f["items"] for f in report["findings"]["train"]}
    assert found["repeated"] == [4] and found["left out"] == [5]
    assert found["no objects"] == ["unused"] and found["same image"] == ["6.png"]
    assert found["empty"] == ["2.png", "5.png", "6.png", "7.png"]
    found = {f["kind"]: f["items"] for f in report["findings"]["val"]}
    assert found["size"] == ["5.png"] and found["frames"] == ["p.tif"]
    across = {f["kind"]: f["items"] for f in report["across"]}
    assert across == {"in both": ["5.png"], "unknown categories": ["new"], "other ids": ["part"]}
    assert main(["check", str(tmp_path), "--device", "cpu", "--json", str(out)]) == 1
    assert "all.json exists already; --overwrite" in capsys.readouterr().err


def test_check_hints_at_other_boxes(tmp_path: Path) -> None:
    write(tmp_path, [{**BOX, "bbox": [10, 60, 34, 84]}, {**BOX, "id": 2, "bbox": [0, 0, 4, 4]}])
    (hint,) = [f for f in check_data(str(tmp_path)).findings["val"] if f.kind == "corners"]
    assert hint.items == [1] and "[x1, y1, x2, y2]" in str(hint)
    write(tmp_path, [{**BOX, "bbox": [0.1, 0.6, 0.24, 0.24]}])
    (hint,) = [f for f in check_data(str(tmp_path)).findings["val"] if f.kind == "relative"]
    assert hint.items == [1]
    write(tmp_path, [{**BOX, "bbox": [10, 60, 34, 84]}, {**BOX, "id": 2, "bbox": [9, 9, 4, 4]}])
    assert "corners" not in {f.kind for f in check_data(str(tmp_path)).findings["val"]}


def test_check_without_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere is not a folder"),
        ([str(tmp_path)], "has neither train.json nor"),
        ([str(tmp_path), "--workers", "0"], "--workers must be a whole number at least 1, got 0"),
    ):
        assert main(["check", *arguments, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--split", "val", "--device", "cpu"]) == 1
    assert "val.json nor annotations" in capsys.readouterr().out
    write(tmp_path).write_text("{")
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 1
    assert "is not valid JSON" in capsys.readouterr().out


# ---- Pascal VOC ---------------------------------------------------------------------------------

OBJECT = (
    "<object><name>cat</name><bndbox><xmin>11</xmin><ymin>61</ymin><xmax>34</xmax><ymax>84</ymax></bndbox>"
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>"
)


def voc_xml(
    filename: str | None = None, width: Any = 64, height: Any = 96, things: str = OBJECT
) -> str:
    name = "" if filename is None else f"<filename>{filename}</filename>"
    return f"<annotation>{name}<size><width>{width}</width><height>{height}</height></size>{things}</annotation>"


def write_voc(
    root: Path,
    xmls: dict[str, str | bytes],
    pictures: list[str],
    lists: dict[str, str | bytes] | None = None,
) -> Path:
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in xmls.items():
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(xml.encode() if isinstance(xml, str) else xml)
    for name in pictures:
        (root / "JPEGImages" / name).parent.mkdir(exist_ok=True)
        picture = upright_picture()
        picture.save(
            root / "JPEGImages" / name, **({"quality": 95} if name.endswith("jpg") else {})
        )
    for name, text in (lists or {}).items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_bytes(
            text.encode() if isinstance(text, str) else text
        )
    return root


@pytest.mark.parametrize(
    ("name", "written", "picture", "line"),
    [
        ("shelf (2) left", "shelf (2) left.jpg", "shelf (2) left.jpg", "shelf (2) left"),
        ("shelf 1", None, "shelf 1.jpg", "shelf 1"),
        ("a.b.c", "a.b.c.jpg", "a.b.c.jpg", "a.b.c"),
        ("a", "a.jpg", "a.png", "a"),
        ("a", None, "a.png", "a"),
        ("a", "", "a.tif", "a"),
        ("a", "a", "a.JPG", "a"),
        ("a", "C:\\Users\\me\\a.jpg", "a.jpg", "a"),
        ("a", "other.jpg", "a.jpg", "a"),
        ("a", "b.jpg", "b.jpg", "a"),
        ("a", None, "a.jpg", "a.jpg"),
        ("a", None, "a.jpg", "JPEGImages/a.jpg"),
        ("a", None, "a.jpg", "Annotations\\a.xml"),
        ("a", None, "a.jpg", "a 1"),
        ("sub/a", "a.jpg", "sub/a.jpg", "sub/a"),
    ],
)
def test_voc_names(tmp_path: Path, name: str, written: str | None, picture: str, line: str) -> None:
    voc = write_voc(tmp_path / "voc", {name: voc_xml(written)}, [picture], {"train": f"{line}\n"})
    assert convert_voc(voc, tmp_path / "out") == {"train": 1}
    data = CocoDataset(tmp_path / "out", "train")
    assert sees_white(data) and data.categories == {1: "cat"} and "renamed" not in kinds(data)


def test_voc_images_that_cannot_be_told(tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "voc", {"a": voc_xml("a.jpg")}, ["a.png", "a.tif"], {"train": "a\n"})
    with pytest.raises(
        DataError, match=r"a\.xml has several images, a\.png, a\.tif, and .* 'a\.jpg'"
    ):
        convert_voc(voc, tmp_path / "out")
    write_voc(voc, {"a": voc_xml("a.png")}, [])
    assert convert_voc(voc, tmp_path / "out") == {"train": 1}
    assert sees_white(CocoDataset(tmp_path / "out", "train"))
    voc = write_voc(tmp_path / "none", {"a": voc_xml("b.jpg")}, [], {"train": "a\n"})
    with pytest.raises(DataError, match=r"a\.xml has no image in .*JPEGImages: neither a\.jpg"):
        convert_voc(voc, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("width", "height"), [(0, 0), ("", ""), (-1, 96), ("nan", 96)])
def test_voc_without_a_size(
    tmp_path: Path, width: Any, height: Any, capsys: pytest.CaptureFixture
) -> None:
    voc = write_voc(
        tmp_path / "voc", {"a": voc_xml(None, width, height)}, ["a.jpg"], {"train": "a"}
    )
    assert main(["convert", str(voc), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "1 annotations have no width and height" in capsys.readouterr().err
    data = CocoDataset(tmp_path / "out", "train")
    assert data.left_out == [] and kinds(data) == {} and sees_white(data)


def test_voc_lists(tmp_path: Path) -> None:
    lists = {
        "train": "\ufeffa\r\n\r\nb \r\na\n",
        "my_val": "b\n",
        "cat_train": "a  1\nb -1\n",
        "cat_val": "b  0\n",
        "empty_test": "",
    }
    voc = write_voc(
        tmp_path / "voc", {n: voc_xml() for n in "abc"}, ["a.jpg", "b.jpg", "c.jpg"], lists
    )
    assert convert_voc(voc, tmp_path / "out") == {"train": 2, "my_val": 1, "empty_test": 0}
    write_voc(voc, {}, [], {"train": "nowhere\n"})
    with pytest.raises(DataError, match=r"Annotations/nowhere\.xml does not exist"):
        convert_voc(voc, tmp_path / "other")
    write_voc(voc, {}, [], {"train": b"\xe4\n"})
    with pytest.raises(DataError, match=r"train\.txt cannot be read as a list of names"):
        convert_voc(voc, tmp_path / "other")


def test_voc_without_lists(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    voc = write_voc(tmp_path / "voc", {n: voc_xml() for n in "ab"}, ["a.jpg", "b.jpg"])
    assert main(["convert", str(voc), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "all 2 annotations are 'train'" in capsys.readouterr().err
    assert len(CocoDataset(tmp_path / "out", "train")) == 2
    flat = tmp_path / "flat"  # as labelImg leaves it
    flat.mkdir()
    (flat / "a.xml").write_text(voc_xml("a.jpg"))
    upright_picture().save(flat / "a.jpg", quality=95)
    assert convert_voc(flat, tmp_path / "of flat") == {"train": 1}
    assert sees_white(CocoDataset(tmp_path / "of flat", "train"))


@pytest.mark.parametrize(
    "encode",
    [
        lambda xml: b"\xef\xbb\xbf" + xml.encode(),
        lambda xml: xml.encode("utf-16"),
        lambda xml: b'\n<?xml version="1.0"?>' + xml.encode(),
        lambda xml: b'<?xml version="1.0" encoding="latin-1"?>' + xml.encode("latin-1"),
        lambda xml: b'<?xml version="1.0" encoding="cp1252"?>' + xml.encode("cp1252"),
    ],
)
def test_voc_encodings(tmp_path: Path, encode: Callable[[str], bytes]) -> None:
    xml = encode(voc_xml().replace("cat", "Bär"))
    voc = write_voc(tmp_path / "voc", {"a": xml}, ["a.jpg"])
    assert convert_voc(voc, tmp_path / "out") == {"train": 1}
    assert CocoDataset(tmp_path / "out", "train").categories == {1: "Bär"}


def test_voc_in_chinese(tmp_path: Path) -> None:
    xml = '<?xml version="1.0" encoding="gbk"?>' + voc_xml().replace("cat", "猫")
    voc = write_voc(tmp_path / "voc", {"a": xml.encode("gbk")}, ["a.jpg"])
    convert_voc(voc, tmp_path / "out")
    assert CocoDataset(tmp_path / "out", "train").categories == {1: "猫"}


def test_voc_boxes(tmp_path: Path) -> None:
    things = OBJECT.replace("<xmin>11<", "<xmin> 11.0\n<").replace("</name>", " </name>", 1)
    difficult = OBJECT.replace("</name>", "</name><difficult>True</difficult>", 1)
    xml = voc_xml(things=things + difficult)
    voc = write_voc(tmp_path / "voc", {"a": xml}, ["a.jpg"])
    convert_voc(voc, tmp_path / "out")
    target = CocoDataset(tmp_path / "out", "train")[0][1]
    assert target["boxes"].tolist() == target["crowd_boxes"].tolist() == [[10, 60, 34, 84]]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (voc_xml(things=OBJECT.replace("xmin>11", "xmin>five")), r"could not convert .*'five'"),
        (voc_xml(things="<object><name>cat</name></object>"), "object 1, cat, has no <bndbox>"),
        (voc_xml(things=OBJECT.replace("<name>cat</name>", "")), "object 1 has no <name>"),
        ("", "no element found"),
        ("<annotation>", "no element found"),
        ("<html/>", "it begins with <html>"),
        (b"<annotation>\xe4</annotation>", "not well-formed"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "unknown encoding"),
    ],
)
def test_voc_that_is_none(tmp_path: Path, xml: str | bytes, message: str) -> None:
    voc = write_voc(tmp_path / "voc", {"a": xml}, ["a.jpg"])
    with pytest.raises(DataError, match=rf"a\.xml is no Pascal VOC annotation \(.*{message}"):
        convert_voc(voc, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversions_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    voc = write_voc(tmp_path / "voc", {"a": voc_xml()}, ["a.jpg"])
    other = write_voc(tmp_path / "other", {"b": voc_xml()}, ["b.jpg"], {"val": "b"})
    out = tmp_path / "out"
    command = ["convert", str(voc), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    before = (out / "train.json").read_bytes()
    assert main(command) == 1
    assert "train.json exists already; --overwrite replaces it" in capsys.readouterr().err
    assert main(["convert", str(other), *command[2:]]) == 1
    assert "another data set is in" in capsys.readouterr().err
    assert (out / "train.json").read_bytes() == before and not (out / "val.json").exists()
    assert main([*command, "--overwrite"]) == 0
    (tmp_path / "mine" / "images").mkdir(parents=True)
    command[3] = str(tmp_path / "mine")
    for arguments in (command, [*command, "--overwrite"]):
        assert main(arguments) == 1
        assert "images exists already and is not" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "images"]
