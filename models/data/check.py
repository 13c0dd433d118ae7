"""A whole data set, images included: what would be refused or wrong, and what is odd."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..data.annotations import Id, parse
from ..data.coco import DARK, CocoDataset, dark_images
from ..data.downloads import data_folder
from ..data.errors import DataError
from ..data.findings import Finding, only_met
from ..data.images import decode
from ..data.layouts import IMAGE_SUFFIXES, find_split, list_files, splits


@dataclass
class Report:
    """By split: a line about it, what is refused, what is odd or wrong; and what concerns several splits."""

    summary: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    across: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        findings = itertools.chain(self.across, *self.findings.values())
        return any(self.faults.values()) or any(finding.wrong for finding in findings)


@dataclass(frozen=True)
class Content:
    """What reading a whole image tells."""

    digest: bytes
    brightest: int
    frames: int


def check_data(
    name: str,
    names: Sequence[str] | None = None,
    images: Path | None = None,
    *,
    large_images: bool = False,
    workers: int = 2,
) -> Report:
    """Checks the splits `names` of a folder, or all that it has."""
    if workers < 1:
        raise ValueError(f"--workers must be a whole number at least 1, got {workers}")
    root = data_folder(name)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    report, read, digests = Report(), {}, {}
    for split in names or _annotated_splits(root, report):
        report.faults[split], report.findings[split] = [], []
        try:
            data = CocoDataset(root, split, images, large_images=large_images, strict=False)
        except DataError as error:
            report.faults[split].append(str(error))
            continue
        read[split] = data
        report.summary[split] = (
            f"{data.annotation_file}, {len(data)} images, {len(data.coco.anns)} annotations, "
            f"{len(data.categories)} categories"
        )
        digests[split] = _check_split(data, report.faults[split], report.findings[split], workers)
    if not report.faults:
        find_split(root, "train")  # the sentence about layouts
    unlisted = [] if names else [_unlisted(read.values())]
    report.across = only_met([*_same_images(digests), *_other_categories(read), *unlisted])
    return report


def _annotated_splits(root: Path, report: Report) -> list[str]:
    """All splits but those whose file is something else, such as COCO results."""
    found = []
    for split in splits(root):
        try:
            file, _ = find_split(root, split)
            is_other = file.parent == root and "images" not in parse(file)
        except DataError as error:
            is_other = "is not a COCO annotation file" in str(error)
        if not is_other:
            found.append(split)
    return found


def _check_split(
    data: CocoDataset, faults: list[str], findings: list[Finding], workers: int
) -> dict[str, bytes]:
    """Adds to the faults and findings; returns the digests of the images' files by name."""
    faults += data.faults
    if len(data) == 0:
        faults.append(f"{data.annotation_file} has no images")
    if data.has_annotations and not data.categories:
        faults.append(f"{data.annotation_file} has no categories")
    findings += _annotation_findings(data)  # before the survey, which turns boxes
    unreadable: list[str] = []
    findings += [finding for finding in data.survey(unreadable) if finding.kind != "dark"]
    contents, broken = _read_all(data, workers)
    faults += dict.fromkeys([*unreadable, *broken])
    frames = [name for name, content in contents.items() if content.frames > 1]
    deep = [data.file_name(n) for n in range(len(data)) if data.is_deep(n)]
    dark = [name for name in deep if name in contents and contents[name].brightest < DARK]
    findings += only_met(
        [
            Finding(
                "frames", "images have several frames or pages: only the first is read", frames
            ),
            dark_images(dark),
            _twins("same image", "images are the same file as another of their split", contents),
        ]
    )
    return {name: content.digest for name, content in contents.items()}


def _read_all(data: CocoDataset, workers: int) -> tuple[dict[str, Content], list[str]]:
    def look(index: int) -> tuple[str, Content | DataError]:
        path = data.image_path(index)
        try:
            image = decode(path, data.large_images)
            digest = hashlib.sha256(path.read_bytes()).digest()
            with Image.open(path) as opened:
                of_pages = opened.format in (
                    "GIF",
                    "TIFF",
                    "PNG",
                    "WEBP",
                )  # a phone's JPEG has a preview
                frames = getattr(opened, "n_frames", 1) if of_pages else 1
            return data.file_name(index), Content(digest, int(image.max()), frames)
        except DataError as error:
            return data.file_name(index), error

    contents, errors = {}, []
    with ThreadPoolExecutor(workers) as pool:
        looks = pool.map(look, range(len(data)))
        for name, found in tqdm(looks, "check", len(data), unit="image", mininterval=1.0):
            if isinstance(found, DataError):
                errors.append(str(found))
            else:
                contents[name] = found
    return contents, errors


