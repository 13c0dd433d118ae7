"""The classification losses of the paper's comparison. All but the focal loss are plain PyTorch, image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from focalops import (
    dense_equalized_focal_loss,
    dense_focal_loss,
    dense_quality_loss,
    matched_iou,
    nms,
    sigmoid_focal_loss_star,
)

from ..config import LossConfig
from .matching import IGNORED, Matched, rows_of

OHEM_BATCH, OHEM_NMS = 128, 0.5  # the paper's best
EFL_SCALE = 8.0  # how much gamma grows at most
HINGE = 0.5  # the probability of the truth from which on the loss is 0


def classification_loss(matched: Matched, config: LossConfig) -> Tensor:
    """The sum over the images, each divided by its normalizer."""
    return LOSSES[config.classification_loss](matched, config)


def focal(matched: Matched, config: LossConfig) -> Tensor:
    """With gamma 0 the alpha-balanced cross entropy, with alpha -1 the plain one."""
    return dense_focal_loss(
        matched.outputs.cls_logits,
        matched.classes,
        config.alpha,
        config.gamma,
        normalizer=matched.normalizers,
        class_weight=matched.class_weight,
    )


def quality(matched: Matched, config: LossConfig) -> Tensor:
    """Li et al., "Generalized Focal Loss", 2020: a true class learns how well its box does, by the assigner's score or, without
    one, by the IoU of the anchor's box with its match. Of the losses here it alone has no alpha, as in the paper."""
    scores = matched.scores
    if scores is None:
        boxes = [t["boxes"] for t in matched.targets]
        scores = matched_iou(matched.outputs.box_deltas, matched.anchors, boxes, matched.matches)
    return dense_quality_loss(
        matched.outputs.cls_logits,
        matched.classes,
        scores,
        beta=config.gamma,
        normalizer=matched.normalizers,
    )


def equalization(config: LossConfig) -> Tensor:
    """(3, K), the class weights of the equalization loss (Tan et al., "Equalization Loss for Long-Tailed Object Recognition",
    2020): an object of another class says nothing against a rare one. Background does, as in the paper."""
    if config.class_frequencies is None:
        raise ValueError(
            "class_frequencies must be given with classification_loss eql without a data set, got None"
        )
    frequencies = torch.tensor(config.class_frequencies)
    ones = torch.ones_like(frequencies)
    return torch.stack((ones, (frequencies >= config.rare_below).float(), ones))


def eqlv2(matched: Matched, config: LossConfig) -> Tensor:
    """Tan et al., "Equalization Loss v2", 2021: objects of a class weigh more, and all else less, while its objects had less
    gradient than all else. The gradients are those of the loss that is trained, with its alpha, gamma and these weights; the
    paper's are those of cross entropy, which alpha -1 and gamma 0 give. Its extra output, whether there is an object at all, is
    left out, as the heads here have none."""
    assert matched.balance is not None
    ratio = matched.balance.ratio(before=100)
    of_others = torch.sigmoid(12 * (ratio - 0.8))
    class_weight = torch.stack((1 + 4 * (1 - of_others), of_others, of_others))
    return equalized(matched, config, torch.full_like(ratio, config.gamma), class_weight)


def efl(matched: Matched, config: LossConfig) -> Tensor:
    """Li et al., "Equalized Focal Loss for Dense Long-Tailed Object Detection", 2022: the less gradient the objects of a class
    had, compared with all else, the larger its gamma, and its weight with it."""
    assert matched.balance is not None
    ratio = matched.balance.ratio(before=1).clamp(max=1)
    gamma = config.gamma + EFL_SCALE * (1 - ratio)
    return equalized(matched, config, gamma, gamma / config.gamma)


def equalized(matched: Matched, config: LossConfig, gamma: Tensor, class_weight: Tensor) -> Tensor:
    """Of gradients before this step; those of this one are added for the next."""
    assert matched.balance is not None
    loss, gradient_sums = dense_equalized_focal_loss(
        matched.outputs.cls_logits,
        matched.classes,
        gamma,
        config.alpha,
        normalizer=matched.normalizers,
        class_weight=class_weight,
    )
    matched.balance.add(gradient_sums)
    return loss


# ---- Of one image: rows (N, K), labels (N,), normalizer (), anchors (N, 4) ------------------------


def focal_star(
    rows: Tensor, labels: Tensor, normalizer: Tensor, anchors: Tensor, config: LossConfig
) -> Tensor:
    """Lin et al., appendix A."""
    return sigmoid_focal_loss_star(
        rows, labels, config.alpha, config.gamma, "sum", beta=config.beta, normalizer=normalizer
    )


def ohem(
    rows: Tensor, labels: Tensor, normalizer: Tensor, anchors: Tensor, config: LossConfig
) -> Tensor:
    """Online hard example mining (Shrivastava et al., 2016): the mean cross entropy of the anchors of
    the highest loss, after NMS by it."""
    of_anchors = F.binary_cross_entropy_with_logits(
        rows.float(), one_hot(labels, config.num_classes), reduction="none"
    ).sum(dim=1)
    valid = (labels != IGNORED).nonzero().squeeze(1)
    hardest = nms(anchors[valid], of_anchors[valid].detach(), OHEM_NMS)[:OHEM_BATCH]
    return of_anchors[valid[hardest]].mean()


def hinge(
    rows: Tensor, labels: Tensor, normalizer: Tensor, anchors: Tensor, config: LossConfig
) -> Tensor:
    """A hinge on the probability of the truth, which the paper found unstable."""
    kept = labels != IGNORED
    truth = one_hot(labels, config.num_classes)[kept].bool()
    p = rows.float()[kept].sigmoid()
    return (HINGE - torch.where(truth, p, 1 - p)).clamp(min=0).sum() / normalizer.clamp(min=1)


Loss = Callable[[Matched, LossConfig], Tensor]


def image_by_image(loss: Callable[[Tensor, Tensor, Tensor, Tensor, LossConfig], Tensor]) -> Loss:
    def of_batch(matched: Matched, config: LossConfig) -> Tensor:
        rows = rows_of(matched.outputs.cls_logits, config.num_classes)
        images = zip(rows, matched.classes, matched.normalizers, strict=True)
        return torch.stack([loss(*image, matched.anchors, config) for image in images]).sum()

    return of_batch


LOSSES: dict[str, Loss] = {
    "focal": focal,
    "focal_star": image_by_image(focal_star),
    "quality": quality,
    "eql": focal,
    "eqlv2": eqlv2,
    "efl": efl,
    "ohem": image_by_image(ohem),
    "hinge": image_by_image(hinge),
}


def one_hot(labels: Tensor, num_classes: int) -> Tensor:  # (N,) -> (N, K), 0 where there is none
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
