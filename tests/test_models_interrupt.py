"""Ctrl-C at any time, and a reader of the output that leaves, end every command in one sentence."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import command_line, outputs
from models.__main__ import main

ROOT = Path(__file__).parents[1]
MINIMAL = {
    "train": "--data none --out none",
    "evaluate": "none.pt --data none",
    "predict": "none.pt none.png",
    "export": "none.pt",
    "study": "loss",
    "convert": "none --out none",
    "check": "none",
}


def start(*arguments: str, **more) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "models", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize("command", command_line.COMMANDS)
@pytest.mark.parametrize(
    ("raised", "said"),
    [(KeyboardInterrupt, "interrupted"), (BrokenPipeError, "nobody reads the output any more")],
)
def test_every_command_ends_in_a_sentence(command, raised, said, monkeypatch, capsys) -> None:
    def run(options: argparse.Namespace) -> None:
        raise raised

    monkeypatch.setattr(command_line.COMMANDS[command], "run", run)
    assert main([command, *MINIMAL.get(command, "").split(), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_an_interrupted_import_says_nothing() -> None:
    process = start("configs", stdout=subprocess.DEVNULL, preexec_fn=listen)
    maps = Path(f"/proc/{process.pid}/maps")
    until = time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGINT and error == ""


def listen() -> None:
    """A test run in the background ignores the signal, and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("with_errors", [False, True])
def test_nobody_reads(with_errors: bool) -> None:
    """`| head`, and `|& head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "models", "configs"]
    errors = write if with_errors else subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=errors, text=True)
    os.close(write)
    assert done.returncode == 1
    if not with_errors:
        assert done.stderr == "error: nobody reads the output any more\n"


def test_an_output_without_room() -> None:
    with open("/dev/full", "w") as full:
        done = start("configs", stdout=full)
        assert done.communicate()[1] == "error: the disk is full\n" and done.returncode == 1


def test_letters_that_the_terminal_has_not_are_escaped(monkeypatch) -> None:
    """Or the name of a category would end a command after its hours of work."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    monkeypatch.setattr(command_line.COMMANDS["configs"], "run", lambda options: print("树 ±"))
    assert main(["configs", "--device", "cpu"]) == 0
    assert file.getvalue() == b"\\u6811 \\xb1\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupted_file_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    """And a reader of the terminal's output that leaves is no fault of the file."""
    with pytest.raises(error), outputs.text_written_whole(tmp_path / "new" / "a.csv") as file:
        file.write("half")
        raise error
    assert [*(tmp_path / "new").iterdir()] == []


def test_ctrl_c_while_a_file_is_written(tmp_path: Path, monkeypatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    outputs.write_whole(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs.write_whole(tmp_path / "a.json", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}
