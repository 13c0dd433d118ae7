"""focalops in mmdet's registries: assigners and losses that configurations name.

Copy this file into a project of mmdet (3.x) and add to its configuration

    custom_imports = dict(imports=["mmdet_registry"])

after which ``assigner=dict(type="FocalopsATSSAssigner", topk=9)`` stands where ``ATSSAssigner`` did. Every class takes the
arguments of mmdet's that it has; another one is refused. An image without boxes gives background only.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.task_modules.assigners import AssignResult, BaseAssigner
from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor, nn

import focalops

# ---- assigners ----------------------------------------------------------------------------------


def boxes_of(instances: Any) -> Tensor:
    """``bboxes`` as a tensor (M, 4), of a tensor or of mmdet's HorizontalBoxes."""
    return getattr(instances.bboxes, "tensor", instances.bboxes)


def centers_of(priors: Tensor) -> Tensor:  # (N, 4), xyxy -> (N, 2)
    return (priors[:, :2] + priors[:, 2:4]) / 2


def result(matches: Tensor, instances: Any, boxes: Tensor) -> AssignResult:
    """Of the matches (N,) of an image, and the boxes (N, 4) that are compared with the ground truth. ``max_overlaps`` are those of
    positives with their own box, 0 of the rest."""
    gt_boxes, positive = boxes_of(instances), matches >= 0
    overlaps = boxes.new_zeros(len(matches), dtype=torch.float32)
    labels = torch.full_like(matches, -1)
    if len(gt_boxes):
        own = gt_boxes[matches[positive]]
        overlaps[positive] = 1 - focalops.box_iou_loss(boxes[positive].float(), own.float(), eps=0)
        labels[positive] = instances.labels[matches[positive]].long()
    # There -1 is to be ignored, 0 the background.
    return AssignResult(len(gt_boxes), matches + 1, overlaps, labels=labels)


@TASK_UTILS.register_module()
class FocalopsMaxIoUAssigner(BaseAssigner):
    """``MaxIoUAssigner`` without a matrix of IoUs."""

    def __init__(
        self,
        pos_iou_thr: float,
        neg_iou_thr: float,
        min_pos_iou: float = 0.0,
        gt_max_assign_all: bool = True,
        ignore_iof_thr: float = -1,
        ignore_wrt_candidates: bool = True,
        match_low_quality: bool = True,
    ) -> None:
        self.thresholds = (pos_iou_thr, neg_iou_thr, match_low_quality)
        self.rule: dict[str, Any] = {"rule": "mmdet", "min_pos_iou": min_pos_iou}
        self.rule |= {"gt_max_assign_all": gt_max_assign_all}
        self.ignore: dict[str, Any] = {"crowd_threshold": ignore_iof_thr}
        self.ignore |= {"ignore_wrt_candidates": ignore_wrt_candidates}

    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        **kwargs: Any,
    ) -> AssignResult:
        priors, boxes, ignore = pred_instances.priors, boxes_of(gt_instances), {}
        ignores = gt_instances_ignore is not None and self.ignore["crowd_threshold"] > 0
        if ignores and len(boxes):  # without boxes all is background there
            crowds = boxes_of(gt_instances_ignore)
            crowd = torch.arange(len(boxes) + len(crowds), device=boxes.device) >= len(boxes)
            boxes, ignore = torch.cat((boxes, crowds)), {"crowd": [crowd], **self.ignore}
        matches = focalops.match_anchors(priors, [boxes], *self.thresholds, **self.rule, **ignore)
        return result(matches[0], gt_instances, priors)


@TASK_UTILS.register_module()
class FocalopsATSSAssigner(BaseAssigner):
    """``ATSSAssigner`` by the IoUs of anchors (``alpha=None``), without a matrix of IoUs and one of distances."""

    def __init__(self, topk: int) -> None:
        self.topk = topk

    def assign(
        self,
        pred_instances: Any,
        num_level_priors: list[int],
        gt_instances: Any,
        gt_instances_ignore: Any = None,
    ) -> AssignResult:
        priors = pred_instances.priors[:, :4]
        boxes = [boxes_of(gt_instances)]
        matches = focalops.assign_atss(priors, num_level_priors, boxes, self.topk)
        return result(matches[0], gt_instances, priors)


