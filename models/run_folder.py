"""The folder of a training run: its files, and whether a new run may write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .checkpoint import load_checkpoint
from .data import DataError
from .draw import is_ours
from .log import LOG, step_of
from .outputs import claim, write_whole

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
    for path in found:
        # A run that goes on leaves what it does not write, and says itself what is wrong with a checkpoint.
        if (overwrite or path.name == PICTURE) and not made_by_a_run(path):
            raise DataError(
                f"{path} is not of a run of this command: move it, or give another --out"
            )
    outputs = {folder / name for name in (CHECKPOINT, BEST, LOG, PICTURE)}
    claim(sorted({*outputs, *found}), overwrite=True, inputs=inputs)


def made_by_a_run(path: Path) -> bool:
    """Whether a file with a name of FILES is what a run writes there, so that --overwrite may remove it."""
    if path.suffix == ".pt":
        try:
            load_checkpoint(path)
        except DataError:
            return False
    elif path.name == LOG:
        lines = path.read_text(errors="replace").splitlines()
        return all(step_of(line) for line in lines[:1])
    elif path.name == PICTURE:
        return is_ours(path)
    return True


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The last checkpoint; where a run ended before its first, the best one takes its place."""
    last, best = folder / CHECKPOINT, folder / BEST
    if not last.exists() and best.exists():
        write_whole(last, best.read_bytes())
    return last if last.exists() else None


def remove_run(folder: Path) -> None:
    for path in files_of_run(folder):
        path.unlink()
