"""A tiny data set drawn at test time: bright squares and discs on a dark, noisy ground."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE, DISC = 7, 3  # category ids: sparse, and not in the order of the names


def draw_image(
    rng: np.random.Generator, size: int, num_objects: int
) -> tuple[np.ndarray, list[dict]]:
    """uint8 (size, size, 3) and COCO annotations without ids."""
    image = rng.integers(0, 60, (size, size, 3))
    annotations = []
    y, x = np.mgrid[:size, :size]
    corners = [(i, j) for i in range(0, size, size // 2) for j in range(0, size, size // 2)]
    for index, (top, left) in enumerate(corners[:num_objects]):
        side = int(rng.integers(size // 5, size // 3))
        top, left = top + int(rng.integers(0, size // 8)), left + int(rng.integers(0, size // 8))
        inside = (x >= left) & (x < left + side) & (y >= top) & (y < top + side)
        category = SQUARE if index % 2 else DISC
        if category == DISC:
            center = (side - 1) / 2
            inside &= (x - left - center) ** 2 + (y - top - center) ** 2 <= (side / 2) ** 2
        image[inside] = (230, 60, 60) if category == SQUARE else (60, 230, 60)
        annotations.append(
            {
                "category_id": category,
                "bbox": [left, top, side, side],
                "area": side * side,
                "iscrowd": 0,
            }
        )
    return image.astype(np.uint8), annotations


def make_coco_folder(root: Path) -> Path:
    """COCO's own layout. In train2017, one image has no boxes and one has a crowd region."""
    rng = np.random.default_rng(0)
    for split, num_images in (("train2017", 4), ("val2017", 2)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(num_images):
            empty = split == "train2017" and index == 1
            image_id = 100 + 10 * index
            image, boxes = draw_image(rng, 96, 0 if empty else 3)
            file_name = f"{image_id:012d}.png"
            Image.fromarray(image).save(root / split / file_name)
            images.append({"id": image_id, "file_name": file_name, "width": 96, "height": 96})
            if split == "train2017" and index == 2:
                boxes.append(
                    {"category_id": DISC, "bbox": [60, 60, 30, 30], "area": 900, "iscrowd": 1}
                )
            for box in boxes:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **box})
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(
                {
                    "info": {},
                    "images": images,
                    "annotations": annotations,
                    "categories": [
                        {"id": SQUARE, "name": "square"},
                        {"id": DISC, "name": "disc"},
                    ],
                }
            )
        )
    return root


# ---- Runs -------------------------------------------------------------------------------------


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing that the run could do about it."""


def change_annotations(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "annotations" / "instances_train2017.json"
    dataset = json.loads(file.read_text())
    change(dataset)
    file.write_text(json.dumps(dataset))
