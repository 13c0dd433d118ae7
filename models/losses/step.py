"""From a network's outputs to the losses of a training step."""

from __future__ import annotations

from torch import Tensor, nn

from focalops import class_index_targets

from ..config import LossConfig, MatchingConfig
from ..structures import HeadOutputs, Target
from .balance import GradientBalance
from .box import box_loss
from .classification import classification_loss, equalization
from .matching import Matched, match, normalizers
from .unified import WeightingNetwork
from .weighting import UNIFIED, weighted_losses


class LossStep(nn.Module):
    """Each image's losses are divided by its normalizer, then averaged over the images.

    It is a module so that what it is made of may have parameters and a memory: the model's state has them then, and an
    optimizer of their own trains the parameters.
    """

    def __init__(self, matching: MatchingConfig, loss: LossConfig, finest_stride: int) -> None:
        super().__init__()
        self.matching, self.loss, self.finest_stride = matching, loss, finest_stride
        class_weight = equalization(loss) if loss.classification_loss == "eql" else None
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight, persistent=False)
        has_balance = loss.classification_loss in ("eqlv2", "efl")
        self.balance = GradientBalance(loss.num_classes) if has_balance else None
        self.weighting_network = WeightingNetwork() if loss.weighting in UNIFIED else None

    def forward(
        self,
        outputs: HeadOutputs,
        anchors: Tensor,  # (N, 4)
        targets: list[Target],
    ) -> dict[str, Tensor]:
        matched = self.match(outputs, anchors, targets)
        if self.loss.weighting == "none":
            losses = {
                "classification": classification_loss(matched, self.loss),
                "bbox_regression": box_loss(matched, self.loss),
            }
        else:
            losses = weighted_losses(matched, self.loss, self.weighting_network)
        return {name: loss / len(targets) for name, loss in losses.items()}

    def match(self, outputs: HeadOutputs, anchors: Tensor, targets: list[Target]) -> Matched:
        matches, scores = match(
            outputs, anchors, targets, self.matching, self.finest_stride
        )  # (B, N)
        classes = class_index_targets(
            matches, [t["labels"] for t in targets], self.loss.num_classes
        )
        counts = (matches >= 0 if scores is None else scores).sum(dim=1)  # (B,)
        divisors = normalizers(counts, self.loss.normalizer)
        weighs = self.class_weight, self.balance
        return Matched(outputs, anchors, targets, matches, classes, divisors, *weighs, scores)
