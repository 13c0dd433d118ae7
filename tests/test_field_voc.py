"""Pascal VOC folders as users have them: each case stands for a kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import kinds, sees_white, upright_picture

from models.__main__ import main
from models.data import (
    CocoDataset,
    DataError,
    convert_voc,
)

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
        as_jpeg = None if name.endswith(("png", "tif")) else "JPEG"
        picture.save(root / "JPEGImages" / name, as_jpeg, quality=95)
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
        ("a", "a.jpg", "a", "a"),
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
    with pytest.raises(
        DataError, match=r"Annotations/nowhere\.xml does not exist, and .*\.txt names it$"
    ):
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


def test_voc_boxes_without_an_area(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    xml = voc_xml("a.jpg")
    voc = write_voc(tmp_path / "voc", {"a": xml}, ["a.jpg"], {"train": "a\n"})
    (x1, x2), file = ("<xmin>11<", "<xmin>110<"), voc / "Annotations" / "a.xml"
    assert x1 in xml
    file.write_text(xml.replace(x1, x2))
    (file.parent / "._a.xml").write_bytes(b"\0\5\26\7")  # as macOS lays it beside
    assert main(["convert", str(voc), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "1 annotations have boxes that end before they begin" in capsys.readouterr().err
    (annotation,) = json.loads((tmp_path / "out" / "train.json").read_text())["annotations"]
    assert annotation["area"] == 0
    for value in ("nan", "inf"):
        file.write_text(xml.replace(x1, f"<xmin>{value}<"))
        with pytest.raises(DataError, match=r"object 1, cat, has a <bndbox> that is not finite"):
            convert_voc(voc, tmp_path / "other")
