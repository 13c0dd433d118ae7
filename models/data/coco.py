"""COCO-format folders.

A data set is a folder in one of two layouts, SPLIT being train, val, ...:

    DIR/annotations/instances_SPLIT2017.json  DIR/SPLIT2017/     as COCO comes
    DIR/SPLIT.json                            DIR/images/

Category ids may be sparse: models see labels 0..K-1 in the order of the ids, results carry the ids.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from models.data.errors import DataError
from models.data.images import read_image

Target = dict[str, Any]


class CocoDataset(Dataset):
    """Images as uint8 (3, H, W) with "boxes" (M, 4) xyxy, "labels" (M,) in 0..K-1, "crowd_boxes"
    (C, 4), the regions around crowds of objects, and "image_id".

    Boxes without an area inside their image are left out; `left_out` holds their annotations' ids,
    as far as the file tells the images' sizes, and pycocotools sees them through `coco`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.annotation_file, self.image_dir = find_split(Path(root), split)
        self.coco = load_annotations(self.annotation_file)
        self.image_ids = sorted(self.coco.imgs)
        self.categories = {id: self.coco.cats[id]["name"] for id in sorted(self.coco.cats)}
        self.labels = {category_id: label for label, category_id in enumerate(self.categories)}
        self.left_out = [
            annotation["id"]
            for annotation in self.coco.anns.values()
            if not has_area(annotation["bbox"], self.coco.imgs[annotation["image_id"]])
        ]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.image_ids[index]
        image = read_image(self.image_path(index))
        boxes: list[list[float]] = []
        crowds: list[list[float]] = []
        labels = []
        height, width = image.shape[-2:]
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, w, h = annotation["bbox"]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if not (x1 < x2 and y1 < y2):
                continue
            if annotation.get("iscrowd", 0):
                crowds.append([x1, y1, x2, y2])
            else:
                boxes.append([x1, y1, x2, y2])
                labels.append(self.labels[annotation["category_id"]])
        return image, {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "crowd_boxes": torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4),
            "image_id": image_id,
        }

    def image_path(self, index: int) -> Path:
        return self.image_dir / self.coco.imgs[self.image_ids[index]]["file_name"]


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    simple = root / f"{split}.json"
    if simple.is_file():
        return simple, root / "images"
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(found) == 1:
        return found[0], root / found[0].stem.removeprefix("instances_")
    if found:
        years = ", ".join(path.stem.removeprefix("instances_") for path in found)
        raise DataError(f"{root} has several splits {split!r}: name one of {years}")
    raise DataError(f"{root} has neither {split}.json nor annotations/instances_{split}*.json")


def load_annotations(path: Path) -> COCO:
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DataError(f"{path} is not a COCO annotation file: it has no list {key!r}")
    needed = {"images": ("id", "file_name"), "annotations": ("id",), "categories": ("id", "name")}
    for name, keys in needed.items():
        seen = set()
        for number, entry in enumerate(dataset[name]):
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise DataError(f"{path}: entry {number} of {name!r} has no {key!r}")
            if entry["id"] in seen:
                raise DataError(f"{path}: the id {entry['id']} stands twice in {name!r}")
            seen.add(entry["id"])
    for annotation in dataset["annotations"]:
        annotation.setdefault("image_id", None)  # for the index; the sentence comes below
        annotation.setdefault("category_id", None)
    coco = as_coco(dataset)
    for annotation in coco.anns.values():
        for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if annotation.get(key) not in known:
                raise DataError(
                    f"{path}: annotation {annotation['id']} has an unknown {key}, "
                    f"{annotation.get(key)}"
                )
        if not is_box(annotation.get("bbox")):
            raise DataError(
                f"{path}: annotation {annotation['id']} must have a bbox of four numbers, "
                f"got {annotation.get('bbox')}"
            )
    return coco


def is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
    )


def has_area(bbox: list[float], image: dict[str, Any]) -> bool:
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
