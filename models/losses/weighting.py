"""Losses whose anchors are weighed: which of them matter is found anew in each step, from what the network says of them.

All start from the losses of single anchors, which one pass over the head's levels gives, and so does the gradient: a weight
is plain PyTorch. Anchors without a box have no part in the ranks and means, and nothing waits for the device to count them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focalops import (
    box_iou,
    decode_boxes,
    dense_box_loss,
    dense_focal_loss,
    dense_quality_loss,
    multiclass_nms,
)
from focalops.reference import head_rows

from ..config import LossConfig
from .matching import IGNORED, Matched
from .unified import WeightingNetwork

# Of PISA on RetinaNet: the power and the least weight, of ranks and of scores.
ISR_POWER, ISR_BIAS = 2.0, 0.0
CARL_POWER, CARL_BIAS = 1.0, 0.2
# Of its negatives: the power, which of them take part, at most how many of an image, and what overlap is one place.
ISR_N_POWER, ISR_N_SCORE, ISR_N_ANCHORS, ISR_N_IOU = 0.5, 0.05, 1000, 0.5
# Of noisy anchors: the share of the localisation, and how near to 1 accuracy and confidence may come.
LOCALISATION, LEAST_ERROR = 0.75, 1e-4
UNIFIED = ("unified", "unified_mean")  # which have a network


def weighted_losses(
    matched: Matched, config: LossConfig, network: WeightingNetwork | None = None
) -> dict[str, Tensor]:
    """The sums over the images, each divided by its normalizer."""
    of_boxes, ious = dense_box_loss(
        matched.outputs.box_deltas,
        matched.anchors,
        [t["boxes"] for t in matched.targets],
        matched.matches,
        loss=config.box_loss,
        beta=config.box_loss_beta,
        reduction="none",
        return_iou=True,
    )
    of_boxes = of_boxes * config.box_loss_weight
    truth = logits_of_the_truth(matched, config.num_classes)
    if config.weighting == "cleanliness":
        of_classes, of_boxes = cleanliness(matched, config, of_boxes, ious, truth.detach())
        return normalized(matched, classification=of_classes, bbox_regression=of_boxes)

    of_classes = dense_focal_loss(
        matched.outputs.cls_logits,
        matched.classes,
        config.alpha,
        config.gamma,
        "none",
        class_weight=matched.class_weight,
    )
    is_positive = matched.matches >= 0
    if network is not None:
        m = network.of_anchors(ious, truth.sigmoid(), of_classes, of_boxes, is_positive)
        return unified(matched, of_classes, of_boxes, *m, config.weighting == "unified_mean")

    losses = {"classification": of_classes, "bbox_regression": of_boxes}
    if config.weighting == "isr_n":
        importance, is_ranked = importance_of_negatives(matched, config.num_classes)
        weight = keeping_the_sum(importance, of_classes.detach(), is_ranked)
        losses["classification"] = of_classes * weight
    if config.weighting in ("isr", "pisa"):
        importance = importance_of(ious, groups_of(matched), matched.classes, config.num_classes)
        weight = keeping_the_sum(importance, of_classes.detach(), is_positive)
        losses["classification"] = of_classes * weight
    if config.weighting in ("carl", "pisa"):
        losses["carl"] = of_boxes * carl_weights(truth.sigmoid(), is_positive)
    return normalized(matched, **losses)


def normalized(matched: Matched, **losses: Tensor) -> dict[str, Tensor]:
    divisors = matched.normalizers.clamp(min=1)
    return {name: (loss.sum(dim=1) / divisors).sum() for name, loss in losses.items()}


def logits_of_the_truth(matched: Matched, num_classes: int) -> Tensor:
    """(B, N), of each anchor the logit of its class, in float32, read where the head left it; of one without a class any."""
    logits, first_row = [], 0
    for level in matched.outputs.cls_logits:
        batch, channels, height, width = level.shape
        anchors = channels // num_classes
        rows = height * width * anchors
        classes = matched.classes[:, first_row : first_row + rows]
        classes = classes.clamp(0, num_classes - 1).view(batch, height, width, anchors)
        first_channel = num_classes * torch.arange(anchors, device=level.device)
        channel = (classes + first_channel).permute(0, 3, 1, 2)
        logits.append(level.gather(1, channel).permute(0, 2, 3, 1).flatten(1))
        first_row += rows
    return torch.cat(logits, dim=1).float()


def groups_of(matched: Matched) -> Tensor:
    """(B, N), a number for each box of each image, -1 for anchors without one."""
    most = max(len(t["boxes"]) for t in matched.targets)
    images = torch.arange(len(matched.targets), device=matched.matches.device)
    return torch.where(matched.matches >= 0, matched.matches + most * images[:, None], -1)


# ---- PISA: Cao et al., "Prime Sample Attention in Object Detection", 2020 --------------------------


def ranks(groups: Tensor, *keys: Tensor) -> Tensor:
    """Of each element its rank in its group, 0 first, by ascending keys, the first of which counts most; of equal ones the
    place decides. All are (n,). Time O(n log n)."""
    place = torch.arange(len(groups), device=groups.device)
    order = place
    for key in (*reversed(keys), groups):
        order = order[key[order].argsort(stable=True)]
    ordered = groups[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(is_first, place, 0).cummax(dim=0).values
    return torch.empty_like(place).scatter_(0, order, place - start)


@torch.no_grad()
def importance_of(ious: Tensor, groups: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """IoU-HLR: anchors compete first with those of their box, then the best of each box with each other, the second best,
    and so on, in each class; the importance falls from 1 by equal steps, of 1 over the size of the largest class."""
    shape, is_positive = ious.shape, groups >= 0
    best_first, groups = -ious.flatten(), groups.flatten()
    classes = torch.where(is_positive, classes, num_classes).flatten()
    of_box = ranks(groups, best_first)
    of_class = ranks(classes, of_box, best_first)
    sizes = classes.new_zeros(num_classes + 1).scatter_add_(0, classes, torch.ones_like(classes))
    largest = sizes[:num_classes].max().clamp(min=1)
    share = (largest - of_class) / largest
    weight = (ISR_BIAS + (1 - ISR_BIAS) * share).clamp(min=0) ** ISR_POWER
    return weight.view(shape)


def keeping_the_sum(weight: Tensor, losses: Tensor, is_positive: Tensor) -> Tensor:
    """The weights of the positives, times one number that leaves the sum of their losses as it is; 1 for the others."""
    of_positives = torch.where(is_positive, losses, 0)
    weighed = (of_positives * weight).sum()
    ratio = torch.where(weighed > 0, of_positives.sum() / weighed, 1)
    return torch.where(is_positive, weight * ratio, 1)


@torch.no_grad()
def importance_of_negatives(matched: Matched, num_classes: int) -> tuple[Tensor, Tensor]:
    """Score-HLR, and which anchors have one, (B, N): negatives with a high score compete first with those that NMS would
    remove for the same box, then the best of all groups with each other, the second best, and so on."""
    scores = torch.cat(
        [head_rows(x, num_classes).amax(dim=2) for x in matched.outputs.cls_logits], dim=1
    )
    deltas = torch.cat([head_rows(level, 4) for level in matched.outputs.box_deltas], dim=1)
    scores = scores.float().sigmoid().masked_fill(matched.classes != num_classes, 0)
    best, rows = scores.topk(min(ISR_N_ANCHORS, scores.shape[1]), dim=1)  # (B, n)
    takes_part = best > ISR_N_SCORE
    of_rows = rows[..., None].expand(-1, -1, 4)
    boxes = decode_boxes(deltas.gather(1, of_rows).float(), matched.anchors[rows])
    kept, count = multiclass_nms(
        boxes, best, None, ISR_N_IOU, rows.shape[1], counts=takes_part.sum(dim=1)
    )
    is_kept = torch.arange(kept.shape[1], device=kept.device) < count[:, None]
    of_kept = boxes.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, 4))
    removes = (box_iou(of_kept, boxes) > ISR_N_IOU) & is_kept[..., None]
    group = removes.byte().argmax(dim=1)  # of several the best: they come by descending score
    group = group + best.shape[1] * torch.arange(len(best), device=group.device)[:, None]
    best_first, takes_part = -best.flatten(), takes_part.flatten()
    of_group = ranks(torch.where(takes_part, group.flatten(), -1), best_first)
    rank = ranks(takes_part.long(), of_group, best_first).view_as(best)
    most = takes_part.sum().clamp(min=1)
    weight = ((most - rank) / most).clamp(min=0) ** ISR_N_POWER
    is_ranked = torch.zeros_like(scores, dtype=torch.bool)
    return (
        torch.ones_like(scores).scatter(1, rows, weight),
        is_ranked.scatter(1, rows, takes_part.view_as(best)),
    )


def carl_weights(p: Tensor, is_positive: Tensor) -> Tensor:
    """Weights whose mean is 1, from the probability of the truth, through which they have a gradient: where a box is poor,
    its score falls."""
    weight = torch.where(is_positive, (CARL_BIAS + (1 - CARL_BIAS) * p) ** CARL_POWER, 0)
    return weight * (is_positive.sum() / weight.sum().clamp(min=LEAST_ERROR))


# ---- Li et al., "Learning from Noisy Anchors for One-stage Object Detection", 2020 ----------------


def cleanliness(
    matched: Matched, config: LossConfig, of_boxes: Tensor, ious: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses of anchors whose label is as true as they are clean, weighed by it: where box and score are good already.
    The anchors are those that matching gives; the paper takes the best 30 of each box."""
    is_positive, p = matched.matches >= 0, truth.sigmoid()
    scores = soft_labels(ious, p, is_positive)
    of_classes = dense_quality_loss(
        matched.outputs.cls_logits,
        matched.classes,
        scores,
        "soft_focal_loss",
        "none",
        alpha=config.alpha,
        gamma=config.gamma,
        class_weight=matched.class_weight,
    )
    weight = mixed(
        1 / (1 - ious).clamp(min=LEAST_ERROR), 1 / (1 - p).clamp(min=LEAST_ERROR), is_positive
    )
    return (
        of_classes * keeping_the_sum(weight, of_classes.detach(), is_positive),
        of_boxes * keeping_the_sum(weight, of_boxes.detach(), is_positive),
    )


