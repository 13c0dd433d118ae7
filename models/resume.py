"""Whether a checkpoint's run is the one that shall go on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from .data import CocoDataset, DataError
from .recipes import Recipe


def fingerprint(data: CocoDataset) -> dict[str, Any]:
    """What training sees of the annotations: images, boxes, categories; not the pixels."""
    digest = hashlib.sha256()
    boxes = 0
    for image_id in data.image_ids:
        annotations = [
            (a["bbox"], a["category_id"], a.get("iscrowd", 0))
            for a in data.coco.imgToAnns[image_id]
        ]
        boxes += len(annotations)
        digest.update(f"{(data.coco.imgs[image_id]['file_name'], annotations)!r}\n".encode())
    return {"images": len(data.image_ids), "boxes": boxes, "sha256": digest.hexdigest()}


def check_same_run(
    path: Path,
    checkpoint: dict[str, Any],
    recipe: Recipe,
    now: dict[str, Any],  # what a checkpoint of the run would have besides
    annotation_file: Path,
) -> None:
    """Raises a DataError where the checkpoint is of another run; older ones tell less of theirs."""
    check_same_data(path, checkpoint, now, annotation_file)
    check_same_world(path, checkpoint, now["world_size"])
    changed = differences(checkpoint["recipe"], recipe)
    if changed:
        raise other_recipe(path, changed)


def other_recipe(path: Path, changed: dict[str, tuple[Any, Any]]) -> DataError:
    words = [f"{name} {before}, got {now}" for name, (before, now) in changed.items()]
    return DataError(f"the run of {path} must go on with its own recipe: {'; '.join(words)}")


def check_same_data(
    path: Path, checkpoint: dict[str, Any], now: dict[str, Any], annotation_file: Path
) -> None:
    refused = f"the run of {path} cannot go on with {annotation_file}: it was trained on"
    trained, given = checkpoint["categories"], now["categories"]
    if list(trained.items()) != list(given.items()):
        raise DataError(
            f"{refused} the categories {listing(trained)}, and that has {listing(given)}"
        )
    before = checkpoint.get("data", now["data"])
    if not isinstance(before, dict):
        raise DataError(f"{path} must have a fingerprint of its data, got {type(before).__name__}")
    if before != now["data"]:
        had, has = (
            f"{d.get('images')} images and {d.get('boxes')} boxes" for d in (before, now["data"])
        )
        raise DataError(f"{refused} {had}, and that has {has if has != had else 'as many others'}")


def listing(categories: dict[int, str]) -> str:
    shown = [f"{id} {name}" for id, name in list(categories.items())[:10]]
    return ", ".join(shown + ["..."] * (len(categories) > 10))


def check_same_world(path: Path, checkpoint: dict[str, Any], world_size: int) -> None:
    """Processes draw their own image sizes and pad their own share of a batch."""
    before = checkpoint.get("world_size", world_size)
    if before != world_size:
        raise DataError(
            f"the run of {path} must go on with as many processes as before, {before}, "
            f"got {world_size}"
        )


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, those of the model among them, with both values."""
    if before.model.kind != now.model.kind:  # its fields are others
        return {"kind": (before.model.kind, now.model.kind)}
    changed = {}
    pairs: tuple[tuple[Any, Any], ...] = ((before, now), (before.model, now.model))
    for a, b in pairs:
        for name in (f.name for f in dataclasses.fields(a) if f.name != "model"):
            if getattr(a, name) != getattr(b, name):
                changed[name] = (getattr(a, name), getattr(b, name))
    return changed
