"""The methods that weigh anchors: the papers' analytic cases, mmdet's numbers, and what holds of each of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models_fixtures import make_coco_folder
from test_models_retinanet import TINY
from torch import Tensor

from focalops import box_iou, decode_boxes, nms_match
from models.commands.common import for_data
from models.config import WEIGHTINGS
from models.data import open_data
from models.losses import LossStep
from models.losses.classification import rows_of
from models.losses.unified import WeightingNetwork
from models.losses.weighting import (
    ISR_N_IOU,
    UNIFIED,
    carl_weights,
    cleanliness,
    importance_of,
    importance_of_negatives,
    keeping_the_sum,
    logits_of_the_truth,
    ranks,
    soft_labels,
)
from models.recipes import Recipe, with_model
from models.structures import HeadOutputs

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("pisa.json").read_text())
METHODS = [name for name in WEIGHTINGS if name != "none"]
SIZES = ((4, 5), (2, 3))


def loss_step(weighting: str = "none", **config) -> LossStep:
    model = dataclasses.replace(TINY, weighting=weighting, **config)
    return LossStep(model, model, 8)


def scene(dtype: torch.dtype = torch.float32, classes: int = TINY.num_classes, anchors: int = 3):
    """Outputs, anchors and targets of three images, of which one has no objects; some boxes have many anchors."""
    rows = sum(h * w for h, w in SIZES) * anchors
    corner = torch.rand(rows, 2) * 60
    boxes = torch.cat((corner, corner + 12 + 30 * torch.rand(rows, 2)), dim=1)
    levels = [
        [torch.randn(3, anchors * n, h, w, dtype=dtype).requires_grad_() for h, w in SIZES]
        for n in (classes, 4)
    ]
    targets = []
    for count in (4, 0, 2):
        truth = boxes[torch.randperm(rows)[:count]] + torch.rand(count, 4)
        targets.append({"boxes": truth, "labels": torch.randint(0, classes, (count,))})
    return HeadOutputs(*levels), boxes, targets


def leaves(outputs: HeadOutputs) -> list[Tensor]:
    return [level for levels in outputs for level in levels]


# ---- prime samples ------------------------------------------------------------------------------


def test_ranks_in_groups():
    groups = torch.tensor([1, 0, 1, 1, 0, -1])
    keys = torch.tensor([3.0, 1.0, 3.0, 2.0, 0.0, 9.0])
    assert ranks(groups, keys).tolist() == [1, 1, 2, 0, 0, 0]
    first = torch.tensor([0, 0, 1, 1, 0, 0])
    assert ranks(groups, first, keys).tolist() == [0, 1, 2, 1, 0, 0]
    assert ranks(groups[:0], keys[:0]).shape == (0,)


def test_importance_of_the_paper_s_ranks():
    """IoU .9 .6 of one box and .8 .5 .7 of another, of one class: ranks 0 3 1 4 2."""
    ious = torch.tensor([[0.9, 0.6, 0.8, 0.5, 0.7, 0.99]])
    groups = torch.tensor([[0, 0, 1, 1, 1, -1]])
    classes = torch.tensor([[2, 2, 2, 2, 2, 3]])
    weight = importance_of(ious, groups, classes, 3)
    torch.testing.assert_close(weight[0, :5], torch.tensor([1.0, 0.16, 0.64, 0.04, 0.36]))
    # Of a smaller class the ranks fall by the same steps.
    classes = torch.tensor([[0, 0, 2, 2, 2, 3]])
    weight = importance_of(ious, groups, classes, 3)
    torch.testing.assert_close(weight[0, :5], torch.tensor([1, 4 / 9, 1, 1 / 9, 4 / 9]))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{len(case['images'])} images")
def test_mmdet_s_numbers(case):
    sizes = [len(image) for image in case["images"]]
    boxes = torch.cat([torch.tensor(image) + 100 * i for i, image in enumerate(case["images"])])
    ious, losses, p = (torch.tensor(case[name]) for name in ("ious", "class_losses", "p"))
    classes, is_positive = torch.tensor(case["labels"]), torch.ones(sum(sizes), dtype=torch.bool)
    importance = importance_of(ious, boxes, classes, 80)
    weight = keeping_the_sum(importance, losses, is_positive)
    torch.testing.assert_close(weight, torch.tensor(case["weights"]), rtol=1e-5, atol=1e-6)
    carl = (torch.tensor(case["box_losses"]) * carl_weights(p, is_positive)).sum()
    torch.testing.assert_close(carl / case["avg_factor"], torch.tensor(case["carl"]))


def test_importance_of_negatives():
    """As the paper says it: groups of NMS in each image, ranks in a group, then one order of all of the batch."""
    outputs, anchors, targets = scene()
    for level in outputs.box_deltas:  # few boxes overlap otherwise
        level.data.mul_(0.1)
    step = loss_step("isr_n")
    matched = step.match(outputs, anchors, targets)
    weight, is_ranked = importance_of_negatives(matched, TINY.num_classes)
    scores = rows_of(outputs.cls_logits, TINY.num_classes).sigmoid().amax(dim=2)
    boxes = decode_boxes(rows_of(outputs.box_deltas, 4), anchors)
    expected = (matched.classes == TINY.num_classes) & (scores > 0.05)
    assert torch.equal(is_ranked, expected) and not expected.all()
    entries = []  # (rank in its group, -score, image, anchor)
    for image in range(3):
        rows = expected[image].nonzero().flatten()
        groups = nms_match(boxes[image, rows], scores[image, rows], ISR_N_IOU)
        for group in groups.unique():
            members = rows[groups == group].tolist()
            members.sort(key=lambda row: -scores[image, row].item())
            entries += [(n, -scores[image, r].item(), image, r) for n, r in enumerate(members)]
    assert max(entry[0] for entry in entries) >= 2
    for rank, (*_, image, row) in enumerate(sorted(entries)):
        best = (1 - rank / len(entries)) ** 0.5
        assert weight[image, row].item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("weighting", ["isr", "isr_n", "pisa"])
def test_isr_keeps_the_sum_of_the_losses(weighting):
    outputs, anchors, targets = scene()
    weighted = loss_step(weighting, normalizer="batch")(outputs, anchors, targets)
    plain = loss_step(normalizer="batch")(outputs, anchors, targets)
    for name in ("classification", "bbox_regression"):
        torch.testing.assert_close(weighted[name], plain[name], rtol=1e-5, atol=1e-6)
    grads, of_plain = (
        torch.autograd.grad(losses["classification"], outputs.cls_logits, retain_graph=True)
        for losses in (weighted, plain)
    )
    assert not torch.allclose(grads[0], of_plain[0])


def test_carl_moves_scores_by_the_quality_of_boxes():
    """Of two anchors of one probability the one with the worse box loses score, the other one gains."""
    p = torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)
    is_positive = torch.tensor([[True, True, False]])
    weight = carl_weights(p, is_positive)
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1.0, 0.0]]))
    (torch.tensor([[2.0, 1.0, 5.0]]) * weight).sum().backward()
    assert p.grad[0, 0] > 0 > p.grad[0, 1] and p.grad[0, 2] == 0


# ---- noisy anchors ------------------------------------------------------------------------------


def test_soft_labels():
    ious = torch.tensor([[0.8, 0.4, 0.6, 0.9]])
    p = torch.tensor([[0.5, 0.1, 0.3, 0.9]])
    is_positive = torch.tensor([[True, True, True, False]])
    scores = soft_labels(ious, p, is_positive)
    # Mixtures .75 x / .6 + .25 p / .3: 17/12, 7/12 and 1; from the mean IoU to 1.
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.8, 0.0]]))
    alone = torch.tensor([[False, True, False, False]])
    assert soft_labels(ious, p, alone).tolist() == [[0, 1, 0, 0]]
    assert soft_labels(ious, p, alone & False).tolist() == [[0, 0, 0, 0]]


def test_cleanliness_keeps_the_sums():
    outputs, anchors, targets = scene()
    step = loss_step("cleanliness", normalizer="batch")
    matched = step.match(outputs, anchors, targets)
    truth = logits_of_the_truth(matched, TINY.num_classes).detach()
    is_positive = matched.matches >= 0
    of_boxes = torch.rand(matched.matches.shape) * is_positive
    ious = torch.rand(matched.matches.shape) * is_positive
    of_classes, weighed = cleanliness(matched, step.loss, of_boxes, ious, truth)
    torch.testing.assert_close(weighed.sum(), of_boxes.sum())
    # Perfect anchors are where F is bounded.
    of_classes, weighed = cleanliness(matched, step.loss, of_boxes, ious.ceil(), truth)
    assert of_classes.isfinite().all() and weighed.isfinite().all()


# ---- the equalization loss ----------------------------------------------------------------------


def test_rare_classes_do_not_suffer_from_objects_of_others():
    """Of an anchor that has a class the negative logits of rare classes have no gradient; of a background anchor they have."""
    outputs, anchors, targets = scene()
    frequencies = (0.5, *[0.001] * (TINY.num_classes - 1))
    eql = loss_step(classification_loss="eql", class_frequencies=frequencies)
    loss = eql(outputs, anchors, targets)["classification"]
    plain = loss_step()(outputs, anchors, targets)["classification"]
    matched = eql.match(outputs, anchors, targets)
    grads, of_plain = (
        rows_of(
            list(torch.autograd.grad(total, outputs.cls_logits, retain_graph=True)),
            TINY.num_classes,
        )
        for total in (loss, plain)
    )
    truth = matched.classes[..., None] == torch.arange(TINY.num_classes)
    is_rare = torch.tensor(frequencies) < 0.00177
    spared = (matched.matches >= 0)[..., None] & is_rare & ~truth
    assert spared.any() and (grads[spared] == 0).all()
    torch.testing.assert_close(grads[~spared], of_plain[~spared])


def test_frequencies_must_be_known():
    with pytest.raises(ValueError, match="class_frequencies must be given with"):
        loss_step(classification_loss="eql")
    with pytest.raises(ValueError, match="class_frequencies must be one of each of the"):
        loss_step(classification_loss="eql", class_frequencies=(0.5,))


def test_frequencies_of_a_data_set(tmp_path):
    data = open_data(str(make_coco_folder(tmp_path)), "train2017")
    frequencies = data.class_frequencies()
    images = [set(data[i][1]["labels"].tolist()) for i in range(len(data))]
    for label, share in enumerate(frequencies):
        assert share == sum(label in labels for labels in images) / len(images)
    recipe = with_model(Recipe(model=TINY), classification_loss="eql")
    assert for_data(recipe, data).model.class_frequencies == frequencies


# ---- of all of them -----------------------------------------------------------------------------


def test_logits_of_the_truth():
    outputs, anchors, targets = scene()
    outputs.cls_logits[1] = (
        outputs.cls_logits[1]
        .detach()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    matched = loss_step().match(outputs, anchors, targets)
    is_positive = matched.matches >= 0
    rows = rows_of(outputs.cls_logits, TINY.num_classes)
    expected = rows[is_positive].gather(1, matched.classes[is_positive][:, None]).squeeze(1)
    truth = logits_of_the_truth(matched, TINY.num_classes)[is_positive]
    assert torch.equal(truth, expected)
    grads = torch.autograd.grad(truth.sum(), outputs.cls_logits)
    of_rows = torch.autograd.grad(expected.sum(), outputs.cls_logits)
    for grad, other in zip(grads, of_rows, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("weighting", [name for name in METHODS if name != "isr_n"])
def test_weights_see_the_iou_of_decoded_boxes(weighting, monkeypatch):
    """What reaches the methods is the overlap of the box that the network gives, not the anchor's."""
    outputs, anchors, targets = scene()
    seen = []
    name = {"cleanliness": "soft_labels", "carl": "carl_weights"}.get(weighting, "importance_of")
    where, place = weighting_module(), 0
    if weighting in UNIFIED:
        where, name, place = WeightingNetwork, "of_anchors", 1
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: seen.append(args[place]) or original(*args))
    step = loss_step(weighting)
    step(outputs, anchors, targets)
    matched = step.match(outputs, anchors, targets)
    if weighting == "carl":
        expected = logits_of_the_truth(matched, TINY.num_classes).sigmoid()
    else:
        deltas = rows_of(outputs.box_deltas, 4)
        expected = torch.zeros(matched.matches.shape)
        for i, target in enumerate(targets):
            for j in (matched.matches[i] >= 0).nonzero().flatten():
                box = decode_boxes(deltas[i, j : j + 1], anchors[j : j + 1])
                truth = target["boxes"][matched.matches[i, j]]
                expected[i, j] = box_iou(box, truth[None]).detach()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def weighting_module():
    from models.losses import weighting

    return weighting


