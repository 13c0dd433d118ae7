"""A data set of one picture, made wrong in one way or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from models.data import (
    CocoDataset,
)

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 60, 24, 24], "iscrowd": 0}
PICTURE = {"id": 1, "file_name": "p.png", "width": 64, "height": 96}
PART = {"id": 1, "name": "part"}
ONE = pytest.approx(1, abs=1e-15)  # pycocotools adds 2e-16 to what it divides by


def upright_picture() -> Image.Image:
    """64 x 96, black, white in the box."""
    image = Image.new("RGB", (64, 96))
    ImageDraw.Draw(image).rectangle((10, 60, 33, 83), fill="white")
    return image


def write(
    root: Path,
    annotations: list[dict[str, Any]] | None = None,
    pictures: list[dict[str, Any]] | None = None,
    categories: list[dict[str, Any]] | None = None,
    split: str = "val",
    **more: Any,
) -> Path:
    """A data set of one picture with its box, but for what is given; returns the annotation file."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    upright_picture().save(root / "images" / "p.png")
    file = root / f"{split}.json"
    dataset = {
        "images": pictures or [PICTURE],
        "annotations": [BOX] if annotations is None else annotations,
        "categories": categories or [PART],
    }
    file.write_text(json.dumps(dataset | more))
    return file


def kinds(data: CocoDataset) -> dict[str, list[Any]]:
    return {finding.kind: list(finding.items) for finding in data.survey()}


def sees_white(data: CocoDataset, index: int = 0) -> bool:
    """Whether the box is where the picture is white, to the pixel."""
    image, target = data[index]
    inside = torch.zeros_like(image, dtype=torch.bool)
    for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
        inside[:, y1:y2, x1:x2] = True
    return bool(inside.any() and (image[inside] > 200).all() and (image[~inside] < 60).all())
