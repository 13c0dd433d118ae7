"""What docs/coming_from/yolox.md shows gives what YOLOX defines."""

import re
from pathlib import Path

import pytest
import torch
from test_detect_factors import yolox_detections
from torch import Tensor
from torchvision.ops import box_convert, box_iou

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from" / "yolox.md").read_text()
STRIDES = (8, 16)
SIZES = ((8, 6), (4, 3))
CLASSES = 3


@pytest.fixture
def page() -> dict:
    names: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), names)
    return names


def assigned(outputs: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The matches of an image and the overlaps, as YOLOX defines them, of every anchor and box."""
    rows, centers, strides = [], [], []
    for level, stride in zip(outputs, STRIDES, strict=True):
        y, x = torch.meshgrid(*map(torch.arange, level.shape[1:]), indexing="ij")
        corners = torch.stack((x, y), dim=-1).reshape(-1, 2) * stride
        of_level = level.flatten(1).t().clone()
        of_level[:, :2] = of_level[:, :2] * stride + corners
        of_level[:, 2:4] = of_level[:, 2:4].exp() * stride
        rows.append(of_level)
        centers.append(corners + stride / 2)
        strides.append(torch.full((len(corners),), float(stride)))
    of_anchor, points, stride = torch.cat(rows), torch.cat(centers), torch.cat(strides)
    middles = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    near = ((points[None] - middles[:, None]).abs() < 1.5 * stride[None, :, None]).all(-1)  # (M, N)
    valid = near.any(0)
    ious = box_iou(gt_boxes, box_convert(of_anchor[:, :4], "cxcywh", "xyxy"))
    p = (of_anchor[:, 5:].sigmoid() * of_anchor[:, 4:5].sigmoid()).sqrt()
    hot = torch.eye(CLASSES)[gt_labels]
    bce = -(hot[:, None] * p.log() + (1 - hot[:, None]) * (1 - p).log()).sum(-1)
    cost = (bce - 3 * (ious + 1e-8).log() + 1e6 * ~near).masked_fill(~valid, torch.inf)
    takes = torch.zeros_like(near)
    for box in range(len(gt_boxes)):
        overlaps = ious[box, valid].topk(min(10, int(valid.sum()))).values
        takes[box, cost[box].topk(max(1, int(overlaps.sum())), largest=False).indices] = True
    several = takes.sum(0) > 1
    matches = torch.where(takes.any(0), takes.int().argmax(0), -1)
    matches[several] = cost.argmin(0)[several]
    overlap = ious.gather(0, matches.clamp(min=0)[None])[0]
    return matches, overlap.masked_fill(matches < 0, 0)


def test_targets(page):
    total = 0
    for seed in range(20):
        torch.manual_seed(seed)
        outputs = [torch.randn(2, 5 + CLASSES, *size) for size in SIZES]
        corners = torch.rand(2, 3, 2) * torch.tensor([30.0, 45])
        boxes = torch.cat((corners, corners + 6 + torch.rand(2, 3, 2) * 20), dim=2)
        labels = torch.randint(0, CLASSES, (2, 3))
        matches, classes, ious = page["targets"](outputs, STRIDES, [*boxes], [*labels])
        for i in range(2):
            expected, overlaps = assigned([level[i] for level in outputs], boxes[i], labels[i])
            assert torch.equal(matches[i], expected)
            torch.testing.assert_close(ious[i], overlaps, rtol=1e-5, atol=1e-6)
            found = expected >= 0
            assert torch.equal(classes[i][found], labels[i][expected[found]])
            assert (classes[i][~found] == CLASSES).all()
            total += int(found.sum())
    assert total > 90


def test_detections(page):
    """With one class there is no other than the best."""
    for seed in range(20):
        torch.manual_seed(seed)
        outputs = [torch.randn(2, 6, *size) for size in SIZES]
        boxes, scores, _, counts = page["detections"](outputs, STRIDES, 0.2)
        for i, one in enumerate(yolox_detections(outputs, 0.2, 0.65)):
            count = int(counts[i])
            assert count == len(one["scores"])
            torch.testing.assert_close(scores[i, :count], one["scores"], rtol=2e-6, atol=0)
            torch.testing.assert_close(boxes[i, :count], one["boxes"], rtol=2e-6, atol=2e-5)
