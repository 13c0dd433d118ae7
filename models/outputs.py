"""Where commands write: what was there before stays, unless its owner says otherwise."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from models.data.errors import DataError


def claim(paths: Iterable[Path], *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Makes sure that these files can be written, before anything is computed for them.

    They must differ from each other and from the inputs of the command, also where --overwrite allows them
    to replace earlier results. Their folders are made.
    """
    read = {path.resolve() for path in inputs}
    written: set[Path] = set()
    for path in paths:
        place = path.resolve()
        if place in read:
            raise DataError(f"{path} is an input of this command and cannot be its output")
        if place in written:
            raise DataError(f"{path} would be written twice: two outputs have the same name")
        written.add(place)
        if path.is_dir():
            raise DataError(f"{path} must be a file to write to, and is a folder")
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists already; --overwrite replaces it")
        claim_folder(path.parent)


def claim_folder(folder: Path, needed: int = 0) -> None:
    """Makes the folder; makes sure that it can be written to and has room for `needed` bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder} must be a folder to write to, and is a file or in one") from None
    except OSError as error:
        raise DataError(f"nothing can be written to {folder} ({reason(error)})") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} must have {needed / 1e6:.0f} MB free, and has {free / 1e6:.0f} MB"
        )


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file so that `path` is at any time the old content or the new, and leaves nothing else."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({reason(error)})") from None


def reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)
