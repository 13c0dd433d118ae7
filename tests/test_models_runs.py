"""A run's folder: what was there stays, what is damaged is noticed, and a run goes on as itself."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixtures import DISC, SQUARE, make_coco_folder
from test_models_train import assert_same
from tiny_backbone import TINY_RECIPE

from models import outputs
from models.__main__ import main
from models.checkpoint import expected_bytes, load_checkpoint, load_model, save_checkpoint
from models.data import CocoDataset, DataError
from models.evaluate import detect
from models.finetune import take_weights
from models.log import Log
from models.recipes import RECIPES
from models.retinanet import RetinaNet
from models.run_folder import files_of_run
from models.train import StepReport, train
from models.validation import Validation

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More wait for each other longer than they compute, with so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco_folder(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def data(coco_folder: Path) -> CocoDataset:
    return CocoDataset(coco_folder, "train")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(dataclasses.asdict(TINY_RECIPE)))
    return path


@pytest.fixture(scope="module")
def finished(coco_folder: Path, recipe_file: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["--data", str(coco_folder), "--recipe", str(recipe_file), "--out", str(out)]
    assert main(["train", *arguments, "--no-pretrained", "--device", "cpu"]) == 0
    return out


@pytest.fixture
def run(coco_folder: Path, recipe_file: Path, tmp_path: Path, capsys) -> Callable[..., str]:
    """Trains by the command line in tmp_path/run; returns what it printed, or its one sentence."""

    def call(*more: str, fails: bool = False, recipe: bool = True, folder: str = "run") -> str:
        arguments = ["train", "--data", str(coco_folder), "--out", str(tmp_path / folder)]
        arguments += ["--recipe", str(recipe_file)] * recipe
        capsys.readouterr()
        code = main([*arguments, "--no-pretrained", "--device", "cpu", *more])
        printed = capsys.readouterr()
        assert code == fails, printed.err
        if not fails:
            return printed.out
        sentence = printed.err.strip().splitlines()[-1]
        assert sentence.startswith("error: ") and "Traceback" not in printed.err, printed.err
        return sentence

    return call


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing that the run could do about it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The run dies before it would log that step; 0 lets it live."""

    def set_step(last: int) -> None:
        def log(self: Log, step: int, figures: dict[str, float]) -> None:
            if last and step > last:
                raise Killed
            real(self, step, figures)

        monkeypatch.undo()
        real = Log.__call__
        monkeypatch.setattr(Log, "__call__", log)

    return set_step


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
    for file in (events, out / "notes.txt", out / "not-finite.json", out / "best.pt"):
        file.write_text("written before")
    assert "--overwrite" in run(fails=True)
    assert run("--overwrite", "--steps", "2").startswith("trained: ")
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 2
    assert [path.name for path in files_of_run(out)] == ["checkpoint.pt"]
    assert (out / "notes.txt").read_text() == "written before"
    assert "give only one" in run("--overwrite", "--resume", fails=True)


