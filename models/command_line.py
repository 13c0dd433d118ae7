"""The table of the commands, and their errors as sentences."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from urllib.error import URLError

import torch

from .commands import (
    bench,
    check,
    configs,
    convert,
    demo,
    evaluate,
    export,
    predict,
    study,
    train,
)
from .commands.common import first_line
from .data import DataError
from .distributed import process_group
from .outputs import reason
from .program import program
from .train import TrainingStopped

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, evaluate, predict, export, study, configs, convert, check, bench, demo)
}


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status. Errors, Ctrl-C and a reader of the output that leaves
    (`| head`) end in one sentence."""
    for stream in (sys.stdout, sys.stderr):  # names that the terminal cannot show are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        return run_command(options)
    except KeyboardInterrupt:
        return fail(f"interrupted{options.when_interrupted}")
    except BrokenPipeError:
        discard_what_fails()
        return fail(f"nobody reads the output any more{options.when_interrupted}")


def run_command(options: argparse.Namespace) -> int:
    try:
        with process_group(options.device) as options.device:
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (DataError, ValueError, TrainingStopped) as error:
        return fail(str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return fail(f"out of memory ({first_line(error) or 'MemoryError'}); {LESS_MEMORY}")
    except RuntimeError as error:
        message = first_line(error)
        if "can't allocate memory" in str(error):  # torch's allocator of a CPU's memory
            return fail(f"out of memory ({message}); {LESS_MEMORY}")
        if message.startswith("DataLoader worker (pid"):
            return fail(f"a process that loads images died ({message}); {FEWER_WORKERS}")
        raise
    except URLError as error:
        return fail(
            f"the ImageNet weights could not be downloaded ({error.reason}); "
            "--no-pretrained does without"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        discard_what_fails()
        return fail(f"{where}{reason(error)}")
    return 0


def fail(sentence: str) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {sentence}", file=sys.stderr)
    return 1


def discard_what_fails() -> None:
    """What Python still holds for an output that is closed or full would fail once more when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


LESS_MEMORY = (
    "lower --batch-size, --min-size or --crop, compute a batch in pieces with --accumulate, or use "
    "--precision bfloat16"
)
FEWER_WORKERS = "lower --workers, or give it more memory, shared memory (/dev/shm) among it"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog=program(), description="Train and run the reference detectors."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        outcome = getattr(module, "WHEN_INTERRUPTED", "")  # what there is of its files
        sub.set_defaults(run=module.run, when_interrupted=f": {outcome}" if outcome else "")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        module.add_arguments(sub)
    return top
