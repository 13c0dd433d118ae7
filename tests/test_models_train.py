"""Training that is interrupted, killed, spread over processes or fed with nonsense."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder
from tiny_backbone import TINY_RECIPE

from models import train as training
from models.__main__ import main
from models.checkpoint import load_checkpoint, save_checkpoint
from models.data import CocoDataset, DataError
from models.log import Log
from models.losses.matching import normalizers
from models.recipes import Recipe
from models.train import Batches, TrainingInterrupted, TrainingStopped, lr_factor, train

RECIPE = TINY_RECIPE
CATEGORIES = {1: "a", 2: "b"}


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco_folder(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def data(coco_folder: Path) -> CocoDataset:
    return CocoDataset(coco_folder, "train")


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# ---- Interruptions ------------------------------------------------------------------------------


class Killed(Exception):
    pass


AS_PUBLISHED: dict = {
    "model": dataclasses.replace(RECIPE.model, frozen_batch_norm=False),
    "optimizer": "sgd",
    "decay_vectors": False,
    "ema_warmup": True,
    "ema_buffers": True,
}


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "float16", "accumulate": 2, "crop": 64}, AS_PUBLISHED]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    whole, resumed = tmp_path / "whole.pt", tmp_path / "resumed.pt"
    train(recipe, data, whole, pretrained=False)

    def save_and_die(path: Path, state: dict) -> None:
        save_checkpoint(path, state)
        raise Killed

    monkeypatch.setattr("models.train.save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train(recipe, data, resumed, pretrained=False, checkpoint_every=2)
    monkeypatch.undo()
    assert load_checkpoint(resumed)["step"] == 2
    torch.manual_seed(999)
    train(recipe, data, resumed, pretrained=False, resume=True)
    assert_same(load_checkpoint(resumed), load_checkpoint(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves(data: CocoDataset, tmp_path: Path, number: int) -> None:
    path = tmp_path / "checkpoint.pt"
    before = signal.getsignal(number)

    def log(step: int, figures: dict[str, float]) -> None:
        if step == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterrupted, match=r"after step 2 of 4$"):
        train(RECIPE, data, path, pretrained=False, log=log, workers=1)
    assert signal.getsignal(number) is before
    assert load_checkpoint(path)["step"] == 2


def test_checkpoints_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    recipe = dataclasses.asdict(RECIPE)
    content = {"model": {}, "recipe": recipe, "categories": CATEGORIES}
    save_checkpoint(path, {**content, "step": 1})

    def broken(state: dict, file) -> None:
        file.write(b"half a check")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(
        DataError, match=r"checkpoint.pt cannot be written \(the disk is full\); what"
    ):
        save_checkpoint(path, {**content, "step": 2})
    assert load_checkpoint(path)["step"] == 1


def save_for_ever(path: Path, content: dict) -> None:
    step = 0
    while True:
        step += 1
        save_checkpoint(path, {**content, "step": step})


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    weights = {str(i): torch.full((50_000,), float(i)) for i in range(20)}
    content = {"model": weights, "recipe": dataclasses.asdict(RECIPE), "categories": CATEGORIES}
    save_checkpoint(path, {**content, "step": 0})
    process_type = multiprocessing.get_context("fork").Process
    steps = []
    for kill in range(12):
        process = process_type(target=save_for_ever, args=(path, content))
        process.start()
        time.sleep(0.05 + 0.007 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = load_checkpoint(path)
        assert_same(found["model"], weights)
        steps.append(found["step"])
    assert max(steps) > 1  # it was killed amid its work


# ---- Nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "checkpoint_every"), [(0.0, 1000), (1e30, 1)])
def test_what_is_not_finite_stops(
    data: CocoDataset, tmp_path: Path, decay: float, checkpoint_every: int
) -> None:
    """Of the losses before a step, of the weights before they are saved."""
    path = tmp_path / "checkpoint.pt"
    train(dataclasses.replace(RECIPE, steps=1), data, path, pretrained=False)
    before = path.read_bytes()
    diverging = dataclasses.replace(
        RECIPE, learning_rate=1e38, weight_decay=decay, optimizer="sgd", warmup_steps=0
    )
    with pytest.raises(TrainingStopped, match=r"are not finite: .*not-finite\.json, and the last"):
        train(diverging, data, path, pretrained=False, checkpoint_every=checkpoint_every)
    assert path.read_bytes() == before
    report = json.loads((tmp_path / "not-finite.json").read_text())
    assert report["step"] >= 1
    assert len(report["images"]) == 2
    assert all(Path(file).is_file() for file in report["images"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    coco_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception,
) -> None:
    def too_much(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("models.commands.train.train", too_much)
    arguments = ["train", "--data", str(coco_folder), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--no-pretrained"]) == 1
    message = capsys.readouterr().err
    assert re.search(r"error: out of memory \(.*allocate.*\); lower --batch-size", message)


# ---- Schedules and shares -----------------------------------------------------------------------


def test_learning_rate() -> None:
    paper = Recipe()
    assert lr_factor(paper, 0) == pytest.approx(1 / 500)
    assert lr_factor(paper, 499) == lr_factor(paper, 59_999) == 1
    assert lr_factor(paper, 60_000) == pytest.approx(0.1)
    assert lr_factor(paper, 89_999) == pytest.approx(0.01)
    cosine = dataclasses.replace(paper, schedule="cosine")
    factors = [lr_factor(cosine, step) for step in range(500, 90_000, 100)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1 and factors[-1] < 1e-4


def test_ranks_share_a_batch() -> None:
    recipe = dataclasses.replace(RECIPE, steps=3, batch_size=12, accumulate=2)
    shares = [Batches(recipe, 1, rank, 3) for rank in range(3)]
    for step in (1, 2):
        samples = [n for share in shares for piece in share[2 * step - 2 : 2 * step] for n in piece]
        assert sorted(samples) == list(range(12 * step, 12 * step + 12))
    with pytest.raises(ValueError, match="multiple of 5 processes x accumulate 2, got 12"):
        Batches(recipe, 0, 0, 5)


def test_normalizers() -> None:
    counts = torch.tensor([4, 0, 5])
    assert normalizers(counts, "image").tolist() == [4, 0, 5]
    assert normalizers(counts, "batch").tolist() == [3, 3, 3]


def test_pieces_add_up_to_the_batch(data: CocoDataset, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, crop=64, optimizer="sgd", batch_size=4, steps=2)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, min_size=None))
    weights = []
    for accumulate in (1, 2):
        path = tmp_path / f"{accumulate}.pt"
        pieces = dataclasses.replace(recipe, accumulate=accumulate)
        train(pieces, data, path, pretrained=False)
        weights.append(load_checkpoint(path)["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def test_half_precision_trains(data: CocoDataset, tmp_path: Path) -> None:
    losses = {}
    for precision in training.PRECISIONS:
        figures: list[dict[str, float]] = []
        recipe = dataclasses.replace(RECIPE, steps=2, precision=precision)
        train(
            recipe,
            data,
            tmp_path / "checkpoint.pt",
            pretrained=False,
            log=lambda step, values, figures=figures: figures.append(values),
        )
        losses[precision] = sum(figures[1].values())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.01)
    assert len({*losses.values()}) == 3


def test_a_compiled_run_is_the_eager_one(data: CocoDataset, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, crop=64, optimizer="sgd", steps=2)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, min_size=None))
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        losses[compiled] = []
        path = tmp_path / f"{compiled}.pt"
        train(
            dataclasses.replace(recipe, compile=compiled),
            data,
            path,
            pretrained=False,
            log=lambda step, figures, to=losses[compiled]: to.append(figures["classification"]),
        )
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert (
        load_checkpoint(path)["model"].keys()
        == load_checkpoint(tmp_path / "False.pt")["model"].keys()
    )


def test_log_writes_means(tmp_path: Path) -> None:
    with Log(tmp_path, every=2, tensorboard=False) as log:
        for step in range(1, 6):
            log(step, {"loss": float(step)})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 3.5}]


def test_log_for_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Log(tmp_path, every=1, tensorboard=True) as log:
        log(7, {"loss": 0.25})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.25)]


def test_tensorboard_gets_pictures(coco_folder: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = (
        "--recipe trees --backbone resnet18 --no-pretrained --steps 2 --batch-size 2 --crop 64"
    )
    arguments = [*options.split(), "--checkpoint-every", "1", "--log-every", "1", "--tensorboard"]
    out = tmp_path / "run"
    data = ["--data", str(coco_folder), "--device", "cpu", "--out", str(out)]
    assert main(["train", *data, *arguments]) == 0
    events = accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Images("detections")] == [1, 2]
    assert (out / "detections.png").exists()


# ---- Several processes --------------------------------------------------------------------------


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "models", *arguments, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_are_one(coco_folder: Path, tmp_path: Path) -> None:
    """Losses, weights and results are those of one process with the same batch."""
    options = ["train", "--data", str(coco_folder), "--recipe", "small", "--backbone", "resnet18"]
    options += [
        "--no-pretrained",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--crop",
        "64",
        "--optimizer",
        "sgd",
    ]
    options += ["--normalizer", "batch", "--log-every", "1", "--learning-rate", "0.01"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*options, "--out", str(one), "--device", "cpu"]) == 0
    assert torchrun(*options, "--out", str(two)).count("trained: ") == 1
    logs = [
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    a, b = (load_checkpoint(out / "checkpoint.pt") for out in (one, two))
    for part in ("model", "average"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=1e-5, atol=1e-6, msg=name)

    options = ["evaluate", str(one / "checkpoint.pt"), "--data", str(coco_folder), "--split"]
    options += ["train"]
    results = [tmp_path / "one.json", tmp_path / "two.json"]
    assert main([*options, "--out", str(results[0]), "--device", "cpu"]) == 0
    assert torchrun(*options, "--out", str(results[1])).count("Average Precision") == 6
    # Another number of threads sums the convolutions in another order.
    for a, b in zip(*(json.loads(path.read_text()) for path in results), strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
