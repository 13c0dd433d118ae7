"""Where commands write: what was there before stays, unless its owner says otherwise."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from .data.errors import DataError


def claim(paths: Iterable[Path], *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Makes sure that these files can be written, before anything is computed for them.

    They must differ from each other and from the inputs of the command, also where --overwrite allows them
    to replace earlier results. Their folders are made.
    """
    read: set[Path] | None = None
    written: set[Path] = set()
    for path in paths:
        place = path.resolve()
        if path.exists():
            read = {path.resolve() for path in inputs} if read is None else read
            if place in read:
                raise DataError(f"{path} is an input of this command and cannot be its output")
        if place in written:
            raise DataError(f"{path} would be written twice: two outputs have the same name")
        written.add(place)
        if path.is_dir():
            raise DataError(f"{path} must be a file to write to, and is a folder")
        if path.exists() and not overwrite:
            raise DataError(
                f"{path} exists already; --overwrite replaces it, and another --out keeps it"
            )
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
            f"{folder} must have {needed / 1e6:.1f} MB free, and has {free / 1e6:.1f} MB"
        )


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file so that `path` is at any time the old content or the new, and leaves nothing else."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is at `path` when all of it has been written; an error leaves nothing.

    Its folder is made.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BrokenPipeError:  # of the terminal's output: a file has none
        raise
    except OSError as error:
        kept = "; what it held before is as it was" if path.exists() else ""
        raise DataError(f"{path} cannot be written ({reason(error)}){kept}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def text_written_whole(path: Path) -> Iterator[TextIO]:
    """The same for text; names of files that are no Unicode are written with escapes."""
    with written_whole(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        yield text
        text.flush()
        text.detach()


def reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone, until it leaves or dies.

    Loading processes do not inherit the lock, and a file system that has none goes without.
    """
    path = folder / ".lock"
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def open_locked(path: Path) -> IO[str]:
    """The file, with this process's lock on it for as long as it is open."""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise DataError(
                f"{path.parent} is being written to by another process{f', {holder}' if holder else ''}"
            ) from None
        except OSError:
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        file.close()  # its last holder has just removed it


@contextlib.contextmanager
def remade(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """For a command that may be repeated: it replaces the files that it made itself and no others.

    Which those are is known by their digests, in a record beside them.
    """
    record = folder / ".made"
    try:
        made = json.loads(record.read_text())
    except (OSError, ValueError):
        made = {}
    files = {name: folder / name for name in names}
    for name, path in files.items():
        if path.exists() and (not path.is_file() or made.get(name) != digest(path)):
            raise DataError(
                f"{path} exists, and this command did not make it or it was changed since: move it "
                "away, or choose another --out"
            )
    try:
        yield
    finally:
        found = {name: digest(path) for name, path in files.items() if path.is_file()}
        write_whole(record, json.dumps(found, indent=1) + "\n")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
