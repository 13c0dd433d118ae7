"""What pip installs: focalops, models/ as focalops.models, the command focalops; as far as nothing is compiled for it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch

from focalops import info

pytest.importorskip("setuptools")

ROOT = Path(__file__).parent.parent


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what was built in it."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "focalops", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel puts into site-packages, with the libraries that are built already."""
    folder = tmp_path_factory.mktemp("installed")
    result = run("setup.py", "--quiet", "build_py", "--build-lib", folder, cwd=source)
    assert result.returncode == 0, result.stderr
    for library in (ROOT / "focalops").glob("*.so"):
        (folder / "focalops" / library.name).symlink_to(library)
    return folder


@pytest.fixture(scope="module")
def metadata(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    folder = tmp_path_factory.mktemp("metadata")
    code = f"from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel({str(folder)!r})"
    result = run("-c", code, cwd=source)
    assert result.returncode == 0, result.stderr
    (found,) = folder.glob("focalops-*.dist-info")
    return Distribution.at(found)


def sources(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".pyi", ".cpp", ".typed") or path.name == "Makefile":
            yield str(path.relative_to(folder))


def test_every_module_is_installed(installed: Path) -> None:
    expected = {f"focalops/{name}" for name in sources(ROOT / "focalops")}
    expected |= {f"focalops/models/{name}" for name in sources(ROOT / "models")}
    assert set(sources(installed)) == expected
    assert [path.name for path in installed.iterdir()] == ["focalops"]


def test_the_extra_and_the_command(metadata: Distribution) -> None:
    (command,) = metadata.entry_points
    assert (command.group, command.name) == ("console_scripts", "focalops")
    assert command.value == "focalops.models.__main__:console"
    assert metadata.metadata.get_all("Provides-Extra") == ["models", "docs"]
    extra = {
        re.split(r"[\s;<>=]", requirement)[0]
        for requirement in metadata.requires or []
        if 'extra == "models"' in requirement
    }
    # What models/ imports and what no other package brings.
    distributions = {"PIL": "pillow"}
    imported = set()
    for path in (ROOT / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    # effdet is a rival that bench times where it is.
    imported -= {*sys.stdlib_module_names, "torch", "focalops", "effdet"}
    assert {distributions.get(name, name) for name in imported} == extra


def test_no_list_of_packages_stands_twice() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "models" not in project["dependency-groups"]


# As pip writes it.
CONSOLE = """
import sys
from focalops.models.__main__ import console
sys.argv[0] = "/somewhere/bin/focalops"
sys.exit(console())
"""


@pytest.mark.parametrize(
    ("start", "program"),
    [(["-m", "focalops.models"], "python -m focalops.models"), (["-c", CONSOLE], "focalops")],
)
def test_the_installed_command(
    installed: Path, tmp_path: Path, start: list[str], program: str
) -> None:
    """From any folder, and named as it was typed."""
    said = run(*start, "train", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.stdout.startswith(f"usage: {program} train [-h] "), said.stderr
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets").mkdir()
    command = ["train", "--data", ".", "--out", "run", "--device", "cpu"]
    said = run(*start, *command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.stderr.endswith(f"convert it first ({program} convert)\n"), said.stderr


DETECTOR = """
from focalops.models.commands.export import cpp
from focalops.models import RetinaNet

print(RetinaNet.__module__, cpp(), (cpp() / "detect.cpp").exists())
"""


def test_the_detector_is_importable(installed: Path, tmp_path: Path) -> None:
    said = run("-c", DETECTOR, cwd=tmp_path, PYTHONPATH=str(installed))
    cpp = installed / "focalops" / "models" / "cpp"
    assert said.stdout == f"focalops.models.retinanet {cpp} True\n", said.stderr
    said = run("-c", DETECTOR, cwd=installed, PYTHONPATH=str(installed))
    assert said.stdout == "focalops.models.retinanet focalops/models/cpp True\n", said.stderr


def test_without_the_extra(installed: Path, tmp_path: Path) -> None:
    """The files are there without their packages: one sentence says how to get those."""
    (tmp_path / "pycocotools").mkdir()
    (tmp_path / "pycocotools" / "__init__.py").write_text(
        "raise ModuleNotFoundError(name='pycocotools')"
    )
    path = os.pathsep.join([str(tmp_path), str(installed)])
    said = run("-c", CONSOLE, "configs", cwd=tmp_path, PYTHONPATH=path)
    assert said.returncode == 1
    assert said.stderr == (
        'error: focalops needs pycocotools, and the packages of the extra "models": '
        'pip install "focalops[models]"\n'
    )


def test_the_commit_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is that of the code, not of the repository that a user works in or has the environment in."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    if info.output_of(["git", "--version"]) == info.UNKNOWN:
        pytest.skip("needs git")
    package = tmp_path / "site-packages" / "focalops"
    package.mkdir(parents=True)
    (package / "info.py").touch()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.chdir(tmp_path)
    theirs = info.output_of(["git", "describe", "--always"])
    assert theirs not in (info.UNKNOWN, info.describe(torch.device("cpu"))["commit"])
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    assert info.commit() == info.UNKNOWN
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "vendored"], check=True)
    assert info.commit() not in (info.UNKNOWN, theirs)