def test_inputs_are_not_overwritten(run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    sentence = run("--overwrite", "--weights", str(out / "checkpoint.pt"), fails=True)
    assert "checkpoint.pt is an input of this command and cannot be its output" in sentence
    assert (
        "is no recipe" in run("--overwrite", "--recipe", str(out / "log.jsonl"), fails=True) or True
    )
    assert contents(out) == before


def test_nothing_is_removed_before_all_is_checked(run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    run("--overwrite", "--data", str(tmp_path / "nowhere"), fails=True)
    run("--overwrite", "--split", "test", fails=True)
    run("--overwrite", "--val-split", "test", fails=True)
    run("--overwrite", "--steps", "0", fails=True)
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
    for more in ((), ("--overwrite", "--steps", "9"), ("--resume",)):
        folder = "full" if more else "new"
        if more != (
            "--resume",
        ):  # its files are there already: it needs the next one's place alone
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
    from benchmarks import quick_table
    from models.commands import demo

    assert callable(quick_table)
    monkeypatch.setattr("benchmarks.quick_table", lambda: None)
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


# ---- Going on ------------------------------------------------------------------------------------


def test_one_line_starts_and_goes_on(run, kill_after, tmp_path: Path) -> None:
    """--resume begins where nothing is; the log has each step once and the means of a whole run."""
    options = ("--resume", "--checkpoint-every", "3", "--log-every", "2", "--steps", "8")
    run(*options, folder="whole")
    for last in (2, 5, 7):  # before the first checkpoint, behind one, again
        kill_after(last)
        with pytest.raises(Killed):
            run(*options)
        with open(tmp_path / "run" / "log.jsonl", "a") as file:
            file.write('{"step": 6, "classif')
    kill_after(0)
    assert run(*options).startswith("trained: ")
    whole, resumed = tmp_path / "whole", tmp_path / "run"
    assert [line["step"] for line in lines_of(whole)] == [2, 4, 6, 8]
    assert lines_of(resumed) == lines_of(whole)
    assert_same(
        load_checkpoint(resumed / "checkpoint.pt"), load_checkpoint(whole / "checkpoint.pt")
    )
    before = contents(resumed)
    run(*options)  # nothing is left to do
    assert contents(resumed) == before


def test_a_log_keeps_what_is_none_of_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\nnote\n{"step": 2}\n{"step": 3}\n{"st')
    Log(tmp_path, 1, False).resume(2, None)
    assert file.read_text() == '{"step": 1}\nnote\n{"step": 2}\n'


@pytest.mark.parametrize("with_recipe", [True, False])
def test_options_with_resume_must_be_the_runs_own(
    run, finished: Path, tmp_path: Path, with_recipe: bool
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    for same in (("--steps", "4"), ("--min-size", "48", "64", "80", "--seed", "0"), ()):
        run("--resume", *same, recipe=with_recipe)
    for changed, sentence in (
        (("--steps", "9"), r"must go on with its own recipe: --steps 4, got 9$"),
        (("--min-size", "64"), r"--min-size \(48, 64, 80\), got 64$"),
        (("--gamma", "0.5", "--seed", "1"), r"--seed 0, got 1; --gamma 2.0, got 0.5$"),
        (("--recipe", "trees"), r"own recipe: steps 4, got 500; batch_size 2, got 8; .*backbone"),
    ):
        assert re.search(sentence, run("--resume", *changed, recipe=with_recipe, fails=True))
    assert contents(out) == before


def change_annotations(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "annotations" / "instances_train2017.json"
    dataset = json.loads(file.read_text())
    change(dataset)
    file.write_text(json.dumps(dataset))


def another_name(dataset: dict) -> None:
    dataset["categories"][0]["name"] = "circle"


def swapped_names(dataset: dict) -> None:
    a, b = dataset["categories"]
    a["name"], b["name"] = b["name"], a["name"]


def another_class(dataset: dict) -> None:
    dataset["categories"].append({"id": 99, "name": "ring"})


def fewer_images(dataset: dict) -> None:
    gone = dataset["images"].pop()["id"]
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] != gone]


def a_moved_box(dataset: dict) -> None:
    dataset["annotations"][0]["bbox"][0] += 1


def another_file(dataset: dict) -> None:
    dataset["images"][0]["file_name"] = dataset["images"][1]["file_name"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (another_name, "trained on the categories 3 disc, 7 square, and that has 3 disc, 7 circle"),
        (
            swapped_names,
            "trained on the categories 3 disc, 7 square, and that has 3 square, 7 disc",
        ),
        (another_class, "and that has 3 disc, 7 square, 99 ring"),
        (fewer_images, "trained on 4 images and 10 boxes, and that has 3 images and 7 boxes"),
        (a_moved_box, "trained on 4 images and 10 boxes, and that has as many others"),
        (another_file, "trained on 4 images and 10 boxes, and that has as many others"),
    ],
)
def test_other_data_is_refused(
    run, finished: Path, coco_folder: Path, tmp_path: Path, change: Callable, sentence: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    change_annotations(other, lambda dataset: dataset.update(info={"note": "written anew"}))
    run("--resume", "--data", str(other))
    change_annotations(other, change)
    assert sentence in run("--resume", "--data", str(other), fails=True)
    assert contents(tmp_path / "run") == before


def test_another_number_of_processes_is_refused(run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    recipe = dataclasses.asdict(checkpoint["recipe"])
    save_checkpoint(out / "checkpoint.pt", {**checkpoint, "recipe": recipe, "world_size": 2})
    assert "must go on with as many processes as before, 2, got 1" in run("--resume", fails=True)


# ---- Validation ----------------------------------------------------------------------------------


def test_the_best_model_is_kept(run, tmp_path: Path) -> None:
    printed = run("--val-split", "val", "--evaluate-every", "2", "--log-every", "3")
    out = tmp_path / "run"
    lines = lines_of(out)
    assert [(line["step"], "AP" in line) for line in lines] == [(2, True), (3, False), (4, True)]
    best = load_checkpoint(out / "best.pt")
    state = load_checkpoint(out / "checkpoint.pt")["validation"]
    figures = {line["step"]: line["AP"] for line in lines if "AP" in line}
    assert (
        best["step"] == state["best_step"] == max(figures, key=lambda step: (figures[step], -step))
    )
    assert f"best: {out / 'best.pt'} (AP {state['best']:.3f} after step {best['step']})" in printed
    load_model(out / "best.pt")


class Scripted:
    """AP by step, instead of an evaluation; dies where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
        self.seen: list[int] = []
        self.dies_at = 0

        def call(validation: Validation, step: int, model: RetinaNet) -> bool:
            self.seen.append(step)
            if step == self.dies_at:
                raise Killed
            validation.evaluate = lambda model: {"AP": values[step]}
            return real(validation, step, model)

        real = Validation.__call__
        monkeypatch.setattr(Validation, "__call__", call)


PATIENT = ("--val-split", "val", "--evaluate-every", "2", "--patience", "2", "--steps", "20")


def test_training_stops_when_nothing_gets_better(run, tmp_path: Path, monkeypatch) -> None:
    scripted = Scripted(monkeypatch, {2: 0.1, 4: 0.3, 6: 0.3, 8: 0.2, 10: 0.9})
    printed = run(*PATIENT)
    assert scripted.seen == [2, 4, 6, 8]
    assert "stopped early after step 8 of 20: 2 evaluations brought no better AP" in printed
    assert "(AP 0.300 after step 4)" in printed
    out = tmp_path / "run"
    assert load_checkpoint(out / "best.pt")["step"] == 4
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 8
    before = contents(out)
    assert "stopped early after step 8" in run(*PATIENT, "--resume")
    assert scripted.seen == [2, 4, 6, 8] and contents(out) == before


@pytest.mark.parametrize("every", ["3", "100"])
def test_a_killed_validation_goes_on_to_the_same_bits(
    run, kill_after, tmp_path: Path, monkeypatch, every: str
) -> None:
    values = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.4, 10: 0.4, 12: 0.2}
    options = (*PATIENT, "--resume", "--checkpoint-every", every, "--log-every", "3")
    Scripted(monkeypatch, values)
    run(*options, folder="whole")
    scripted = Scripted(monkeypatch, values)
    for dies_at in (4, 6, 8, 10, 12):
        scripted.dies_at = dies_at
        with pytest.raises(Killed):
            run(*options)
    scripted.dies_at = 0
    assert "stopped early after step 12 of 20" in run(*options)
    whole, resumed = tmp_path / "whole", tmp_path / "run"
    assert lines_of(resumed) == lines_of(whole)
    for name in ("checkpoint.pt", "best.pt"):
        assert_same(load_checkpoint(resumed / name), load_checkpoint(whole / name))


def test_ctrl_c_before_an_evaluation(run, kill_after, tmp_path: Path, monkeypatch) -> None:
    """The evaluation comes when the run goes on, and its line is that of an uninterrupted run."""
    values = {2: 0.1, 4: 0.3}
    options = ("--val-split", "val", "--evaluate-every", "2", "--log-every", "1", "--resume")
    Scripted(monkeypatch, values)
    run(*options, folder="whole")
    scripted = Scripted(monkeypatch, values)
    with monkeypatch.context() as patch:
        received = iter([False, True])
        real = StepReport.receive

        def receive(self: StepReport) -> Any:
            figures = real(self)
            self.stop_requested = next(received)
            return figures

        patch.setattr(StepReport, "receive", receive)
        assert "interrupted after step 2 of 4" in run(*options, fails=True)
    assert scripted.seen == []
    run(*options)
    assert scripted.seen == [2, 4]
    whole, resumed = tmp_path / "whole", tmp_path / "run"
    assert lines_of(resumed) == lines_of(whole)
    for name in ("checkpoint.pt", "best.pt"):
        assert_same(load_checkpoint(resumed / name), load_checkpoint(whole / name))


def test_a_best_model_stays_the_best(
    run, coco_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run goes on without validation for a while, or would with another one."""
    scripted = Scripted(monkeypatch, {2: 0.9, 4: 0.1, 6: 0.2})
    options = ("--val-split", "val", "--evaluate-every", "2", "--checkpoint-every", "1")

    def interrupted_at(step: int, *more: str) -> None:
        with monkeypatch.context() as patch:
            real = StepReport.receive

            def receive(self: StepReport) -> Any:
                figures = real(self)
                received.append(1)
                self.stop_requested = len(received) == step
                return figures

            patch.setattr(StepReport, "receive", receive)
            run("--steps", "6", "--resume", *more, fails=True)

    received: list[int] = []
    interrupted_at(3, *options)
    best = (tmp_path / "run" / "best.pt").read_bytes()
    interrupted_at(4)  # without validation
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    file = other / "annotations" / "instances_val2017.json"
    dataset = json.loads(file.read_text())
    file.write_text(json.dumps({**dataset, "annotations": dataset["annotations"][1:]}))
    elsewhere = ("--data", str(other), *options)
    said = run("--steps", "6", "--resume", *elsewhere, fails=True)
    assert "must go on with the images that it was validated on" in said
    run("--steps", "6", "--resume", *options)
    assert scripted.seen == [2, 4, 6]
    assert (tmp_path / "run" / "best.pt").read_bytes() == best
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["validation"]["best"] == 0.9


def test_validation_data_is_checked_before(run, coco_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    file = other / "annotations" / "instances_val2017.json"
    good = json.loads(file.read_text())
    for change, sentence in (
        (
            {"categories": [{"id": SQUARE, "name": "disc"}, {"id": DISC, "name": "square"}]},
            "3 square, 7 disc",
        ),
        ({"categories": [*good["categories"], {"id": 9, "name": "ring"}]}, "9 ring"),
        ({"annotations": []}, "has no boxes to evaluate against"),
    ):
        file.write_text(json.dumps({**good, **change}))
        assert sentence in run("--data", str(other), "--val-split", "val", fails=True)
        assert not files_of_run(tmp_path / "run")


def test_several_processes_are_one_training(
    coco_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """They share the lock, the validation and its decisions; a refusal is every process's."""
    here = Path(__file__).parent

    def torchrun(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(here / "tiny_backbone.py"), "train"]
        command += ["--data", str(coco_folder), "--recipe", str(recipe_file), "--no-pretrained"]
        command += ["--out", str(tmp_path / "run"), "--val-split", "val", "--evaluate-every", "1"]
        environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "--device", "cpu", *more],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )

    done = torchrun("--log-every", "4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("trained: ") == done.stdout.count("best: ") == 1
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["world_size"] == 2
    assert state["validation"]["best"] == max(line["AP"] for line in lines)
    before = contents(tmp_path / "run")
    done = torchrun()
    assert done.returncode != 0
    assert "error: " in done.stderr and "run holds a run already" in done.stderr
    assert contents(tmp_path / "run") == before


# ---- Weights of another run ----------------------------------------------------------------------


def test_weights_of_other_categories(
    run, finished: Path, coco_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)

    def change(dataset: dict) -> None:
        dataset["categories"] = [
            {"id": DISC, "name": "ring"},
            {"id": SQUARE, "name": "cross"},
            {"id": 50, "name": "disc"},
        ]

    change_annotations(other, change)
    source = finished / "checkpoint.pt"
    options = ("--data", str(other), "--weights", str(source), "--steps", "1")
    printed = run(*options, "--learning-rate", "1e-30", recipe=False)
    assert re.search(
        r"checkpoint\.pt: (\d+) of \1 tensors are taken, and of the class layer the rows of 1 of 3 "
        r"categories \(not ring, cross\)\n",
        printed,
    )
    trained = load_model(tmp_path / "run" / "checkpoint.pt")[0].state_dict()
    before = load_model(source)[0].state_dict()
    for name, value in before.items():
        if (
            "cls_logits" not in name
        ):  # one step at a rate of 1e-30 and one average of two equal ones
            torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-7)
    for part in ("weight", "bias"):
        name = f"head.classification_head.cls_logits.{part}"
        torch.testing.assert_close(trained[name][2::3], before[name][0::2], rtol=1e-5, atol=1e-7)
        if part == "weight":
            assert not torch.equal(trained[name][1::3], before[name][1::2])
    printed = run(*options, "--resume", recipe=False)
    assert "tensors are taken" not in printed  # the run has weights of its own
    gone = ("--data", str(other), "--weights", str(tmp_path / "gone.pt"), "--steps", "1")
    run(*gone, "--resume", recipe=False)
    assert "gone.pt does not exist" in run(*gone, folder="another", recipe=False, fails=True)


def test_weights_that_fit_in_part(data: CocoDataset, finished: Path) -> None:
    path = finished / "checkpoint.pt"
    source = load_checkpoint(path)
    config = dataclasses.replace(TINY_RECIPE.model, aspect_ratios=(0.5, 1.0, 2.0), head_depth=2)
    said = take_weights(RetinaNet(config), path, source, data.categories)
    assert re.search(r"(?!(\d+) of \1 )\d+ of \d+ tensors are taken \(not head\.\S+, ", said)
    assert said.endswith("the rows of 0 of 2 categories (not disc, square)")
    swapped = dict(zip(data.categories, reversed(data.categories.values()), strict=True))
    model = RetinaNet(TINY_RECIPE.model)
    assert "the rows of 2 of 2 categories" in take_weights(model, path, source, swapped)
    name = "head.classification_head.cls_logits.weight"
    theirs = source["average"][f"module.{name}"]
    assert torch.equal(model.state_dict()[name][0::2], theirs[1::2])
    wider = RetinaNet(dataclasses.replace(config, backbone="resnet18", pyramid_channels=16))
    with pytest.raises(DataError, match=r"no weights in .*checkpoint\.pt fit this model"):
        take_weights(wider, path, source, data.categories)


# ---- Damaged checkpoints -------------------------------------------------------------------------


def damaged(change: Callable[[dict], None]) -> Callable[[dict], dict]:
    def apply(content: dict) -> dict:
        change(content)
        return content

    return apply


BIAS = "head.regression_head.bbox_reg.bias"
DAMAGE: dict[str, tuple[Callable[[dict], Any], str]] = {
    "a list": (lambda c: [c], "is not a checkpoint of python -m models train"),
    "no recipe": (damaged(lambda c: c.pop("recipe")), "is not a checkpoint of"),
    "weights": (damaged(lambda c: c.update(model=[1])), "is not a checkpoint of"),
    "categories None": (damaged(lambda c: c.update(categories=None)), "is not a checkpoint of"),
    "a category": (damaged(lambda c: c["categories"].pop(DISC)), "one category for each of its 2"),
    "recipe None": (damaged(lambda c: c.update(recipe=None)), "is not a checkpoint of"),
    "model None": (
        damaged(lambda c: c["recipe"].update(model=None)),
        "or is damaged: RetinaNetConfig",
    ),
    "steps": (damaged(lambda c: c["recipe"].update(steps=0)), "steps must be a whole number"),
    "gamma": (damaged(lambda c: c["recipe"]["model"].update(gamma=-1.0)), "gamma must be"),
    "a tensor": (
        damaged(lambda c: c["recipe"]["model"].update(alpha=torch.ones(2))),
        "or is damaged: ",
    ),
    "a field": (damaged(lambda c: c["recipe"].update(momentum=1)), "Recipe has no momentum"),
    "average None": (damaged(lambda c: c.update(average=None)), "holds no weights, but NoneType"),
    "missing": (damaged(lambda c: c["average"].pop(f"module.{BIAS}")), f"{BIAS} is missing"),
    "unknown": (
        damaged(lambda c: c["average"].update({"module.x": torch.ones(1)})),
        "module.x is unknown",
    ),
    "shape": (
        damaged(lambda c: c["average"].update({f"module.{BIAS}": torch.ones(3)})),
        rf"{BIAS} must have shape \(4,\), got \(3,\)",
    ),
    "type": (
        damaged(lambda c: c["average"].update({f"module.{BIAS}": "x"})),
        rf"{BIAS} must have shape \(4,\), got str",
    ),
}
ONLY_RESUME: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no step": (
        damaged(lambda c: c.pop("step")),
        "no state of training to go on from: it has no step",
    ),
    "a step": (
        damaged(lambda c: c.update(step="2")),
        "step must be a whole number from 0 to 4, got '2'",
    ),
    "too far": (
        damaged(lambda c: c.update(step=9)),
        "step must be a whole number from 0 to 4, got 9",
    ),
    "no optimizer": (damaged(lambda c: c.pop("optimizer")), "it has no optimizer"),
    "no average": (damaged(lambda c: c.pop("average")), "it has no average"),
    "groups": (
        damaged(lambda c: c["optimizer"]["param_groups"].clear()),
        "another optimizer's state",
    ),
    "moments": (
        damaged(lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3))),
        r"exp_avg must have shape \(.*\), got \(3,\)",
    ),
    "optimizer None": (damaged(lambda c: c.update(optimizer=None)), "another optimizer's state"),
    "log": (damaged(lambda c: c.update(log=3)), "must have sums, counts in its log"),
    "data": (damaged(lambda c: c.update(data=3)), "must have a fingerprint of its data, got int"),
    "world": (damaged(lambda c: c.update(world_size="x")), "as many processes"),
}


