"""The code blocks of README.md and docs/ work as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from models.command_line import parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != TUTORIAL], ids=name
)
def test_python_blocks(page: Path) -> None:
    """In order, and with the names that the blocks before have defined."""
    if "torchvision" in page.read_text():
        pytest.importorskip("torchvision")
    names: dict[str, object] = {"__name__": name(page)}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name)
def test_options_of_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if "models" in words and "-m" in words:
            try:
                parser().parse_args(words[words.index("models") + 1 :])
            except SystemExit:
                pytest.fail(f"{line}: {capsys.readouterr().err}")
