"""Which anchors learn which box, by configuration, and the loss whose targets are scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_models_retinanet import TINY
from test_models_weighting import leaves, loss_step, scene
from tiny_backbone import TINY_RECIPE
from torch import Tensor

from focalops import box_iou_loss, decode_boxes, reference
from models.config import ASSIGNERS
from models.detectors import create, from_json, to_json
from models.efficientdet import EfficientDetConfig
from models.losses.matching import rows_of
from models.recipes import with_model

SMALL = {"num_classes": 2, "min_size": 128, "max_size": 128}
EFFICIENTDET = EfficientDetConfig.named(
    "lite0", cells=1, pyramid_channels=16, head_depth=1, **SMALL
)
LOSSES = [
    *((assigner, "focal") for assigner in ASSIGNERS if assigner != "task_aligned"),
    *((assigner, "quality") for assigner in ASSIGNERS),
]


@pytest.mark.parametrize("kind", [TINY, EFFICIENTDET], ids=lambda config: config.kind)
@pytest.mark.parametrize("assigner, loss", LOSSES)
def test_a_detector_learns_by_each(kind, assigner: str, loss: str) -> None:
    """With an image without objects; the losses of another have gradients in the heads."""
    config = dataclasses.replace(kind, assigner=assigner, classification_loss=loss)
    assert from_json(to_json(config)) == config
    model = create(config).train()
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    boxes = torch.tensor([[20.0, 20, 52, 52], [50, 40, 90, 88]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([0, 1])},
        {"boxes": boxes[:0], "labels": torch.tensor([], dtype=torch.int64)},
    ]
    losses = model(images, targets)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for name, p in model.named_parameters() if "head" in name]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def quality_by_hand(outputs, classes: Tensor, scores: Tensor, normalizers: Tensor) -> Tensor:
    rows = rows_of(outputs.cls_logits, TINY.num_classes).double()
    target = reference.one_hot(classes, TINY.num_classes) * scores[..., None].double()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        rows, target, reduction="none"
    )
    losses = cross_entropy * (rows.sigmoid() - target).abs() ** TINY.gamma
    valid = (classes >= 0)[..., None]  # not those that are ignored
    return ((losses * valid).sum((1, 2)) / normalizers.clamp(min=1)).sum() / len(classes)


def test_quality_is_the_iou_of_the_match() -> None:
    outputs, anchors, targets = scene()
    step = loss_step(assigner="atss", classification_loss="quality")
    matched = step.match(outputs, anchors, targets)
    assert (matched.matches >= 0).any()
    assert torch.equal(
        matched.matches,
        reference.assign_atss(
            anchors,
            [level[0].numel() // 4 for level in outputs.box_deltas],
            [t["boxes"] for t in targets],
            27,  # nine of each of the three anchors of a position
        ),
    )
    scores = torch.zeros(matched.matches.shape)
    deltas = rows_of(outputs.box_deltas, 4)
    for i, match in enumerate(matched.matches):
        n = torch.where(match >= 0)[0]
        if len(n):
            boxes = targets[i]["boxes"][match[n]]
            scores[i, n] = 1 - box_iou_loss(decode_boxes(deltas[i, n], anchors[n]), boxes).detach()
    expected = quality_by_hand(outputs, matched.classes, scores, matched.normalizers)
    losses = step(outputs, anchors, targets)
    torch.testing.assert_close(losses["classification"].double(), expected, rtol=1e-5, atol=0)


def test_task_aligned_learns_and_weighs_by_the_scores() -> None:
    outputs, anchors, targets = scene()
    step = loss_step(assigner="task_aligned", classification_loss="quality", box_loss="giou")
    matched = step.match(outputs, anchors, targets)
    logits, deltas = rows_of(outputs.cls_logits, TINY.num_classes), rows_of(outputs.box_deltas, 4)
    decoded = torch.stack([decode_boxes(of_image, anchors) for of_image in deltas])
    matches, scores = reference.assign_task_aligned(
        logits.detach().sigmoid(),
        decoded.detach(),
        (anchors[:, :2] + anchors[:, 2:]) / 2,
        [t["boxes"] for t in targets],
        [t["labels"] for t in targets],
        *(13, 1.0, 6.0),
        rule="tood",
    )
    assert torch.equal(matched.matches, matches)
    torch.testing.assert_close(matched.scores, scores, rtol=1e-4, atol=1e-12)
    assert (matches >= 0).any() and not matched.scores.requires_grad
    torch.testing.assert_close(matched.normalizers, scores.sum(1), rtol=1e-4, atol=1e-9)
    losses = step(outputs, anchors, targets)
    expected = quality_by_hand(outputs, matched.classes, scores, matched.normalizers)
    torch.testing.assert_close(losses["classification"].double(), expected, rtol=1e-4, atol=0)
    of_boxes = torch.zeros(())
    for i, match in enumerate(matches):
        n = torch.where(match >= 0)[0]
        boxes = targets[i]["boxes"][match[n]]
        of_image = reference.generalized_box_iou_loss(decoded[i, n], boxes) * scores[i, n]
        of_boxes = of_boxes + of_image.sum() / scores[i].sum().clamp(min=1)
    torch.testing.assert_close(losses["bbox_regression"], of_boxes / 3, rtol=1e-4, atol=0)
    sum(losses.values()).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves(outputs))


def test_fcos_and_simota_see_the_centers_and_strides() -> None:
    outputs, anchors, targets = scene()
    boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    sizes = [level[0].numel() // 4 for level in outputs.box_deltas]
    step = loss_step(assigner="fcos")
    matches = step.match(outputs, anchors, targets).matches
    assert torch.equal(matches, reference.assign_fcos(points, [8.0, 16.0], sizes, boxes))
    assert (matches >= 0).any()

    step = loss_step(assigner="simota", classification_loss="quality")
    matched = step.match(outputs, anchors, targets)
    deltas = rows_of(outputs.box_deltas, 4).detach()
    expected, _ = reference.assign_simota(
        rows_of(outputs.cls_logits, TINY.num_classes).detach(),
        torch.stack([decode_boxes(of_image, anchors) for of_image in deltas]),
        points,
        torch.tensor([8.0] * sizes[0] + [16.0] * sizes[1]),
        boxes,
        labels,
    )
    assert torch.equal(matched.matches, expected) and (expected >= 0).any()
    assert matched.scores is None


@pytest.mark.parametrize("assigner", ["atss", "fcos", "simota", "task_aligned"])
def test_crowds_have_no_part(assigner: str) -> None:
    outputs, anchors, targets = scene()
    for target in targets:
        target["iscrowd"] = torch.zeros_like(target["labels"])
        target["iscrowd"][:1] = 1
    step = loss_step(assigner=assigner, classification_loss="quality")
    matched = step.match(outputs, anchors, targets)
    assert not (matched.matches == 0).any()
    assert (matched.matches == -2).any()
    assert (matched.classes[matched.matches == -2] == -100).all()


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="classification_loss must be quality with assigner"):
        with_model(TINY_RECIPE, assigner="task_aligned")
    with pytest.raises(
        ValueError, match="assigner must be one of iou, atss, fcos, simota, task_ali"
    ):
        with_model(TINY_RECIPE, assigner="ota")


def test_one_graph() -> None:
    outputs, anchors, targets = scene()
    for assigner in ("atss", "fcos", "simota", "task_aligned"):
        step = loss_step(assigner=assigner, classification_loss="quality")
        expected = step(outputs, anchors, targets)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(outputs, anchors, targets), expected)