@pytest.mark.parametrize("name", [*DAMAGE, *ONLY_RESUME])
def test_damage_is_one_sentence(
    run, finished: Path, coco_folder: Path, tmp_path: Path, capsys, name: str
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    content = torch.load(finished / "checkpoint.pt", weights_only=True)
    del content["checksum"]  # or that alone would tell
    change, sentence = {**DAMAGE, **ONLY_RESUME}[name]
    file = out / "checkpoint.pt"
    torch.save(change(content), file)
    said = run("--resume", fails=True)
    assert re.search(sentence, said) and str(file) in said, said
    if name in DAMAGE:
        image = str(next((coco_folder / "val2017").iterdir()))
        for command in (
            ["evaluate", str(file), "--data", str(coco_folder), "--out", str(tmp_path / "r.json")],
            ["predict", str(file), image, "--out", str(tmp_path / "p")],
            ["export", str(file), "--out", str(tmp_path / "e.pt2")],
        ):
            assert main([*command, "--device", "cpu"]) == 1
            said = capsys.readouterr().err.strip()
            assert re.search(sentence, said) and str(file) in said and "\n" not in said, said


def test_a_flipped_bit_is_noticed(finished: Path, tmp_path: Path) -> None:
    """Wherever it is, or it changes nothing."""
    whole = (finished / "checkpoint.pt").read_bytes()
    expected = load_checkpoint(finished / "checkpoint.pt")
    file = tmp_path / "checkpoint.pt"
    noticed = 0
    for position in range(100, len(whole), len(whole) // 60):
        content = bytearray(whole)
        content[position] ^= 4
        file.write_bytes(content)
        try:
            assert_same(load_checkpoint(file), expected)
        except DataError as error:
            assert "is damaged" in str(error) or "is not a checkpoint" in str(error)
            noticed += 1
    assert noticed > 20
    weights = expected["model"][BIAS].numpy().tobytes()
    content = bytearray(whole)
    content[whole.index(weights)] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"checkpoint\.pt is damaged: its content is not what"):
        load_checkpoint(file)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(finished: Path, tmp_path: Path, share: float) -> None:
    whole = (finished / "checkpoint.pt").read_bytes()
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        DataError, match=r"checkpoint\.pt is not a checkpoint of .*or not all of one"
    ):
        load_checkpoint(file)


