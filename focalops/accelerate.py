"""focalops inside a torchvision detector that already exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from focalops._arguments import MAX_LEVELS
from focalops._padding import in_one_dtype
from focalops._swapping import Accelerated, overridden, swap
from focalops._ultralytics import accelerate_ultralytics, ultralytics_models
from focalops.anchors import AnchorGenerator
from focalops.assigners import assign_fcos
from focalops.box_losses import dense_box_loss, generalized_box_iou_loss
from focalops.boxes import decode_boxes
from focalops.dense_focal_loss import dense_focal_loss
from focalops.focal_loss import sigmoid_focal_loss
from focalops.matching import class_index_targets, match_anchors
from focalops.nms import batched_nms
from focalops.postprocess import detect
from focalops.reference import head_rows


def accelerate(model: nn.Module) -> Accelerated:
    """Swaps parts of torchvision's RetinaNets, FCOS and SSDs and of ultralytics' detectors in a model for focalops', in place.

    Of a RetinaNet the loss step (matching, focal loss, box loss), the post-processing (threshold, top-k, boxes, NMS) and, where
    both could be swapped, the copies between the heads' convolutions and them (not while somebody looks: where a head has
    hooks, or is called from outside, its outputs are torchvision's); of FCOS the matching, all images at once, the losses, without a
    one-hot target of the logits' size, and the post-processing; of an SSD the post-processing, all classes at once. A RetinaNet or
    FCOS that detects without ``torch.no_grad()`` does it torchvision's way, at its pace: its detections have gradients.
    Losses, gradients and detections stay what they were, but for the order of float32 sums and of equal scores; in a
    RetinaNet a ground-truth box that overlaps no anchor no longer makes all of them foreground. Parameters, their names and
    the way to call the model stay too, and so do copies, pickling and ``nn.DataParallel``.

    Of a detection model of ultralytics (YOLOv8 to YOLO26) the assigner, which then needs no tensor of all anchors and boxes
    and does not wait for the host; where it takes an anchor of metric 0 by a tie, which trains nothing, ours takes none. The
    model must have its trainer's arguments, so that its loss can be made: call this when training starts. The loss is no part
    of what ultralytics saves: its checkpoints do not need focalops.

    Args:
        model: a ``RetinaNet``, ``FCOS`` or ``SSD`` of ``torchvision.models.detection``, a ``DetectionModel`` of
            ``ultralytics.nn.tasks``, or a module that holds some. A part that
            a subclass or an attribute of the instance overrides is kept, and so is one that depends on a part that focalops does
            not know.
            Thresholds and other numbers may be changed afterwards; parts may not, without another call.

    Returns:
        What was replaced and what was kept and why, in sentences.

    Raises:
        ValueError: the model holds none of them.

    >>> print(accelerate(model))
    >>> yolo.add_callback("on_train_start", lambda trainer: accelerate(trainer.model))  # of ultralytics
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    try:
        from torchvision.models.detection import FCOS, RetinaNet
        from torchvision.models.detection.ssd import SSD
    except ImportError:
        kinds = {}
    else:
        kinds = {
            RetinaNet: _accelerate_retinanet,
            FCOS: _accelerate_fcos,
            SSD: _accelerate_ssd,
        }
    kinds |= dict.fromkeys(ultralytics_models(), accelerate_ultralytics)
    report = Accelerated()
    for name, part in model.named_modules():
        for kind, accelerate_kind in kinds.items():
            if isinstance(part, kind):
                accelerate_kind(part, name or "model", report)
    if not report.replaced and not report.kept:
        raise ValueError(
            "model must be or hold a RetinaNet, FCOS or SSD of torchvision or a detector of ultralytics, "
            f"got {type(model).__qualname__}"
        )
    return report


