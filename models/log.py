"""The figures of a training run, one JSON object a line, and for TensorBoard with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.data import DataError


class Log:
    """Called with a step and its figures, writes their means since the last line to DIR/log.jsonl."""

    def __init__(self, directory: Path, every: int, tensorboard: bool) -> None:
        self.directory, self.every = directory, every
        self.sums: dict[str, float] = {}
        self.count = 0
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
        self.count += 1
        if step % self.every:
            return
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **means}) + "\n")
        if self.new_writer is not None:
            for name, value in means.items():
                self._opened().add_scalar(name, value, step)

    def picture(self, step: int, file: Path) -> None:
        if self.new_writer is not None:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._opened().add_image(file.stem, pixels, step, dataformats="HWC")

    def _opened(self) -> Any:
        if self.writer is None:  # not before: of several processes, one is called
            self.writer = self.new_writer(str(self.directory / "tensorboard"))
        return self.writer

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()
