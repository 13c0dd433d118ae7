"""The box losses."""

from __future__ import annotations

from torch import Tensor

from focalops import dense_box_loss

from ..config import LossConfig
from .matching import Matched


def box_loss(matched: Matched, config: LossConfig) -> Tensor:
    """The sum over the images, each divided by its normalizer."""
    return dense_box_loss(
        matched.outputs.box_deltas,
        matched.anchors,
        [t["boxes"] for t in matched.targets],
        matched.matches,
        loss=config.box_loss,
        normalizer=matched.normalizers,
    )
