"""Detection on whole images and large tiles, COCO results, pycocotools' measures."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

from focalops import box_iou

from .data import (
    CocoDataset,
    DataError,
    Id,
    as_coco,
    id_order,
    match_categories,
    numbered,
)
from .detector import Detector
from .distributed import gather, rank, world_size
from .outputs import write_whole
from .recipes import Recipe
from .structures import Detections
from .windows import windows

Result = dict[str, Any]  # one box as COCO results have it


BATCH_PIXELS = 2**21  # of the windows that are detected in at once
SEVERAL_TIMES = 2  # an unresized image whose sides are within so many max_size is seen as a whole


@torch.inference_mode()
def detect(model: Detector, recipe: Recipe, image: Tensor) -> Detections:
    """Boxes, scores and labels, best first, of a uint8 (3, H, W) image of any size.

    Beside the image it needs the memory of a few of its windows, or of its resized copy: where a recipe
    neither resizes nor has windows, an image larger than SEVERAL_TIMES its max_size is seen in windows of max_size.

    Raises:
        DataError: the image is so thin that the model's resize leaves nothing of it.
    """
    check_size(recipe, image)
    image = image.to(next(model.parameters()).device)
    if recipe.symmetries:
        found = vote(
            [_detect_in_symmetry(model, recipe, image, turns, flip) for turns, flip in SYMMETRIES],
            model.kept,
        )
    else:
        found = _detect(model, recipe, image)
    return {name: value[: recipe.max_detections].cpu() for name, value in found.items()}


def check_size(recipe: Recipe, image: Tensor) -> None:
    config, (height, width) = recipe.model, image.shape[-2:]
    if config.min_size is None or recipe.window is not None:
        return
    least, most = min(height, width), max(height, width)
    smallest = config.min_size if isinstance(config.min_size, int) else config.min_size[-1]
    if least * min(smallest / least, config.max_size / most) < 1:
        raise DataError(
            f"an image of {width} x {height} pixels is too thin: nothing is left of it when its "
            f"longer side is resized to {config.max_size}"
        )


def window_of(recipe: Recipe, height: int, width: int) -> tuple[int, int] | None:
    """The side and the overlap of the windows to detect in; None: the image as a whole."""
    if recipe.window is not None:
        return recipe.window, recipe.window_overlap
    side = recipe.model.max_size
    if recipe.model.min_size is not None or max(height, width) <= SEVERAL_TIMES * side:
        return None
    return side, min(recipe.window_overlap, side // 4)


def _detect(model: Detector, recipe: Recipe, image: Tensor) -> Detections:
    height, width = image.shape[-2:]
    window = window_of(recipe, height, width)
    if window is None:
        found: Detections = model([image])[0]
        return found
    cover = list(windows(height, width, *window))
    batch_size = max(1, BATCH_PIXELS // window[0] ** 2)
    parts: list[Detections] = []
    for first in range(0, len(cover), batch_size):
        batch = cover[first : first + batch_size]
        outputs = model([image[:, rows, columns] for rows, columns, _ in batch])
        for (rows, columns, core), output in zip(batch, outputs, strict=True):
            boxes = output["boxes"] + torch.tensor(
                [columns.start, rows.start] * 2, device=image.device
            )
            core = core.to(image.device)
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = ((center >= core[:2]) & (center < core[2:])).all(dim=1)
            parts.append(
                {"boxes": boxes[inside]}
                | {name: output[name][inside] for name in ("scores", "labels")}
            )
    found = _joined(parts)
    keep = model.kept(found)
    return {name: value[keep] for name, value in found.items()}


def _joined(parts: list[Detections]) -> Detections:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- Test-time augmentation ---------------------------------------------------------------------

SYMMETRIES = [(turns, flip) for flip in (False, True) for turns in range(4)]
VOTE_IOU = 0.6


def _detect_in_symmetry(
    model: Detector, recipe: Recipe, image: Tensor, turns: int, flip: bool
) -> Detections:
    """The detections in the image turned to the left so many times and then mirrored, as boxes of the image."""
    turned = torch.rot90(image, turns, (1, 2))
    found = _detect(model, recipe, turned.flip(2) if flip else turned)
    boxes, (height, width) = found["boxes"], turned.shape[-2:]
    if flip:
        boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
    for _ in range(turns):  # a turn to the right
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        boxes = torch.stack((height - y2, x1, height - y1, x2), dim=1)
        height, width = width, height
    return found | {"boxes": boxes}


def vote(parts: list[Detections], kept: Callable[[Detections], Tensor]) -> Detections:
    """One set of detections from several of the same image, of which `kept` gives the indices of the best.

    What is kept becomes the mean, by score, of all boxes of its class that overlap it by VOTE_IOU (box
    voting: Gidaris and Komodakis, 2015), and its score their sum over the number of parts, at most 1: what
    few of them see ranks low.
    """
    found = _joined(parts)
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    keep = kept(found)
    votes = (box_iou(boxes[keep], boxes) > VOTE_IOU) & (labels[keep, None] == labels)
    votes[torch.arange(len(keep)), keep] = True  # boxes without an area overlap not even themselves
    weights = torch.where(votes, scores, 0)
    total = weights.sum(dim=1)
    order = total.argsort(descending=True, stable=True)
    return {
        "boxes": torch.where(total[:, None] > 0, weights @ boxes / total[:, None], boxes[keep])[
            order
        ],
        "scores": (total / len(parts)).clamp(max=1)[order],
        "labels": labels[keep][order],
    }


def category_ids(categories: Mapping[Any, str], data: CocoDataset) -> list[Id | None]:
    """What detect_all takes: the split's id of each label of a model that was trained on `categories`,
    found by name. Says where that makes a difference."""
    ids, notes = match_categories(categories, data)
    for note in notes if rank() == 0 else ():
        print(note, file=sys.stderr)
    return ids


def check_truth(data: CocoDataset) -> None:
    """Raises a DataError where there is nothing to compare detections with."""
    if not data.coco.anns:
        raise DataError(f"{data.annotation_file} has no boxes to evaluate against")


def detect_all(
    model: Detector, recipe: Recipe, ids: Sequence[Id | None], data: CocoDataset
) -> list[Result] | None:
    """COCO results for a whole split; under torchrun on rank 0 only, None on the others.

    They have the ids of the labels; what has None is left out.
    """
    results: list[Result] = []
    share = range(rank(), len(data), world_size())
    for index in tqdm(share, desc="detect", unit="image", mininterval=1.0, disable=rank() != 0):
        image, _ = data[index]
        try:
            found = detect(model, recipe, image)
        except DataError as error:  # nothing can be found in it
            print(f"{data.image_path(index)}: {error}", file=sys.stderr)
            continue
        of_image = to_results(data.image_ids[index], found, ids)
        results += [result for result in of_image if result["category_id"] is not None]
    gathered = gather(results)
    if gathered is not None:
        gathered.sort(
            key=lambda result: id_order(result["image_id"])
        )  # stable: best first in each image
    return gathered


def to_results(
    image_id: Id, detections: Detections, category_ids: Sequence[Id | None]
) -> list[Result]:
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, label in zip(
            detections["boxes"].tolist(),
            detections["scores"].tolist(),
            detections["labels"].tolist(),
            strict=True,
        )
    ]


def save_results(path: Path, results: list[Result]) -> None:
    write_whole(path, json.dumps(results))


class Evaluation(COCOeval):
    """COCOeval whose table also holds for a limit other than 100 detections an image.

    pycocotools' own prints -1 as the first figure there.
    """

    category_ids: list[Id]  # those of the annotation file, in the order of params.catIds

    def summarize(self) -> None:
        limits = self.params.maxDets
        lines: list[tuple[str, float | None, str, int]] = [
            ("precision", None, "all", limits[2]),
            ("precision", 0.5, "all", limits[2]),
            ("precision", 0.75, "all", limits[2]),
            *(("precision", None, size, limits[2]) for size in ("small", "medium", "large")),
            *(("recall", None, "all", limit) for limit in limits),
            *(("recall", None, size, limits[2]) for size in ("small", "medium", "large")),
        ]
        self.stats = np.array([self._line(*line) for line in lines])

    def figures(self) -> dict[str, float]:
        """After summarize()."""
        names = ("AP", "AP50", "AP75")
        return {name: float(value) for name, value in zip(names, self.stats, strict=False)}

    def by_category(self, names: dict[Id, str]) -> list[dict[str, Any]]:
        """For each category with objects its AP, AP50 and, at an IoU of 0.5, the precision at the
        recalls 0, 0.01, ..., 1."""
        precision = self.eval["precision"][..., 0, -1]  # of all sizes: (IoU, recall, category)
        rows = []
        for index, category_id in enumerate(self.category_ids):
            values = precision[..., index]
            if (values > -1).any():
                rows.append(
                    {
                        "id": category_id,
                        "name": names[category_id],
                        "AP": float(values.mean()),
                        "AP50": float(values[0].mean()),
                        "precision": values[0].tolist(),
                    }
                )
        return rows

    def _line(self, measure: str, iou: float | None, size: str, limit: int) -> float:
        p = self.params
        values = self.eval[measure][..., p.areaRngLbl.index(size), p.maxDets.index(limit)]
        if iou is not None:
            values = values[np.isclose(p.iouThrs, iou)]
        values = values[values > -1]
        mean = float(values.mean()) if values.size else -1.0
        ious = f"{p.iouThrs[0]:.2f}:{p.iouThrs[-1]:.2f}" if iou is None else f"{iou:.2f}"
        title = "Average Precision  (AP)" if measure == "precision" else "Average Recall     (AR)"
        print(f" {title} @[ IoU={ious:<9} | area={size:>6s} | maxDets={limit:>3d} ] = {mean:0.3f}")
        return mean


def evaluate(coco: COCO, results: list[Result], max_detections: int) -> dict[str, float]:
    """Prints pycocotools' table and returns its main figures."""
    evaluation = compare(coco, results, max_detections)
    evaluation.summarize()
    return evaluation.figures()


