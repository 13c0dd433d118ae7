"""Downloads without a network, and interrupted ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from models.data import (
    DataError,
    prepare_backbone_weights,
    trees,
)


@pytest.fixture
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOCALOPS_CACHE", str(tmp_path / "focalops"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def fail(error: BaseException) -> Callable[..., Any]:
    def raises(*arguments: Any, **more: Any) -> None:
        raise error

    return raises


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


PIP_FAILED = subprocess.CalledProcessError(
    1, "pip", stderr="WARNING: Retrying\nERROR: No matching distribution found for it\n"
)


def test_trees_without_a_network(nothing_cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in (
        (PIP_FAILED, "could not be downloaded .*: ERROR: No matching distribution found for it$"),
        (FileNotFoundError("no python"), "could not be downloaded .*: no python$"),
    ):
        monkeypatch.setattr(subprocess, "run", fail(error))
        with pytest.raises(DataError, match=message):
            trees()
        assert list((nothing_cached / "focalops").iterdir()) == []
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **more: None)
    with pytest.raises(DataError, match=r"what came is no wheel$"):
        trees()
    monkeypatch.setattr(subprocess, "run", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trees()
    assert list((nothing_cached / "focalops").iterdir()) == []
    monkeypatch.setenv("FOCALOPS_CACHE", str(nothing_cached / "file" / "below"))
    (nothing_cached / "file").touch()
    with pytest.raises(DataError, match=r"nothing can be downloaded to .*below"):
        trees()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "timm:resnet18"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (URLError("Name or service not known"), "(Name or service not known)"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (TimeoutError("timed out"), "(timed out)"),
        (RemoteDisconnected("Remote end closed"), "(Remote end closed)"),
        (RuntimeError("invalid hash value"), "(invalid hash value)"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_weights_without_a_network(
    nothing_cached: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    error: BaseException,
    message: str,
) -> None:
    def partly(url: str, path: str, *arguments: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    timm = pytest.importorskip("timm")
    monkeypatch.setattr(subprocess, "run", fail(PIP_FAILED))
    monkeypatch.setattr(torch.hub, "download_url_to_file", partly)
    monkeypatch.setattr(timm, "create_model", fail(error))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            prepare_backbone_weights(backbone)
    else:
        with pytest.raises(DataError) as caught:
            prepare_backbone_weights(backbone)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert f"the ImageNet weights of {backbone} could" in str(caught.value)
    assert files_below(nothing_cached) == []


def test_weights_are_where_torchvision_looks(
    nothing_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def download(url: str, path: str, digest: str) -> None:
        calls.append(digest)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        prepare_backbone_weights("resnet18")
    assert calls == ["f37072fd"]
    folder = nothing_cached / "hub" / "checkpoints"
    assert files_below(nothing_cached) == [folder / "resnet18-f37072fd.pth"]
    prepare_backbone_weights("no such model")
    prepare_backbone_weights("timm:no such model")
