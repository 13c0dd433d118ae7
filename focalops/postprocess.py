"""From the outputs of a dense head to detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    as_sizes,
    check_num_levels,
    choice,
    flag,
    floats,
    number,
    require_tensors,
    whole,
)
from focalops._ops import (
    call,
    check,
    check_floating,
    check_same_device,
    ops,
    register_vmap_as_loop,
    require_tensor,
    runs_reference,
)
from focalops.nms import by_distance


def detect(
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Tensor,
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    image_sizes: Tensor | Sequence[Sequence[float]] | None = None,
    class_agnostic: bool = False,
    overlap: str = "iou",
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = math.log(1000 / 16),
    method: str = "hard",
    sigma: float = 0.5,
    topk: int | None = None,
    coding: str = "deltas",
    strides: Sequence[float] | None = None,
    bins: int = 1,
    score_factors: Sequence[Tensor] | None = None,
    combine: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The detections of a batch from what a dense head put out, padded to one size.

    Scores above a threshold, the best of them in each level, their boxes, NMS inside each class: the post-processing of
    torchvision's RetinaNet, with ``topk`` and ``method`` that of EfficientDet, or with ``score_factors`` that of FCOS and YOLOX,
    for all images and levels at once. The logits are read once where the head left them, and nothing waits for the device: the form for compiled graphs, CUDA graphs and
    deployment.

    Args:
        cls_logits: 1 to 8 levels ``(B, A * K, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``a * K + k`` is class ``k`` of anchor ``a``. What lies otherwise is copied. float64 is rounded to float32.
        box_deltas: as many levels ``(B, A * 4, H, W)``, of the dtype of the logits: channel ``a * 4 + c``.
        anchors: ``(N, 4)``, the anchors of an image as xyxy, in the order level, row, column, anchor.
        score_threshold: a class of an anchor is a candidate where ``sigmoid(logit) > score_threshold``, in float32.
        topk_per_level: how many candidates of a level are kept at most, by score. Which ones is exact, whatever passes the
            threshold.
        iou_threshold: a box is suppressed where ``iou > iou_threshold`` with a better one of its class; with ``"linear"`` its
            score decays there.
        max_detections: D, how many boxes of an image are kept at most. NMS stops there.
        image_sizes: ``(B, 2)``, a tensor or numbers, the height and width of each image, to which its boxes are clipped; None: no
            clipping. Numbers have to be copied to the device.
        class_agnostic: boxes of different classes suppress each other too.
        overlap: ``"iou"``, or ``"diou"``, as in :func:`focalops.nms`.
        weights: the four factors of :func:`focalops.encode_boxes`.
        clip: as in :func:`focalops.decode_boxes`.
        method: ``"hard"``: a box that is suppressed is gone; ``"linear"`` or ``"gaussian"``: its score decays, as in
            :func:`focalops.soft_nms`, by IoU alone, and it is kept while that is above ``score_threshold``.
        sigma: of the gaussian, > 0.
        topk: how many candidates of an image are kept at most, by score, of those that ``topk_per_level`` left; None: all.
        coding: ``"deltas"``, or ``"distance"``: of a head that :func:`decode_distances` decodes. ``box_deltas`` are then levels
            ``(B, 4 * bins, H, W)``, ``anchors`` are points ``(N, 2)``, one a position, and ``weights`` and ``clip`` are not
            looked at. Only what is left for NMS is decoded: of a head with bins a hundredth.
        strides: of distances, a number for each level.
        bins: of distances, as in :func:`decode_distances`.
        score_factors: of a head that also scores its anchors, as many levels ``(B, A, H, W)``, of the dtype of the logits: the
            logits of YOLOX's objectness or FCOS's centerness, each level in its own layout. They are a part of every score, that
            of the threshold, of ``topk_per_level`` and ``topk`` and of NMS. (mmdet's FCOS compares the class alone with its threshold
            and multiplies after its top-k.)
        combine: how a score is made of both: ``"product"``, ``sigmoid(logit) * sigmoid(factor)``, as in YOLOX; ``"sqrt"``, its
            root, as in torchvision's FCOS.

    Returns:
        ``boxes (B, D, 4)`` and ``scores (B, D)``, float32, ``labels (B, D)``, int64, each image's by descending score, then
        padding: 0, 0 and -1; and ``counts (B,)``, int64, the number of detections of each image. Of equal scores the lower
        level, row, column, anchor, class comes first, also where a cut lies between them: two runs give the same bits. A NaN
        logit, factor or box is never a detection. Unless ``"hard"`` the scores are those that have become, and of equal ones the box
        comes first that did so before they decayed. Nothing is differentiated.

    Time O(logits), and O(B D^2) for NMS, O(B D C) for soft NMS of C candidates an image; where more candidates pass than a few
    times ``topk_per_level``, the logits are read a few times more. Memory O(B * levels * topk_per_level + B D). An image has fewer
    than 2^31 logits.

    >>> boxes, scores, labels, counts = detect(cls_logits, box_deltas, anchors, image_sizes=sizes)
    >>> found = detect(cls_logits, distances, points, coding="distance", strides=[8, 16, 32], bins=16)  # YOLOv8
    >>> found = detect(*head, coding="distance", strides=strides, score_factors=centerness, combine="sqrt")  # FCOS
    """
    require_tensors("cls_logits", cls_logits)
    require_tensors("box_deltas", box_deltas)
    require_tensor("anchors", anchors)
    cls_logits = [level.detach() for level in cls_logits]
    box_deltas = [level.detach() for level in box_deltas]
    if score_factors is not None:
        require_tensors("score_factors", score_factors)
        check_num_levels("detect", "score_factors", score_factors)
    factors = [] if score_factors is None else [level.detach() for level in score_factors]
    takes_root = choice("combine", combine, ("product", "sqrt")) == "sqrt"
    weights, clip = floats("weights", weights, "4 numbers"), number("clip", clip)
    coder = (weights, clip, *_distances(coding, strides, bins))
    score_threshold = number("score_threshold", score_threshold)
    iou_threshold, sigma = number("iou_threshold", iou_threshold), number("sigma", sigma)
    topk_per_level = whole("topk_per_level", topk_per_level)
    topk = None if topk is None else whole("topk", topk)
    max_detections = whole("max_detections", max_detections)
    class_agnostic, is_diou = flag("class_agnostic", class_agnostic), by_distance(overlap)
    if choice("method", method, ("hard", "linear", "gaussian")) != "hard" and is_diou:
        raise ValueError(f"overlap must be 'iou' unless method is 'hard', got {overlap!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma:g}")
    if isinstance(image_sizes, Tensor):
        require_tensor("image_sizes", image_sizes)
        image_sizes = image_sizes.to(torch.float32)
    elif image_sizes is not None:
        image_sizes = as_sizes("image_sizes", image_sizes, anchors.device)
    check_num_levels("detect", "cls_logits", cls_logits)
    for i, level in enumerate(
        factors
    ):  # the dispatcher does not look into lists that may be missing
        check_same_device("detect", f"score_factors[{i}]", level, "cls_logits[0]", cls_logits[0])
    tensors = (cls_logits, box_deltas, anchors.detach().to(torch.float32), image_sizes)
    limits = (topk_per_level, topk)
    if runs_reference(cls_logits[0]):
        _check(*tensors, factors, weights, *coder[2:], *limits, takes_root, max_detections)
        return reference.detect(
            *tensors[:3],
            score_threshold=score_threshold,
            topk_per_level=topk_per_level,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            image_sizes=image_sizes,
            class_agnostic=class_agnostic,
            overlap=overlap,
            weights=weights,
            clip=clip,
            topk=topk,
            method=method,
            sigma=sigma,
            coding=coding,
            strides=strides,
            bins=bins,
            score_factors=factors or None,
            combine=combine,
        )
    if method != "hard":
        _check_max_detections(max_detections)
        boxes, scores, labels = call(
            *(ops._head_candidates, *tensors, weights, clip, score_threshold),
            *(*limits, *coder[2:], takes_root, factors or None),
        )
        indices, kept_scores, counts = call(
            ops.soft_nms,
            boxes,
            scores,
            None if class_agnostic else labels,
            iou_threshold,
            sigma,
            method == "gaussian",
            score_threshold,
            max_detections,
        )
        return *_kept(boxes, labels, indices, kept_scores), counts
    return call(
        ops.detect,
        *tensors,
        weights,
        clip,
        score_threshold,
        topk_per_level,
        iou_threshold,
        max_detections,
        class_agnostic,
        is_diou,
        topk,
        *coder[2:],
        takes_root,
        factors or None,
    )


