"""A drawn data set with a long tail: 30 classes, whose numbers of objects in training follow Zipf's law."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

SIDE = 160  # of an image
OBJECTS = (2, 3, 4)  # of an image, equally often
DIAMETERS = (22.0, 56.0)
IMAGES = {"train": 600, "val": 210}
EXPONENT = 1.25  # the class of rank r has a share of r^-1.25 of the objects; in the validation set all have the same
COLORS = {
    "red": (215, 45, 40),
    "yellow": (225, 200, 40),
    "green": (45, 165, 65),
    "blue": (45, 90, 215),
    "violet": (160, 60, 190),
}
# Whether a point is inside, from its coordinates in the unit disc.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: np.hypot(x, y) <= 1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.8) <= 0.2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.75,
    "triangle": lambda x, y: np.maximum(-y, abs(x) * 3**0.5 / 2 + y / 2) <= 0.5,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.25) & (np.hypot(x, y) <= 1),
    "star": lambda x, y: np.hypot(x, y) <= 0.65 + 0.35 * np.cos(5 * np.arctan2(x, y)),
}
CLASSES = [f"{color} {shape}" for shape, color in itertools.product(SHAPES, COLORS)]


def draw_shapes(folder: Path) -> None:
    """Writes SPLIT.json and images/ in COCO's format, always the same."""
    categories = [{"id": id, "name": name} for id, name in enumerate(CLASSES, start=1)]
    ranked = np.random.default_rng(0).permutation(len(CLASSES))  # frequent classes first
    for seed, (split, count) in enumerate(IMAGES.items()):
        rng = np.random.default_rng(seed)
        sizes = rng.permutation(np.resize(OBJECTS, count))
        shares = (1.0 + np.arange(len(CLASSES))) ** -(EXPONENT if split == "train" else 0.0)
        labels = rng.permutation(np.repeat(ranked, apportioned(shares, int(sizes.sum()))))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for id, of_image in enumerate(np.split(labels, sizes.cumsum()[:-1]), start=1):
            pixels, boxes = draw_image(rng, of_image)
            name = f"{split}-{id:03d}.jpg"
            Image.fromarray(pixels).save(folder / "images" / name, quality=90)
            images.append({"id": id, "file_name": name, "width": SIDE, "height": SIDE})
            for label, box in zip(of_image, boxes, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": id,
                        "category_id": int(label) + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        dataset = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(dataset))


def apportioned(shares: Array, total: int) -> Array:
    """Whole numbers in proportion to the shares whose sum is `total`: the largest remainders are rounded up."""
    exact = shares / shares.sum() * total
    counts = exact.astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def draw_image(rng: np.random.Generator, labels: Array) -> tuple[Array, list[list[int]]]:
    """uint8 (SIDE, SIDE, 3) with an object of each label, and their boxes as x, y, width, height; none overlap."""
    pixels = background(rng)
    free = np.ones((SIDE, SIDE), dtype=bool)
    boxes = []
    for label in labels:
        shape, color = divmod(int(label), len(COLORS))
        inside = place(rng, [*SHAPES.values()][shape], free)
        (top, bottom), (left, right) = ((i.min(), i.max() + 1) for i in inside.nonzero())
        free[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
        pixels[inside] = np.array([*COLORS.values()][color]) + rng.normal(0, 18, 3)
        boxes.append([int(left), int(top), int(right - left), int(bottom - top)])
    pixels += rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8), boxes


def background(rng: np.random.Generator) -> Array:
    """Plain, or patches of several colors, all of them pale or dark rather than bright."""
    patches = rng.choice((1, 5, 20))
    colors = rng.uniform(30, 220) + rng.normal(0, 25, (patches, patches, 3))
    side = SIDE // patches
    return colors.repeat(side, axis=0).repeat(side, axis=1)


def place(rng: np.random.Generator, shape: Callable[[Array, Array], Array], free: Array) -> Array:
    """Where in the image the shape is, turned and as large as chance has it, smaller where nothing else is free."""
    diameter = np.exp(rng.uniform(*np.log(DIAMETERS)))
    while True:
        radius = diameter / 2
        center = rng.uniform(radius, SIDE - radius, 2)
        angle = rng.uniform(-0.5, 0.5)
        y, x = (np.mgrid[:SIDE, :SIDE] + 0.5 - center[:, None, None]) / radius
        inside = shape(x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle))
        rows, columns = (slice(i.min(), i.max() + 1) for i in inside.nonzero())
        if free[rows, columns].all():
            return inside
        diameter = max(diameter * 0.97, DIAMETERS[0])
