"""Where data sets keep their annotation files and images, and how files name them.

DIR/SPLIT.json                             DIR/images/ or images/SPLIT/
DIR/annotations/instances_SPLIT2017.json   DIR/SPLIT2017/, images/SPLIT2017/, images/SPLIT/ or images/
DIR/annotations/image_info_SPLIT2017.json  the same: images without annotations
DIR/SPLIT/_annotations.coco.json           DIR/SPLIT/
"""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..data.errors import DataError
from ..program import program

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jp2",
    ".ppm",
    ".pgm",
)
ROBOFLOW = "_annotations.coco.json"
OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_")


def find_split(root: Path, split: str, images: Path | None = None) -> tuple[Path, list[Path]]:
    """The annotation file of a split, and the folders that its images may lie in, the likeliest first."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    if images is not None and not images.is_dir():
        raise DataError(f"--images must be a folder, got {images}")
    file = _annotation_file(root, split)
    stem = _split_of(file)
    # image_info_test-dev2017.json lists images of test2017.
    names = list(dict.fromkeys([stem, split, re.sub(r"-[a-z]+(?=\d{4}$)", "", stem)]))
    inside = [root / "images" / name for name in names]
    if images is not None:
        return file, [images, *(images / name for name in names)]
    if file.name == ROBOFLOW:
        return file, [file.parent, file.parent / "images"]
    if file.parent == root:
        return file, [root / "images", *inside, root / split, root / "JPEGImages", root]
    return file, [*(root / name for name in names), *inside, root / "images", root]


def splits(root: Path) -> list[str]:
    """The names of the splits that a folder has."""
    return list(dict.fromkeys(_split_of(file) for file in _annotation_files(root)))


def list_files(folder: Path, endings: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """The files with such an ending, in order, without hidden ones: macOS lays a ._a.jpg beside an a.jpg."""
    return sorted(
        path
        for path in folder.glob("**/*" if recursive else "*")
        if path.suffix.lower() in endings and not path.name.startswith(".")
    )


def image_folder(folders: Sequence[Path], file_names: Sequence[str]) -> Path:
    """The first of the folders that holds images of these names; if none does, the first that exists."""
    probes = {file_names[place] for place in (0, len(file_names) // 2, -1)} if file_names else set()
    for folder in folders:
        if any((folder / name.replace("\\", "/")).is_file() for name in probes):
            return folder
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def locate(folders: Sequence[Path], file_name: str, by_last_part: bool) -> Path:
    """The image that an annotation file names so, also where the name was written on another system: with
    backslashes, in URL encoding, with an ending in other case. `by_last_part`: the name without its
    folders will do, because no two images share it."""
    first = folders[0] / file_name
    if first.is_file():
        return first
    for name in _spellings(file_name, by_last_part):
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    return first


def _spellings(file_name: str, by_last_part: bool) -> Iterator[str]:
    slashed = file_name.replace("\\", "/")
    path = urlsplit(slashed).path.lstrip("/") if "://" in slashed else slashed
    for name in (path, *([PurePosixPath(path).name] if by_last_part else [])):
        for decoded in dict.fromkeys((name, unquote(name))):
            stem, dot, ending = decoded.rpartition(".")
            yield from (decoded, stem + dot + ending.lower(), stem + dot + ending.upper())
            yield from (unicodedata.normalize(form, decoded) for form in ("NFC", "NFD"))


def _annotation_file(root: Path, split: str) -> Path:
    annotations, escaped = root / "annotations", glob.escape(split)
    exact = (root / f"{split}.json", annotations / f"instances_{split}.json")
    for file in exact:
        if file.is_file():
            return file
    for pattern in (f"instances_{escaped}*.json", f"{escaped}.json", f"image_info_{escaped}*.json"):
        found = sorted(annotations.glob(pattern))
        found = [file for file in found if _split_of(file) == split] or found
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(map(_split_of, found))
            raise DataError(f"{root} has several splits {split!r}: name one of {names}")
    for folder in (split, *(["valid"] if split == "val" else [])):
        if (root / folder / ROBOFLOW).is_file():
            return root / folder / ROBOFLOW
    others = ", ".join(splits(root))
    if not others and (root / "Annotations").is_dir():
        raise DataError(
            f"{root} looks like a Pascal VOC folder: convert it first ({program()} convert)"
        )
    raise DataError(
        f"{root} has neither {split}.json nor annotations/instances_{split}*.json"
        + (f"; its splits are {others}" if others else "")
    )


def _annotation_files(root: Path) -> list[Path]:
    in_folder = sorted((root / "annotations").glob("*.json"))
    return [
        *sorted(root.glob("*.json")),
        *(file for file in in_folder if not file.name.startswith(OTHER_TASKS)),
        *sorted(root.glob(f"*/{ROBOFLOW}")),
    ]


def _split_of(file: Path) -> str:
    if file.name == ROBOFLOW:
        return file.parent.name
    return file.stem.removeprefix("instances_").removeprefix("image_info_")
