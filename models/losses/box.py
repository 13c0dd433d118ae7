"""The box losses."""

from __future__ import annotations

from torch import Tensor

from focalops import dense_box_loss

from ..config import LossConfig
from .matching import Matched


def box_loss(matched: Matched, config: LossConfig) -> Tensor:
    """The sum over the images, each divided by its normalizer; an anchor weighs its score, where it has one."""
    loss = dense_box_loss(
        matched.outputs.box_deltas,
        matched.anchors,
        [t["boxes"] for t in matched.targets],
        matched.matches,
        loss=config.box_loss,
        beta=config.box_loss_beta,
        normalizer=matched.normalizers,
        weight=matched.scores,
    )
    return loss if config.box_loss_weight == 1 else loss * config.box_loss_weight
