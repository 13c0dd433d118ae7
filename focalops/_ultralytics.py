"""focalops inside a detector of ultralytics, of which only public names are used."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from focalops._swapping import Accelerated, overridden, swap
from focalops.dynamic_assigners import MAX_TOPK, assign_task_aligned


def ultralytics_models() -> list[type]:
    """Whose instances can only exist where the package was imported; to import it here would take seconds."""
    tasks = sys.modules.get("ultralytics.nn.tasks")
    return [] if tasks is None else [tasks.DetectionModel]


def accelerate_ultralytics(model: Any, name: str, report: Accelerated) -> None:
    from ultralytics.utils.loss import v8DetectionLoss

    what = f"{name}: the assigner"
    if getattr(model, "criterion", None) is None:
        if not hasattr(getattr(model, "args", None), "box"):
            reason = (
                "the model has no trainer's arguments yet: call accelerate when training starts"
            )
            report.kept.append(f"{what}, because {reason}")
            return
        model.criterion = model.init_criterion()
    losses: list[Any] = [model.criterion]
    if hasattr(model.criterion, "one2many"):  # it is end to end
        losses = [model.criterion.one2many, model.criterion.one2one]
    for loss in losses:
        if type(loss) is v8DetectionLoss:
            _accelerate_assigner(loss.assigner, what, name, report)
        else:
            reason = f"{name}.criterion is no v8DetectionLoss but {type(loss).__qualname__}"
            report.kept.append(f"{what}, because {reason}")


def _accelerate_assigner(assigner: Any, what: str, name: str, report: Accelerated) -> None:
    from ultralytics.utils.tal import TaskAlignedAssigner

    reasons: list[str] = []
    for method in vars(TaskAlignedAssigner):
        if callable(getattr(TaskAlignedAssigner, method)) and method not in vars(object):
            reasons += overridden(
                f"{name}.criterion.assigner", assigner, TaskAlignedAssigner, method
            )
    swap(assigner, "forward", _assign, what, reasons[:1], report)


@torch.no_grad()
def _assign(
    assigner: Any,
    pd_scores: Tensor,  # (B, N, K), probabilities
    pd_bboxes: Tensor,  # (B, N, 4), in pixels
    anc_points: Tensor,  # (N, 2), in pixels
    gt_labels: Tensor,  # (B, M, 1)
    gt_bboxes: Tensor,  # (B, M, 4), in pixels
    mask_gt: Tensor,  # (B, M, 1), which of them are there: no prefix of them
    **extra: Tensor,
) -> tuple[Tensor, ...]:
    """Labels (B, N), boxes (B, N, 4), scores (B, N, K), whether foreground (B, N), and the index of the box (B, N)."""
    if extra or gt_bboxes.shape[1] == 0 or assigner.topk > MAX_TOPK:
        original = type(assigner).accelerated_from.forward
        found: tuple[Tensor, ...] = original(
            *(assigner, pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt), **extra
        )
        return found
    labels = gt_labels.squeeze(-1).long()
    matches, scores = assign_task_aligned(
        *(pd_scores, pd_bboxes, anc_points),
        gt_bboxes.masked_fill(mask_gt == 0, torch.nan),  # holds no point
        labels,
        assigner.topk,
        assigner.alpha,
        assigner.beta,
        min_side=assigner.stride_val,
        final_topk=assigner.topk2 if assigner.topk2 != assigner.topk else None,
        eps=assigner.eps,
    )
    index = matches.clamp(min=0)  # of the background the first box, as there
    target_labels = labels.gather(1, index)
    target_bboxes = gt_bboxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    target_scores = pd_scores.new_zeros(pd_scores.shape, dtype=scores.dtype)
    target_scores.scatter_(2, target_labels.unsqueeze(-1), scores.unsqueeze(-1))
    return target_labels, target_bboxes, target_scores, matches >= 0, index
