"""accelerate() of ultralytics' detectors, where the package is installed: the same losses, gradients and matches."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from focalops import accelerate

tasks = pytest.importorskip("ultralytics.nn.tasks")
TaskAlignedAssigner = pytest.importorskip("ultralytics.utils.tal").TaskAlignedAssigner

ARGUMENTS = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=10, overlap_mask=True)


def detector(name: str):
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", nc=5, verbose=False)
    model.args = ARGUMENTS
    return model.train()


def batch(counts: list[int]) -> dict[str, torch.Tensor]:
    total = sum(counts)
    sides = 0.03 * 20 ** torch.rand(total, 2)
    centers = sides / 2 + torch.rand(total, 2) * (1 - sides)
    return {
        "img": torch.rand(len(counts), 3, 128, 128),
        "batch_idx": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).float(),
        "cls": torch.randint(0, 5, (total, 1)).float(),
        "bboxes": torch.cat((centers, sides), dim=1),
    }


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
@pytest.mark.parametrize("counts", [[7, 0, 30], [0, 0]], ids=str)
def test_losses_and_gradients_are_ultralytics(name, counts):
    original = detector(name)
    model = copy.deepcopy(original)
    report = accelerate(model)
    assigners = 2 if name == "yolo26n" else 1  # one2many and one2one
    assert report.replaced == ["model: the assigner"] * assigners
    assert not report.kept
    images = batch(counts)
    for one in (original, model):
        loss, _ = one.loss(images)
        loss.sum().backward()
        one.total = loss.detach()
    torch.testing.assert_close(model.total, original.total, rtol=1e-5, atol=1e-6)
    for (where, a), b in zip(original.named_parameters(), model.parameters(), strict=True):
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-4 * a.grad.abs().max() + 1e-7, where


@pytest.mark.parametrize("topk, topk2", [(10, None), (13, None), (7, 1), (40, None)])
def test_what_the_assigner_gives(topk, topk2):
    """Padded boxes between the others, and all five results."""
    model = SimpleNamespace(assigner=TaskAlignedAssigner(topk, 5, 0.5, 6.0, topk2=topk2))
    points = torch.cartesian_prod(torch.arange(16) * 8 + 4.0, torch.arange(16) * 8 + 4.0)
    corners = torch.rand(2, 20, 2) * 100
    boxes = torch.cat((corners, corners + 4 + torch.rand(2, 20, 2) * 60), dim=2)
    mask = (torch.rand(2, 20, 1) < 0.7).float()
    labels = torch.randint(0, 5, (2, 20, 1)).float()
    predicted = boxes[:, torch.randint(0, 20, (256,))] + torch.randn(2, 256, 4) * 4
    arguments = (torch.rand(2, 256, 5), predicted, points, labels, boxes * mask, mask)
    expected = model.assigner(*arguments)
    holder = tasks.DetectionModel("yolov8n.yaml", nc=5, verbose=False)
    holder.args = ARGUMENTS
    holder.criterion = holder.init_criterion()
    holder.criterion.assigner = model.assigner
    accelerate(holder)
    for assigner in (
        model.assigner,
        copy.deepcopy(model.assigner),
        pickle.loads(pickle.dumps(model.assigner)),
    ):
        assert isinstance(assigner, TaskAlignedAssigner)
        given = assigner(*arguments)
        for i, (ours, theirs) in enumerate(zip(given, expected, strict=True)):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            foreground = (expected[3] > 0) & (expected[2].sum(-1) > 0)
            if i in (0, 1, 4):
                assert torch.equal(ours[foreground], theirs[foreground])
            elif i == 2:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
            else:
                assert torch.equal(ours & foreground, foreground)


def test_what_is_kept():
    model = detector("yolov8n")
    model.args = {"model": "yolov8n.yaml"}
    assert "call accelerate when training starts" in str(accelerate(model))
    segmentation = tasks.SegmentationModel("yolov8n-seg.yaml", nc=5, verbose=False)
    segmentation.args = ARGUMENTS
    said = str(accelerate(segmentation))
    assert said == (
        "kept: model: the assigner, because model.criterion is no v8DetectionLoss but v8SegmentationLoss"
    )
    model = detector("yolov8n")
    accelerate(model)
    assert "is focalops' already" in str(accelerate(model))
