"""Fixtures of the tests of training runs: a tiny data set, a run by the command line, one that is killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models_fixtures import Killed, make_coco_folder
from tiny_backbone import TINY_RECIPE

from models.__main__ import main
from models.data import CocoDataset
from models.log import Log


@pytest.fixture(scope="module")
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
def finished(one_thread: None, coco_folder: Path, recipe_file: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["--data", str(coco_folder), "--recipe", str(recipe_file), "--out", str(out)]
    assert main(["train", *arguments, "--no-pretrained", "--device", "cpu"]) == 0
    return out


@pytest.fixture
def run(
    one_thread: None, coco_folder: Path, recipe_file: Path, tmp_path: Path, capsys
) -> Callable[..., str]:
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