def compare(coco: COCO, results: list[Result], max_detections: int) -> Evaluation:
    """Results against the ground truth, without the table."""
    # pycocotools writes into what it is given, takes no empty list of results, takes the id 0 of an
    # annotation for none, and cannot sort ids of which some are numbers and some text.
    images, categories = numbered(coco.imgs), numbered(coco.cats)

    def renumbered(boxes: Iterable[Result], is_result: bool) -> COCO:
        annotations = [
            {
                "id": number,
                "image_id": images[box["image_id"]],
                "category_id": categories[box["category_id"]],
                "bbox": box["bbox"],
                "area": box["bbox"][2] * box["bbox"][3] if is_result else box["area"],
                "iscrowd": 0 if is_result else box["iscrowd"],
                **({"score": box["score"]} if is_result else {}),
            }
            for number, box in enumerate(boxes, start=1)
        ]
        return as_coco(
            {
                "images": [{"id": number} for number in images.values()],
                "categories": [{"id": number} for number in categories.values()],
                "annotations": annotations,
            }
        )

    # A category that the split does not have has no figures.
    counted = (result for result in results if result["category_id"] in categories)
    truth, found = renumbered(coco.anns.values(), False), renumbered(counted, True)
    evaluation = Evaluation(truth, found, "bbox")
    evaluation.category_ids = list(categories)
    evaluation.params.maxDets = [1, 10, max_detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def save_figures(path: Path, figures: dict[str, float], categories: list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps({**figures, "categories": categories}, indent=1) + "\n")
