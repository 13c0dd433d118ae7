"""The network of Cai et al., "Learning a Unified Sample Weighting Network for Object Detection", 2020."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 2.0  # of m on either side: weights from e^-2 to e^2
WIDTH, START = 64, 1e-4  # of the layers, and the standard deviation that their weights begin with
SMALLEST, LARGEST, KNOTS = (
    -6,
    3,
    256,
)  # powers of ten of the losses that are tabulated, and how many
# Positives are the first rows of a stable sort, and no more than these are looked at: how many there are only the device
# knows. A 64th of the anchors, 3,150 an image of 201,600, is several times what photographs have.
LEAST_ROWS, SHARE_OF_ROWS = 4096, 64


class WeightingNetwork(nn.Module):
    """What m an anchor's losses have, which weighs them by e^-m, from what is known of the anchor: the IoU of its box, the
    probability of its class, its two losses. The paper's has each of the four terms of smooth L1; other box losses have one.

    Memory: 3 KB for each of the positives, 60 bytes for each anchor: 0.4 GB for 16 x 201,600 of them.
    """

    def __init__(self) -> None:
        super().__init__()

        def layers(*widths: int) -> list[nn.Module]:
            return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]

        def branch() -> nn.Sequential:
            first, second = layers(1, WIDTH, WIDTH)
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

        self.branches = nn.ModuleList(branch() for _ in range(4))
        joined, last = layers(4 * WIDTH, WIDTH, 2)
        self.joined = nn.Sequential(joined, nn.ReLU(), last)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=START)
                nn.init.zeros_(module.bias)
        knots = torch.cat((torch.zeros(1), torch.logspace(SMALLEST, LARGEST, KNOTS - 1)))
        self.register_buffer("knots", knots, persistent=False)
        self.knots: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """(n, 4) IoU, probability, class loss, box loss -> (n, 2) m of the class loss and of the box loss; float32."""
        with torch.autocast(features.device.type, enabled=False):
            columns = features.float().split(1, dim=1)
            each = [branch(x) for branch, x in zip(self.branches, columns, strict=True)]
            m: Tensor = self.joined(torch.cat(each, dim=1))
            return m.clamp(-LIMIT, LIMIT)

    def of_anchors(
        self, ious: Tensor, p: Tensor, of_classes: Tensor, of_boxes: Tensor, is_positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        """m of the class losses, and of the box losses, which is 0 where there is no box. All are (B, N)."""
        total = is_positive.numel()
        order = is_positive.flatten().byte().argsort(descending=True, stable=True)
        rows = order[: max(LEAST_ROWS, total // SHARE_OF_ROWS)]
        known = (ious, p, of_classes, of_boxes)
        features = torch.stack([x.detach().flatten()[rows] for x in known], dim=1)
        exact = features.new_zeros(total, 2).index_copy(0, rows, self(features))
        m_class, m_box = exact.unflatten(0, is_positive.shape).unbind(dim=-1)
        return (
            torch.where(is_positive, m_class, self.of_negatives(of_classes.detach())),
            torch.where(is_positive, m_box, 0),
        )

    def of_negatives(self, losses: Tensor) -> Tensor:
        """m of the class losses: without a box, IoU and probability are 0, and m follows from the loss alone. So a table is
        enough, in place of 256 features of every anchor; between its knots, 8 % apart, lines."""
        table = self(F.pad(self.knots[:, None], (2, 1)))[:, 0]
        piece = torch.bucketize(losses, self.knots).clamp(1, KNOTS - 1) - 1
        low, high = self.knots[piece], self.knots[piece + 1]
        # The gradient of an embedding is summed in a fixed order, that of an index is not.
        ends = F.embedding(piece, torch.stack((table[:-1], table[1:]), dim=1))
        return torch.lerp(ends[..., 0], ends[..., 1], ((losses - low) / (high - low)).clamp(max=1))
