"""The folder of a training run: its files, and whether a new run may write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.data import DataError
from models.log import LOG
from models.outputs import claim, write_whole

CHECKPOINT, BEST, PICTURE = "checkpoint.pt", "best.pt", "detections.png"
FILES = (CHECKPOINT, BEST, LOG, PICTURE, "not-finite*.json", "tensorboard/events.out.tfevents.*")


def files_of_run(folder: Path) -> list[Path]:
    return sorted(path for pattern in FILES for path in folder.glob(pattern))


def claim_run(folder: Path, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Makes sure that a run can write its files and that they replace no other run's."""
    found = files_of_run(folder)
    if found and not resume and not overwrite:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:3])
        raise DataError(
            f"{folder} holds a run already ({names}{', ...' if len(found) > 3 else ''}): --resume "
            "goes on with it, --overwrite replaces it"
        )
    outputs = {folder / name for name in (CHECKPOINT, BEST, LOG, PICTURE)}
    claim(sorted({*outputs, *found}), overwrite=True, inputs=inputs)


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The last checkpoint; where a run ended before its first, the best one takes its place."""
    last, best = folder / CHECKPOINT, folder / BEST
    if not last.exists() and best.exists():
        write_whole(last, best.read_bytes())
    return last if last.exists() else None


def remove_run(folder: Path) -> None:
    for path in files_of_run(folder):
        path.unlink()