@pytest.mark.parametrize("weighting", METHODS)
def test_empty_images_and_one_positive(weighting):
    outputs, anchors, targets = scene()
    none = [{"boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in targets]
    one = [*none[:2], {"boxes": anchors[:1] + 0.5, "labels": torch.tensor([1])}]
    for these in (none, one):
        losses = loss_step(weighting)(outputs, anchors, these)
        total = sum(losses.values())
        assert total.isfinite()
        for grad in torch.autograd.grad(total, leaves(outputs), allow_unused=True):
            assert grad is None or grad.isfinite().all()
        plain = loss_step()(outputs, anchors, these)
        # The labels of the one are softer, the other moves losses between images.
        if weighting not in ("cleanliness", "isr_n"):
            for name in ("classification", "bbox_regression"):
                torch.testing.assert_close(losses[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", METHODS)
def test_two_runs_give_the_same_bits(weighting):
    outputs, anchors, targets = scene()
    runs, step = [], loss_step(weighting)
    for _ in range(2):
        losses = step(outputs, anchors, targets)
        runs.append([*losses.values(), *torch.autograd.grad(sum(losses.values()), leaves(outputs))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("weighting", METHODS)
def test_compiles_whole(weighting):
    outputs, anchors, targets = scene()
    step = loss_step(weighting)

    def f(levels, anchors, targets):
        return step(HeadOutputs(levels[:2], levels[2:]), anchors, targets)

    levels = leaves(outputs)
    eager = f(levels, anchors, targets)
    # What inductor makes of a graph is its own affair, and takes it half a minute: of one method.
    backend = "inductor" if weighting == "pisa" else "aot_eager"
    compiled = torch.compile(f, fullgraph=True, backend=backend)(levels, anchors, targets)
    grads = [torch.autograd.grad(sum(x.values()), levels) for x in (eager, compiled)]
    for name, loss in eager.items():
        torch.testing.assert_close(compiled[name], loss)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", METHODS)
def test_half_precision_outputs(weighting):
    outputs, anchors, targets = scene()
    half = HeadOutputs(*([x.detach().bfloat16().requires_grad_() for x in o] for o in outputs))
    losses = loss_step(weighting)(half, anchors, targets)
    exact = loss_step(weighting)(outputs, anchors, targets)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.05)
    assert all(level.grad.isfinite().all() for level in leaves(half))


def test_other_classification_losses_have_no_weighting():
    with pytest.raises(ValueError, match="weighting must be none unless classification_loss is"):
        loss_step("isr", classification_loss="ohem")
