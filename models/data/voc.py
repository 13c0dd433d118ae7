"""Pascal VOC annotations in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from models.data.errors import DataError


def voc_to_coco(sources: list[tuple[str, str]], category: str) -> dict[str, Any]:
    """Pascal VOC annotations, (image file name, XML text) each, as one category of objects."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file_name, xml) in enumerate(sources, start=1):
        root = ElementTree.fromstring(xml)
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for box in root.iter("bndbox"):
            x1, y1, x2, y2 = (
                float(box.findtext(side, "nan")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": category}],
    }


def convert_voc(root: Path, out: Path) -> dict[str, int]:
    """Writes the splits of a Pascal VOC folder as a COCO-format folder that links to its images;
    returns the number of images of each.

    VOC counts pixels from 1 and box ends inclusively. Objects that it calls difficult, and leaves out
    of its own evaluation, become crowd regions, which COCO's leaves out.
    """
    lists = sorted(p for p in (root / "ImageSets" / "Main").glob("*.txt") if "_" not in p.stem)
    if not lists:
        raise DataError(f"{root} is no Pascal VOC folder: it has no ImageSets/Main/*.txt")
    splits = {path.stem: path.read_text().split() for path in lists}
    parsed = {name: _voc_image(root, name) for names in splits.values() for name in names}
    classes = sorted({name for _, objects in parsed.values() for name, _, _ in objects})
    ids = {name: number for number, name in enumerate(classes, start=1)}
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "images").exists():
        (out / "images").symlink_to((root / "JPEGImages").resolve())
    for split, names in splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, name in enumerate(names, start=1):
            image, objects = parsed[name]
            images.append({"id": image_id, **image})
            for category, (x1, y1, x2, y2), difficult in objects:
                width, height = x2 - x1 + 1, y2 - y1 + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": ids[category],
                        "bbox": [x1 - 1, y1 - 1, width, height],
                        "area": width * height,
                        "iscrowd": int(difficult),
                    }
                )
        dataset = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
        (out / f"{split}.json").write_text(json.dumps(dataset))
    return {split: len(names) for split, names in splits.items()}


VocObject = tuple[str, tuple[float, ...], bool]  # class, x1 y1 x2 y2, difficult


def _voc_image(root: Path, name: str) -> tuple[dict[str, Any], list[VocObject]]:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        image = {
            "file_name": tree.findtext("filename") or f"{name}.jpg",
            "width": int(tree.findtext("size/width", "")),
            "height": int(tree.findtext("size/height", "")),
        }
        objects = [
            (
                thing.findtext("name", ""),
                tuple(
                    float(thing.findtext(f"bndbox/{side}", ""))
                    for side in ("xmin", "ymin", "xmax", "ymax")
                ),
                thing.findtext("difficult") == "1",
            )
            for thing in tree.iter("object")
        ]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} is no Pascal VOC annotation ({error})") from None
    return image, objects