def _annotation_findings(data: CocoDataset) -> list[Finding]:
    annotations = list(data.coco.anns.values())
    seen: set[tuple[Any, ...]] = set()
    repeated: list[Id] = []
    for a in annotations:
        key = (a["image_id"], a["category_id"], a["iscrowd"], *a["bbox"])
        if key in seen:
            repeated.append(a["file_id"])
        seen.add(key)
    used = {a["category_id"] for a in annotations}
    annotated = {a["image_id"] for a in annotations}
    names = Counter(data.categories.values())
    listed = data.coco.imgs
    findings = [
        Finding("repeated", "annotations repeat another one", repeated, "annotations"),
        Finding(
            "same name",
            "categories share their name with another",
            [name for name, count in names.items() if count > 1],
            "categories",
        ),
        Finding("corners", *_hint_of_corners(annotations, listed), "annotations", wrong=True),
        Finding("relative", *_hint_of_shares(annotations, listed), "annotations", wrong=True),
    ]
    if data.has_annotations:
        findings += [
            Finding(
                "no objects",
                "categories have no objects",
                [name for id, name in data.categories.items() if id not in used],
                "categories",
            ),
            Finding(
                "empty",
                "images have no annotations: they count as background",
                [image["file_name"] for id, image in listed.items() if id not in annotated],
            ),
        ]
    return only_met(findings)


def _hint_of_corners(
    annotations: list[dict[str, Any]], images: dict[Id, dict[str, Any]]
) -> tuple[str, list[Id]]:
    """All boxes could be [x1, y1, x2, y2], and some cannot be COCO's [x, y, width, height]."""
    outside: list[Id] = []
    for annotation in annotations:
        a, b, c, d = annotation["bbox"]
        image = images[annotation["image_id"]]
        width, height = image.get("width"), image.get("height")
        if width is None or height is None:
            continue
        if not (a < c <= width + 1 and b < d <= height + 1):
            outside = []
            break
        if a + c > width + 1 or b + d > height + 1:
            outside.append(annotation["file_id"])
    return (
        "boxes reach out of their images, and all boxes would fit if they were [x1, y1, x2, y2], while COCO's "
        "are [x, y, width, height]",
        outside,
    )


def _hint_of_shares(
    annotations: list[dict[str, Any]], images: dict[Id, dict[str, Any]]
) -> tuple[str, list[Id]]:
    """All boxes lie in 0..1."""
    inside = all(0 <= value <= 1 for a in annotations for value in a["bbox"])
    return (
        "boxes all lie in 0..1, as if they were shares of the image, while COCO's are in pixels",
        [a["file_id"] for a in annotations] if inside else [],
    )


def _twins(kind: str, text: str, contents: dict[str, Content]) -> Finding:
    seen: set[bytes] = set()
    twins = []
    for name, content in contents.items():
        if content.digest in seen:
            twins.append(name)
        seen.add(content.digest)
    return Finding(kind, text, twins)


def _same_images(digests: dict[str, dict[str, bytes]]) -> Iterable[Finding]:
    for (one, left), (other, right) in itertools.combinations(digests.items(), 2):
        of_left = set(left.values())
        names = [name for name, digest in right.items() if digest in of_left]
        yield Finding("in both", f"images of {other} are in {one} too, as the same files", names)


def _unlisted(read: Collection[CocoDataset]) -> Finding:
    listed = {data.image_path(n) for data in read for n in range(len(data))}
    folders = sorted({data.image_dir for data in read})
    files = (file for folder in folders for file in list_files(folder, IMAGE_SUFFIXES))
    rest = sorted(file.name for file in files if file not in listed)
    return Finding("unlisted", "files in the folders of images are in no split", rest, "files")


def _other_categories(read: dict[str, CocoDataset]) -> Iterable[Finding]:
    """Against the split that models are trained on: "train", or the first."""
    if not read:
        return
    first = "train" if "train" in read else next((s for s in read if s.startswith("train")), None)
    trained = read[first or next(iter(read))]
    for split, data in read.items():
        if data is trained:
            continue
        known, names = set(trained.categories.values()), set(data.categories.values())
        yield Finding(
            "unknown categories",
            f"categories of {split} are not in {trained.annotation_file.name}: a model that is trained on "
            "that cannot be evaluated",
            sorted(names - known),
            "categories",
            wrong=True,
        )
        ids = defaultdict(set)
        for id, name in (*trained.categories.items(), *data.categories.items()):
            ids[name].add(id)
        moved = sorted(name for name in known & names if len(ids[name]) > 1)
        yield Finding(
            "other ids",
            f"categories have other ids in {split} than in {trained.annotation_file.name}: they are matched by name",
            moved,
            "categories",
        )
