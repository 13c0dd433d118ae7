"""assign_task_aligned against the reference and what the peers gave."""

import json
import math
from pathlib import Path

import pytest
import torch
from assignments import grid, positives, predictions, random_boxes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focalops import assign_task_aligned, reference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "task_aligned.json").read_text())
STRIDES = [8, 16, 32]
RULES = ["ultralytics", "mmyolo", "tood"]


def check_is_the_references(*arguments, **options) -> tuple[Tensor, Tensor]:
    """The arctangents of CIoU differ by some ulps, which the metric raises to a power: scores differ by a multiple of that."""
    matches, scores = assign_task_aligned(*arguments, **options)
    assert matches.dtype == torch.int64 and scores.dtype == torch.float32
    expected, expected_scores = reference.assign_task_aligned(*arguments, **options)
    assert torch.equal(matches, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=2e-4, atol=1e-30)
    return matches, scores


def scene(counts, size: int = 128, num_classes: int = 5, device: str = "cpu"):
    points, _ = grid(size, STRIDES)
    gt_boxes = [random_boxes(n, size, most=150) for n in counts]
    scores, boxes, labels = predictions(points, gt_boxes, num_classes)
    of_images = [boxes.to(device) for boxes in gt_boxes], [t.to(device) for t in labels]
    return scores.to(device), boxes.to(device), points.to(device), *of_images


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("counts", [(0,), (1,), (5, 0, 33), (90, 1), (0, 0)], ids=str)
def test_is_the_references(rule, counts, device):
    arguments = scene(counts, device=device)
    for options in (
        {},
        {"topk": 1, "alpha": 1, "beta": 2},
        {"topk": 32, "alpha": 0, "beta": 1},
        {"alpha": 0.5, "beta": 0.5},
    ):
        matches, scores = check_is_the_references(*arguments, rule=rule, **options)
        assert (matches >= 0).any() or max(counts) < 2
        assert (scores[matches < 0] == 0).all() and (scores[matches >= 0] > 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overlap", ["iou", "ciou"])
def test_overlaps_and_eps(rule, overlap, device):
    arguments = scene((20, 3), device=device)
    check_is_the_references(*arguments, rule=rule, overlap=overlap, eps=1e-3)


@pytest.mark.parametrize("final_topk", [1, 3, 32])
@pytest.mark.parametrize("min_side", [0, 8.0, 40.0])
def test_options_of_ultralytics(final_topk, min_side, device):
    arguments = scene((30, 0, 4), device=device)
    options = {"min_side": min_side, "final_topk": final_topk}
    matches, _ = check_is_the_references(*arguments, **options)
    for match in matches:
        assert match[match >= 0].bincount().max() <= final_topk if (match >= 0).any() else True


def test_powers_that_are_no_products(device):
    """Of exponentials and logarithms of their own, which are within an ulp."""
    arguments = scene((20,), device=device)
    options = {"alpha": 0.7, "beta": 5.5, "overlap": "iou"}
    matches, scores = assign_task_aligned(*arguments, **options)
    expected, expected_scores = reference.assign_task_aligned(*arguments, **options)
    assert torch.equal(matches, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-30)


# Points that are grids are looked up by columns and rows on the CPU, others are compared.
ORDERS = {
    "grids": lambda points: points,
    "cut off": lambda points: points[1:-1],
    "columns first": lambda points: points.flip(1),
    "descending": lambda points: points.flip(0),
    "repeated": lambda points: points.repeat_interleave(2, dim=0),
    "shuffled": lambda points: points[torch.randperm(len(points))],
}
# What happens to some of them once there are predictions about them.
BROKEN = {
    "whole": lambda points: points,
    "elsewhere": lambda points: points.index_add(0, HALF, torch.full((120, 2), 99.0)),
    "no numbers": lambda points: points.index_fill(0, HALF, torch.nan),
    "the first is no number": lambda points: points.index_fill(0, HALF[:1] * 0, torch.nan),
    "infinite": lambda points: points.index_fill(0, HALF[-9:], torch.inf),
}
HALF = torch.arange(17, 256, 2)  # of the first level, but for its first row


@pytest.mark.parametrize(
    "order, broken",
    [
        *((order, "whole") for order in ORDERS),
        *(("grids", broken) for broken in BROKEN if broken != "whole"),
    ],
)
@pytest.mark.parametrize("boxes", [5, 40])
def test_points_in_any_order(order, broken, boxes, device):
    """Few boxes find the angles of those predictions alone that they hold."""
    points = ORDERS[order](grid(128, STRIDES)[0])
    gt_boxes = [random_boxes(n, 128, most=150) for n in (boxes, 3)]
    scores, predicted, labels = predictions(points, gt_boxes, 4)
    points = BROKEN[broken](points)
    on_device = [boxes.to(device) for boxes in gt_boxes], [t.to(device) for t in labels]
    for rule in RULES:
        arguments = (scores.to(device), predicted.to(device), points.to(device), *on_device)
        matches, _ = check_is_the_references(*arguments, rule=rule)
        assert (matches >= 0).any()


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 31, 33, 257])
def test_any_number_of_points(number, device):
    points = torch.rand(number, 2) * 64
    gt_boxes = [random_boxes(9, 64, most=80) for _ in range(2)]
    scores, boxes, labels = predictions(points, gt_boxes, 3)
    on_device = [boxes.to(device) for boxes in gt_boxes], [t.to(device) for t in labels]
    for rule in RULES:
        arguments = (scores.to(device), boxes.to(device), points.to(device), *on_device)
        check_is_the_references(*arguments, rule=rule)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["kind"])
