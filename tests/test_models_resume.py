"""A run goes on as itself or not at all; validation along the way."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models_fixtures import Killed, change_annotations, contents, lines_of
from test_models_train import assert_same

from models.checkpoint import load_checkpoint, load_model, save_checkpoint
from models.log import Log
from models.retinanet import RetinaNet
from models.run_folder import files_of_run
from models.train import StepReport
from models.validation import Validation

pytest_plugins = ["models_runs"]


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
        ({"categories": [*good["categories"], {"id": 9, "name": "ring"}]}, "ring"),
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
