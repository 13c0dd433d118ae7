"""What the README shows works as it stands there."""

import re
from pathlib import Path

import torch

from focalops import AnchorGenerator

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_first_example(device):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    sizes, num_anchors, num_classes = [(8, 8), (4, 4)], 3, 5
    anchors = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    corners = torch.rand(2, 4, 2) * 32
    names = {
        "K": num_classes,
        "anchors": anchors.grid((64, 64), sizes).to(device),
        "gt_boxes": [*torch.cat((corners, corners + 30), dim=2).to(device)],
        "gt_labels": [*torch.randint(0, num_classes, (2, 4), device=device)],
        "cls_logits": [torch.randn(2, num_anchors * num_classes, *s, device=device) for s in sizes],
        "box_deltas": [torch.randn(2, num_anchors * 4, *s, device=device) for s in sizes],
        "sizes": [(64, 64), (60, 50)],
    }
    exec(code, names)
    assert names["loss"].isfinite() and names["boxes"].shape == (2, 100, 4)