def soft_labels(ious: Tensor, p: Tensor, is_positive: Tensor) -> Tensor:
    """(B, N): the mixture of both, moved and stretched from its least and largest value in an image to the mean IoU and 1."""
    score = mixed(ious, p, is_positive)
    least = torch.where(is_positive, score, torch.inf).amin(dim=1, keepdim=True)
    most = torch.where(is_positive, score, -torch.inf).amax(dim=1, keepdim=True)
    place = torch.where(most > least, (score - least) / (most - least), 1)
    of_image = mean_of(ious, is_positive)
    return torch.where(is_positive, of_image + (1 - of_image) * place, 0)


def mixed(localisation: Tensor, confidence: Tensor, is_positive: Tensor) -> Tensor:
    """Each over its mean in the image."""
    return LOCALISATION * localisation / mean_of(localisation, is_positive).clamp(
        min=LEAST_ERROR
    ) + (1 - LOCALISATION) * confidence / mean_of(confidence, is_positive).clamp(min=LEAST_ERROR)


def mean_of(values: Tensor, is_positive: Tensor) -> Tensor:  # (B, N) -> (B, 1)
    count = is_positive.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(is_positive, values, 0).sum(dim=1, keepdim=True) / count


# ---- Cai et al., "Learning a Unified Sample Weighting Network for Object Detection", 2020 ---------


def unified(
    matched: Matched,
    of_classes: Tensor,
    of_boxes: Tensor,
    m_class: Tensor,
    m_box: Tensor,
    one_for_all: bool,
) -> dict[str, Tensor]:
    """e^-m L + m / 2 of both losses, of which the best m is log 2L; the network has to find it from what it knows.

    Of the box losses that is a mean over the positives. Of the class losses, which are divided by the number of positives,
    m / 2 is a mean over all anchors. The authors' code has one m for all class losses of RetinaNet, their mean: `one_for_all`.
    """
    is_counted = matched.classes != IGNORED
    if one_for_all:
        mean = torch.where(is_counted, m_class, 0).sum() / is_counted.sum().clamp(min=1)
        m_class = mean.expand_as(m_class)
    losses = normalized(
        matched,
        classification=of_classes * (-m_class).exp(),
        bbox_regression=of_boxes * (-m_box).exp(),
        weighting=m_box / 2,
    )
    losses["weighting"] = losses["weighting"] + mean_of(m_class, is_counted).sum() / 2
    return losses
