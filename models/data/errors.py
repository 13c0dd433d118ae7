"""What is wrong with a user's files."""

from __future__ import annotations


class DataError(Exception):
    """Something is wrong with the user's files; the message is one sentence that names the file."""
