"""docs/mmdet_registry.py with stand-ins for what it takes from mmdet: what its classes hand on, and in which form."""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import focalops

FILE = Path(__file__).parent.parent / "docs" / "mmdet_registry.py"


class Result(SimpleNamespace):
    def __init__(self, num_gts, gt_inds, max_overlaps, labels):
        super().__init__(num_gts=num_gts, gt_inds=gt_inds, max_overlaps=max_overlaps, labels=labels)


@pytest.fixture
def registered(monkeypatch) -> dict:
    classes: dict = {}

    def register_module():
        return lambda kind: classes.setdefault(kind.__name__.removeprefix("Focalops"), kind)

    registry = SimpleNamespace(register_module=register_module)
    for name, members in {
        "mmdet": {},
        "mmdet.models": {},
        "mmdet.models.task_modules": {},
        "mmdet.models.task_modules.assigners": {"AssignResult": Result, "BaseAssigner": object},
        "mmdet.registry": {"MODELS": registry, "TASK_UTILS": registry},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(FILE))
    return classes


def scene(boxes: int = 6) -> tuple[SimpleNamespace, SimpleNamespace]:
    grid = torch.cartesian_prod(torch.arange(12), torch.arange(12)) * 8.0
    anchors = torch.cat((grid - 12, grid + 12), dim=1)
    corners = torch.rand(boxes, 2) * 70
    gt_boxes = torch.cat((corners, corners + 10 + torch.rand(boxes, 2) * 20), dim=1)
    near = anchors + torch.randn(144, 4) * 3
    predicted = SimpleNamespace(priors=anchors, bboxes=near, scores=torch.rand(144, 4))
    return predicted, SimpleNamespace(bboxes=gt_boxes, labels=torch.randint(0, 4, (boxes,)))


def as_points(predicted: SimpleNamespace) -> SimpleNamespace:
    priors = predicted.priors
    centers = (priors[:, :2] + priors[:, 2:]) / 2
    strided = torch.cat((centers, torch.full((144, 2), 8.0)), dim=1)
    return SimpleNamespace(priors=strided, bboxes=predicted.bboxes, scores=predicted.scores)


@pytest.mark.parametrize("boxes", [6, 0])
def test_assigners(boxes, registered):
    predicted, truth = scene(boxes)
    gt, labels = [truth.bboxes], [truth.labels]
    anchors, points = predicted.priors, as_points(predicted)
    of_points = (points.bboxes[None], points.priors[:, :2], points.priors[:, 2], gt, labels)
    logits = predicted.scores[None]
    found = {
        "MaxIoUAssigner": (
            registered["MaxIoUAssigner"](0.4, 0.3, 0.1).assign(predicted, truth),
            focalops.match_anchors(anchors, gt, 0.4, 0.3, rule="mmdet", min_pos_iou=0.1),
        ),
        "ATSSAssigner": (
            registered["ATSSAssigner"](9).assign(predicted, [144], truth),
            focalops.assign_atss(anchors, [144], gt, 9),
        ),
        "TaskAlignedAssigner": (
            registered["TaskAlignedAssigner"](13).assign(predicted, truth),
            focalops.assign_task_aligned(
                *(logits, predicted.bboxes[None], points.priors[:, :2], gt, labels, 13, 1, 6),
                rule="tood",
            )[0],
        ),
        "SimOTAAssigner": (
            registered["SimOTAAssigner"]().assign(points, truth),
            focalops.assign_simota(logits.logit(), *of_points)[0],
        ),
        "DynamicSoftLabelAssigner": (
            registered["DynamicSoftLabelAssigner"]().assign(points, truth),
            focalops.assign_simota(logits, *of_points, rule="rtmdet")[0],
        ),
    }
    for name, (result, (matches,)) in found.items():
        positive = matches >= 0
        assert positive.any() == (boxes > 0), name
        assert result.num_gts == boxes
        # 1-based, 0: background, -1: to be ignored
        assert torch.equal(result.gt_inds, torch.where(matches == -2, -1, matches + 1))
        assert torch.equal(result.labels[positive], truth.labels[matches[positive]])
        assert (result.labels[~positive] == -1).all() and (
            result.max_overlaps[~positive] == 0
        ).all()
        compared = anchors if name in ("MaxIoUAssigner", "ATSSAssigner") else predicted.bboxes
        ious = focalops.box_iou(compared[positive], truth.bboxes)
        own = ious.gather(1, matches[positive][:, None])[:, 0]
        torch.testing.assert_close(result.max_overlaps[positive], own, rtol=1e-5, atol=1e-6)


def test_what_is_ignored(registered):
    predicted, truth = scene()
    everything = SimpleNamespace(bboxes=torch.tensor([[-99.0, -99, 999, 999]]))
    assigner = registered["MaxIoUAssigner"](0.4, 0.3, ignore_iof_thr=0.5)
    assert (assigner.assign(predicted, truth, everything).gt_inds == -1).all()
    assert (assigner.assign(predicted, scene(0)[1], everything).gt_inds == 0).all()
    assigner = registered["MaxIoUAssigner"](0.4, 0.3)
    assert (assigner.assign(predicted, truth, everything).gt_inds > 0).any()


@pytest.mark.parametrize("weight", [None, torch.rand(40)])
@pytest.mark.parametrize("avg_factor", [None, 7.0])
def test_losses(avg_factor, weight, registered):
    inputs, classes, scores = torch.randn(40, 3), torch.randint(0, 4, (40,)), torch.rand(40)
    hot = torch.nn.functional.one_hot(classes, 4)[:, :3].float()
    p = inputs.sigmoid()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, hot, reduction="none")
    focal = bce * (p - hot).abs() ** 2 * (0.25 * hot + 0.75 * (1 - hot))
    soft = hot * scores[:, None]
    quality = torch.nn.functional.binary_cross_entropy_with_logits(inputs, soft, reduction="none")
    quality = (quality * (p - soft).abs() ** 2).sum(dim=1)
    for name, target, losses in (
        ("FocalLoss", classes, focal),
        ("QualityFocalLoss", (classes, scores), quality),
    ):
        if weight is not None:
            losses = losses * weight.view(-1, *[1] * (losses.dim() - 1))
        loss = registered[name](loss_weight=2.0)
        expected = losses.mean() if avg_factor is None else losses.sum() / avg_factor
        for reduction, value in (("mean", expected), ("sum", losses.sum()), ("none", losses)):
            given = loss(inputs, target, weight, avg_factor, reduction)
            torch.testing.assert_close(given, 2 * value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use_sigmoid must be True"):
        registered["FocalLoss"](use_sigmoid=False)
