"""What is odd about a data set and does not stop it from being read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """`text` follows the number of `items`: ids of annotations, or names of images or categories.

    `wrong`: unless somebody mends it, what is trained or measured is wrong or nothing.
    """

    kind: str
    text: str
    items: Sequence[Any]
    noun: str = "images"
    wrong: bool = False

    def __str__(self) -> str:
        named = ", ".join(map(str, self.items[:10])) + (", ..." if len(self.items) > 10 else "")
        return f"{len(self.items)} {self.text} ({self.noun} {named})"


def only_met(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.items]
