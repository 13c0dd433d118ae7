"""A run's folder: what was there stays, a full disk is noticed, errors of loading processes are sentences."""

from __future__ import annotations

import dataclasses
import errno
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models_fixtures import contents
from tiny_backbone import TINY_RECIPE

from models import outputs
from models.__main__ import main
from models.checkpoint import expected_bytes, load_checkpoint
from models.data import CocoDataset, DataError
from models.log import Log
from models.recipes import RECIPES
from models.run_folder import files_of_run
from models.train import train

pytest_plugins = ["models_runs"]

# ---- What was there stays ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint.pt",
        "best.pt",
        "log.jsonl",
        "detections.png",
        "not-finite.json",
        "not-finite-rank1.json",
        "tensorboard/events.out.tfevents.7.host",
    ],
)
def test_a_folder_with_a_run_is_refused(run, tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    sentence = run(fails=True)
    assert re.search(rf"run holds a run already \({name}\): --resume .* --overwrite", sentence)
    assert contents(tmp_path / "run") == {name: b"precious"}


def test_overwrite_replaces_the_run_and_nothing_else(run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    events = out / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    shutil.copy(out / "checkpoint.pt", out / "best.pt")
    for file in (events, out / "notes.txt", out / "not-finite.json"):
        file.write_text("written before")
    assert "--overwrite" in run(fails=True)
    assert run("--overwrite", "--steps", "2").startswith("trained: ")
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 2
    assert [path.name for path in files_of_run(out)] == ["checkpoint.pt"]
    assert (out / "notes.txt").read_text() == "written before"
    assert "give only one" in run("--overwrite", "--resume", fails=True)


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "log.jsonl", "detections.png"])
def test_overwrite_keeps_what_no_run_made(run, finished: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).write_bytes(b"somebody's own")
    before = contents(out)
    assert f"{name} is not of a run of this command" in run("--overwrite", fails=True)
    if name == "detections.png":
        assert f"{name} is not of a run of this command" in run("--resume", fails=True)
    assert contents(out) == before


