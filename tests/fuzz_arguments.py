"""Random arguments of every public function, right ones and wrong ones, for fuzz.py."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzz_modules import anchor_generator, detector
from torch import Tensor

import focalops

Arguments = dict[str, Any]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IOU_KINDS = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
pick = random.choice
between = random.randint


def maybe(make: Callable[[], Any], otherwise: Any = None, share: float = 0.5) -> Any:
    return make() if random.random() < share else otherwise


# ---- losses of logits ---------------------------------------------------------------------------


def logits(*shape: int) -> Tensor:
    """Of one of the dtypes, some of them with infinities."""
    x = (torch.randn(shape) * pick((0.1, 3, 30))).to(pick(DTYPES))
    if random.random() < 0.15:
        x[torch.rand(shape) < 0.1] = pick((math.inf, -math.inf))
    return x


def class_indices(classes: int, *shape: int, ignore_index: int) -> Tensor:
    indices = torch.randint(0, classes + 1, shape)
    indices[torch.rand(shape) < 0.2] = ignore_index
    return indices.to(pick((torch.int32, torch.int64)))


def normalizer(*shape: int) -> Any:
    value = pick((0.0, 0.5, 3.0, 1000.0))
    dtype = pick((torch.float32, torch.float64, torch.int64))
    return pick((None, value, torch.full(pick(((), shape)), value, dtype=dtype)))


def weights(rows: Sequence[int], classes: int, by_part: bool = True) -> Arguments:
    """Often none: they lead to a kernel of their own."""
    if random.random() < 0.5:
        return {}
    dtype = pick((torch.float32, torch.float64))
    row = torch.rand(rows, dtype=dtype) * 3
    row[torch.rand(rows) < 0.2] = 0
    of_class = (
        torch.rand(pick(((classes,), (3, classes)) if by_part else ((classes,),)), dtype=dtype) * 3
    )
    return {"weight": maybe(lambda: row), "class_weight": maybe(lambda: of_class)}


def reduced_anchors(images: int) -> Arguments:
    reduction = pick(("none", "sum", "sum"))
    divided = {"normalizer": normalizer(images), "min_normalizer": pick((1, 0.1))}
    return {"reduction": reduction, **(divided if reduction == "sum" else {})}


def reduced() -> Arguments:
    reduction = pick(("none", "mean", "sum", "sum"))
    if reduction != "sum":
        return {"reduction": reduction}
    divided = {"normalizer": normalizer(), "min_normalizer": pick((1, 0.1, 10))}
    return {"reduction": reduction, **divided}


def rows_of_logits() -> tuple[Tensor, Tensor, int]:
    """Logits, class indices and the index that is ignored."""
    shape = (*(between(0, 7) for _ in range(between(0, 2))), between(0, 40))
    classes = pick((1, 2, 3, 13, 80, 91))
    ignore_index = pick((-100, -100, -1, 0, 255))
    indices = class_indices(classes, *shape, ignore_index=ignore_index)
    return logits(*shape, classes), indices, ignore_index


def sigmoid_focal_loss() -> Arguments:
    if random.random() < 0.4:
        x = logits(*(between(0, 12) for _ in range(between(0, 4))))
        t = torch.rand(x.shape)
        t = torch.where(torch.rand(x.shape) < 0.5, t, t.round())
        targets = pick((t.to(x.dtype), t.float(), t.double(), t.round().bool(), t.round().long()))
        return {"inputs": x, "targets": targets, **focusing(), **reduced()}
    x, indices, ignore_index = rows_of_logits()
    return {
        "inputs": x,
        "targets": indices,
        "ignore_index": ignore_index,
        **focusing(),
        **reduced(),
        **weights(indices.shape, x.shape[-1]),
        **maybe(lambda: {"label_smoothing": pick((0, 0.1, 1))}, {}),
    }


def focusing() -> Arguments:
    return {"alpha": pick((-1, 0, 0.25, 1)), "gamma": pick((0, 0.5, 1, 1.5, 2, 3, 5))}


def sigmoid_focal_loss_star() -> Arguments:
    arguments = sigmoid_focal_loss()
    for name in ("weight", "class_weight", "label_smoothing"):
        arguments.pop(name, None)
    return {**arguments, "gamma": pick((0.5, 1, 2, 4)), "beta": pick((0, 1, -0.5))}


def softmax_focal_loss() -> Arguments:
    x, indices, ignore_index = rows_of_logits()
    indices = torch.where(indices == x.shape[-1], 0, indices)
    if not x.isfinite().all():
        x = x.nan_to_num(0, 8, -8)  # the softmax of two infinities is not a number
    return {
        "inputs": x,
        "targets": indices,
        "ignore_index": ignore_index,
        **focusing(),
        **reduced(),
        **weights(indices.shape, x.shape[-1], by_part=False),
    }


def row_loss(may_be_dense: bool = False, **options: Sequence[Any]) -> Callable[[], Arguments]:
    def make() -> Arguments:
        x, indices, ignore_index = rows_of_logits()
        is_dense = may_be_dense and random.random() < 0.3
        scores = torch.rand(x.shape if is_dense else indices.shape)
        scores = torch.where(torch.rand(scores.shape) < 0.7, scores, scores.round())
        scores = scores.to(pick((torch.float32, torch.float64)))
        chosen = {name: pick(values) for name, values in options.items()} | reduced()
        if is_dense:
            weight = torch.rand(x.shape) * 3
            return {"inputs": x, "targets": scores, "weight": maybe(lambda: weight), **chosen}
        return {
            "inputs": x,
            "targets": (indices, scores),
            "ignore_index": ignore_index,
            **chosen,
            **weights(indices.shape, x.shape[-1]),
        }

    return make


def level_sizes() -> list[tuple[int, int]]:
    return [(between(0, 5), between(1, 6)) for _ in range(between(1, 4))]


def dense_focal_loss() -> Arguments:
    images, anchors, classes, sizes = (
        between(0, 3),
        between(1, 3),
        pick((1, 2, 5, 16)),
        level_sizes(),
    )
    first = logits(images, anchors * classes, *sizes[0])
    levels = [first, *(logits(images, anchors * classes, *s).to(first.dtype) for s in sizes[1:])]
    rows = (images, anchors * sum(h * w for h, w in sizes))
    ignore_index = pick((-100, -1))
    return {
        "cls_logits": levels,
        "labels": class_indices(classes, *rows, ignore_index=ignore_index),
        "ignore_index": ignore_index,
        **reduced_anchors(images),
        **focusing(),
        **weights(rows, classes),
        **maybe(lambda: {"label_smoothing": pick((0, 0.1, 1))}, {}),
    }


def dense_equalized_focal_loss() -> Arguments:
    arguments = dense_focal_loss()
    levels, labels = arguments["cls_logits"], arguments["labels"]
    positions = sum(level.shape[2] * level.shape[3] for level in levels)
    classes = levels[0].shape[1] // max(labels.shape[1] // max(positions, 1), 1)
    if arguments.get("class_weight") is not None:  # without positions nothing else tells
        classes = arguments["class_weight"].shape[-1]
    gamma = torch.tensor([pick((0.0, 0.5, 2.0, 3.0, 10.0)) for _ in range(classes)])
    for name in ("reduction", "gamma", "label_smoothing"):
        arguments.pop(name, None)
    return {**arguments, "gamma": gamma.to(pick((torch.float32, torch.float64)))}


DENSE_TARGETS = ("quality_focal_loss", "soft_focal_loss", "varifocal_loss")
QUALITY_LOSSES: dict[str, dict[str, Sequence[Any]]] = {
    "ia_bce_loss": {"alpha": (0.25, 0.5), "gamma": (0, 1.5, 2)},
    "matchability_aware_loss": {"alpha": (1, 0.6), "gamma": (0, 1.5, 2)},
    "quality_focal_loss": {"beta": (0, 1, 1.5, 2)},
    "soft_focal_loss": {"alpha": (-1, 0, 0.25, 1), "gamma": (0, 1, 1.5, 2)},
    "varifocal_loss": {
        "alpha": (0.75, 0.25),
        "gamma": (0, 1.5, 2),
        "iou_weighted": (True, False),
        "detach_weight": (True, False),
    },
}


def dense_quality_loss() -> Arguments:
    arguments = dense_focal_loss()
    loss, scores = pick(tuple(QUALITY_LOSSES)), torch.rand(arguments["labels"].shape)
    for name in ("alpha", "gamma", "label_smoothing"):
        arguments.pop(name, None)
    return {
        **arguments,
        "scores": torch.where(torch.rand(scores.shape) < 0.7, scores, scores.round()),
        "loss": loss,
        **{name: pick(values) for name, values in QUALITY_LOSSES[loss].items()},
    }


# ---- boxes --------------------------------------------------------------------------------------


def boxes(*shape: int, dtype: torch.dtype | None = None, proper: bool = False) -> Tensor:
    """Spread or clustered, on whole pixels or between; some empty, repeated or infinite unless `proper`."""
    scale = pick((1.0, 30.0, 1000.0))
    corner, size = torch.randn(*shape, 2) * scale, torch.rand(*shape, 2) * scale * pick((0.2, 2))
    size = size + scale / 50
    if not proper and random.random() < 0.5:
        corner, size = corner.round(), (size - scale / 50).round()
    result = torch.cat((corner, corner + size), dim=-1)
    flat = result.view(-1, 4)
    if len(flat) and not proper and random.random() < 0.5:
        result = flat[torch.randint(0, len(flat), (len(flat),))].view(result.shape)
    return result.to(dtype or pick((torch.float16, torch.float32, torch.float64)))


def one_dtype() -> torch.dtype:
    return pick((torch.float32, torch.float32, torch.float64, torch.bfloat16))


def pairwise() -> Arguments:
    batch, dtype = maybe(lambda: (between(0, 3),), ()), one_dtype()
    a, b = (boxes(*batch, between(0, 20), dtype=dtype) for _ in range(2))
    return {"boxes1": a, "boxes2": maybe(lambda: b, b.double(), 0.9)}


def box_iou() -> Arguments:
    fmt, mode = pick(("xyxy", "xyxy", "xywh", "cxcywh")), pick(("iou", "iou", "iof"))
    return {**pairwise(), "fmt": fmt, "mode": mode}


def pairwise_with_eps() -> Arguments:
    return {**pairwise(), "eps": pick((1e-7, 1e-3))}


def pairs() -> Arguments:
    shape, dtype = tuple(between(0, 9) for _ in range(between(0, 2))), one_dtype()
    a = boxes(*shape, dtype=dtype)
    b = maybe(lambda: a + torch.rand(a.shape, dtype=a.dtype), boxes(*shape, dtype=dtype))
    return {"boxes1": a, "boxes2": b, "eps": pick((1e-7, 1e-3)), "reduction": pick(("none", "mean", "sum"))}  # fmt: skip


CODER_WEIGHTS = ((1, 1, 1, 1), (10.0, 10.0, 5.0, 5.0))


def encode_boxes() -> Arguments:
    batch, n = maybe(lambda: (between(0, 3),), ()), between(0, 20)
    return {
        "boxes": boxes(*batch, n, proper=True),
        "anchors": boxes(*maybe(lambda: batch, ()), n, proper=True),
        "weights": pick(CODER_WEIGHTS),
    }


def decode_boxes() -> Arguments:
    batch, n = maybe(lambda: (between(0, 3),), ()), between(0, 20)
    sizes = [(between(1, 900), between(1, 900)) for _ in range(batch[0] if batch else 0)]
    return {
        "deltas": (torch.randn(*batch, n, 4) * pick((0.1, 1, 10))).to(pick(DTYPES)),
        "anchors": boxes(*maybe(lambda: batch, ()), n, proper=True),
        "weights": pick(CODER_WEIGHTS),
        "clip": pick((4.135, 0.5)),
        "image_size": pick((None, (between(1, 900), between(1, 900)), sizes or None)),
        "ctr_clamp": maybe(lambda: pick((0.5, 32))),
    }


def head_of_boxes() -> Arguments:
    images, per_position, sizes = between(0, 3), between(1, 3), level_sizes()
    dtype = pick(DTYPES)
    deltas = [(torch.randn(images, per_position * 4, *s) / 4).to(dtype) for s in sizes]
    rows, most = per_position * sum(h * w for h, w in sizes), between(1, 5)
    matches = torch.randint(0, most, (images, rows))
    kind = torch.rand(images, rows)
    matches[kind < 0.7], matches[kind < 0.1] = -1, -2
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    gt_boxes = boxes(images, most, dtype=compute, proper=True)
    return {
        "deltas": deltas,
        "anchors": boxes(rows, dtype=compute, proper=True),
        "gt_boxes": maybe(lambda: gt_boxes, list(gt_boxes)),
        "matches": matches,
        "weights": pick(CODER_WEIGHTS),
        "clip": pick((4.135, 0.1)),
    }


def distances_of_boxes() -> Arguments:
    """The same head, and boxes that its points are matched to."""
    arguments = decode_distances()
    levels, points = arguments["levels"], arguments["points"]
    images, most = len(levels[0]), between(1, 5)
    matches = torch.randint(0, most, (images, len(points)))
    matches[torch.rand(matches.shape) < 0.7] = -1
    gt_boxes = boxes(images, most, dtype=points.dtype, proper=True)
    return {
        "deltas": levels,
        "anchors": points,
        "gt_boxes": maybe(lambda: gt_boxes, list(gt_boxes)),
        "matches": matches,
        "coding": "distance",
        "strides": arguments["strides"],
        "bins": arguments["bins"],
        "dfl_weight": pick((0, 0.2)) if arguments["bins"] > 1 else 0,
        "loss": pick(("iou", "giou", "diou", "ciou")),
        "eps": pick((1e-7, 1e-3)),
        **reduced_anchors(images),
        "weight": maybe(lambda: torch.rand(matches.shape, dtype=points.dtype) * 3),
        "return_iou": pick((True, False)),
    }


def dense_box_loss() -> Arguments:
    if random.random() < 0.3:
        return distances_of_boxes()
    arguments = head_of_boxes()
    matches, compute = arguments["matches"], arguments["anchors"].dtype
    return {
        **arguments,
        "loss": pick(("l1", "smooth_l1", "iou", "giou", "diou", "ciou")),
        "beta": pick((1.0, 0.1, 0)),
        "eps": pick((1e-7, 1e-3)),
        **reduced_anchors(len(matches)),
        "weight": maybe(lambda: torch.rand(matches.shape, dtype=compute) * 3),
        "return_iou": pick((True, False)),
    }


def decode_distances() -> Arguments:
    images, bins, sizes, dtype = between(0, 3), pick((1, 2, 5, 16)), level_sizes(), pick(DTYPES)
    spread = pick((0.1, 1, 5))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "levels": [(torch.randn(images, 4 * bins, *s) * spread).to(dtype) for s in sizes],
        "points": (torch.rand(sum(h * w for h, w in sizes), 2) * 60).to(compute),
        "strides": [4.0 * 2**i for i in range(len(sizes))],
        "bins": bins,
        "image_sizes": maybe(lambda: [(between(1, 90), between(1, 90)) for _ in range(images)]),
    }


def encode_distances() -> Arguments:
    batch, n = maybe(lambda: (between(0, 3),), ()), between(0, 20)
    return {
        "points": torch.randn(n, 2, dtype=one_dtype()) * 30,
        "boxes": boxes(*batch, n),
        "max_distance": pick((None, 15, 0)),
    }


def distribution_focal_loss() -> Arguments:
    shape, bins = tuple(between(0, 9) for _ in range(between(0, 2))), pick((2, 3, 16, 17))
    inputs = (torch.randn(*shape, bins) * pick((0.1, 3, 30))).to(pick(DTYPES))
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    targets = torch.rand(shape, dtype=dtype) * (bins + 1) - 1
    return {
        "inputs": inputs,
        "targets": maybe(lambda: targets, targets.round()),
        "weight": maybe(lambda: torch.rand(shape, dtype=dtype) * 3),
        **reduced(),
    }


def fuse_features() -> Arguments:
    height, width, images, channels = between(1, 9), between(1, 9), between(0, 3), between(0, 9)
    dtype, mode = pick(DTYPES), pick(("fast", "softmax", "sum", "unbounded"))
    sizes = [(height, width)] + [
        pick(
            (
                (height, width),
                ((height + 1) // 2, (width + 1) // 2),
                (2 * height - between(0, 1), 2 * width - between(0, 1)),
            )
        )
        for _ in range(between(0, 3))
    ]
    # Of distinct numbers in every dtype, so that each window has one largest.
    features = [
        (torch.randperm(images * channels * h * w).view(images, channels, h, w) % 1024 - 512) / 128
        for h, w in sizes
    ]
    weights = torch.rand(len(sizes), dtype=pick((torch.float32, torch.float64))) * 2 - 0.5
    return {
        "features": [x.to(dtype) for x in features],
        "weights": None if mode == "sum" else weights,
        "mode": mode,
        "eps": pick((1e-4, 1e-2)),
        "activation": pick((None, "silu")),
        "padding": pick(("same", "symmetric")),
    }


# ---- choices ------------------------------------------------------------------------------------


def ground_truth(anchors: Tensor, image: int) -> Tensor:
    """Boxes near anchors, and others."""
    n = between(0, 6)
    if not len(anchors):
        return boxes(n, dtype=anchors.dtype)
    near = anchors[torch.randint(0, len(anchors), (n,))]
    near = near + torch.randn(near.shape) * pick((0, 0.5, 5))
    return torch.cat((near.to(anchors.dtype), boxes(between(0, 3), dtype=anchors.dtype)))


def match_anchors() -> Arguments:
    anchors = boxes(between(0, 60), dtype=pick((torch.float32, torch.float64)))
    gt_boxes = [ground_truth(anchors, i) for i in range(between(0, 3))]
    low, high = pick(((0.4, 0.5), (0.3, 0.7), (0.5, 0.5), (0.0, 0.0)))
    arguments: Arguments = {"anchors": anchors, "gt_boxes": gt_boxes}
    arguments |= {"fg_iou_threshold": high, "bg_iou_threshold": low}
    arguments |= {"allow_low_quality_matches": pick((True, False))}
    arguments |= {"rule": pick(("torchvision", "detectron2", "mmdet", "efficientdet"))}
    if arguments["rule"] == "mmdet":
        arguments |= {"min_pos_iou": pick((0, 0.2)), "gt_max_assign_all": pick((True, False))}
    if random.random() < 0.4:
        crowd = [torch.rand(len(g)) < 0.3 for g in gt_boxes]
        arguments |= {"crowd": crowd, "crowd_threshold": pick((0.0, 0.5, 0.9))}
        arguments |= {"ignore_wrt_candidates": pick((True, False))}
    elif random.random() < 0.4:
        dtype = pick((torch.int32, torch.int64))
        arguments["counts"] = torch.tensor([len(g) for g in gt_boxes], dtype=dtype)
        padded = torch.full((len(gt_boxes), 9, 4), math.nan, dtype=anchors.dtype)
        for row, g in zip(padded, gt_boxes, strict=True):
            row[: len(g)] = g
        arguments["gt_boxes"] = padded
    if random.random() < 0.4:
        arguments |= {"image_sizes": [(between(1, 60), between(1, 60)) for _ in gt_boxes]}
    return arguments


def padded_or_listed(gt_boxes: list[Tensor]) -> Arguments:
    """The boxes as the assigners take them, some of them crowds."""
    arguments: Arguments = {"gt_boxes": gt_boxes}
    if random.random() < 0.4:
        arguments |= {"crowd": [torch.rand(len(g)) < 0.3 for g in gt_boxes]}
    elif random.random() < 0.4:
        dtype = pick((torch.int32, torch.int64))
        arguments["counts"] = torch.tensor([len(g) for g in gt_boxes], dtype=dtype)
        most = max(map(len, gt_boxes), default=0) + between(0, 2)
        padded = torch.full((len(gt_boxes), most, 4), math.nan)
        for row, g in zip(padded, gt_boxes, strict=True):
            row[: len(g)] = g
        arguments["gt_boxes"] = padded
    return arguments


def points_of_levels() -> tuple[Tensor, list[int], list[int]]:
    """Points about 60 pixels wide, strides and sizes of levels."""
    levels = between(1, 3)
    sizes = [between(0, 40) for _ in range(levels)]
    points = torch.rand(sum(sizes), 2) * 60
    if random.random() < 0.5:  # on the boxes' edges, too
        points = points.round()
    return points.to(pick((torch.float32, torch.float64))), [4 * 2**i for i in range(levels)], sizes


def assign_atss() -> Arguments:
    points, strides, sizes = points_of_levels()
    half = torch.tensor(strides).repeat_interleave(torch.tensor(sizes))[:, None] * pick((2.5, 4))
    gt_boxes = [boxes(between(0, 9), dtype=torch.float32) for _ in range(between(0, 3))]
    if random.random() < 0.5:
        gt_boxes = [b.round() for b in gt_boxes]
    return {
        "anchors": torch.cat((points - half, points + half), dim=1),
        "level_sizes": sizes,
        "topk": pick((1, 9, 9, 40)),
        "rule": pick(("atss", "mmyolo")),
        "at_least_one": pick((True, False)),
        **padded_or_listed(gt_boxes),
    }


def assign_fcos() -> Arguments:
    points, strides, sizes = points_of_levels()
    gt_boxes = [boxes(between(0, 9), dtype=torch.float32) for _ in range(between(0, 3))]
    if random.random() < 0.5:
        gt_boxes = [b.round() for b in gt_boxes]
    return {
        "points": points,
        "strides": strides,
        "level_sizes": sizes,
        "rule": pick(("torchvision", "mmdet")),
        "center_radius": pick((None, 0.5, 1.5, 4.0)),
        "ranges": maybe(lambda: [(pick((0, 4, 10)), pick((8, 30, math.inf))) for _ in sizes]),
        **padded_or_listed(gt_boxes),
    }


def assign_simota() -> Arguments:
    points, _, _ = points_of_levels()
    points = points.to(torch.float32)
    classes = between(1, 4)
    gt_boxes = [boxes(between(0, 9), dtype=torch.float32) for _ in range(between(0, 3))]
    images, rule = len(gt_boxes), pick(("simota", "yolox", "rtmdet"))
    arguments = padded_or_listed(gt_boxes)
    labels: Any = [torch.randint(0, classes, (len(b),)) for b in gt_boxes]
    if isinstance(arguments["gt_boxes"], Tensor):
        labels = torch.randint(0, classes, arguments["gt_boxes"].shape[:2])
    has_objectness = rule == "yolox" or (rule == "simota" and random.random() < 0.5)
    return {
        "cls_logits": torch.randn(images, len(points), classes).to(pick(DTYPES)),
        "pred_boxes": boxes(images * len(points), dtype=torch.float32).view(images, len(points), 4),
        "points": points,
        "strides": 8 * torch.ones(len(points)),
        "gt_labels": labels,
        "objectness": torch.randn(images, len(points)) if has_objectness else None,
        "rule": rule,
        "center_radius": maybe(lambda: pick((0, 1.5, 10.0))),
        "candidates": maybe(lambda: pick((1, 3, 32))),
        **arguments,
    }


def assign_task_aligned() -> Arguments:
    points, _, _ = points_of_levels()
    points = points.to(torch.float32)
    classes = between(1, 4)
    gt_boxes = [boxes(between(0, 9), dtype=torch.float32) for _ in range(between(0, 3))]
    if random.random() < 0.5:
        gt_boxes = [b.round() for b in gt_boxes]
    images, rule = len(gt_boxes), pick(("ultralytics", "mmyolo", "tood"))
    arguments = padded_or_listed(gt_boxes)
    labels: Any = [torch.randint(0, classes, (len(b),)) for b in gt_boxes]
    if isinstance(arguments["gt_boxes"], Tensor):
        labels = torch.randint(0, classes, arguments["gt_boxes"].shape[:2])
    of_ultralytics = {"min_side": pick((0, 4.0, 16.0)), "final_topk": maybe(lambda: between(1, 4))}
    return {
        "pred_scores": torch.rand(images, len(points), classes).to(pick(DTYPES)),
        "pred_boxes": boxes(images * len(points), dtype=torch.float32).view(images, len(points), 4),
        "points": points,
        "gt_labels": labels,
        "topk": pick((1, 3, 10, 32)),
        "alpha": pick((0, 0.5, 1.0)),
        "beta": pick((1.0, 2, 6.0)),
        "rule": rule,
        "overlap": maybe(lambda: pick(("iou", "ciou"))),
        "eps": maybe(lambda: pick((0.0, 1e-3))),
        **(of_ultralytics if rule == "ultralytics" else {}),
        **arguments,
    }


def class_index_targets() -> Arguments:
    images, most = between(0, 3), between(0, 4)
    labels = torch.randint(0, 5, (images, most))
    matches = torch.randint(-2, most, (images, between(0, 30)))
    of_image = maybe(lambda: labels, list(labels))
    return {
        "matches": matches,
        "gt_labels": of_image,
        "num_classes": 5,
        "ignore_index": pick((-100, -1)),
    }


def count_degenerate_boxes() -> Arguments:
    gt_boxes = [boxes(between(0, 6), dtype=torch.float32) for _ in range(between(0, 3))]
    sizes = [(between(1, 60), between(1, 60)) for _ in gt_boxes]
    arguments: Arguments = {"gt_boxes": gt_boxes, "image_sizes": maybe(lambda: sizes)}
    if random.random() < 0.3:
        counts = torch.randint(0, 6, (len(gt_boxes),))
        arguments |= {"gt_boxes": boxes(len(gt_boxes), 5, dtype=torch.float32), "counts": counts}
    return arguments


def scored(*shape: int) -> tuple[Tensor, Tensor]:
    """Boxes that overlap, and scores; a few of either infinite or not a number."""
    b, s = boxes(*shape, dtype=pick(DTYPES)), torch.rand(shape)
    if random.random() < 0.3:
        s = (s * 8).round() / 8
    if random.random() < 0.2:
        s[torch.rand(shape) < 0.1] = pick((math.nan, math.inf, -math.inf))
        b[torch.rand(shape) < 0.1] = pick((math.nan, math.inf))
    return b, s.to(maybe(lambda: b.dtype, torch.float32))


def nms() -> Arguments:
    b, s = scored(between(0, 120))
    return {"boxes": b, "scores": s, "iou_threshold": pick((0.0, 0.3, 0.5, 0.7, 1.0)), "overlap": pick(("iou", "iou", "diou"))}  # fmt: skip


def batched_nms() -> Arguments:
    arguments = nms()
    dtype = pick((torch.int64, torch.int32, torch.uint8))
    return {**arguments, "idxs": torch.randint(0, 3, arguments["scores"].shape, dtype=dtype)}


def padded() -> tuple[Arguments, Tensor]:
    shape = between(0, 3), between(0, 60)
    b, s = scored(*shape)
    arguments = {"boxes": b, "scores": s, "max_detections": pick((0, 1, 10, 100))}
    return arguments, torch.randint(0, 3, shape, dtype=pick((torch.int64, torch.int32)))


def multiclass_nms() -> Arguments:
    arguments, labels = padded()
    images, n = labels.shape
    counts = torch.randint(0, n + 1, (images,))
    threshold, overlap = pick((0.0, 0.5, 0.7)), pick(("iou", "diou"))
    return {**arguments, "labels": maybe(lambda: labels), "iou_threshold": threshold, "overlap": overlap, "counts": maybe(lambda: counts)}  # fmt: skip


def decaying_nms() -> Arguments:
    arguments, labels = padded()
    chosen = {"method": pick(("linear", "gaussian")), "sigma": pick((0.5, 2.0))}
    chosen |= {"score_threshold": pick((-1.0, 0.0, 0.001, 0.5))}
    return {**arguments, "labels": maybe(lambda: labels), **chosen}


def soft_nms() -> Arguments:
    return {**decaying_nms(), "iou_threshold": pick((0.0, 0.3, 0.7))}


def detect() -> Arguments:
    images, per_position, classes, sizes = (
        between(0, 3),
        between(1, 3),
        between(1, 4),
        level_sizes(),
    )
    dtype = pick(DTYPES)
    # Of many decayed scores some lie an ulp of an exponential from each other: a few have room.
    method = pick(("hard", "hard", "linear", "gaussian"))
    is_hard = method == "hard"
    total = per_position * sum(h * w for h, w in sizes)
    # A grid so coarse that an ulp of a score does not change their order, and with ties.
    cls_logits = [
        torch.randint(-900, 600, (images, per_position * classes, *s)) / 100 for s in sizes
    ]
    if random.random() < 0.2:
        for level in cls_logits:
            level[torch.rand(level.shape) < 0.05] = pick((math.inf, -math.inf, math.nan))
    heads = {
        "cls_logits": [level.to(dtype) for level in cls_logits],
        "box_deltas": [(torch.randn(images, per_position * 4, *s) * 0.3).to(dtype) for s in sizes],
        "anchors": boxes(total, dtype=torch.float32, proper=True),
    }
    if per_position == 1 and random.random() < 0.5:
        bins = pick((1, 3))
        distances = [torch.randint(-200, 200, (images, 4 * bins, *s)) / 50 for s in sizes]
        heads |= {
            "box_deltas": [level.to(dtype) for level in distances],
            "anchors": torch.rand(total, 2) * 60,
            "coding": "distance",
            "strides": [4 * 2**i for i in range(len(sizes))],
            "bins": bins,
        }
    if random.random() < 0.5:
        # On the grid their products are equal or 2e-6 apart, relatively.
        factors = torch.tensor([-math.inf, -3.9, 0, 0, math.inf, math.inf, math.nan])
        heads["score_factors"] = [
            factors[torch.randint(0, 7, (images, per_position, *s))].to(dtype) for s in sizes
        ]
        heads["combine"] = pick(("product", "sqrt"))
    return {
        **heads,
        "score_threshold": pick((-1.0, 0.0, 0.05, 0.5, 1.0)),
        "topk_per_level": pick((1, 7, 1000)),
        "iou_threshold": pick((0.0, 0.5, 1.0)) if is_hard else 0.5,
        "max_detections": pick((0, 1, 20, 100) if is_hard else (0, 1, 4)),
        "image_sizes": maybe(lambda: [(between(1, 900), between(1, 900)) for _ in range(images)]),
        "class_agnostic": pick((True, False)),
        "overlap": pick(("iou", "diou")) if is_hard else "iou",
        "method": method,
        "sigma": pick((0.1, 0.5)),
        "topk": maybe(lambda: pick((1, 20, 5000))),
        "weights": pick(CODER_WEIGHTS),
        "clip": pick((4.135, 0.1)),
    }


def match_iou_matrix() -> Arguments:
    iou = torch.rand(between(0, 8), between(0, 40)).clamp(min=0.3).sub(0.3).to(pick(DTYPES))
    options = ("fg_iou_threshold", "bg_iou_threshold", "allow_low_quality_matches", "rule")
    options = (*options, "min_pos_iou", "gt_max_assign_all")
    arguments = {k: v for k, v in match_anchors().items() if k in options}
    return {"iou": iou, **arguments}


def nms_match() -> Arguments:
    return {k: v for k, v in nms().items() if k != "overlap"}


MAKERS: dict[str, Callable[[], Arguments]] = {
    "AnchorGenerator": anchor_generator,
    "accelerate": detector,
    "assign_atss": assign_atss,
    "assign_fcos": assign_fcos,
    "assign_simota": assign_simota,
    "assign_task_aligned": assign_task_aligned,
    "batched_nms": batched_nms,
    "box_iou": box_iou,
    "generalized_box_iou": pairwise,
    **dict.fromkeys(IOU_KINDS[2:], pairwise_with_eps),
    **{f"{name}_loss": pairs for name in IOU_KINDS},
    "class_index_targets": class_index_targets,
    "count_degenerate_boxes": count_degenerate_boxes,
    "decode_boxes": decode_boxes,
    "decode_distances": decode_distances,
    "dense_box_loss": dense_box_loss,
    "dense_equalized_focal_loss": dense_equalized_focal_loss,
    "dense_focal_loss": dense_focal_loss,
    "detect": detect,
    "distribution_focal_loss": distribution_focal_loss,
    "encode_boxes": encode_boxes,
    "encode_distances": encode_distances,
    "fuse_features": fuse_features,
    "dense_quality_loss": dense_quality_loss,
    **{
        name: row_loss(name in DENSE_TARGETS, **options) for name, options in QUALITY_LOSSES.items()
    },
    "match_anchors": match_anchors,
    "match_iou_matrix": match_iou_matrix,
    "matched_iou": head_of_boxes,
    "matrix_nms": decaying_nms,
    "multiclass_nms": multiclass_nms,
    "nms": nms,
    "nms_match": nms_match,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "sigmoid_focal_loss_star": sigmoid_focal_loss_star,
    "soft_nms": soft_nms,
    "softmax_focal_loss": softmax_focal_loss,
}
assert MAKERS.keys() == set(focalops.__all__) - {"__version__"}


# ---- wrong arguments ----------------------------------------------------------------------------

OF_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.long() if t.is_floating_point() else t.float(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t[..., :-1] if t.dim() else t.unsqueeze(0),
    lambda t: t[1:] if t.dim() else t.expand(3),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.to("meta"),
    lambda t: t.tolist(),
    lambda t: None,
]
OF_NUMBERS: list[Callable[[Any], Any]] = [lambda n, v=v: v for v in (-1, -0.5, 1.5, math.nan, math.inf, "1", [1])]  # fmt: skip
OF_LISTS: list[Callable[[Any], Any]] = [
    lambda x: [],
    lambda x: list(x)[:-1],
    lambda x: [*x, *x],
    lambda x: None,
    lambda x: [*list(x)[:-1], wrong(list(x)[-1])] if len(x) else [3],
]
OF_WORDS: list[Callable[[Any], Any]] = [lambda w: "other", lambda w: None, lambda w: 3]


def wrong(value: Any) -> Any:
    """Of the same kind, but most likely not what it has to be."""
    if isinstance(value, Tensor):
        return pick(OF_TENSORS)(value)
    if isinstance(value, str):
        return pick(OF_WORDS)(value)
    if isinstance(value, (list, tuple)):
        return pick(OF_LISTS)(value)
    return pick(OF_NUMBERS)(value)
