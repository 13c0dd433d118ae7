"""The code blocks of README.md and docs/ work as they stand there, and the links of README.md lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models.command_line import parser

ROOT = Path(__file__).parent.parent
README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
PAGES = [
    README,
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "_generated" not in p.parts),
]
MINUTES = (
    "\n## 4. "  # where the part of the tutorial begins that compiles the model and the program
)


def blocks(text: str, languages: str) -> list[tuple[str, str]]:
    return re.findall(rf"^```({languages})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page.read_text(), language)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [page for page in with_blocks("python") if page != TUTORIAL], ids=name
)
def test_python_blocks(page: Path) -> None:
    """In order, and with the names that the blocks before have defined."""
    names: dict[str, object] = {"__name__": name(page)}
    for _, block in blocks(page.read_text(), "python"):
        exec(compile(block, name(page), "exec"), names)


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, as in the root of a checkout; FOCALOPS_DOCS=all has those that take minutes, too."""
    for package in ("focalops", "models"):
        (tmp_path / package).symlink_to(ROOT / package)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text()
    assert MINUTES in text
    if os.environ.get("FOCALOPS_DOCS") != "all":
        text = text.partition(MINUTES)[0]
    names: dict[str, object] = {}
    for language, block in blocks(text, "python|sh"):
        if language == "python":
            exec(compile(block, name(TUTORIAL), "exec"), names)
        else:
            done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True)
            assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"
    assert names["found"]["boxes"].shape[1] == 4  # type: ignore[index]


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name)
def test_options_of_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _, block in blocks(page.read_text(), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "models" in words and "-m" in words:
                try:
                    parser().parse_args(words[words.index("models") + 1 :])
                except SystemExit:
                    pytest.fail(f"{line}: {capsys.readouterr().err}")


def test_links_of_the_readme() -> None:
    """Those of docs/ are Sphinx's to check, and `make docs` fails where one is broken."""
    links = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []
