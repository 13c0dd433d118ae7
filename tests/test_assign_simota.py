"""assign_simota against the reference and what the peers gave."""

import json
import math
from pathlib import Path

import pytest
import torch
from assignments import grid, positives, predictions, random_boxes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focalops import assign_simota, reference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "simota.json").read_text())
STRIDES = [8, 16, 32]
RULES = ["simota", "yolox", "rtmdet"]


def check_is_the_references(*arguments, **options) -> tuple[Tensor, Tensor]:
    """Logarithms are of other polynomials, so that costs differ by ulps; overlaps have the same bits."""
    matches, ious = assign_simota(*arguments, **options)
    assert matches.dtype == torch.int64 and ious.dtype == torch.float32
    expected, expected_ious = reference.assign_simota(*arguments, **options)
    assert torch.equal(matches, expected) and torch.equal(ious, expected_ious)
    return matches, ious


def scene(counts, size: int = 96, num_classes: int = 5, rule: str = "simota", device: str = "cpu"):
    """Arguments and options; RTMDet's points are the corners of the cells."""
    points, sizes = grid(size, STRIDES)
    strides = torch.tensor(STRIDES).float().repeat_interleave(torch.tensor(sizes))
    gt_boxes = [random_boxes(n, size, most=120) for n in counts]
    scores, boxes, labels = predictions(points, gt_boxes, num_classes)
    if rule == "rtmdet":
        points = points - strides[:, None] / 2
    objectness = torch.randn(scores.shape[:2], device=device) if rule == "yolox" else None
    tensors = [scores.logit(1e-3), boxes, points, strides]
    of_images = [boxes.to(device) for boxes in gt_boxes], [t.to(device) for t in labels]
    options = {"rule": rule, "objectness": objectness}
    return (*(tensor.to(device) for tensor in tensors), *of_images), options


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("counts", [(0,), (1,), (5, 0, 25), (60, 1), (0, 0)], ids=str)
def test_is_the_references(rule, counts, device):
    arguments, options = scene(counts, rule=rule, device=device)
    matches, ious = check_is_the_references(*arguments, **options)
    assert (matches >= 0).any() or max(counts) < 2
    assert (ious[matches < 0] == 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("center_radius", "candidates"), [(0.5, 1), (4, 32), (0, 5)])
def test_radius_and_candidates(rule, center_radius, candidates, device):
    arguments, options = scene((20, 3), rule=rule, device=device)
    more = {"center_radius": center_radius, "candidates": candidates}
    check_is_the_references(*arguments, **options, **more)


def test_objectness_of_mmdets_rule(device):
    arguments, _ = scene((20, 3), device=device)
    objectness = torch.randn(arguments[0].shape[:2], device=device)
    matches, _ = check_is_the_references(*arguments, objectness=objectness)
    without, _ = check_is_the_references(*arguments)
    assert not torch.equal(matches, without)


@pytest.mark.parametrize("number", [1, 15, 17, 31, 33, 100])
def test_any_number_of_points(number, device):
    points, strides = torch.rand(number, 2) * 64, torch.rand(number) * 30
    gt_boxes = [random_boxes(9, 64, most=80) for _ in range(2)]
    scores, boxes, labels = predictions(points, gt_boxes, 3)
    tensors = [t.to(device) for t in (scores.logit(1e-3), boxes, points, strides)]
    on_device = [boxes.to(device) for boxes in gt_boxes], [t.to(device) for t in labels]
    objectness = torch.randn(2, number, device=device)
    for rule in RULES:
        options = {"rule": rule, "objectness": None if rule == "rtmdet" else objectness}
        check_is_the_references(*tensors, *on_device, **options)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["kind"])
