"""python -m models"""

from __future__ import annotations

import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    from .command_line import run

    return run(arguments)


if __name__ == "__main__":
    # Importing torch takes seconds in which nothing is begun: Ctrl-C just ends the process there.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from . import command_line  # noqa: F401

    signal.signal(signal.SIGINT, handler)
    sys.exit(main())