@TASK_UTILS.register_module()
class FocalopsTaskAlignedAssigner(BaseAssigner):
    """``TaskAlignedAssigner``, and the metrics that TOOD's head normalizes."""

    def __init__(self, topk: int) -> None:
        self.topk = topk

    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        alpha: float = 1,
        beta: float = 6,
    ) -> AssignResult:
        matches, _ = focalops.assign_task_aligned(
            pred_instances.scores[None],
            pred_instances.bboxes[None],
            centers_of(pred_instances.priors),
            [boxes_of(gt_instances)],
            [gt_instances.labels],
            self.topk,
            alpha,
            beta,
            rule="tood",
        )
        found = result(matches[0], gt_instances, pred_instances.bboxes.detach())
        positive = matches[0] >= 0
        scores = pred_instances.scores.detach()[positive, found.labels[positive]]
        found.assign_metrics = torch.zeros_like(found.max_overlaps)
        found.assign_metrics[positive] = (
            scores.float() ** alpha * found.max_overlaps[positive] ** beta
        )
        return found


@TASK_UTILS.register_module()
class FocalopsSimOTAAssigner(BaseAssigner):
    """``SimOTAAssigner``: of probabilities, which YOLOX' head of mmdet makes, and priors (N, 4) of x, y and strides."""

    def __init__(self, center_radius: float = 2.5, candidate_topk: int = 10) -> None:
        self.options = {"center_radius": center_radius, "candidates": candidate_topk}

    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        **kwargs: Any,
    ) -> AssignResult:
        logits = pred_instances.scores.float().logit()
        return simota(logits, pred_instances, gt_instances, "simota", self.options)


@TASK_UTILS.register_module()
class FocalopsDynamicSoftLabelAssigner(BaseAssigner):
    """``DynamicSoftLabelAssigner`` of RTMDet: of logits, and priors (N, 4) of x, y and strides; ground truth with masks has the
    center of its box here, not that of mass."""

    def __init__(self, soft_center_radius: float = 3.0, topk: int = 13) -> None:
        self.options = {"center_radius": soft_center_radius, "candidates": topk}

    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        **kwargs: Any,
    ) -> AssignResult:
        return simota(pred_instances.scores, pred_instances, gt_instances, "rtmdet", self.options)


def simota(
    logits: Tensor, pred_instances: Any, gt_instances: Any, rule: str, options: dict[str, Any]
) -> AssignResult:
    priors, boxes = pred_instances.priors, pred_instances.bboxes.detach()
    matches, _ = focalops.assign_simota(
        logits[None],
        boxes[None],
        priors[:, :2],
        priors[:, 2],
        [boxes_of(gt_instances)],
        [gt_instances.labels],
        rule=rule,
        **options,
    )
    return result(matches[0], gt_instances, boxes)


# ---- losses -------------------------------------------------------------------------------------


class RowLoss(nn.Module):
    """What mmdet's losses of rows (N, K) share: the weight of each row, and what the sum is divided by."""

    def __init__(self, use_sigmoid: bool, reduction: str, loss_weight: float) -> None:
        super().__init__()
        if not use_sigmoid:
            raise ValueError("use_sigmoid must be True")
        self.reduction, self.loss_weight = reduction, loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Tensor | None = None,  # (N,)
        avg_factor: Tensor | float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        reduction = reduction_override or self.reduction
        if reduction == "none":
            return self.loss_weight * self.unreduced(self.loss(pred, target, "none", weight))
        total = self.loss(pred, target, "sum", weight)
        if reduction == "mean":
            total = total / (self.count(pred) if avg_factor is None else avg_factor)
        return self.loss_weight * total

    def loss(self, pred: Tensor, target: Any, reduction: str, weight: Tensor | None) -> Tensor:
        raise NotImplementedError

    def unreduced(self, losses: Tensor) -> Tensor:
        return losses

    def count(self, pred: Tensor) -> int:
        return max(1, pred.numel())


@MODELS.register_module()
class FocalopsFocalLoss(RowLoss):
    """``FocalLoss``: targets are classes (N,), K the background."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight)
        self.alpha, self.gamma = alpha, gamma

    def loss(self, pred: Tensor, target: Any, reduction: str, weight: Tensor | None) -> Tensor:
        parameters = (self.alpha, self.gamma, reduction)
        return focalops.sigmoid_focal_loss(pred, target, *parameters, weight=weight)


@MODELS.register_module()
class FocalopsQualityFocalLoss(RowLoss):
    """``QualityFocalLoss``: targets are classes (N,), K the background, and their scores (N,); its mean is that of rows."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight)
        self.beta = beta

    def loss(self, pred: Tensor, target: Any, reduction: str, weight: Tensor | None) -> Tensor:
        return focalops.quality_focal_loss(pred, target, self.beta, reduction, weight=weight)

    def unreduced(self, losses: Tensor) -> Tensor:
        return losses.sum(dim=1)

    def count(self, pred: Tensor) -> int:
        return max(1, len(pred))