def test_is_the_peers(case, device):
    points, sizes = grid(case["size"], STRIDES, device)
    strides = torch.tensor(STRIDES).float().repeat_interleave(torch.tensor(sizes)).to(device)
    names = ("logits", "boxes", "objectness", "gt_boxes")
    logits, boxes, objectness, gt_boxes = (torch.tensor(case[n], device=device) for n in names)
    gt_labels = torch.tensor(case["gt_labels"], device=device)
    for call in case["calls"]:
        matches, ious = check_is_the_references(
            *(logits[None], boxes[None], points + (call["offset"] - 0.5) * strides[:, None]),
            *(strides, [gt_boxes], [gt_labels]),
            rule=call["rule"],
            objectness=objectness[None] if call["has_objectness"] else None,
        )
        assert positives(matches[0]) == call["positives"]
        expected = torch.tensor(call["ious"], device=device)
        torch.testing.assert_close(ious[0][matches[0] >= 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_boxes_that_own_too_few_anchors(rule, device):
    """Between four points of the finest level, and twice at a corner of the image: they take others' anchors."""
    arguments, options = scene((6, 2), rule=rule, device=device)
    for boxes in arguments[4]:
        corner = boxes.new_tensor([[33, 33, 35, 35], [0, 0, 2, 2], [0, 0, 2, 2]])
        boxes[: len(boxes) // 2] = corner[: len(boxes) // 2]
    arguments[1][:, :6] = arguments[1].new_tensor([0.0, 0, 2, 2])  # more than the box may have
    check_is_the_references(*arguments, **options)


@pytest.mark.parametrize("rule", RULES)
def test_saturated_logits(rule, device):
    """The classes of all anchors of the first box cost more than the penalty: it takes another's."""
    num_classes = 10_100 if rule == "yolox" else 1100
    arguments, options = scene((3,), 48, num_classes, rule, device)
    logits, _, points, _, gt_boxes, _ = arguments
    gt_boxes[0] = points.new_tensor([[2, 2, 30, 30], [20, 20, 46, 46], [9, 3, 40, 28]])
    logits.fill_(-20.0)
    of_first = ((points > 2) & (points < 30)).all(1)
    logits[:, of_first] = 100.0
    if rule == "yolox":
        options["objectness"].fill_(100.0)
    matches, _ = check_is_the_references(*arguments, **options)
    assert (matches[:, ~of_first] >= 0).any() and not (matches[:, of_first] >= 0).any()
    logits.fill_(100.0)
    check_is_the_references(*arguments, **options)


@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_first(rule, device):
    """Equal predictions at equal places, and each box twice."""
    (logits, boxes, points, strides, _, _), options = scene((2,), 64, rule=rule, device=device)
    gt_boxes = [
        points.new_tensor([[8, 8, 24, 24], [8, 8, 24, 24], [40, 8, 56, 24], [40, 8, 56, 24]])
    ]
    labels = [torch.tensor([0, 0, 1, 1], device=device)]
    logits.zero_()
    boxes.copy_(points.repeat(1, 2) + boxes.new_tensor([-8, -8, 8, 8]))
    if rule == "yolox":
        options["objectness"].zero_()
    matches, _ = check_is_the_references(
        logits, boxes, points, strides, gt_boxes, labels, **options
    )
    assert set(matches.flatten().tolist()) == {-1, 0, 2}


@pytest.mark.parametrize("rule", RULES)
def test_crowds(rule, device):
    arguments, options = scene((30, 0, 15), rule=rule, device=device)
    points, gt_boxes = arguments[2], arguments[4]
    crowd = [torch.rand(len(boxes), device=device) < 0.1 for boxes in gt_boxes]
    for boxes, is_crowd in zip(gt_boxes, crowd, strict=True):
        boxes[3:4] = torch.tensor([30.0, 41, 62, 70], device=device)  # whose edge is on no point
        is_crowd[3:4] = True
    matches, _ = check_is_the_references(*arguments, **options, crowd=crowd)
    inside = ((points > points.new_tensor([30, 41])) & (points < points.new_tensor([62, 70]))).all(
        1
    )
    for match, is_crowd in zip(matches, crowd, strict=True):
        assert not torch.isin(match, torch.where(is_crowd)[0]).any()
        assert not len(is_crowd) or (match[inside] == -2).all()
    assert (matches[1] == -1).all()


def test_padded_boxes_and_counts(device):
    counts = [7, 0, 20]
    (*predicted, gt_boxes, gt_labels), options = scene(counts, 64, device=device)
    expected = assign_simota(*predicted, gt_boxes, gt_labels, **options)
    padded = torch.full((3, 20, 4), 20.0, device=device)  # behind the count nobody looks
    padded[:, :, 2:] = 90
    labels = torch.full((3, 20), 99, device=device)
    for i, (boxes, of_boxes) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
        padded[i, : len(boxes)] = boxes
        labels[i, : len(boxes)] = of_boxes
    for dtype in (torch.int32, torch.int64):
        on_device = torch.tensor(counts, dtype=dtype, device=device)
        strided = torch.stack((on_device, on_device + 1), dim=1)[:, 0]
        transposed = padded.transpose(0, 1).contiguous().transpose(0, 1)
        given = assign_simota(*predicted, transposed, labels.to(dtype), counts=strided)
        assert all(map(torch.equal, given, expected))


def test_logits_where_they_lie(device):
    (logits, *arguments), options = scene((8, 3), 48, rule="yolox", device=device)
    expected = assign_simota(logits, *arguments, **options)
    head = torch.cat((options["objectness"][..., None], logits), dim=2).permute(2, 0, 1)
    head = head.contiguous().permute(1, 2, 0)
    given = assign_simota(head[..., 1:], *arguments, rule="yolox", objectness=head[..., 0])
    assert all(map(torch.equal, given, expected))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded, objectness = logits.to(dtype), options["objectness"].to(dtype)
        given = assign_simota(rounded, *arguments, rule="yolox", objectness=objectness)
        expected = assign_simota(
            rounded.float(), *arguments, rule="yolox", objectness=objectness.float()
        )
        assert all(map(torch.equal, given, expected))


def test_other_dtypes_and_no_images(device):
    (logits, boxes, points, strides, gt_boxes, gt_labels), _ = scene((12,), 64, device=device)
    boxes, gt_boxes = boxes.round(), [gt_boxes[0].round()]
    expected = assign_simota(logits, boxes, points, strides, gt_boxes, gt_labels)
    for dtype in (torch.int64, torch.float16, torch.float64):
        arguments = (boxes.to(dtype), points.to(dtype), strides.to(dtype), [gt_boxes[0].to(dtype)])
        given = assign_simota(logits, *arguments, [gt_labels[0].to(torch.uint8)])
        assert all(map(torch.equal, given, expected))
    matches, ious = assign_simota(
        logits.requires_grad_(), boxes.requires_grad_(), points, strides, gt_boxes, gt_labels
    )
    assert not matches.requires_grad and not ious.requires_grad
    matches, ious = assign_simota(logits[:0], boxes[:0], points, strides, [], [])
    assert matches.shape == ious.shape == (0, len(points))
    none = (logits[:, :0], boxes[:, :0], points[:0], strides[:0], gt_boxes, gt_labels)
    assert assign_simota(*none)[0].shape == (1, 0)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_number(rule, device):
    """Is never taken."""
    arguments, options = scene((20,), rule=rule, device=device)
    logits, boxes, _, _, gt_boxes, _ = arguments
    logits[0, ::3, 1] = math.nan
    boxes[0, 1::3] = math.nan
    gt_boxes[0][4] = math.nan
    matches, _ = check_is_the_references(*arguments, **options)
    assert (matches[0, ::3] == -1).all() and (matches[0, 1::3] == -1).all()
    assert (matches != 4).all()


def test_labels_out_of_range(backend, device):
    arguments, _ = scene((6, 4), device=device)
    *predicted, gt_boxes, gt_labels = arguments
    rest = [gt_boxes[0][:5], gt_boxes[1][1:]], [gt_labels[0][:5], gt_labels[1][1:]]
    expected, _ = assign_simota(*predicted, *rest)
    gt_labels[0][5], gt_labels[1][0] = 5, -1
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"gt_labels must lie in \[0, 4\], .* got 5"):
            assign_simota(*arguments)
    else:  # their boxes are none
        matches, _ = assign_simota(*arguments)
        expected[1] = torch.where(expected[1] >= 0, expected[1] + 1, expected[1])
        assert torch.equal(matches, expected)


COORDINATES = st.sampled_from([-3.0, 0, 1, 1.5, 2, 4, 7, 20, 1e6, 1e30, math.inf, math.nan])
BOXES = st.tuples(*[COORDINATES] * 4)
LOGITS = st.sampled_from([-200.0, -3.0, 0.0, 0.5, 4.0, 200.0, math.nan])


@given(
    st.lists(st.tuples(COORDINATES, COORDINATES, BOXES, LOGITS), min_size=1, max_size=30),
    st.lists(BOXES, max_size=12),
    st.sampled_from(RULES),
    st.sampled_from([1, 2, 13]),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_any_boxes(anchors, boxes, rule, candidates, crowd):
    """Inverted ones, infinite ones and what is not a number included; ties in numbers."""
    points = torch.tensor([anchor[:2] for anchor in anchors])
    pred_boxes = torch.tensor([anchor[2] for anchor in anchors])
    logits = torch.tensor([anchor[3] for anchor in anchors]).view(1, -1, 1)
    check_is_the_references(
        *(logits, pred_boxes[None], points, torch.tensor([4.0, 8, 1]).repeat(10)[: len(points)]),
        [torch.tensor(boxes).reshape(-1, 4)],
        [torch.zeros(len(boxes)).long()],
        rule=rule,
        objectness=logits[..., 0].flip(1) if rule == "yolox" else None,
        candidates=candidates,
        crowd=[torch.tensor(crowd[: len(boxes)], dtype=torch.bool)] if sum(crowd) > 6 else None,
    )


def test_two_runs_give_the_same_bits(device):
    for rule in RULES:
        arguments, options = scene((12, 4), 48, rule=rule, device=device)
        first = assign_simota(*arguments, **options)
        assert all(map(torch.equal, first, assign_simota(*arguments, **options)))


def test_opcheck_and_compiles_whole(device):
    arguments, _ = scene((5, 5), 32, device=device)
    logits, boxes, points, strides, gt_boxes, gt_labels = arguments
    tensors = (logits, boxes, points, strides, torch.stack(gt_boxes), torch.stack(gt_labels))
    crowd = torch.rand(2, 5, device=device) < 0.3
    of_images = torch.randn(logits.shape[:2], device=device), torch.tensor([5, 2], device=device)
    for optional in ((None, None, None), (*of_images, crowd)):
        options = (*optional, 0, 2.5, 10)
        torch.library.opcheck(torch.ops.focalops.assign_simota.default, (*tensors, *options))

    def f(logits, boxes, gt_boxes):
        return assign_simota(logits, boxes, points, strides, gt_boxes, gt_labels)

    whole = torch.compile(f, fullgraph=True, dynamic=True)
    assert all(map(torch.equal, whole(logits, boxes, gt_boxes), f(logits, boxes, gt_boxes)))