def _accelerate_retinanet(model: Any, name: str, report: Accelerated) -> None:
    from torchvision.models.detection import retinanet
    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Peer

    head, matcher = model.head, model.proposal_matcher
    classification = getattr(head, "classification_head", None)
    regression = getattr(head, "regression_head", None)
    heads = [
        (f"{name}.head", head, retinanet.RetinaNetHead),
        (
            f"{name}.head.classification_head",
            classification,
            retinanet.RetinaNetClassificationHead,
        ),
        (f"{name}.head.regression_head", regression, retinanet.RetinaNetRegressionHead),
    ]

    generator = model.anchor_generator
    anchors = []
    if not isinstance(generator, AnchorGenerator):
        for method in ("forward", "grid_anchors"):  # which give every image the same
            anchors += overridden(f"{name}.anchor_generator", generator, Peer, method)
    if not anchors and len(generator.sizes) > MAX_LEVELS:
        anchors.append(f"{name}.anchor_generator has more than {MAX_LEVELS} levels")

    reasons = overridden(name, model, retinanet.RetinaNet, "compute_loss")
    for where, part, origin in heads:
        reasons += overridden(where, part, origin, "compute_loss")
    for method in ("__call__", "set_low_quality_matches_"):
        reasons += overridden(f"{name}.proposal_matcher", matcher, Matcher, method)
    coder = getattr(regression, "box_coder", None)
    for method in ("encode_single", "decode_single"):
        reasons += overridden(f"{name}.head.regression_head.box_coder", coder, BoxCoder, method)
    reasons += anchors
    loss_type = getattr(regression, "_loss_type", None)
    if loss_type not in BOX_LOSSES:
        reasons.append(f"{name}.head.regression_head has the unknown box loss {loss_type!r}")
    loss = swap(model, "compute_loss", _compute_loss, f"{name}: the loss step", reasons, report)

    reasons = overridden(name, model, retinanet.RetinaNet, "postprocess_detections")
    reasons += overridden(f"{name}.box_coder", model.box_coder, BoxCoder, "decode_single")
    reasons += anchors
    post_processing = swap(
        model,
        "postprocess_detections",
        _postprocess_detections,
        f"{name}: the post-processing",
        reasons,
        report,
    )

    if loss and post_processing:
        reasons = overridden(name, model, retinanet.RetinaNet, "forward")
        for where, part, origin in heads:
            reasons += overridden(where, part, origin, "forward")
        what = f"{name}: the copies of the heads' outputs"
        swap(model, "forward", _forward, what, reasons, report)


def _accelerate_fcos(model: Any, name: str, report: Accelerated) -> None:
    from torchvision.models.detection import fcos
    from torchvision.models.detection._utils import BoxLinearCoder
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Peer

    head = model.head
    reasons = overridden(f"{name}.head", head, fcos.FCOSHead, "compute_loss")
    coder = getattr(head, "box_coder", None)
    for method in ("encode", "decode"):
        reasons += overridden(f"{name}.head.box_coder", coder, BoxLinearCoder, method)
    swap(head, "compute_loss", _fcos_loss, f"{name}.head: the losses", reasons, report)

    where, generator = f"{name}.anchor_generator", model.anchor_generator
    anchors = []
    for method in ("forward", "grid_anchors"):  # which give every image the same
        anchors += overridden(where, generator, Peer, method)
    if not anchors and any(
        len(sizes) != 1 or sizes[0] % 2 or tuple(ratios) != (1.0,)
        for sizes, ratios in zip(generator.sizes, generator.aspect_ratios, strict=True)
    ):
        anchors.append(f"{where} has other anchors than one square of even size a position")
    if not anchors and len(generator.sizes) > MAX_LEVELS:
        anchors.append(f"{where} has more than {MAX_LEVELS} levels")

    reasons = overridden(name, model, fcos.FCOS, "compute_loss") + anchors
    swap(model, "compute_loss", _fcos_matching, f"{name}: the matching", reasons, report)

    reasons = overridden(name, model, fcos.FCOS, "postprocess_detections")
    coder = model.box_coder
    reasons += overridden(f"{name}.box_coder", coder, BoxLinearCoder, "decode")
    if not reasons and not coder.normalize_by_size:
        reasons.append(f"{name}.box_coder has distances that are not in sizes of anchors")
    reasons += anchors
    what = f"{name}: the post-processing"
    swap(model, "postprocess_detections", _fcos_detections, what, reasons, report)


def _accelerate_ssd(model: Any, name: str, report: Accelerated) -> None:
    from torchvision.models.detection import ssd
    from torchvision.models.detection._utils import BoxCoder

    reasons = overridden(name, model, ssd.SSD, "postprocess_detections")
    reasons += overridden(f"{name}.box_coder", model.box_coder, BoxCoder, "decode_single")
    what = f"{name}: the post-processing"
    swap(model, "postprocess_detections", _ssd_detections, what, reasons, report)


# ---- what is put in -----------------------------------------------------------------------------


class HeadOutputs:
    """A head's outputs as the convolutions left them, where torchvision has them permuted and concatenated."""

    def __init__(self, levels: list[Tensor], columns: int) -> None:  # L of (B, A * columns, H, W)
        self.levels, self.columns = levels, columns

    def size(self, dim: int) -> int:
        """Of the (B, N, columns) tensor that torchvision would have made."""
        rows = sum(level[0].numel() for level in self.levels) // self.columns
        return (len(self.levels[0]), rows, self.columns)[dim]

    def split(self, sizes: Sequence[int], dim: int) -> list[Tensor]:
        """The levels: torchvision splits where it has concatenated."""
        return self.levels


