"""What is wrong with a user's files."""

from __future__ import annotations


class DataError(Exception):
    """Something is wrong with the user's files; the message is one sentence that names the file."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker hands its error over as a traceback, whose last line has the sentence.
        super().__init__(message.rpartition(f"\n{__name__}.DataError: ")[2].strip())