def test_inputs_are_not_overwritten(run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    sentence = run("--overwrite", "--weights", str(out / "checkpoint.pt"), fails=True)
    assert "checkpoint.pt is an input of this command and cannot be its output" in sentence
    shutil.copy(out / "checkpoint.pt", out / "best.pt")
    before = contents(out)
    run("--overwrite", "--weights", str(out / "best.pt"), fails=True)
    assert contents(out) == before


def no_memory(*arguments: object) -> None:
    raise MemoryError


def test_nothing_is_removed_before_a_step_is_made(
    run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    run("--overwrite", "--data", str(tmp_path / "nowhere"), fails=True)
    run("--overwrite", "--split", "test", fails=True)
    run("--overwrite", "--val-split", "test", fails=True)
    run("--overwrite", "--steps", "0", fails=True)
    run("--overwrite", "--backbone", "timm:none_of_that_name", fails=True)
    monkeypatch.setattr("models.train.to_device", no_memory)
    assert "out of memory" in run("--overwrite", fails=True)
    assert contents(out) == before


def test_places_that_cannot_be_written_to(run, finished: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("a file")
    for folder in ("file", "file/below"):
        assert "must be a folder to write to, and is a file or in one" in run(
            folder=folder, fails=True
        )
    assert (tmp_path / "file").read_text() == "a file"
    assert re.search(
        r"nothing can be written to /proc/run \(.+\)", run("--out", "/proc/run", fails=True)
    )
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    assert "checkpoint.pt must be a file to write to, and is a folder" in run(
        "--resume", fails=True
    )

    shutil.copytree(finished, tmp_path / "full")
    before = contents(tmp_path / "full")
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for folder, more in (("new", ()), ("full", ("--overwrite",)), ("full", ("--resume",))):
        sentence = run(*more, "--val-split", "val", folder=folder, fails=True)
        assert re.search(r"must have 0\.\d MB free, and has 0\.1 MB", sentence), sentence
    assert contents(tmp_path / "full") == before
    assert not files_of_run(tmp_path / "new")


@pytest.mark.parametrize("name", ["tiny", "small", "trees"])
def test_the_size_of_a_checkpoint_is_known_before(
    finished: Path, data: CocoDataset, tmp_path: Path, name: str
) -> None:
    if name == "tiny":
        file, recipe = finished / "checkpoint.pt", TINY_RECIPE
    else:
        model = dataclasses.replace(RECIPES[name].model, num_classes=2, min_size=64)
        changes: dict[str, Any] = {"steps": 1, "batch_size": 1, "crop": 64, "precision": "bfloat16"}
        recipe = dataclasses.replace(RECIPES[name], model=model, **changes)
        file = tmp_path / "checkpoint.pt"
        train(recipe, data, file, pretrained=False)
    assert expected_bytes(recipe) == pytest.approx(file.stat().st_size, rel=0.1)


def hold(folder: Path, held: Any, done: Any) -> None:
    with outputs.locked(folder):
        held.set()
        done.wait(60)


def test_two_trainings_do_not_share_a_folder(run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, done))
    other.start()
    try:
        assert held.wait(60)
        for more in ((), ("--resume",), ("--overwrite",)):
            sentence = run(*more, fails=True)
            assert f"run is being written to by another process, {other.pid}" in sentence
    finally:
        other.kill()  # a lock ends with its process
        other.join()
    run()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_demo_can_be_repeated(tmp_path: Path) -> None:
    """It replaces what it made, as long as that is as it left it."""
    names = ("checkpoint.pt", "results.json")
    for turn in ("first", "second"):
        with outputs.remade(tmp_path, names):
            (tmp_path / "checkpoint.pt").write_text(turn)
    with pytest.raises(KeyboardInterrupt), outputs.remade(tmp_path, names):
        (tmp_path / "results.json").write_text("half of it is its own too")
        raise KeyboardInterrupt
    with outputs.remade(tmp_path, names):
        pass
    for change in (
        lambda: (tmp_path / "checkpoint.pt").write_text("trained further"),
        lambda: (tmp_path / ".made").unlink(),
        lambda: (tmp_path / ".made").write_text("{"),
    ):
        change()
        before = contents(tmp_path)
        with (
            pytest.raises(
                DataError, match=r"checkpoint.pt exists, and this command did not make it"
            ),
            outputs.remade(tmp_path, names),
        ):
            raise AssertionError("not reached")
        assert contents(tmp_path) == before


def test_the_demo_twice(coco_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from models.commands import demo

    monkeypatch.setitem(RECIPES, "trees", TINY_RECIPE)
    monkeypatch.setattr(demo, "prepare_backbone_weights", lambda backbone: None)
    monkeypatch.setattr(demo, "open_data", lambda name, split: CocoDataset(coco_folder, split))
    monkeypatch.setattr(demo, "train", functools.partial(train, pretrained=False))
    command = ["demo", "--device", "cpu", "--out", str(tmp_path / "demo")]
    assert main(command) == main([*command, "--seed", "1"]) == 0
    before = contents(tmp_path / "demo")
    assert set(before) == {"checkpoint.pt", "results.json", "trees.png", ".made"}
    assert load_checkpoint(tmp_path / "demo" / "checkpoint.pt")["recipe"].seed == 1

    (tmp_path / "demo" / "trees.png").write_bytes(b"drawn by hand")
    before = contents(tmp_path / "demo")
    assert main(command) == 1
    assert "trees.png exists, and this command did not make it" in capsys.readouterr().err
    assert contents(tmp_path / "demo") == before


# ---- A disk that fills up ------------------------------------------------------------------------

LIMITED = """
import resource, sys
sys.path[:0] = [{tests!r}]
import tiny_backbone
from models import train as training
from models.__main__ import main

save = training.save_checkpoint
def fills_up(path, content):
    if content["step"] > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    save(path, content)
training.save_checkpoint = fills_up
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_in_mid_run(
    coco_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """The limit on a file's size fails as a full disk does, amid torch.save."""
    out = tmp_path / "run"
    program = LIMITED.format(tests=str(Path(__file__).parent))
    command = ["train", "--data", str(coco_folder), "--recipe", str(recipe_file), "--out", str(out)]
    command += ["--no-pretrained", "--device", "cpu", "--checkpoint-every", "2"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"error: .*checkpoint\.pt cannot be written \(File too large\); what it held", sentence
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 2
    assert os.listdir(out) == ["checkpoint.pt"]


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"log\.jsonl cannot be written \(the disk is full\)"):
        Log(tmp_path, 1, False)(1, {"loss": 1.0})

    def full(options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "picture.png")

    monkeypatch.setattr("models.commands.configs.run", full)  # any command, any file
    assert main(["configs", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: picture.png: the disk is full\n"


# ---- Loading processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named(run, coco_folder: Path, tmp_path: Path, workers: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    for image in (other / "train2017").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    said = run("--data", str(other), "--workers", workers, fails=True)
    assert re.fullmatch(r"error: the image \S+/0000000001\d0\.png cannot be read \(.*\)", said)


def test_a_loading_process_that_dies_is_one_sentence(run, monkeypatch) -> None:
    message = "DataLoader worker (pid 123) is killed by signal: Killed. \nDetails"

    def dies(*arguments: object, **options: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("models.commands.train.train", dies)
    said = run("--workers", "1", fails=True)
    assert said.startswith("error: a process that loads images died (DataLoader worker (pid 123)")
    assert "--workers" in said and "Details" not in said
