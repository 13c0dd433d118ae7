"""python -m models check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fixtures import BOX, PART, PICTURE, write
from PIL import Image

from models.__main__ import main
from models.data.check import check_data


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
    assert across.pop("unlisted") == ["p.png"]
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


def test_check_of_a_voc_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "Annotations").mkdir()
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 1
    assert "looks like a Pascal VOC folder: convert it first" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.json", "images/p.png"])
def test_a_report_replaces_nothing_else(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, split="train")
    file, report = tmp_path / name, tmp_path / "report.json"
    before = file.read_bytes()
    check = ["check", str(tmp_path), "--device", "cpu", "--overwrite", "--json"]
    assert main([*check, str(file)]) == 1 and file.read_bytes() == before
    assert f"{file} is no report that check wrote, and stays" in capsys.readouterr().err
    for _ in range(2):
        assert main([*check, str(report)]) == 0


def test_a_data_set_without_anything_to_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """check says what train does."""
    cases = {"no categories": ([], []), "left out": ([{**BOX, "bbox": [30, 30, -9, -9]}], [PART])}
    for name, (boxes, categories) in cases.items():
        file = write(tmp_path / name, boxes, split="train")
        dataset = {**json.loads(file.read_text()), "categories": categories}
        file.write_text(json.dumps(dataset))
        assert main(["check", str(tmp_path / name), "--device", "cpu"]) == 1
        assert f"wrong: {'1 boxes' if boxes else file}" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "run"), "--no-pretrained", "--device", "cpu"]
    data = str(tmp_path / "no categories")
    assert main(["train", "--data", data, *out]) == 1
    assert "train.json has no categories" in capsys.readouterr().err


def test_files_that_macos_lays_beside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, split="train")
    (tmp_path / "images" / "._p.png").write_bytes(b"\0\5\26\7")
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 0
    assert "no split" not in capsys.readouterr().out
