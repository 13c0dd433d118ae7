"""Losses whose anchors are weighed: which of them matter is found anew in each step, from what the network says of them.

All start from the losses of single anchors, which one pass over the head's levels gives, and so does the gradient: a weight
is plain PyTorch. Anchors without a box have no part in the ranks and means, and nothing waits for the device to count them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focalops import dense_box_loss, dense_focal_loss, dense_quality_loss

from ..config import LossConfig
from .matching import Matched

# Of PISA on RetinaNet: the power and the least weight, of ranks and of scores.
ISR_POWER, ISR_BIAS = 2.0, 0.0
CARL_POWER, CARL_BIAS = 1.0, 0.2
# Of noisy anchors: the share of the localisation, and how near to 1 accuracy and confidence may come.
LOCALISATION, LEAST_ERROR = 0.75, 1e-4


def weighted_losses(matched: Matched, config: LossConfig) -> dict[str, Tensor]:
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
    losses = {"classification": of_classes, "bbox_regression": of_boxes}
    is_positive = matched.matches >= 0
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
