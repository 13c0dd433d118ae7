"""The classification losses of the paper's comparison. All but the focal loss are plain PyTorch, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from focalops import dense_focal_loss, nms, sigmoid_focal_loss_star
from focalops.reference import head_rows

if TYPE_CHECKING:
    from .config import RetinaNetConfig

IGNORED = -100
OHEM_BATCH, OHEM_NMS = 128, 0.5  # the paper's best
HINGE = 0.5  # the probability of the truth from which on the loss is 0


def classification_loss(
    cls_logits: list[Tensor],  # L of (B, A * K, H, W)
    classes: Tensor,  # (B, N)
    counts: Tensor,  # (B,), what each image's loss is divided by
    anchors: Tensor,  # (N, 4)
    config: RetinaNetConfig,
) -> Tensor:
    """The sum over the images."""
    if config.classification_loss == "focal":
        # With gamma 0 the alpha-balanced cross entropy, with alpha -1 the plain one.
        return dense_focal_loss(cls_logits, classes, config.alpha, config.gamma, normalizer=counts)
    loss = LOSSES[config.classification_loss]
    images = zip(rows_of(cls_logits, config.num_classes), classes, counts, strict=True)
    return torch.stack(
        [loss(rows, labels, count, anchors, config) for rows, labels, count in images]
    ).sum()


# ---- Of one image: rows (N, K), labels (N,), count (), anchors (N, 4) -----------------------------


def focal_star(
    rows: Tensor, labels: Tensor, count: Tensor, anchors: Tensor, config: RetinaNetConfig
) -> Tensor:
    """Lin et al., appendix A."""
    return sigmoid_focal_loss_star(
        rows, labels, config.alpha, config.gamma, "sum", beta=config.beta, normalizer=count
    )


def ohem(
    rows: Tensor, labels: Tensor, count: Tensor, anchors: Tensor, config: RetinaNetConfig
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
    rows: Tensor, labels: Tensor, count: Tensor, anchors: Tensor, config: RetinaNetConfig
) -> Tensor:
    """A hinge on the probability of the truth, which the paper found unstable."""
    kept = labels != IGNORED
    truth = one_hot(labels, config.num_classes)[kept].bool()
    p = rows.float()[kept].sigmoid()
    return (HINGE - torch.where(truth, p, 1 - p)).clamp(min=0).sum() / count.clamp(min=1)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, "RetinaNetConfig"], Tensor]
LOSSES: dict[str, Loss] = {"focal_star": focal_star, "ohem": ohem, "hinge": hinge}
CLASSIFICATION_LOSSES = ("focal", *LOSSES)


def rows_of(levels: list[Tensor], columns: int) -> Tensor:
    """(B, N, columns), the anchors of an image in the order level, row, column, anchor."""
    return torch.cat([head_rows(level, columns) for level in levels], dim=1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:  # (N,) -> (N, K), 0 where there is none
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