def _distances(coding: str, strides: Any, bins: Any) -> tuple[list[float], int]:
    """As the ops have them: without strides the head has deltas."""
    if strides is not None:
        strides = floats("strides", strides, "numbers, one for each level")
    bins = whole("bins", bins)
    if choice("coding", coding, ("deltas", "distance")) == "distance":
        if not strides:
            raise ValueError(
                "strides must be numbers, one for each level, with coding 'distance', got none"
            )
        return strides, bins
    for name, given, left_alone in (("strides", strides, None), ("bins", bins, 1)):
        if given != left_alone:
            raise ValueError(
                f"{name} must be {left_alone} unless coding is 'distance', got {given}"
            )
    return [], 1


def _kept(
    boxes: Tensor,  # [B, C, 4]
    labels: Tensor,  # [B, C]
    indices: Tensor,  # [B, D], -1: padding
    scores: Tensor,  # [B, D]
) -> tuple[Tensor, Tensor, Tensor]:
    # Behind the candidates one that is padding, so that there is something to take where there are none.
    boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    places = indices.where(indices >= 0, boxes.shape[1] - 1)
    return boxes.gather(1, places.unsqueeze(2).expand(-1, -1, 4)), scores, labels.gather(1, places)


# ---- fake kernel --------------------------------------------------------------------------------


