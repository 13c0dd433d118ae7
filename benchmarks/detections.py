"""From the outputs of a RetinaNet's head on images of 800 x 1344 to detections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import retinanet
from torchvision.models.detection._utils import BoxCoder

from benchmarks.harness import OURS, Case, Contestant
from benchmarks.scenes import HEIGHT, STRIDES, WIDTH, retinanet_anchors
from focalops import detect, reference

ANCHORS = 9
SCORE_THRESHOLD, TOPK, IOU_THRESHOLD, MAX_DETECTIONS = 0.05, 1000, 0.5, 100

# Mean and standard deviation of the logits.
SCORES = {
    "trained": (-7.5, 1.2),  # about 80 in a million pass the threshold
    "uniform": (-4.6, 1.0),  # one in twenty
    "everything": (2.0, 1.0),
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    batches = (1,) if device.type == "cpu" else (1, 8, 16)
    for classes in (91,) if quick else (80, 91, 1203):
        for images in batches:
            if device.type == "cpu" and classes > 91:
                continue  # a gigabyte of logits, and torchvision takes minutes
            for name in ("trained",) if quick else SCORES:
                yield case(images, classes, name, device, quick)


def case(images: int, classes: int, scores: str, device: torch.device, quick: bool) -> Case:
    contestants = contestants_of(images, classes, scores, (HEIGHT, WIDTH), device)
    if scores == "everything":
        del contestants["reference"]  # sorts all of them in float64

    def agree(ours: Any, theirs: Any) -> None:
        is_padded = isinstance(theirs, tuple)
        counts = theirs[3].tolist() if is_padded else [len(one["scores"]) for one in theirs]
        assert ours[3].tolist() == counts

    rows = len(retinanet_anchors(device, (HEIGHT, WIDTH))) * images
    return Case(
        "detections",
        f"{images} x 201,600 anchors, K = {classes}, {scores}",
        rows * classes * 4 + images * MAX_DETECTIONS * 32,
        contestants,
        agree,
    )


def contestants_of(
    images: int, classes: int, scores: str, size: tuple[int, int], device: torch.device
) -> dict[str, Contestant]:
    mean, deviation = SCORES[scores]
    height, width = size
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]

    def levels(channels: int, mean: float, deviation: float) -> list[Tensor]:
        shapes = [(images, channels, *size) for size in sizes]
        return [torch.randn(shape, device=device) * deviation + mean for shape in shapes]

    head = levels(ANCHORS * classes, mean, deviation), levels(ANCHORS * 4, 0, 0.2)
    anchors = retinanet_anchors(device, size)
    image_sizes = torch.tensor([[height, width]] * images, dtype=torch.float32, device=device)
    options: dict[str, Any] = {
        "score_threshold": SCORE_THRESHOLD,
        "topk_per_level": TOPK,
        "iou_threshold": IOU_THRESHOLD,
        "max_detections": MAX_DETECTIONS,
        "image_sizes": image_sizes,
    }
    return {
        OURS: lambda: detect(*head, anchors, **options),
        "reference": lambda: reference.detect(*head, anchors, **options),
        "torchvision": torchvision_postprocess(*head, anchors, classes, size),
    }


def torchvision_postprocess(
    cls_logits: list[Tensor],
    box_deltas: list[Tensor],
    anchors: Tensor,
    classes: int,
    size: tuple[int, int],
) -> Callable[[], list[dict[str, Tensor]]]:
    """RetinaNet.postprocess_detections of the rows that its head makes, which it is given for free."""
    logits = [reference.head_rows(level, classes).contiguous() for level in cls_logits]
    deltas = [reference.head_rows(level, 4).contiguous() for level in box_deltas]
    model = retinanet.RetinaNet.__new__(retinanet.RetinaNet)
    torch.nn.Module.__init__(model)
    model.score_thresh = SCORE_THRESHOLD
    model.topk_candidates = TOPK
    model.nms_thresh = IOU_THRESHOLD
    model.detections_per_img = MAX_DETECTIONS
    model.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    images = len(logits[0])
    per_level = list(anchors.split([level.shape[1] for level in deltas]))
    head = {"cls_logits": logits, "bbox_regression": deltas}
    return lambda: model.postprocess_detections(head, [per_level] * images, [size] * images)
