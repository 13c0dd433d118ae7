"""Image files as users have them: each case stands for a kind."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fixtures import BOX, PICTURE, kinds, sees_white, upright_picture, write
from PIL import Image

from models.data import (
    CocoDataset,
    DataError,
    images,
    read_image,
)
from models.data.check import check_data

# ---- EXIF -----------------------------------------------------------------------------------------

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


# ---- Pixels ---------------------------------------------------------------------------------------


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
    found = kinds(CocoDataset(tmp_path, "val"))
    assert found["deep"] == found["dark"] == ["a.png"]
    (dark,) = [f for f in check_data(str(tmp_path)).findings["val"] if f.kind == "dark"]
    assert dark.items == ["a.png"] and dark.wrong


# ---- Files of images ------------------------------------------------------------------------------


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
