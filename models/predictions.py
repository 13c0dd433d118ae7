"""Detections of image files as data: JSON, CSV and COCO's results.

All formats have the same detections and the same numbers, boxes rounded to hundredths of a pixel and scores
to five decimals. Image ids count the images of the command from 1; file names are relative to the folder that all
of them lie in.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .outputs import text_written_whole
from .structures import Detections

# What each format writes.
FILES = {
    "json": ("predictions.json",),
    "csv": ("predictions.csv",),
    "coco": ("coco-results.json", "coco-images.json"),
}
COLUMNS = (
    *("image_id", "file_name", "width", "height"),
    *("category_id", "category", "score", "x1", "y1", "x2", "y2"),
)


@dataclass(frozen=True)
class Found:
    """The detections of an image, rounded, best first."""

    image_id: int
    file_name: str
    width: int
    height: int
    detections: list[dict[str, Any]]  # category_id, category, score and box, xyxy in pixels

    @property
    def image(self) -> dict[str, Any]:
        names = ("file_name", "width", "height")
        return {"id": self.image_id, **{name: getattr(self, name) for name in names}}


def rounded(
    found: Detections, categories: dict[Any, str], min_score: float
) -> list[dict[str, Any]]:
    """The detections with a score above the limit."""
    known = list(categories.items())
    return [
        {
            "category_id": known[label][0],
            "category": known[label][1],
            "score": round(score, 5),
            "box": [round(x, 2) for x in box],
        }
        for box, score, label in zip(
            found["boxes"].tolist(),
            found["scores"].tolist(),
            found["labels"].tolist(),
            strict=True,
        )
        if score > min_score
    ]


@contextlib.contextmanager
def writers(
    folder: Path, formats: list[str], categories: dict[Any, str], min_score: float
) -> Iterator[Callable[[Found], None]]:
    """Takes the images one by one; the files are there at the end, or none of them after an error."""
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(text_written_whole(folder / name))
            for chosen in formats
            for name in FILES[chosen]
        }
        adders = []
        if "json" in formats:
            adders.append(stack.enter_context(_json(files["predictions.json"], min_score)))
        if "csv" in formats:
            adders.append(_csv(files["predictions.csv"]))
        if "coco" in formats:
            results, images = (files[name] for name in FILES["coco"])
            adders.append(stack.enter_context(_coco(results, images, categories)))

        def add(found: Found) -> None:
            for adder in adders:
                adder(found)

        yield add


@contextlib.contextmanager
def _json(file: TextIO, min_score: float) -> Iterator[Callable[[Found], None]]:
    """An image a line, also one without a detection."""
    file.write(f'{{"min_score": {json.dumps(min_score)}, "images": [')
    put = _lines(file)
    yield lambda found: put([{**found.image, "detections": found.detections}])
    file.write("\n]}\n")


def _csv(file: TextIO) -> Callable[[Found], None]:
    """A detection a line, so that an image without one has none."""
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)

    def add(found: Found) -> None:
        for d in found.detections:
            image = (found.image_id, found.file_name, found.width, found.height)
            table.writerow((*image, d["category_id"], d["category"], d["score"], *d["box"]))

    return add


@contextlib.contextmanager
def _coco(
    results: TextIO, images: TextIO, categories: dict[Any, str]
) -> Iterator[Callable[[Found], None]]:
    """Results as pycocotools' loadRes reads them, and the images that their ids mean, without annotations."""
    named = [{"id": id, "name": name} for id, name in categories.items()]
    results.write("[")
    images.write(f'{{"categories": {json.dumps(named)}, "annotations": [], "images": [')
    put_results, put_images = _lines(results), _lines(images)

    def add(found: Found) -> None:
        put_images([found.image])
        put_results([_result(found.image_id, detection) for detection in found.detections])

    yield add
    results.write("\n]\n")
    images.write("\n]}\n")


def _result(image_id: int, detection: dict[str, Any]) -> dict[str, Any]:
    x1, y1, x2, y2 = detection["box"]
    return {
        "image_id": image_id,
        "category_id": detection["category_id"],
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "score": detection["score"],
    }


def _lines(file: TextIO) -> Callable[[list[Any]], None]:
    """Writes the items of a JSON list, one a line."""
    first = True

    def put(items: list[Any]) -> None:
        nonlocal first
        for item in items:
            file.write(("\n" if first else ",\n") + json.dumps(item))
            first = False

    return put
