"""What the options of the commands on a trained model may be, and where they run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder
from test_field_voc import voc_xml, write_voc
from test_models_commands import RECIPE
from test_models_predict import make_checkpoint

from models.__main__ import main
from models.command_line import COMMANDS
from models.commands import demo, export
from models.data import CocoDataset
from models.recipes import RECIPES
from models.train import train

BASES = {
    "predict": "predict missing.pt missing.png",
    "evaluate": "evaluate missing.pt --data missing",
    "export": "export missing.pt",
    "study": "study loss --data missing",
    "bench": "bench --data missing",
    "demo": "demo",
}
WRONG = {
    ("predict", "--min-score"): ("nan", "inf", "-0.1", "1.5"),
    ("evaluate", "--max-detections"): ("0", "-1"),
    ("export", "--size"): ("0 0", "64 -1", "0 64"),
    ("export", "--batch-size"): ("0", "-2"),
    ("study", "--steps"): ("0", "-1"),
    ("study", "--seeds"): ("0", "-1"),
    ("study", "--samples"): ("0", "-1"),
    ("demo", "--steps"): ("0", "1.5", "many"),
    ("demo", "--seed"): ("-1", "0.5"),
    ("bench", "--size"): ("0 0", "64 -1"),
    ("bench", "--batch-size"): ("0", "-2"),
    ("bench", "--rounds"): ("0", "-1"),
}


def test_every_number_has_a_row() -> None:
    numbers = set()
    for name in BASES:
        parser = argparse.ArgumentParser()
        COMMANDS[name].add_arguments(parser)
        numbers |= {
            (name, action.option_strings[0])
            for action in parser._actions
            if action.type in (int, float) or action.metavar == "NUMBER"
        }
    assert numbers == set(WRONG)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [(*where, value) for where, values in WRONG.items() for value in values],
)
def test_an_option_out_of_range_is_a_sentence(
    command: str, option: str, value: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Before the files are looked at, none of which exists."""
    monkeypatch.chdir(tmp_path)
    assert main([*BASES[command].split(), option, *value.split(), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} must be ") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    recipe = folder / "recipe.json"
    recipe.write_text(
        json.dumps(dataclasses.asdict(dataclasses.replace(RECIPE, steps=1, batch_size=1)))
    )
    return {
        "checkpoint": make_checkpoint(folder / "checkpoint.pt"),
        "data": make_coco_folder(folder / "coco"),
        "voc": write_voc(folder / "voc", {"a": voc_xml()}, ["a.jpg"], {"train": "a\n"}),
        "image": folder / "coco" / "val2017" / "000000000100.png",
        "recipe": recipe,
    }


ON_THE_CPU = {
    "predict": "predict {checkpoint} {image} --out {out}",
    "evaluate": "evaluate {checkpoint} --data {data} --out {out}/results.json",
    "export": "export {checkpoint} --size 64 64 --out {out}/detector.pt2",
    "study": "study seeds --seeds 1 --data {data} --recipe {recipe} --no-pretrained --out {out}",
    "bench": "bench --size 64 64 --rounds 1 --out {out}/bench.json",
    "train": "train --data {data} --recipe {recipe} --no-pretrained --out {out}",
    "configs": "configs coco",
    "convert": "convert {voc} --out {out}",
    "check": "check {data}",
    "demo": "demo --out {out}",
}
CURVES = "study curves --out {out}"
DISTRIBUTION = (
    "study distribution --samples 2 --data {data} --recipe {recipe} --no-pretrained --out {out}"
)


def test_every_command_is_tried_on_the_cpu() -> None:
    assert set(ON_THE_CPU) == set(COMMANDS)


@pytest.mark.parametrize("command", [*ON_THE_CPU.values(), DISTRIBUTION, CURVES])
def test_a_machine_with_a_gpu_can_use_its_cpu(
    command: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # torch's own optimizers ask the GPU that is not there; the check's name changed after torch 2.10.
    for check in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    monkeypatch.setattr(
        export, "forms", lambda detector, *_: {"eager": detector}
    )  # the rest takes minutes
    # The demo's own data and weights are downloaded.
    monkeypatch.setitem(RECIPES, "trees", dataclasses.replace(RECIPE, steps=1, batch_size=1))
    monkeypatch.setattr(demo, "prepare_backbone_weights", lambda backbone: None)
    monkeypatch.setattr(demo, "open_data", lambda _, split: CocoDataset(files["data"], split))
    monkeypatch.setattr(demo, "train", functools.partial(train, pretrained=False))
    arguments = command.format(**files, out=tmp_path / "out").split()
    assert main([*arguments, "--device", "cpu"]) == 0


@pytest.mark.parametrize("command", ["evaluate", "export", "bench"])
def test_results_are_replaced_only_when_told(
    command: str, files: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(export, "forms", lambda detector, *_: {"eager": detector})
    arguments = [*ON_THE_CPU[command].format(**files, out=tmp_path).split(), "--device", "cpu"]
    names = {
        "evaluate": ("results.json", "results-figures.json", "results-curves.png"),
        "export": ("detector.pt2",),
        "bench": ("bench.json",),
    }[command]
    for name in names:
        for other in names:
            (tmp_path / other).unlink(missing_ok=True)
        (tmp_path / name).write_text("mine")
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert f"{name} exists already" in error and "--overwrite" in error and "--out" in error
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert main([*arguments, "--overwrite"]) == 0


def test_an_input_is_never_replaced(files: dict[str, Path], tmp_path: Path, capsys) -> None:
    checkpoint, data = files["checkpoint"], files["data"]
    annotations = data / "annotations" / "instances_val2017.json"
    for arguments in (
        f"evaluate {checkpoint} --data {data} --out {annotations}",
        f"evaluate {checkpoint} --data {data} --out {checkpoint}",
        f"predict {checkpoint} {files['image']} --out {files['image'].parent}",
    ):
        before = annotations.read_bytes(), checkpoint.read_bytes(), files["image"].read_bytes()
        assert main([*arguments.split(), "--overwrite", "--device", "cpu"]) == 1
        assert "is an input of this command" in capsys.readouterr().err
        assert before == (
            annotations.read_bytes(),
            checkpoint.read_bytes(),
            files["image"].read_bytes(),
        )


def test_results_without_a_truth(files: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Of a test set as COCO publishes it there is nothing to compare with."""
    data = tmp_path / "coco"
    shutil.copytree(files["data"] / "val2017", data / "test2017")
    val = json.loads((files["data"] / "annotations" / "instances_val2017.json").read_text())
    (data / "annotations").mkdir()
    info = {"images": val["images"], "categories": val["categories"]}
    (data / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    out = tmp_path / "out" / "results.json"
    arguments = f"evaluate {files['checkpoint']} --data {data} --split test-dev --out {out}"
    assert main([*arguments.split(), "--device", "cpu"]) == 0
    assert "there is nothing to compare with" in capsys.readouterr().out
    assert {result["image_id"] for result in json.loads(out.read_text())} == {100, 110}
    assert [*out.parent.iterdir()] == [out]


def test_studies_are_not_mixed(files: dict[str, Path], tmp_path: Path, capsys) -> None:
    def study(data: Path, *more: str) -> int:
        arguments = ON_THE_CPU["study"].format(**{**files, "data": data}, out=tmp_path / "out")
        return main([*arguments.split(), "--device", "cpu", *more])

    out = tmp_path / "out"
    out.mkdir()
    (out / "seeds.md").write_text("my notes")
    assert study(files["data"]) == 1 and "seeds.md exists already" in capsys.readouterr().err
    (out / "seeds.md").unlink()
    for name in ("seeds.pt", "distribution.pt"):
        (out / name).write_text("my weights")
    assert study(files["data"]) == 0
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert kept["seeds.pt"] == kept["distribution.pt"] == b"my weights" and len(kept) == 5
    # A data set of the same names with another content.
    other = tmp_path / "other" / "coco"
    shutil.copytree(files["data"], other)
    annotations = other / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text() + " ")
    assert study(other, "--overwrite") == 1
    assert "holds runs of another pair of annotation files" in capsys.readouterr().err
    assert kept == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "seeds.json").write_text("[1]")
    assert study(files["data"]) == 1 and "is no record of a study" in capsys.readouterr().err
    distribution = ON_THE_CPU["study"].format(**files, out=out).replace("seeds", "distribution", 1)
    assert main([*distribution.split(), "--samples", "1", "--device", "cpu"]) == 1
    assert "distribution.pt exists already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "bench"])
def test_ctrl_c_is_a_sentence(
    command: str, files: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("load_model", "bench"):
        monkeypatch.setattr(COMMANDS[command], name, interrupted, raising=False)
    arguments = ON_THE_CPU[command].format(**files, out=tmp_path / "out").split()
    assert main([*arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted") and error.count("\n") == 1


def test_figures_do_not_replace_the_data(files: dict[str, Path], tmp_path: Path, capsys) -> None:
    data = tmp_path / "coco"
    shutil.copytree(files["data"], data)
    file = data / "annotations" / "instances_train2017.json"
    before = file.read_bytes()
    arguments = f"bench --data {data} --size 64 64 --rounds 1 --overwrite --out {file}"
    assert main([*arguments.split(), "--device", "cpu"]) == 1
    assert "is an input of this command" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_nothing_to_evaluate_on(files: dict[str, Path], tmp_path: Path, capsys) -> None:
    data = tmp_path / "coco"
    shutil.copytree(files["data"], data)
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": [], "annotations": []}))
    arguments = ON_THE_CPU["evaluate"].format(**{**files, "data": data}, out=tmp_path / "out")
    assert main([*arguments.split(), "--device", "cpu"]) == 1
    assert "instances_val2017.json has no images" in capsys.readouterr().err
