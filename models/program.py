"""What a user types before the name of a command."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """`focalops` where that is what runs, `python -m` and the name of this package otherwise."""
    return "focalops" if Path(sys.argv[0]).name == "focalops" else f"python -m {__package__}"
