"""COCO annotation files: what they must hold, and what may be read in more than one way.

What is missing or written in another type but has one meaning is put right and counted; what has none is a
fault, a sentence with the entry's id.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pycocotools.coco import COCO

from ..data.errors import DataError
from ..data.findings import Finding, only_met

Id = int | float | str
Entry = dict[str, Any]

LIMIT = 2**31  # of coordinates: further out, areas and float32 have lost the pixels
FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "": 0, "none": 0, "0.0": 0, "1.0": 1}


@dataclass
class AnnotationFile:
    dataset: dict[str, Any]  # as pycocotools takes it, without the entries that have faults
    has_annotations: bool  # False: a list of images, such as COCO's test sets have
    faults: list[str]
    findings: list[Finding]


def load_annotations(path: Path) -> COCO:
    """pycocotools' index of a file without faults."""
    file = read_annotations(path)
    refuse(path, file.faults)
    return as_coco(file.dataset)


def refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f" ({len(faults) - 1} more such faults; check lists them)" if faults[1:] else ""
        raise DataError(f"{path}: {faults[0]}{more}")


def read_annotations(path: Path) -> AnnotationFile:
    """The annotations have ids from 1 on, because pycocotools takes a match with id 0 for none; "file_id"
    is that of the file. Their boxes and areas are numbers, "iscrowd" is 0 or 1."""
    dataset = parse(path)
    has_annotations = "annotations" in dataset
    for key in ("images", *(("annotations", "categories") if has_annotations else ())):
        if not isinstance(dataset.get(key), list):
            raise DataError(f"{path} is not a COCO annotation file: it has no list {key!r}")
    faults: list[str] = []
    images, unsized = _images(of_images := _entries(dataset, "images", faults), faults)
    categories = _categories(of_categories := _entries(dataset, "categories", faults), faults)
    annotations, found = _annotations(
        _entries(dataset, "annotations", faults),
        {entry["id"] for entry in of_images},
        {entry["id"] for entry in of_categories},
        faults,
    )
    usable = [{entry["id"] for entry in entries} for entries in (images, categories)]
    annotations = [
        a for a in annotations if a["image_id"] in usable[0] and a["category_id"] in usable[1]
    ]
    clean = {"images": images, "annotations": annotations, "categories": categories}
    sizes = Finding(
        "no size", "images have no usable width and height: those of their files count", unsized
    )
    return AnnotationFile(
        {"info": {}, **dataset, **clean}, has_annotations, faults, only_met([sizes, *found])
    )


def parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        dataset = json.loads(
            content
        )  # in UTF-8, UTF-16 or UTF-32, with or without a byte order mark
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if not content.strip():
            raise DataError(f"{path} is empty") from None
        raise DataError(f"{path} is not valid JSON ({error})") from None
    if isinstance(dataset, list):
        raise DataError(
            f"{path} is not a COCO annotation file: it is a list, as COCO's results are, and must be an "
            "object with the lists 'images', 'annotations' and 'categories'"
        )
    if not isinstance(dataset, dict):
        raise DataError(f"{path} is not a COCO annotation file: it has no list 'images'")
    return dataset


def id_order(id: Id) -> tuple[bool, Id]:
    """Sorts ids of which some are numbers and some text."""
    return isinstance(id, str), id


def _entries(dataset: dict[str, Any], name: str, faults: list[str]) -> list[Entry]:
    """The entries with an id of their own."""
    entries, seen = [], set()
    for number, entry in enumerate(dataset.get(name) or []):
        if not isinstance(entry, dict) or "id" not in entry:
            faults.append(f"entry {number} of {name!r} has no 'id'")
        elif not (type(entry["id"]) in (int, str) or _is_number(entry["id"])):
            faults.append(
                f"entry {number} of {name!r} must have a number or text as id, got {entry['id']!r}"
            )
        elif entry["id"] in seen:
            faults.append(f"the id {entry['id']} stands twice in {name!r}")
        else:
            seen.add(entry["id"])
            entries.append(entry)
    return entries


