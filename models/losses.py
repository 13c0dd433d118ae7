"""The classification losses of the paper's comparison. All but the focal loss are plain PyTorch on rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from focalops import dense_focal_loss, nms, sigmoid_focal_loss_star

if TYPE_CHECKING:
    from models.retinanet import RetinaNetConfig

IGNORED = -100
OHEM_BATCH, OHEM_NMS = 128, 0.5  # the paper's best
HINGE = 0.5  # the probability of the truth from which on the loss is 0

# Each takes L levels (B, A * K, H, W), class indices (B, N), normalizers (B,), anchors (N, 4) and the
# configuration, and returns the sum over the images.
Loss = Callable[[list[Tensor], Tensor, Tensor, Tensor, "RetinaNetConfig"], Tensor]


def focal(
    cls_logits: list[Tensor],
    classes: Tensor,
    counts: Tensor,
    anchors: Tensor,
    config: RetinaNetConfig,
) -> Tensor:
    """Lin et al., equation 5; with gamma 0 the alpha-balanced cross entropy, with alpha -1 the plain one."""
    return dense_focal_loss(cls_logits, classes, config.alpha, config.gamma, normalizer=counts)


def focal_star(
    cls_logits: list[Tensor],
    classes: Tensor,
    counts: Tensor,
    anchors: Tensor,
    config: RetinaNetConfig,
) -> Tensor:
    """Lin et al., appendix A."""
    losses = [
        sigmoid_focal_loss_star(
            rows, labels, config.alpha, config.gamma, "sum", beta=config.beta, normalizer=count
        )
        for rows, labels, count in zip(
            rows_of(cls_logits, config.num_classes), classes, counts, strict=True
        )
    ]
    return torch.stack(losses).sum()


def ohem(
    cls_logits: list[Tensor],
    classes: Tensor,
    counts: Tensor,
    anchors: Tensor,
    config: RetinaNetConfig,
) -> Tensor:
    """Online hard example mining (Shrivastava et al., 2016): the mean cross entropy of the anchors of
    the highest loss, after NMS by it."""
    losses = []
    for rows, labels in zip(rows_of(cls_logits, config.num_classes), classes, strict=True):
        of_anchors = F.binary_cross_entropy_with_logits(
            rows.float(), one_hot(labels, config.num_classes), reduction="none"
        ).sum(dim=1)
        valid = (labels != IGNORED).nonzero().squeeze(1)
        hardest = nms(anchors[valid], of_anchors[valid].detach(), OHEM_NMS)[:OHEM_BATCH]
        losses.append(of_anchors[valid[hardest]].mean())
    return torch.stack(losses).sum()


def hinge(
    cls_logits: list[Tensor],
    classes: Tensor,
    counts: Tensor,
    anchors: Tensor,
    config: RetinaNetConfig,
) -> Tensor:
    """A hinge on the probability of the truth, which the paper found unstable."""
    losses = []
    for rows, labels, count in zip(
        rows_of(cls_logits, config.num_classes), classes, counts, strict=True
    ):
        kept = labels != IGNORED
        truth = one_hot(labels, config.num_classes)[kept].bool()
        p = rows.float()[kept].sigmoid()
        losses.append(
            (HINGE - torch.where(truth, p, 1 - p)).clamp(min=0).sum() / count.clamp(min=1)
        )
    return torch.stack(losses).sum()


LOSSES: dict[str, Loss] = {
    "focal": focal,
    "focal_star": focal_star,
    "ohem": ohem,
    "hinge": hinge,
}


def rows_of(levels: list[Tensor], columns: int) -> Tensor:
    """(B, N, columns), the anchors of an image in the order level, row, column, anchor."""
    rows = []
    for level in levels:
        images, channels, height, width = level.shape
        by_anchor = level.view(images, channels // columns, columns, height, width)
        rows.append(by_anchor.permute(0, 3, 4, 1, 2).reshape(images, -1, columns))
    return torch.cat(rows, dim=1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:  # (N,) -> (N, K), 0 where there is none
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