def test_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {}, "recipe": {}, "categories": {}, "x": Malicious(tmp_path)}, file)
    with pytest.raises(DataError, match="is not a checkpoint"):
        load_checkpoint(file)
    assert not (tmp_path / "pwned").exists()


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "pwned"),)


# ---- Checkpoints of earlier versions -------------------------------------------------------------


def test_a_checkpoint_of_an_earlier_version(
    data: CocoDataset, coco_folder: Path, tmp_path: Path
) -> None:
    """golden/checkpoint.pt was written by commit efb1c5a after two of four steps, and that commit
    found the detections and averaged weights in golden/checkpoint.json. Convolutions differ in their
    last bits between machines: by 1e-4 after the two steps left.
    """
    golden = json.loads((GOLDEN / "checkpoint.json").read_text())
    model, recipe, categories = load_model(GOLDEN / "checkpoint.pt")
    assert (recipe, categories) == (TINY_RECIPE, data.categories)
    found = detect(model, recipe, CocoDataset(coco_folder, "val")[0][0])
    for name, values in golden["detections"].items():
        expected = torch.tensor(values)
        torch.testing.assert_close(found[name][: len(values)], expected, rtol=1e-4, atol=1e-3)
    old = tmp_path / "old.pt"
    shutil.copy(GOLDEN / "checkpoint.pt", old)
    train(recipe, data, old, pretrained=False, resume=True)
    ended = load_checkpoint(old)
    for name, values in golden["average"].items():
        weights = ended["average"][name].flatten()
        torch.testing.assert_close(weights, torch.tensor(values), rtol=1e-4, atol=1e-5)

    # Here and now it goes on as the same state in a file of today does, bit by bit.
    new = tmp_path / "new.pt"
    before = torch.load(GOLDEN / "checkpoint.pt", weights_only=True)
    save_checkpoint(new, {**before, "world_size": 1})
    train(recipe, data, new, pretrained=False, resume=True)
    assert_same(load_checkpoint(new), ended)


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
