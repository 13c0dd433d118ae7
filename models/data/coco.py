"""COCO-format data sets.

Ids of categories may be sparse, or text: models see labels 0..K-1 in the order of the ids, results carry the ids.

Boxes are those of the upright image, as viewers and labelling tools show it: where EXIF turns an image, its boxes
are turned too if the annotation file gives the width and height of the stored pixels instead.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.annotations import Id, as_coco, has_area, id_order, read_annotations, refuse
from ..data.errors import DataError
from ..data.findings import Finding, only_met
from ..data.images import Header, read_header, read_image
from ..data.layouts import find_split, image_folder, locate

Target = dict[str, Any]

DARK, DARK_PROBES = 32, 4  # of 255; a survey decodes so many images to see it


class CocoDataset(Dataset):
    """Images as uint8 (3, H, W) with "boxes" (M, 4) xyxy, "labels" (M,) in 0..K-1, "crowd_boxes"
    (C, 4), the regions around crowds of objects, and "image_id".

    Boxes are clipped to their image; those without an area inside it are left out, while pycocotools sees them
    through `coco`. An image has the size of its file, whatever the annotations say.

    Args:
        images: the folder of the images, where it is not one of those in models/data/layouts.py.
        large_images: reads images above Pillow's limit.
        strict: refuses a file with faults. Else `faults` has them, and what they are about is missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        images: Path | None = None,
        *,
        large_images: bool = False,
        strict: bool = True,
    ) -> None:
        self.root, self.large_images = Path(root), large_images
        self.annotation_file, folders = find_split(self.root, split, images)
        file = read_annotations(self.annotation_file)
        if strict:
            refuse(self.annotation_file, file.faults)
        self.faults, self._findings = file.faults, file.findings
        self.coco, self.has_annotations = as_coco(file.dataset), file.has_annotations
        self.image_ids = sorted(self.coco.imgs, key=id_order)
        self.image_dir = image_folder(folders, [self.file_name(n) for n in range(len(self))])
        self.categories = {
            id: self.coco.cats[id]["name"] for id in sorted(self.coco.cats, key=id_order)
        }
        self.labels = {category_id: label for label, category_id in enumerate(self.categories)}
        self._headers: dict[Id, Header] = {}  # of the images that settle() has seen

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.image_ids[index]
        image = read_image(self.image_path(index), self.large_images)
        boxes: list[list[float]] = []
        crowds: list[list[float]] = []
        labels = []
        height, width = image.shape[-2:]
        if _size(self.coco.imgs[image_id]) not in (None, (width, height)):
            self.settle(index)
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, w, h = annotation["bbox"]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if not (x1 < x2 and y1 < y2):
                continue
            if annotation["iscrowd"]:
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

    def class_frequencies(self) -> tuple[float, ...]:
        """Of each label the share of the images that have it, crowds aside."""
        images: dict[Id, set[Id]] = {id: set() for id in self.categories}
        for annotation in self.coco.anns.values():
            if not annotation["iscrowd"]:
                images[annotation["category_id"]].add(annotation["image_id"])
        return tuple(len(having) / max(len(self), 1) for having in images.values())

    def file_name(self, index: int) -> str:
        name: str = self.coco.imgs[self.image_ids[index]]["file_name"]
        return name

    def image_path(self, index: int) -> Path:
        name = self.file_name(index)
        folders = (self.image_dir, self.root, self.annotation_file.parent)
        return locate(folders, name, self._last_parts[_last_part(name)] == 1)

    @functools.cached_property
    def _last_parts(self) -> Counter[str]:
        return Counter(_last_part(self.file_name(n)) for n in range(len(self)))

    @property
    def left_out(self) -> list[Id]:
        """The ids of the annotations whose boxes have no area inside their image."""
        places = {id: place for place, id in enumerate(self.image_ids)}
        left_out = []
        for annotation in self.coco.anns.values():
            image = self.coco.imgs[annotation["image_id"]]
            if not has_area(annotation["bbox"], image) and _size(image) is not None:
                try:  # before a box is said to be left out, the file has to say so
                    self.settle(places[image["id"]])
                except DataError:
                    continue  # an image that cannot be read says that itself
            if not has_area(annotation["bbox"], image):
                left_out.append(annotation["file_id"])
        return left_out

    def settle(self, index: int) -> list[str]:
        """Gives an image's entry the size of its file, and its boxes the upright frame; returns what the
        annotation file says otherwise: "turned", "size", and what its name is: "renamed"."""
        image_id = self.image_ids[index]
        if image_id in self._headers:
            return []
        path, image = self.image_path(index), self.coco.imgs[image_id]
        header = read_header(path, self.large_images)
        said, odd = _size(image), []
        if said == header.raw_size != header.size:
            odd.append("turned")
            for annotation in self.coco.imgToAnns[image_id]:
                annotation["bbox"] = header.turn(annotation["bbox"])
        elif said not in (None, header.size):
            odd.append("size")
        if path != self.image_dir / image["file_name"]:
            odd.append("renamed")
        image["width"], image["height"] = header.size
        self._headers[image_id] = header
        return odd

    def survey(self, unreadable: list[str] | None = None) -> list[Finding]:
        """What is odd about the annotations, the images' names and their files' headers.

        Images without a readable header are an error in one sentence, unless a list takes their sentences.
        """
        odd: dict[str, list[str]] = {"turned": [], "size": [], "renamed": []}
        errors: list[str] = []

        def look(index: int) -> tuple[int, list[str] | DataError]:
            try:
                return index, self.settle(index)
            except DataError as error:
                return index, error

        with ThreadPoolExecutor(8) as pool:
            looks = pool.map(look, range(len(self)))
            for index, found in tqdm(
                looks, "headers", len(self), unit="image", delay=2, mininterval=1.0
            ):
                if isinstance(found, DataError):
                    errors.append(str(found))
                    continue
                for kind in found:
                    odd[kind].append(self.file_name(index))
        if errors and unreadable is None:
            more = f", and {len(errors) - 1} more images cannot be read" if errors[1:] else ""
            raise DataError(f"{errors[0]}{more}")
        if unreadable is not None:
            unreadable += errors
        deep = [n for n in range(len(self)) if self.is_deep(n)]
        probed = [(n, self._brightest(n)) for n in deep[:DARK_PROBES]]
        twice = [name for name, count in self._file_names.items() if count > 1]
        return only_met(
            [
                *self._findings,
                Finding(
                    "size",
                    "images have another size than the annotations say, which their boxes may belong to: "
                    "that of the file counts",
                    odd["size"],
                    wrong=True,
                ),
                Finding(
                    "turned",
                    "images are turned upright by EXIF, and annotated as they were before: their boxes are "
                    "turned with them, and results are those of the upright images",
                    odd["turned"],
                ),
                Finding(
                    "renamed",
                    "images were found under another name or in another folder",
                    odd["renamed"],
                ),
                Finding(
                    "deep",
                    "images have more than 8 bits: the range of their type is scaled to 8",
                    [self.file_name(n) for n in deep],
                ),
                dark_images([self.file_name(n) for n, value in probed if value < DARK]),
                Finding(
                    "twice",
                    "files stand for several images, each with its own boxes",
                    twice,
                    wrong=True,
                ),
                *self._box_findings(),
            ]
        )

    def is_deep(self, index: int) -> bool:
        """After survey(): whether an image has more than 8 bits."""
        header = self._headers.get(self.image_ids[index])
        return header is not None and header.value_range is not None

    def _brightest(self, index: int) -> int:
        try:
            return int(read_image(self.image_path(index), self.large_images).max())
        except DataError:
            return 255  # it says itself what is wrong with it

    @property
    def _file_names(self) -> Counter[str]:
        return Counter(self.file_name(n) for n in range(len(self)))

    def _box_findings(self) -> list[Finding]:
        clipped, tiny, left_out = [], [], self.left_out
        for annotation in self.coco.anns.values():
            x, y, w, h = annotation["bbox"]
            image = self.coco.imgs[annotation["image_id"]]
            if not (has_area(annotation["bbox"], image) and _size(image)):
                continue
            if min(x, y, image["width"] - x - w, image["height"] - y - h) < -1:
                clipped.append(annotation["file_id"])
            if min(w, h) < 1:
                tiny.append(annotation["file_id"])
        return [
            Finding(
                "left out",
                "boxes without an area inside their image are left out of training, and count as objects "
                "that no detection can find",
                left_out,
                "annotations",
                wrong=len(left_out) == len(self.coco.anns),
            ),
            Finding(
                "clipped",
                "boxes are clipped at the borders of their images",
                clipped,
                "annotations",
            ),
            Finding("tiny", "boxes are less than a pixel wide or high", tiny, "annotations"),
        ]


