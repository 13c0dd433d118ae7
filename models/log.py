"""The figures of a training run, one JSON object a line, and for TensorBoard with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data import DataError
from .distributed import rank
from .outputs import reason, write_whole
from .ranges import check, whole
from .validation import MEASURE

LOG = "log.jsonl"


class Log:
    """Called with a step and its figures, writes their means since the last line to DIR/log.jsonl.

    There is a line every so many steps, and one for each evaluation. The sums are part of a
    checkpoint, so that the log of a resumed run is that of an uninterrupted one.
    """

    def __init__(self, directory: Path, every: int, tensorboard: bool) -> None:
        check("every", every, whole(1))
        self.directory, self.every = directory, every
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.last_line: dict[str, Any] = {}
        self.first_step: int | None = None  # of a resumed run
        self.new_writer: Any = None
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise DataError("--tensorboard needs the package tensorboard") from None
            self.new_writer = SummaryWriter

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        if step % self.every and MEASURE not in figures:
            return
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        self._write({"step": step, **means})
        if self.new_writer is not None:
            for name, value in means.items():
                self._opened().add_scalar(name, value, step)

    def picture(self, step: int, file: Path) -> None:
        if self.new_writer is not None:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._opened().add_image(file.stem, pixels, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def resume(self, step: int, state: dict[str, Any] | None) -> None:
        """Goes on after a step; what the file says of later ones, and half a line, is taken away."""
        if rank() != 0:
            return
        if state is not None:
            self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        self.first_step = step + 1
        file = self.directory / LOG
        if not file.exists():
            return
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and step_of(line) <= step]
        self.last_line = json.loads(kept[-1]) if kept and step_of(kept[-1]) else {}
        if kept != lines:
            write_whole(file, "".join(kept))

    def _write(self, line: dict[str, Any]) -> None:
        """A run stopped before an evaluation may have written the line of its step already."""
        file = self.directory / LOG
        if line["step"] == self.last_line.get("step"):
            lines = file.read_text().splitlines(keepends=True)[:-1]
            write_whole(file, "".join(lines) + json.dumps({**self.last_line, **line}) + "\n")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                with open(file, "a") as opened:
                    opened.write(json.dumps(line) + "\n")
            except OSError as error:
                raise DataError(f"{file} cannot be written ({reason(error)})") from None
        self.last_line = line

    def _opened(self) -> Any:
        if self.writer is None:  # not before: of several processes, one is called
            self.writer = self.new_writer(
                str(self.directory / "tensorboard"), purge_step=self.first_step
            )
        return self.writer

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()


def step_of(line: str) -> int:
    """0 for what is no line of a log."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0
