"""Pascal VOC annotations in COCO's format, also where they differ from VOC's own.

Names may have spaces and dots; lists may name files with an ending or folders; images may have any format; an
XML's <filename> may be wrong, and its size 0; ImageSets may be missing.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from ..data.errors import DataError
from ..data.images import read_header
from ..data.layouts import IMAGE_SUFFIXES, list_files

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
VocObject = tuple[str, Box, bool]  # class, box, difficult
SIDES = ("xmin", "ymin", "xmax", "ymax")


def voc_to_coco(sources: Sequence[tuple[str, str]], category: str) -> dict[str, Any]:
    """Pascal VOC annotations, (image file name, XML text) each, as one category of objects; boxes count
    pixels from 0."""
    writer = Writer([category])
    for file_name, xml in sources:
        root = ElementTree.fromstring(xml)
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        writer.image(file_name, (width, height))
        for _, (x1, y1, x2, y2), _ in _objects(root):
            writer.annotation(category, [x1, y1, x2 - x1, y2 - y1])
    return writer.dataset()


@dataclass
class Conversion:
    """The content of the files that convert_voc writes, by split, and what it found on the way."""

    splits: dict[str, dict[str, Any]]
    image_dir: Path
    notes: list[str]


def convert_voc(root: Path, out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Writes the splits of a Pascal VOC folder as a COCO-format folder that links to its images;
    returns the number of images of each.

    VOC counts pixels from 1 and box ends inclusively. Objects that it calls difficult, and leaves out
    of its own evaluation, become crowd regions, which COCO's leaves out.
    """
    conversion = read_voc(root)
    write_conversion(conversion, out, overwrite=overwrite)
    return {split: len(dataset["images"]) for split, dataset in conversion.splits.items()}


def read_voc(root: Path) -> Conversion:
    """A split for each list of ImageSets/Main; without lists all annotations are the split "train"."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    xml_dir = root / "Annotations" if (root / "Annotations").is_dir() else root
    image_dir = next((root / n for n in ("JPEGImages", "images") if (root / n).is_dir()), root)
    folder, notes = _Folder(xml_dir, image_dir), []
    lists = _lists(root, folder)
    if not lists:
        if not folder.names:
            raise DataError(
                f"{root} is no Pascal VOC folder: it has no ImageSets/Main/*.txt and no annotations *.xml"
            )
        lists = {"train": folder.names}
        notes.append(
            f"{root} has no ImageSets/Main/*.txt: all {len(folder.names)} annotations are 'train'"
        )
    listed = {name for names in lists.values() for name in names}
    rest = len(set(folder.names) - listed)
    if rest:
        notes.append(f"{rest} annotations are in no list and left out")
    parsed = {name: folder.read(name) for name in sorted(listed)}
    classes = sorted({name for _, _, objects in parsed.values() for name, _, _ in objects})
    splits = {}
    for split, names in lists.items():
        writer = Writer(classes)
        for name in names:
            file_name, size, objects = parsed[name]
            writer.image(file_name, size)
            for category, (x1, y1, x2, y2), difficult in objects:
                writer.annotation(
                    category, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], int(difficult)
                )
        splits[split] = writer.dataset()
    return Conversion(splits, image_dir, notes + folder.notes())


def write_conversion(conversion: Conversion, out: Path, *, overwrite: bool = False) -> None:
    """Nothing is written unless everything can be."""
    from ..outputs import claim, reason, write_whole  # not above: it imports this package

    files = {out / f"{split}.json": dataset for split, dataset in conversion.splits.items()}
    link, target = out / "images", conversion.image_dir.resolve()
    replaced = link.is_symlink() and overwrite
    if (link.exists() or link.is_symlink()) and link.resolve() != target and not replaced:
        raise DataError(
            f"{link} exists already and is not {target}: another data set is in {out}, choose another --out"
        )
    claim(files, overwrite=overwrite)
    try:
        if link.resolve() != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    except OSError as error:
        raise DataError(f"{link} cannot be made a link to {target} ({reason(error)})") from None
    for file, dataset in files.items():
        write_whole(file, json.dumps(dataset))


@dataclass
class Writer:
    """Collects images and annotations as COCO's format has them."""

    categories: Sequence[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = {name: number for number, name in enumerate(self.categories, start=1)}

    def image(self, file_name: str, size: tuple[int, int]) -> None:
        width, height = size
        entry = {"id": len(self.images) + 1, "file_name": file_name}
        self.images.append({**entry, "width": width, "height": height})

    def annotation(self, category: str, bbox: list[float], iscrowd: int = 0) -> None:
        """Of the last image."""
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": len(self.images),
                "category_id": self.ids[category],
                "bbox": bbox,
                "area": max(bbox[2], 0) * max(bbox[3], 0),
                "iscrowd": iscrowd,
            }
        )

    def dataset(self) -> dict[str, Any]:
        return {
            "info": {},
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": number, "name": name} for name, number in self.ids.items()],
        }