def test_is_the_peers(case, device):
    points, _ = grid(case["size"], STRIDES, device)
    tensors = [torch.tensor(case[name], device=device) for name in ("scores", "boxes")]
    gt_boxes = torch.tensor(case["gt_boxes"], device=device).reshape(-1, 4)
    gt_labels = torch.tensor(case["gt_labels"], dtype=torch.int64, device=device)
    for call in case["calls"]:
        matches, scores = check_is_the_references(
            *(tensor[None] for tensor in tensors),
            points,
            [gt_boxes],
            [gt_labels],
            **call["options"],
        )
        assert positives(matches[0]) == call["positives"]
        expected = torch.tensor(call["scores"], device=device)
        torch.testing.assert_close(scores[0][matches[0] >= 0], expected, rtol=2e-4, atol=1e-8)


def test_who_contests_an_anchor(device):
    """The first two boxes take the first point, which the third holds and the fourth does not; its prediction is the fourth."""
    points = torch.tensor([[10.0, 10], [30, 30]], device=device)
    gt_boxes = [[0.0, 0, 20, 20], [0, 0, 24, 24], [4, 0, 50, 40], [12, 0, 50, 40]]
    boxes = torch.tensor([[[12.0, 0, 50, 40], [8, 0, 50, 40]]], device=device)
    scores = torch.tensor([[[0.9, 0.01, 0.01], [0.01, 0.9, 0.9]]], device=device)
    arguments = (scores, boxes, points, [torch.tensor(gt_boxes, device=device)])
    labels = [torch.tensor([0, 0, 1, 2], device=device)]
    for rule, winner in (("tood", 1), ("ultralytics", 2), ("mmyolo", 3)):
        options = {"topk": 1, "beta": 1, "overlap": "iou", "rule": rule}
        matches, _ = check_is_the_references(*arguments, labels, **options)
        assert matches.tolist() == [[winner, 2]]


@pytest.mark.parametrize("rule", RULES)
def test_crowds(rule, device):
    arguments = scene((40, 0, 25), device=device)
    points, gt_boxes = arguments[2:4]
    crowd = [torch.rand(len(boxes), device=device) < 0.1 for boxes in gt_boxes]
    for boxes, is_crowd in zip(gt_boxes, crowd, strict=True):
        boxes[3:4] = torch.tensor([30.0, 40, 60, 70], device=device)  # whose edge is on no point
        is_crowd[3:4] = True
    matches, _ = check_is_the_references(*arguments, rule=rule, crowd=crowd)
    low, high = points.new_tensor([30, 40]), points.new_tensor([60, 70])
    inside = ((points > low) & (points < high)).all(1)
    for match, is_crowd in zip(matches, crowd, strict=True):
        assert not torch.isin(match, torch.where(is_crowd)[0]).any()
        assert not len(is_crowd) or (match[inside] == -2).all()
    assert (matches[1] == -1).all()


def test_padded_boxes_and_counts(device):
    counts = [7, 0, 40]
    *predicted, gt_boxes, gt_labels = scene(counts, device=device)
    expected = assign_task_aligned(*predicted, gt_boxes, gt_labels)
    padded = torch.full(
        (3, 40, 4), 20.0, device=device
    )  # what lies behind the count is not looked at
    padded[:, :, 2:] = 90
    labels = torch.full((3, 40), 99, device=device)
    for i, (boxes, of_boxes) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
        padded[i, : len(boxes)] = boxes
        labels[i, : len(boxes)] = of_boxes
    for dtype in (torch.int32, torch.int64):
        on_device = torch.tensor(counts, dtype=dtype, device=device)
        strided = torch.stack((on_device, on_device + 1), dim=1)[:, 0]
        transposed = padded.transpose(0, 1).contiguous().transpose(0, 1)
        given = assign_task_aligned(*predicted, transposed, labels.to(dtype), counts=strided)
        assert all(map(torch.equal, given, expected))


def test_scores_where_they_lie(device):
    scores, *arguments = scene((20, 3), device=device)
    expected = assign_task_aligned(scores, *arguments)
    across = scores.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert all(map(torch.equal, assign_task_aligned(across, *arguments), expected))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = scores.to(dtype)
        given = assign_task_aligned(rounded, *arguments)
        expected = assign_task_aligned(rounded.float(), *arguments)
        assert all(map(torch.equal, given, expected))


