"""predict: where it writes, what it writes, and what it leaves out."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder
from PIL import Image
from pycocotools.coco import COCO
from test_models_commands import RECIPE

from models.__main__ import main
from models.checkpoint import load_model, save_checkpoint
from models.commands import predict
from models.data import DataError, read_image
from models.draw import is_ours
from models.evaluate import detect
from models.retinanet import RetinaNet

ROOT = Path(__file__).parents[1]


def make_checkpoint(path: Path, **config) -> Path:
    torch.manual_seed(0)
    model = dataclasses.replace(RECIPE.model, score_threshold=0.0, **config)
    window = None if model.min_size else RECIPE.window
    recipe = dataclasses.replace(RECIPE, model=model, window=window, max_detections=20)
    content = {"model": RetinaNet(model).state_dict(), "recipe": dataclasses.asdict(recipe)}
    save_checkpoint(path, {**content, "step": 0, "categories": {3: "disc", 7: "square"}})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint.pt")


def save(path: Path, size: tuple[int, int] = (48, 40), color: str = "green") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def run(checkpoint: Path, *arguments: object) -> int:
    return main(["predict", str(checkpoint), *map(str, arguments), "--device", "cpu"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_at_once_do_not_write_into_one_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    image, out = save(tmp_path / "image.png"), tmp_path / "out"
    holder = (
        "import sys, pathlib; from models.outputs import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert run(checkpoint, image, "--out", out) == 1
        assert "is being written to by another process" in capsys.readouterr().err
        other.communicate()
    assert run(checkpoint, image, "--out", out) == 0
    assert sorted(contents(out)) == ["image.png"]


# ---- Names ---------------------------------------------------------------------------------------


def test_every_image_has_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    names = ("left/frame0.png", "right/frame0.png", "frame0.jpg", "frame0.png", "contact-sheet.png")
    images = [save(tmp_path / "in" / name) for name in names]
    out = tmp_path / "out"
    assert run(checkpoint, *images, images[0], "--out", out) == 0
    assert set(contents(out)) == {
        *("left/frame0.png", "right/frame0.png", "frame0.jpg.png", "frame0.png"),
        *("contact-sheet.png.png", "contact-sheet.png"),
    }


def test_names_differ_whatever_the_images_are_called() -> None:
    files = [Path(name) for name in ("a.jpg", "a.jpg.png", "A.PNG", "contact-sheet", "b/a.jpg")]
    names = predict.picture_names(files)
    assert len({*names.values(), predict.SHEET}) == len(files) + 1
    assert names[Path("a.jpg.png")] == "a.jpg.png" and names[Path("a.jpg")] == "a.jpg.png.png"
    many = [Path(f"{i}.jpg") for i in range(81)]
    assert predict.sheet_names(81) == [
        "contact-sheet.png",
        "contact-sheet-2.png",
        "contact-sheet-3.png",
    ]
    assert len(set(predict.picture_names(many).values())) == 81


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_that_was_there_is_lost(
    checkpoint: Path, tmp_path: Path, overwrite: bool, capsys: pytest.CaptureFixture
) -> None:
    photographs = tmp_path / "photographs"
    images = [save(photographs / name) for name in ("1.png", "2.jpg")]
    more = ["--overwrite"] if overwrite else []
    before = contents(photographs)
    assert run(checkpoint, photographs, "--out", photographs, *more) == 1  # its own input
    out = tmp_path / "out"
    mine = save(out / "1.png", color="red")  # a photograph of that name
    assert run(checkpoint, *images, "--out", out, *more) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and str(mine) in error
    assert contents(photographs) == before and list(contents(out)) == ["1.png"]
    mine.unlink()
    assert run(checkpoint, *images, "--out", out, *more) == 0
    assert all(is_ours(out / name) for name in contents(out))
    first = contents(out)
    assert run(checkpoint, *images, "--out", out, "--min-score", "0.9", *more) == (not overwrite)
    assert (contents(out) == first) != overwrite


# ---- Data ----------------------------------------------------------------------------------------


def test_formats_have_the_same_numbers(checkpoint: Path, tmp_path: Path) -> None:
    images = [save(tmp_path / "in" / name, (64, 40)) for name in ("a/1.png", 'b/1, "ä".png')]
    out = tmp_path / "out"
    data = ["--format", "json", "csv", "coco", "--no-pictures", "--min-score", "0.005"]
    assert run(checkpoint, *images, "--out", out, *data) == 0
    assert {p.name for p in out.iterdir()} == {
        *("predictions.json", "predictions.csv", "coco-results.json", "coco-images.json")
    }
    found = json.loads((out / "predictions.json").read_text())
    assert found["min_score"] == 0.005
    rows = [
        [
            i["id"],
            i["file_name"],
            i["width"],
            i["height"],
            d["category_id"],
            d["category"],
            d["score"],
            *d["box"],
        ]
        for i in found["images"]
        for d in i["detections"]
    ]
    assert [i["file_name"] for i in found["images"]] == ["a/1.png", 'b/1, "ä".png']
    assert len(rows) > 10 and {row[5] for row in rows} <= {"disc", "square"}
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        header, *table = csv.reader(file)
    assert header[:2] == ["image_id", "file_name"]
    assert table == [[str(value) for value in row] for row in rows]
    coco = COCO(str(out / "coco-images.json"))
    results = coco.loadRes(str(out / "coco-results.json")).dataset["annotations"]
    assert [r["score"] for r in results] == [row[6] for row in rows]
    for result, row in zip(results, rows, strict=True):
        x, y, w, h = result["bbox"]
        assert [x, y, round(x + w, 2), round(y + h, 2)] == row[7:]
        assert coco.imgs[result["image_id"]]["file_name"] == row[1]
        assert coco.cats[result["category_id"]]["name"] == row[5]
    model, recipe, _ = load_model(checkpoint)
    expected = detect(model, recipe, read_image(images[0]))
    count = int((expected["scores"] > 0.005).sum())
    scores = [row[6] for row in rows if row[0] == 1]
    assert scores == [round(s, 5) for s in expected["scores"][:count].tolist()]


def test_an_interruption_leaves_no_half_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images = [save(tmp_path / "in" / f"{i}.png") for i in range(3)]
    out, seen = tmp_path / "out", []

    def interrupted(*arguments: object) -> object:
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return detect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "detect", interrupted)
    assert run(checkpoint, *images, "--out", out, "--format", "json", "csv", "coco") == 1
    assert list(contents(out)) == ["0.png"]
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_a_closed_output_is_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    images = [save(tmp_path / "in" / f"{i}.png") for i in range(3)]
    command = [
        sys.executable,
        "-m",
        "models",
        "predict",
        checkpoint,
        *images,
        "--out",
        tmp_path / "out",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*map(str, command), "--device", "cpu"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr.startswith("error: nobody reads") and result.stderr.count("\n") == 1


# ---- What cannot be detected in ------------------------------------------------------------------


def test_the_others_are_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = make_checkpoint(tmp_path / "model.pt", min_size=64, max_size=96)
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a.png")
    save(folder / "thin.png", (3000, 2))
    (folder / "text.jpg").write_text("no image")
    save(folder / "z.png")
    assert run(checkpoint, folder, "--out", out, "--format", "json") == 1
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error] == ["left out", "left out", "error"]
    assert "text.jpg" in error[0] and "thin.png" in error[1] and "too thin" in error[1]
    assert error[2] == "error: 2 of 4 images were left out"
    assert set(contents(out)) == {"a.png", "z.png", "contact-sheet.png", "predictions.json"}
    images = json.loads((out / "predictions.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "z.png"]
    assert run(checkpoint, folder, tmp_path / "missing.png", "--out", tmp_path / "other") == 1
    assert "missing.png does not exist" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_evaluate_says_that_nothing_is_found_in_a_thin_image(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model.pt", min_size=64, max_size=96)
    data = make_coco_folder(tmp_path / "coco")
    image = sorted((data / "val2017").iterdir())[0]
    save(image, (3000, 2))
    annotations = data / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["images"][0].update(width=3000, height=2)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 100]
    annotations.write_text(json.dumps(content))
    out = tmp_path / "results.json"
    arguments = ["evaluate", str(checkpoint), "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert f"{image}: an image of 3000 x 2 pixels is too thin" in capsys.readouterr().err
    assert {result["image_id"] for result in json.loads(out.read_text())} == {110}


def test_bytes_are_detected_in_as_numbers_are() -> None:
    torch.manual_seed(0)
    for size in ({"min_size": 64, "max_size": 96}, {"min_size": None}):
        config = dataclasses.replace(RECIPE.model, score_threshold=0.0, **size)
        model = RetinaNet(config).eval()
        image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(model.class_layers) and name.endswith("weight"):
                    parameter *= 30  # a fresh head's scores are nearly one, and a rounding decides their order
            (found,), (expected,) = model([image]), model([image.float() / 255])
        # The order of the resize and the normalisation rounds otherwise.
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-6)


# ---- Memory --------------------------------------------------------------------------------------

PEAK = "import resource, sys; from models.__main__ import main; rc = main(sys.argv[1:]); print(rc, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def test_memory_follows_the_pixels_of_an_image(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model.pt", min_size=64, max_size=96)
    peaks = []
    for name, side in (("small", 64), ("large", 6000)):
        image = save(tmp_path / f"{name}.png", (side, side))
        arguments = ["predict", checkpoint, image, "--out", tmp_path / name, "--device", "cpu"]
        command = [sys.executable, "-c", PEAK, *map(str, arguments)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        code, peak = result.stdout.split()[-2:]
        assert code == "0", result.stderr
        peaks.append(int(peak) * 1024)
    assert peaks[1] - peaks[0] < 16 * 6000**2  # what --help says


WINDOWS = """
import dataclasses, resource, sys, torch
sys.path.insert(0, "tests")
from test_models_commands import RECIPE, Bright
from models.evaluate import detect
image = torch.zeros(3, 4000, 4000, dtype=torch.uint8)
image[0, 3990, 10] = 255
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for symmetries in (False, True):
    recipe = dataclasses.replace(RECIPE, window=None, symmetries=symmetries)
    assert detect(Bright(recipe.model), recipe, image)["boxes"].tolist() == [[10, 3990, 11, 3991]]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_unresized_image_is_seen_in_windows() -> None:
    command = [sys.executable, "-c", WINDOWS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # Two turned copies, and a few windows.
    assert int(result.stdout) * 1024 < 9 * 4000**2 + 1e8


def test_missing_is_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.png does not exist"):
        predict.find_images([tmp_path / "x.png"])


def test_a_format_given_twice_is_written_once(checkpoint: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "a" / "p.png")
    (image.parent / "._p.png").write_bytes(b"\0\5\26\7")  # as macOS lays it beside
    out = tmp_path / "out"
    assert run(checkpoint, image.parent, "--format", "csv", "csv", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["p.png", "predictions.csv"]