class _Inside:
    """The model as its own forward sees it: its head leaves the outputs where they lie."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def head(self, features: list[Tensor]) -> dict[str, HeadOutputs]:
        heads = self.model.head.classification_head, self.model.head.regression_head
        logits, deltas = (head.conv for head in heads)
        return {
            "cls_logits": HeadOutputs(
                [heads[0].cls_logits(logits(f)) for f in features], heads[0].num_classes
            ),
            "bbox_regression": HeadOutputs([heads[1].bbox_reg(deltas(f)) for f in features], 4),
        }


def _forward(model: Any, images: list[Tensor], targets: Any = None) -> Any:
    head = model.head
    is_watched = any(map(_has_hooks, (head, head.classification_head, head.regression_head)))
    kind = type(model).accelerated_from
    return kind.forward(model if is_watched else _Inside(model), images, targets)


def _has_hooks(module: nn.Module) -> bool:
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


BOX_LOSSES = ("l1", "smooth_l1", "giou", "diou", "ciou")


def _compute_loss(
    model: Any,
    targets: list[dict[str, Tensor]],
    head_outputs: dict[
        str, Any
    ],  # "cls_logits" and "bbox_regression": HeadOutputs or (B, N, columns)
    anchors: list[Tensor],  # B of (N, 4), all the same: the batch is padded to one size
) -> dict[str, Tensor]:
    """Each image's losses are divided by its number of foreground anchors, then averaged."""
    matcher, regression = model.proposal_matcher, model.head.regression_head
    cls_logits, deltas = (
        x.levels if isinstance(x, HeadOutputs) else [_level(x)]
        for x in (head_outputs["cls_logits"], head_outputs["bbox_regression"])
    )
    boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
    matches = match_anchors(
        anchors[0],
        boxes,
        matcher.high_threshold,
        matcher.low_threshold,
        matcher.allow_low_quality_matches,
    )  # (B, N)
    classes = class_index_targets(matches, labels, model.head.classification_head.num_classes)
    counts = (matches >= 0).sum(dim=1)
    classification = dense_focal_loss(cls_logits, classes, normalizer=counts)
    bbox_regression = dense_box_loss(
        deltas,
        anchors[0],
        [b.detach() for b in boxes],
        matches,
        loss=regression._loss_type,
        weights=regression.box_coder.weights,
        clip=regression.box_coder.bbox_xform_clip,
        normalizer=counts,
    )
    images = max(1, len(targets))
    return {
        "classification": classification / images,
        "bbox_regression": bbox_regression / images,
    }