def test_other_dtypes_and_no_images(device):
    scores, boxes, points, gt_boxes, gt_labels = scene((12,), 64, device=device)
    boxes, gt_boxes = boxes.round(), [gt_boxes[0].round()]
    expected = assign_task_aligned(scores, boxes, points, gt_boxes, gt_labels)
    for dtype in (torch.int64, torch.float16, torch.float64):
        arguments = (boxes.to(dtype), points.to(dtype), [gt_boxes[0].to(dtype)])
        given = assign_task_aligned(scores, *arguments, [gt_labels[0].to(torch.uint8)])
        assert all(map(torch.equal, given, expected))
    matches, _ = assign_task_aligned(
        scores.requires_grad_(), boxes.requires_grad_(), points, gt_boxes, gt_labels
    )
    assert not matches.requires_grad
    matches, targets = assign_task_aligned(scores[:0], boxes[:0], points, [], [])
    assert matches.shape == targets.shape == (0, len(points))


def test_what_is_no_number(device):
    """Trains nothing."""
    scores, boxes, points, gt_boxes, gt_labels = scene((20,), device=device)
    scores[0, ::3] = math.nan
    boxes[0, 1::3] = math.nan
    gt_boxes[0][4] = math.nan
    for rule in RULES:
        matches, _ = check_is_the_references(scores, boxes, points, gt_boxes, gt_labels, rule=rule)
        assert (matches[0, ::3] == -1).all() and (matches[0, 1::3] == -1).all()


def test_labels_out_of_range(backend, device):
    scores, boxes, points, gt_boxes, gt_labels = scene((6, 4), device=device)
    expected, _ = assign_task_aligned(
        scores,
        boxes,
        points,
        [gt_boxes[0][:5], gt_boxes[1][1:]],
        [gt_labels[0][:5], gt_labels[1][1:]],
    )
    gt_labels[0][5], gt_labels[1][0] = 5, -1
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"gt_labels must lie in \[0, 4\], .* got 5"):
            assign_task_aligned(scores, boxes, points, gt_boxes, gt_labels)
    else:  # their boxes take nothing
        matches, _ = assign_task_aligned(scores, boxes, points, gt_boxes, gt_labels)
        expected[1] = torch.where(expected[1] >= 0, expected[1] + 1, expected[1])
        assert torch.equal(matches, expected)


COORDINATES = st.sampled_from([-3.0, 0, 1, 1.5, 2, 4, 7, 20, 1e6, 1e30, math.inf, math.nan])
BOXES = st.tuples(*[COORDINATES] * 4)


@given(
    st.lists(st.tuples(COORDINATES, COORDINATES, BOXES), min_size=1, max_size=30),
    st.lists(BOXES, max_size=12),
    st.sampled_from(RULES),
    st.sampled_from([1, 2, 5]),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from([None, 1, 2]),
)
def test_any_boxes(anchors, boxes, rule, topk, crowd, final_topk):
    """Inverted ones, infinite ones and what is not a number included. Plain IoU has the reference's bits, ties included."""
    points = torch.tensor([anchor[:2] for anchor in anchors])
    pred_boxes = torch.tensor([anchor[2] for anchor in anchors])
    scores = torch.tensor([0.25, 0.5, 0.5, 1.0]).repeat(15)[: 2 * len(anchors)].view(1, -1, 2)
    check_is_the_references(
        *(scores, pred_boxes[None], points),
        [torch.tensor(boxes).reshape(-1, 4)],
        [torch.arange(len(boxes)) % 2],
        topk,
        beta=2,
        rule=rule,
        overlap="iou",
        final_topk=final_topk if rule == "ultralytics" else None,
        crowd=[torch.tensor(crowd[: len(boxes)], dtype=torch.bool)] if sum(crowd) > 6 else None,
    )


def test_two_runs_give_the_same_bits(device):
    arguments = scene((60, 20), device=device)
    for rule in RULES:
        first = assign_task_aligned(*arguments, rule=rule)
        assert all(map(torch.equal, first, assign_task_aligned(*arguments, rule=rule)))


def test_opcheck_and_compiles_whole(device):
    scores, boxes, points, gt_boxes, gt_labels = scene((5, 5), 32, device=device)
    padded, labels = torch.stack(gt_boxes), torch.stack(gt_labels)
    crowd = torch.rand(2, 5, device=device) < 0.3
    options = (10, 0.5, 6.0, 0, 3, 16.0, 0, 1e-9)
    for counts, of_boxes in ((None, None), (torch.tensor([5, 2], device=device), crowd)):
        arguments = (scores, boxes, points, padded, labels, counts, of_boxes, *options)
        torch.library.opcheck(torch.ops.focalops.assign_task_aligned.default, arguments)

    def f(scores, boxes, gt_boxes):
        return assign_task_aligned(scores, boxes, points, gt_boxes, gt_labels)

    whole = torch.compile(f, fullgraph=True, dynamic=True)
    assert all(map(torch.equal, whole(scores, boxes, gt_boxes), f(scores, boxes, gt_boxes)))