@torch.library.register_fake("focalops::detect")
def _(
    cls_logits: list[Tensor],
    box_deltas: list[Tensor],
    anchors: Tensor,
    image_sizes: Tensor | None,
    weights: list[float],
    clip: float,
    score_threshold: float,
    topk_per_level: int,
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool,
    by_distance: bool = False,
    topk: int | None = None,
    strides: Sequence[float] = (),
    bins: int = 1,
    takes_root: bool = False,
    score_factors: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = (cls_logits, box_deltas, anchors, image_sizes, score_factors or [])
    limits = (topk_per_level, topk)
    _check(*head, weights, strides, bins, *limits, takes_root, max_detections)
    like, padded = cls_logits[0], (cls_logits[0].shape[0], max_detections)
    return (
        like.new_empty((*padded, 4), dtype=torch.float32),
        like.new_empty(padded, dtype=torch.float32),
        like.new_empty(padded, dtype=torch.int64),
        like.new_empty(padded[:1], dtype=torch.int64),
    )


@torch.library.register_fake("focalops::_head_candidates")
def _(
    cls_logits: list[Tensor],
    box_deltas: list[Tensor],
    anchors: Tensor,
    image_sizes: Tensor | None,
    weights: list[float],
    clip: float,
    score_threshold: float,
    topk_per_level: int,
    topk: int | None,
    strides: Sequence[float] = (),
    bins: int = 1,
    takes_root: bool = False,
    score_factors: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = (cls_logits, box_deltas, anchors, image_sizes, score_factors or [])
    _check(*head, weights, strides, bins, topk_per_level, topk, takes_root)
    like = cls_logits[0]
    logits = sum(level.shape[1] * level.shape[2] * level.shape[3] for level in cls_logits)
    most = logits if topk is None else torch.sym_min(logits, topk)
    of_level = torch.sym_min(topk_per_level, most)
    padded = (like.shape[0], torch.sym_min(len(cls_logits) * of_level, most))
    return (
        like.new_empty((*padded, 4), dtype=torch.float32),
        like.new_empty(padded, dtype=torch.float32),
        like.new_empty(padded, dtype=torch.int64),
    )


def _check_max_detections(max_detections: int) -> None:
    check(max_detections >= 0, lambda: f"detect: max_detections must be >= 0, got {max_detections}")


def _check(
    cls_logits: list[Tensor],
    box_deltas: list[Tensor],
    anchors: Tensor,
    image_sizes: Tensor | None,
    score_factors: list[Tensor],
    weights: list[float],
    strides: Sequence[float],
    bins: int,
    topk_per_level: int,
    topk: int | None,
    takes_root: bool,
    max_detections: int = 0,
) -> None:
    op = "detect"
    check_num_levels(op, "cls_logits", cls_logits)
    check(
        len(box_deltas) == len(cls_logits),
        lambda: (
            f"{op}: box_deltas must be {len(cls_logits)} levels like cls_logits, got {len(box_deltas)}"
        ),
    )
    first = cls_logits[0]
    check_floating(op, "cls_logits[0]", first)
    for i, level in enumerate(cls_logits):
        _check_level(f"cls_logits[{i}]", level, first, "A * K", level, cls_logits[0])
    for i, level in enumerate(box_deltas):
        columns = "4 * bins" if strides else "A * 4"
        _check_level(f"box_deltas[{i}]", level, first, columns, cls_logits[i], box_deltas[0])
    if score_factors:
        levels = len(cls_logits)
        check(
            len(score_factors) == levels,
            lambda: (
                f"{op}: score_factors must be {levels} levels like cls_logits, got {len(score_factors)}"
            ),
        )
        for i, level in enumerate(score_factors):
            _check_level(f"score_factors[{i}]", level, first, "A", cls_logits[i], score_factors[0])
    else:
        check(
            not takes_root,
            lambda: f"{op}: combine must be 'product' unless there are score_factors, got 'sqrt'",
        )
    images, channels = first.shape[:2]
    per_position = box_deltas[0].shape[1]
    num_anchors = 1 if strides else per_position // 4
    if strides:
        levels = len(cls_logits)
        check(
            len(strides) == levels,
            lambda: (
                f"{op}: strides must be {levels} numbers, one for each level, got {len(strides)}"
            ),
        )
        check(1 <= bins < 2**29, lambda: f"{op}: bins must lie in [1, 2^29), got {bins}")
        check(
            per_position == 4 * bins,
            lambda: (
                f"{op}: box_deltas must have 4 channels for each of {bins} bins, got {per_position}"
            ),
        )
    else:
        check(
            num_anchors > 0 and per_position % 4 == 0 and channels % num_anchors == 0,
            lambda: (
                f"{op}: cls_logits and box_deltas must have A * K and A * 4 channels, "
                f"got {channels} and {per_position}"
            ),
        )
    if score_factors:
        of_a_position = score_factors[0].shape[1]
        check(
            of_a_position == num_anchors,
            lambda: (
                f"{op}: score_factors must have a channel for each of {num_anchors} anchors, "
                f"got {of_a_position}"
            ),
        )
    rows = num_anchors * sum(level.shape[2] * level.shape[3] for level in cls_logits)
    check(
        rows * (channels // num_anchors) < 2**31,
        lambda: (
            f"{op}: cls_logits must have fewer than 2^31 logits an image, "
            f"got {rows * (channels // num_anchors)}"
        ),
    )
    check_same_device(op, "anchors", anchors, "cls_logits[0]", first)
    check(
        anchors.dtype == torch.float32,
        lambda: f"{op}: anchors must be float32, got {anchors.dtype}",
    )
    of_an_anchor = 2 if strides else 4
    check(
        anchors.dim() == 2 and anchors.shape[0] == rows and anchors.shape[1] == of_an_anchor,
        lambda: (
            f"{op}: anchors must have shape ({rows}, {of_an_anchor}), {num_anchors} at each position of the "
            f"levels, got {tuple(anchors.shape)}"
        ),
    )
    if image_sizes is not None:
        check_same_device(op, "image_sizes", image_sizes, "cls_logits[0]", first)
        check(
            image_sizes.dtype == torch.float32,
            lambda: f"{op}: image_sizes must be float32, got {image_sizes.dtype}",
        )
        check(
            image_sizes.dim() == 2 and image_sizes.shape[0] == images and image_sizes.shape[1] == 2,
            lambda: (
                f"{op}: image_sizes must have shape ({images}, 2), height and width of each image, "
                f"got {tuple(image_sizes.shape)}"
            ),
        )
    check(len(weights) == 4, lambda: f"{op}: weights must be 4 numbers, got {len(weights)}")
    check(topk_per_level >= 1, lambda: f"{op}: topk_per_level must be >= 1, got {topk_per_level}")
    check(
        topk is None or topk >= 1,
        lambda: f"{op}: topk must be >= 1, or None for no limit, got {topk}",
    )
    _check_max_detections(max_detections)


def _check_level(
    name: str, level: Tensor, first: Tensor, channels: str, positions: Tensor, same: Tensor
) -> None:
    """Against cls_logits[0], the level whose positions it shares, and the one whose channels it shares."""
    op = "detect"
    check_same_device(op, name, level, "cls_logits[0]", first)
    check(
        level.dtype == first.dtype,
        lambda: f"{op}: {name} must be {first.dtype} like cls_logits[0], got {level.dtype}",
    )
    check(
        level.dim() == 4
        and level.shape[0] == first.shape[0]
        and level.shape[1] == same.shape[1]
        and level.shape[2:] == positions.shape[2:],
        lambda: (
            f"{op}: {name} must have shape (B, {channels}, H, W), B and {channels} the same in all "
            f"levels, H and W those of the level, got {tuple(level.shape)}"
        ),
    )


register_vmap_as_loop("detect")