def _postprocess_detections(
    model: Any,
    head_outputs: dict[str, list[Tensor]],  # L of (B, A * columns, H, W) or (B, H * W * A, columns)
    anchors: list[list[Tensor]],  # B of L of (H * W * A, 4), all the same
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Score threshold and top-k a level, boxes of the survivors, NMS per class."""
    cls_logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    if _are_differentiated([*cls_logits, *deltas]):
        num_classes = model.head.classification_head.num_classes
        rows = {
            "cls_logits": [_rows(level, num_classes) for level in cls_logits],
            "bbox_regression": [_rows(level, 4) for level in deltas],
        }
        original = type(model).accelerated_from.postprocess_detections
        found: list[dict[str, Tensor]] = original(model, rows, anchors, image_shapes)
        return found
    *padded, counts = detect(
        [_level(level) for level in cls_logits],
        [_level(level) for level in deltas],
        torch.cat(anchors[0]),
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        iou_threshold=model.nms_thresh,
        max_detections=model.detections_per_img,
        image_sizes=image_shapes,
        weights=model.box_coder.weights,
        clip=model.box_coder.bbox_xform_clip,
    )
    return _without_padding(padded, counts)


def _without_padding(padded: list[Tensor], counts: Tensor) -> list[dict[str, Tensor]]:
    names = ("boxes", "scores", "labels")
    return [
        {name: value[image, :count] for name, value in zip(names, padded, strict=True)}
        for image, count in enumerate(counts.tolist())
    ]


def _are_differentiated(outputs: list[Tensor]) -> bool:
    """Whether somebody may ask for gradients of detections, which detect has not; a program that is compiled is for inference."""
    is_eager = not torch.compiler.is_compiling()
    return is_eager and torch.is_grad_enabled() and any(x.requires_grad for x in outputs)


def _rows(level: Tensor, columns: int) -> Tensor:  # (B, H * W * A, columns), as torchvision has it
    return head_rows(level, columns) if level.dim() == 4 else level


def _fcos_matching(
    model: Any,
    targets: list[dict[str, Tensor]],
    head_outputs: dict[str, Tensor],
    anchors: list[Tensor],  # B of (N, 4), all the same
    num_anchors_per_level: list[int],
) -> dict[str, Tensor]:
    matches = assign_fcos(
        (anchors[0][:, :2] + anchors[0][:, 2:]) / 2,
        [size for (size,) in model.anchor_generator.sizes],
        num_anchors_per_level,
        [t["boxes"] for t in targets],
        center_radius=model.center_sampling_radius,
    )
    losses: dict[str, Tensor] = model.head.compute_loss(
        targets, head_outputs, anchors, list(matches.unbind())
    )
    return losses


def _fcos_loss(
    head: Any,
    targets: list[dict[str, Tensor]],
    head_outputs: dict[str, Tensor],  # (B, N, K), (B, N, 4) and (B, N, 1)
    anchors: list[Tensor],  # B of (N, 4)
    matched_idxs: list[Tensor],  # B of (N,), -1: background
) -> dict[str, Tensor]:
    """The losses of all images are divided by their number of foreground positions."""
    cls_logits = head_outputs["cls_logits"]
    matches = torch.stack(matched_idxs)
    classes = class_index_targets(matches, [t["labels"] for t in targets], cls_logits.shape[-1])
    image, anchor = torch.where(matches >= 0)  # (F,) each
    count = max(1, len(image))
    classification = sigmoid_focal_loss(cls_logits, classes, reduction="sum", normalizer=count)

    boxes = in_one_dtype([t["boxes"] for t in targets])
    gt_boxes = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    gt_boxes = gt_boxes[image, matches[image, anchor]] if len(image) else gt_boxes.new_empty((0, 4))
    anchor_boxes = torch.stack(anchors)[image, anchor]
    deltas = head_outputs["bbox_regression"][image, anchor]
    boxes = head.box_coder.decode(deltas, anchor_boxes)
    left, top, right, bottom = head.box_coder.encode(anchor_boxes, gt_boxes).unbind(dim=1)
    centerness = torch.sqrt(
        (torch.minimum(left, right) / torch.maximum(left, right))
        * (torch.minimum(top, bottom) / torch.maximum(top, bottom))
    )
    bbox_ctrness = nn.functional.binary_cross_entropy_with_logits(
        head_outputs["bbox_ctrness"][image, anchor, 0], centerness, reduction="sum"
    )
    return {
        "classification": classification,
        "bbox_regression": generalized_box_iou_loss(boxes, gt_boxes, reduction="sum") / count,
        "bbox_ctrness": bbox_ctrness / count,
    }


def _fcos_detections(
    model: Any,
    head_outputs: dict[str, list[Tensor]],  # L of (B, H * W, K), (B, H * W, 4) and (B, H * W, 1)
    anchors: list[list[Tensor]],  # B of L of (H * W, 4), all the same
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Score threshold and top-k a level, boxes of the survivors, NMS per class."""
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    if _are_differentiated([level for name in names for level in head_outputs[name]]):
        original = type(model).accelerated_from.postprocess_detections
        found: list[dict[str, Tensor]] = original(model, head_outputs, anchors, image_shapes)
        return found
    cls_logits, distances, centerness = (
        [_level(level) for level in head_outputs[name]] for name in names
    )
    boxes = torch.cat(anchors[0])
    *padded, counts = detect(
        cls_logits,
        distances,
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        iou_threshold=model.nms_thresh,
        max_detections=model.detections_per_img,
        image_sizes=image_shapes,
        coding="distance",
        strides=[size for (size,) in model.anchor_generator.sizes],
        score_factors=centerness,
        combine="sqrt",
    )
    return _without_padding(padded, counts)


def _ssd_detections(
    model: Any,
    head_outputs: dict[str, Tensor],  # (B, N, K) and (B, N, 4); class 0 is background
    image_anchors: list[Tensor],  # B of (N, 4)
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Of each class the best above the threshold, then NMS per class."""
    scores = torch.softmax(head_outputs["cls_logits"], dim=-1)
    detections = []
    for image, image_size in enumerate(image_shapes):
        candidates = scores[image, :, 1:]
        anchor, label = torch.where(candidates > model.score_thresh)
        best = _best_of_groups(candidates[anchor, label], label, model.topk_candidates)
        anchor, label = anchor[best], label[best]
        boxes = decode_boxes(
            head_outputs["bbox_regression"][image, anchor],
            image_anchors[image][anchor],
            model.box_coder.weights,
            model.box_coder.bbox_xform_clip,
            image_size,
        )
        detections.append(_kept(model, boxes, candidates[anchor, label], label + 1))
    return detections


def _best_of_groups(scores: Tensor, groups: Tensor, most: int) -> Tensor:  # (C,), (C,) -> (<= C,)
    """The indices of the best scores of each group, at most so many."""
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # group by group, best first
    in_order = groups[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(in_order, in_order)
    return order[rank < most]


def _kept(model: Any, boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    keep = batched_nms(boxes, scores, labels, model.nms_thresh)[: model.detections_per_img]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def _level(outputs: Tensor) -> Tensor:
    """As (B, A * columns, H, W): rows are a channels_last column of positions with one anchor each. A level that was split from
    others is copied as the rows that it is."""
    return outputs if outputs.dim() == 4 else outputs.contiguous().transpose(1, 2).unsqueeze(3)