def _images(entries: list[Entry], faults: list[str]) -> tuple[list[Entry], list[str]]:
    images, unsized = [], []
    for entry in entries:
        if "file_name" not in entry and isinstance(entry.get("coco_url"), str):  # LVIS
            entry["file_name"] = PurePosixPath(entry["coco_url"]).name
        name = entry.get("file_name")
        if name is None:
            faults.append(f"image {entry['id']} has no 'file_name'")
            continue
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            faults.append(f"image {entry['id']} must have a text as file_name, got {name!r}")
            continue
        sides = [as_number(entry.pop(side, None)) for side in ("width", "height")]
        if all(side is not None and side > 0 for side in sides):
            entry["width"], entry["height"] = sides
        else:
            unsized.append(name)
        images.append(entry)
    return images, unsized


def _categories(entries: list[Entry], faults: list[str]) -> list[Entry]:
    categories = []
    for entry in entries:
        name = entry.get("name")
        if type(name) in (int, float):
            entry["name"] = name = str(name)
        if isinstance(name, str):
            categories.append(entry)
        elif name is None:
            faults.append(f"category {entry['id']} has no 'name'")
        else:
            faults.append(f"category {entry['id']} must have a text as name, got {name!r}")
    return categories


def _annotations(
    entries: list[Entry], image_ids: set[Id], category_ids: set[Id], faults: list[str]
) -> tuple[list[Entry], list[Finding]]:
    annotations: list[Entry] = []
    areas, ignored = [], []
    for entry in entries:
        fault = _fault(entry, image_ids, category_ids)
        if fault:
            faults.append(f"annotation {entry['id']} {fault}")
            continue
        _, _, w, h = entry["bbox"]
        area = as_number(entry.get("area"))
        if area is None or not 0 < area <= 2 * (w + 1) * (h + 1):
            area = max(w, 0) * max(h, 0)
            if area > 0:
                areas.append(entry["id"])
        entry["area"] = area
        if entry.get("ignore") and not entry["iscrowd"]:
            ignored.append(entry["id"])
        entry["file_id"], entry["id"] = entry["id"], len(annotations) + 1
        annotations.append(entry)
    return annotations, [
        Finding(
            "area",
            "annotations have no area, or one that their box cannot have: the box's counts",
            areas,
            "annotations",
        ),
        Finding(
            "ignore",
            "annotations have a flag 'ignore', which COCO does not know: they count as objects",
            ignored,
            "annotations",
        ),
    ]


def _fault(entry: Entry, image_ids: set[Id], category_ids: set[Id]) -> str | None:
    """Why an annotation cannot be used; puts its box and flag into numbers if it can."""
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = entry.get(key)
        if type(value) not in (int, float, str) or value not in known:
            return f"has an unknown {key}, {value!r}"
    bbox = entry.get("bbox")
    numbers = [as_number(value) for value in bbox] if isinstance(bbox, list) else []
    if len(numbers) != 4 or None in numbers:
        return f"must have a bbox of four numbers, got {bbox}"
    flag = entry.get("iscrowd")
    flag = FLAGS.get(str(flag).strip().lower()) if flag is not None else 0
    if flag is None:
        return f"must have 0 or 1 as iscrowd, got {entry['iscrowd']!r}"
    entry["bbox"], entry["iscrowd"] = numbers, flag
    return None


def as_number(value: Any) -> float | None:
    """A number, also one written as text; None for what is none, not finite or huge."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LIMIT < value < LIMIT


def has_area(bbox: list[float], image: Entry) -> bool:
    """Whether a box has an area inside its image, as far as the image's size is known."""
    x, y, w, h = bbox
    right, bottom = image.get("width", math.inf), image.get("height", math.inf)
    return min(x + w, right) > max(x, 0) and min(y + h, bottom) > max(y, 0)


def as_coco(dataset: dict[str, Any]) -> COCO:
    """A pycocotools index over annotations in memory, without its prints."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def numbered(ids: Iterable[Id]) -> dict[Id, int]:
    """Numbers from 1 on for ids of any kind, in their order."""
    return {id: number for number, id in enumerate(sorted(ids, key=id_order), start=1)}