def dark_images(names: Sequence[str]) -> Finding:
    return Finding(
        "dark",
        "images use less than an eighth of the range of their more than 8 bits, and are nearly black where that "
        "is scaled: spread their values over the range",
        names,
        wrong=True,
    )


def match_categories(
    trained: Mapping[Any, str], data: CocoDataset
) -> tuple[list[Id | None], list[str]]:
    """The id in `data` of each label of a model that was trained on the categories `trained`, by their names,
    and sentences where that makes a difference.

    A category that `data` does not have keeps its id, or has None where that id means another one.
    """
    file = data.annotation_file
    if all(trained.get(id) == name for id, name in data.categories.items()):
        return list(trained), []
    missing = sorted(set(data.categories.values()) - set(trained.values()))
    if missing:
        raise DataError(
            f"{file} has categories that the model was not trained on: {_listing(missing)}; it knows "
            f"{_listing(trained.values())}"
        )
    for source, names in (("the model", trained), ("the file", data.categories)):
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise DataError(
                f"{file} has other category ids than the model was trained with, and their names do not tell "
                f"which is which: {source} has several {_listing(twice)}"
            )
    by_name = {name: id for id, name in data.categories.items()}
    ids = [by_name.get(name, None if id in data.categories else id) for id, name in trained.items()]
    notes = [
        f"{file} has other category ids than the model was trained with: its ids are used, matched by name"
    ]
    lost = [name for name, id in zip(trained.values(), ids, strict=True) if id is None]
    if lost:
        notes.append(
            f"{file} has no categories {_listing(lost)}: what is detected of them is dropped"
        )
    return ids, notes


def _listing(names: Iterable[str], limit: int = 20) -> str:
    names = list(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _size(image: dict[str, Any]) -> tuple[float, float] | None:
    return (image["width"], image["height"]) if "width" in image else None
