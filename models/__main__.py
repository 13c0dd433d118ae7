"""python -m models in a checkout; python -m focalops.models, and the command focalops, once installed"""

from __future__ import annotations

import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    from .command_line import run

    return run(arguments)


def console() -> int:
    # Importing torch takes seconds in which nothing is begun: Ctrl-C just ends the process there.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from . import command_line  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("focalops", "models"):
            raise
        return say_what_is_missing(error.name)
    signal.signal(signal.SIGINT, handler)
    return main()


def say_what_is_missing(module: str) -> int:
    from .program import program

    extra = 'the packages of the extra "models": pip install "focalops[models]"'
    print(f"error: {program()} needs {module}, and {extra}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(console())