class _Folder:
    """The annotations and images of a VOC folder; an annotation's name is its path without .xml."""

    def __init__(self, xml_dir: Path, image_dir: Path) -> None:
        self.xml_dir, self.image_dir = xml_dir, image_dir
        recursive = xml_dir.name == "Annotations"
        self.names = sorted(
            path.relative_to(xml_dir).with_suffix("").as_posix()
            for path in list_files(xml_dir, [".xml"], recursive=recursive)
        )
        self.images: dict[str, list[str]] = defaultdict(list)  # by path without ending
        for path in list_files(image_dir, IMAGE_SUFFIXES, recursive=recursive):
            place = path.relative_to(image_dir)
            self.images[place.with_suffix("").as_posix()].append(place.as_posix())
        self.misnamed: list[str] = []
        self.reversed: list[str] = []
        self.measured: list[str] = []

    def read(self, name: str) -> tuple[str, tuple[int, int], list[VocObject]]:
        """The image's name below the image folder, its width and height, its objects."""
        path = self.xml_dir / f"{name}.xml"
        root = _parse(path)
        try:
            objects = _objects(root)
        except ValueError as error:
            raise DataError(f"{path} is no Pascal VOC annotation ({error})") from None
        if any(x1 > x2 or y1 > y2 for _, (x1, y1, x2, y2), _ in objects):
            self.reversed.append(name)
        file_name = self._image(name, (root.findtext("filename") or "").strip())
        width, height = (_whole(root.findtext(f"size/{side}")) for side in ("width", "height"))
        if not (width and height):
            width, height = read_header(self.image_dir / file_name).size
            self.measured.append(name)
        return file_name, (width, height), objects

    def notes(self) -> list[str]:
        found = {
            "annotations name another file than the image beside them, which is taken": self.misnamed,
            "annotations have boxes that end before they begin: nothing is trained on those": self.reversed,
            "annotations have no width and height, which are taken from their images": self.measured,
        }
        return [
            f"{len(names)} {text} ({', '.join(names[:10])}{', ...' * (len(names) > 10)})"
            for text, names in found.items()
            if names
        ]

    def _image(self, name: str, written: str) -> str:
        """VOC's images have their annotation's name; <filename> decides where there are several or none."""
        last = PurePosixPath(written.replace("\\", "/")).name
        place = (PurePosixPath(name).parent / last).as_posix()
        beside = self.images.get(name) or self.images.get(PurePosixPath(name).name) or []
        chosen = place if place in beside else beside[0] if len(beside) == 1 else None
        if len(beside) > 1 and chosen is None:
            raise DataError(
                f"{self.xml_dir / name}.xml has several images, {', '.join(beside)}, and its <filename> "
                f"{written!r} is none of them"
            )
        if chosen is None:
            inside = [other for other in (name, written, place, last) if other]
            chosen = next((o for o in inside if (self.image_dir / o).is_file()), None)
        if chosen is None:
            raise DataError(
                f"{self.xml_dir / name}.xml has no image in {self.image_dir}: neither {name}.jpg (or .png, ...) "
                f"nor its <filename> {written!r}"
            )
        if written and PurePosixPath(chosen).name != last:
            self.misnamed.append(name)
        return chosen


def _lists(root: Path, folder: _Folder) -> dict[str, list[str]]:
    """The names of each split; not the lists of single classes, such as dog_train.txt."""
    places = (root / "ImageSets" / "Main", root / "ImageSets")
    files = next((found for place in places if (found := sorted(place.glob("*.txt")))), [])
    known, splits = set(folder.names), {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as a list of names ({error})") from None
        lines = [line.strip() for line in lines if line.strip()]
        flagged = [re.fullmatch(r"(.*\S)\s+(?:-1|0|1)", line) for line in lines]
        of_class = "_" in file.stem and lines and all(flagged) and not known & set(lines)
        if not of_class:
            names = [_name(line, known, folder, file) for line in lines]
            splits[file.stem] = list(dict.fromkeys(names))
    return splits


def _name(line: str, known: set[str], folder: _Folder, file: Path) -> str:
    """The annotation that a line of a list means: its name, with an ending, a folder or a flag, or its image."""
    path = PurePosixPath(line.replace("\\", "/"))
    has_ending = path.suffix.lower() in (".xml", *IMAGE_SUFFIXES)
    without_flag = re.sub(r"\s+(-1|0|1)$", "", line)
    bare = path.with_suffix("") if has_ending else path
    for name in (line, bare.as_posix(), bare.name, without_flag):
        if name in known:
            return name
    missing = folder.xml_dir / f"{line if not has_ending else bare}.xml"
    raise DataError(f"{missing} does not exist, and {file} names it")


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes().strip()
        try:
            root = ElementTree.fromstring(content)
        except ValueError:  # an encoding that the parser does not know, such as GBK
            root = ElementTree.fromstring(_decoded(content))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} is no Pascal VOC annotation ({error})") from None
    if root.tag != "annotation":
        raise DataError(f"{path} is no Pascal VOC annotation (it begins with <{root.tag}>)")
    return root


def _decoded(content: bytes) -> str:
    declared = re.match(rb"<\?xml[^>]*encoding=[\"']([^\"']+)[\"'][^>]*\?>", content)
    if declared is None:
        raise ValueError("its encoding is not known")
    return content[declared.end() :].decode(declared[1].decode("ascii"))


def _objects(root: ElementTree.Element) -> list[VocObject]:
    objects = []
    for number, thing in enumerate(root.iter("object"), start=1):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"object {number} has no <name>")
        texts = [thing.findtext(f"bndbox/{side}") for side in SIDES]
        if None in texts:
            raise ValueError(
                f"object {number}, {name}, has no <bndbox> with xmin, ymin, xmax and ymax"
            )
        x1, y1, x2, y2 = (float(text or "") for text in texts)
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise ValueError(f"object {number}, {name}, has a <bndbox> that is not finite")
        difficult = (thing.findtext("difficult") or "").strip().lower() in ("1", "true")
        objects.append((name, (x1, y1, x2, y2), difficult))
    return objects


def _whole(text: str | None) -> int:
    """A size in pixels, 0 where there is none."""
    try:
        return max(int(float(text or "")), 0)
    except (ValueError, OverflowError):
        return 0
