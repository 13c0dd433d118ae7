"""What passes between the parts of a detector.

Shapes: B images, L pyramid levels of H x W positions, A anchors a position, K classes, M boxes of an image, N = the
sum of H * W * A over the levels: the anchors of an image, in the order level, row, column, anchor. Labels are class
indices 0..K-1 and none is reserved for background, as in torchvision's RetinaNet.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# "boxes" (M, 4) xyxy in pixels, "labels" (M,) integers and, where some are crowds, "iscrowd" (M,)
Target = dict[str, Tensor]
Detections = dict[str, Tensor]  # "boxes" (D, 4), "scores" (D,), "labels" (D,), best first
# boxes (B, D, 4) in pixels of the batch, scores (B, D), labels (B, D), counts (B,)
PaddedDetections = tuple[Tensor, Tensor, Tensor, Tensor]


class HeadOutputs(NamedTuple):
    """What a network says of each anchor, as its convolutions wrote it."""

    cls_logits: list[Tensor]  # L of (B, A * K, H, W); channel a * K + k is class k of anchor a
    box_deltas: list[Tensor]  # L of (B, A * 4, H, W)
