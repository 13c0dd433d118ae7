"""match_anchors and class_index_targets against the reference and torchvision."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from focalops import (
    box_iou,
    class_index_targets,
    count_degenerate_boxes,
    match_anchors,
    match_iou_matrix,
    matching,
    reference,
)


def anchor_grid(height: int, width: int, device: str = "cpu", stride: int = 16) -> Tensor:
    """In the order of AnchorGenerator: neighbours in memory are neighbours in the image."""
    sizes = torch.tensor([[32.0, 32], [45, 23], [23, 45], [64, 64]])
    base = torch.cat((-sizes / 2, sizes / 2), dim=1).round()
    y, x = torch.meshgrid(
        torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij"
    )
    shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (shifts + base).reshape(-1, 4).float().to(device)


def random_boxes(n: int, height: float, width: float, device: str = "cpu") -> Tensor:
    center = torch.rand(n, 2) * torch.tensor([width, height])
    size = torch.exp(torch.rand(n, 2) * 4 + 1)
    return torch.cat((center - size / 2, center + size / 2), dim=1).to(device)


def check_is_the_references(anchors: Tensor, gt_boxes, *arguments, **options) -> Tensor:
    matches = match_anchors(anchors, gt_boxes, *arguments, **options)
    assert matches.dtype == torch.int64
    assert torch.equal(matches, reference.match_anchors(anchors, gt_boxes, *arguments, **options))
    return matches


# Boxes of the images of a batch: none, one, one image's chunk in shared memory and more, several warps' worth.
@pytest.mark.parametrize(
    "counts", [(0,), (1,), (5, 0, 33), (300, 1), (0, 0), (8, 8, 8, 8)], ids=str
)
@pytest.mark.parametrize("allow_low_quality", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_references(counts, allow_low_quality, dtype, device):
    anchors = anchor_grid(9, 11, device).to(dtype)
    gt_boxes = [random_boxes(n, 144, 176, device).to(dtype) for n in counts]
    check_is_the_references(anchors, gt_boxes, 0.5, 0.4, allow_low_quality)


@pytest.mark.parametrize("num_anchors", [0, 1, 31, 32, 33, 255, 256, 257, 2047, 2049, 4500])
def test_any_number_of_anchors(num_anchors, device):
    anchors = anchor_grid(30, 40, device)[:num_anchors]
    check_is_the_references(anchors, [random_boxes(20, 480, 640, device) for _ in range(2)])


def test_anchors_in_any_order(device):
    anchors = anchor_grid(20, 20, device)
    order = torch.randperm(len(anchors))
    gt_boxes = [random_boxes(40, 320, 320, device)]
    assert torch.equal(
        match_anchors(anchors[order], gt_boxes), match_anchors(anchors, gt_boxes)[:, order]
    )


@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.7, 0.3), (0.5, 0.5), (0.0, 0.0), (0.5, 0.0), (-1.0, -2.0), (2.0, 1.5)], ids=str)  # fmt: skip
@pytest.mark.parametrize("allow_low_quality", [True, False])
def test_is_torchvisions(thresholds, allow_low_quality, device):
    anchors = anchor_grid(20, 20, device)
    boxes = random_boxes(30, 320, 320, device)
    iou = torchvision.ops.box_iou(boxes, anchors)
    boxes, iou = boxes[iou.amax(1) > 0], iou[iou.amax(1) > 0]
    expected = Matcher(*thresholds, allow_low_quality)(iou)
    assert torch.equal(match_anchors(anchors, [boxes], *thresholds, allow_low_quality)[0], expected)


def test_thresholds_compare_in_float32(device):
    anchors = torch.tensor([[0.0, 0, 10, 10]], device=device)
    for numerator in range(1, 10):
        boxes = torch.tensor([[0.0, 0, 10, numerator]], device=device)
        threshold = numerator / 10  # rounded to float32 it is the IoU, in float64 often greater
        assert match_anchors(anchors, [boxes], threshold, threshold, False).item() == 0


def test_low_quality_matches(device):
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    #                    half of anchor 0,   a tenth of 1 and of 2 alike, touches 3, far away
    boxes = torch.tensor([[0.0, 0, 10, 5], [29, 0, 41, 1], [70, 0, 80, 10], [500, 0, 510, 10]])
    matches = match_anchors(anchors.to(device), [boxes.to(device)], 0.9, 0.1)
    assert matches.tolist() == [[0, 1, 1, -1]]
    matches = match_anchors(anchors.to(device), [boxes.to(device)], 0.9, 0.1, False)
    assert matches.tolist() == [[-2, -1, -1, -1]]


def test_an_anchor_restored_for_one_box_takes_its_own_best(device):
    anchors = torch.tensor([[0.0, 0, 10, 10]], device=device)
    boxes = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 3], [0, 5, 10, 8]], device=device)
    assert match_anchors(anchors, [boxes]).tolist() == [[1]]  # the first of the equal best two


def test_a_box_that_overlaps_nothing_matches_nothing(device):
    anchors = anchor_grid(5, 5, device)
    boxes = torch.tensor([[1e4, 1e4, 2e4, 2e4], [3, 3, 3, 3], [5, 9, 40, 9]], device=device)
    assert (match_anchors(anchors, [boxes]) == -1).all()
    assert (match_anchors(anchors, [boxes], 0.0, 0.0) == 0).all()


def test_what_is_not_a_number_overlaps_nothing(device):
    anchors = anchor_grid(8, 8, device)
    boxes = random_boxes(10, 128, 128, device)
    anchors[::7, 1], boxes[3, 0], boxes[5, 3], boxes[7] = math.nan, math.nan, math.inf, -math.inf
    matches = check_is_the_references(anchors, [boxes])
    assert (matches[0, ::7] == -1).all()
    assert not torch.isin(matches, torch.tensor([3, 7], device=device)).any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_padded_boxes_and_counts(index_dtype, device):
    anchors = anchor_grid(9, 11, device)
    counts = [7, 0, 40]
    gt_boxes = [random_boxes(n, 144, 176, device) for n in counts]
    expected = match_anchors(anchors, gt_boxes)
    # What lies behind the count would match better than anything: it is not looked at.
    padded = torch.stack([torch.cat((boxes, anchors[: 40 - len(boxes)])) for boxes in gt_boxes])
    on_device = torch.tensor(counts, dtype=index_dtype, device=device)
    assert torch.equal(match_anchors(anchors, padded, counts=on_device), expected)
    strided = torch.stack((on_device, on_device + 1), dim=1)[:, 0]
    transposed = padded.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(match_anchors(anchors, transposed, counts=strided), expected)
    assert torch.equal(match_anchors(anchors, padded), match_anchors(anchors, list(padded)))


def test_other_dtypes(device):
    anchors = anchor_grid(9, 11, device)
    boxes = random_boxes(12, 144, 176, device).round()
    expected = match_anchors(anchors, [boxes])
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        assert torch.equal(match_anchors(anchors, [boxes.to(dtype)]), expected)
        assert torch.equal(match_anchors(anchors.to(dtype), [boxes.to(dtype)]), expected)
    assert torch.equal(match_anchors(anchors, [boxes.double().requires_grad_()]), expected)


def test_no_images(device):
    anchors = anchor_grid(2, 2, device)
    assert match_anchors(anchors, []).shape == (0, 16)
    assert match_anchors(anchors, torch.zeros(0, 3, 4, device=device)).shape == (0, 16)


# ---- rules --------------------------------------------------------------------------------------


GOLDEN = json.loads((Path(__file__).parent / "golden" / "matching.json").read_text())["scenes"]


@pytest.mark.parametrize("scene", GOLDEN, ids=lambda scene: scene["kind"])
def test_rules_are_the_originals(scene, device):
    anchors = torch.tensor(scene["anchors"], device=device)
    boxes = torch.tensor(scene["boxes"], device=device)
    crowd = torch.arange(len(boxes), device=device) < scene["num_crowds"]
    for call in scene["calls"]:
        options = call["options"] | ({"crowd": [crowd]} if call["crowds"] else {})
        matches = check_is_the_references(anchors, [boxes], **options)
        assert matches.tolist() == [call["matches"]]
        if options["rule"] == "detectron2":
            options["rule"] = "torchvision"
            assert match_anchors(anchors, [boxes], **options).tolist() == [call["matches"]]


def test_rules_differ(device):
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]], device=device)
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 2], [19, 0, 22, 1]], device=device)
    assert match_anchors(anchors, [boxes]).tolist() == [[0, 0, 2]]
    mmdet = {"rule": "mmdet"}
    assert match_anchors(anchors, [boxes], **mmdet).tolist() == [[1, 1, 2]]
    assert match_anchors(anchors, [boxes], **mmdet, min_pos_iou=0.1).tolist() == [[1, 1, -1]]
    first = match_anchors(anchors, [boxes], **mmdet, gt_max_assign_all=False)
    assert first.tolist() == [[1, 0, 2]]
    twice = boxes[[0, 1, 0, 2]]  # three boxes claim the first anchor
    last = match_anchors(anchors, [twice], **mmdet, gt_max_assign_all=False)
    assert last.tolist() == [[2, 0, 3]]
    assert match_anchors(anchors, [twice], rule="efficientdet").tolist() == [[0, 0, 3]]
    far = torch.tensor([[900.0, 900, 950, 950]], device=device)  # anchor 0 there, none here
    assert match_anchors(anchors, [far], rule="efficientdet").tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("counts", [(5, 0, 33), (300, 1)], ids=str)
@pytest.mark.parametrize("take_all", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mmdet_in_batches(counts, take_all, dtype, device):
    anchors = anchor_grid(9, 27, device).to(dtype)  # more than a block's
    gt_boxes = [random_boxes(n, 144, 432, device).to(dtype) for n in counts]
    options = {"rule": "mmdet", "min_pos_iou": 0.1, "gt_max_assign_all": take_all}
    check_is_the_references(anchors, gt_boxes, **options)
    check_is_the_references(anchors, gt_boxes, rule="efficientdet")


# ---- crowds, degenerate boxes -------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["torchvision", "mmdet", "efficientdet"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_crowds(rule, threshold, device):
    anchors = anchor_grid(9, 11, device)
    gt_boxes = [random_boxes(n, 144, 176, device) for n in (40, 0, 300)]
    crowd = [torch.rand(len(boxes), device=device) < 0.1 for boxes in gt_boxes]
    for boxes, is_crowd in zip(gt_boxes, crowd, strict=True):
        boxes[3:4] = torch.tensor([30.0, 40, 120, 130])  # several anchors are inside
        is_crowd[3:4] = True
    options = {"rule": rule, "crowd_threshold": threshold}
    matches = check_is_the_references(anchors, gt_boxes, crowd=crowd, **options)
    for match, boxes, is_crowd in zip(matches, gt_boxes, crowd, strict=True):
        assert not torch.isin(match, torch.where(is_crowd)[0]).any()
        if len(boxes) == 0:
            continue
        inter = torchvision.ops.boxes._box_inter_union(anchors, boxes[is_crowd])[0]
        inside = (inter / torchvision.ops.box_area(anchors)[:, None] > threshold).any(1)
        assert inside.any() and (match[inside] == -2).all()


def test_a_crowd_is_only_a_crowd(device):
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 10], [50, 0, 60, 10]], device=device)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 20, 10]]], device=device)
    crowd = torch.tensor([[True, False]], device=device)
    assert match_anchors(anchors, boxes, crowd=crowd).tolist() == [[-2, 1, -1]]
    assert match_anchors(anchors, boxes, 0.0, 0.0, crowd=crowd).tolist() == [[-2, 1, 1]]
    everything = torch.ones_like(crowd)
    assert match_anchors(anchors, boxes, 0.0, 0.0, crowd=everything).tolist() == [[-2, -2, -1]]


def test_crowds_lie_where_their_boxes_do():
    anchors, boxes = torch.rand(5, 4), [torch.rand(2, 4), torch.rand(3, 4)]
    crowd = [torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool, device="meta")]
    with pytest.raises(ValueError, match=r"crowd\[1\] must be on cpu like gt_boxes, got meta"):
        match_anchors(anchors, boxes, crowd=crowd)


def test_degenerate_boxes_match_nothing_and_are_counted(device):
    anchors = anchor_grid(8, 8, device)
    boxes = random_boxes(9, 100, 100, device)
    boxes[1, 2], boxes[2, 3], boxes[3], boxes[4, 0] = boxes[1, 0], boxes[2, 1] - 1, 0, math.nan
    outside = torch.tensor([[-30.0, 5, 0, 40], [5, 120, 40, 140], [5, -30, 9, 1]], device=device)
    boxes = [torch.cat((boxes, outside)), boxes[5:]]
    assert count_degenerate_boxes(boxes).tolist() == [4, 0]
    for sizes in ([(120, 130), (400, 500)], torch.tensor([(120, 130), (400, 500)], device=device)):
        matches = check_is_the_references(anchors, boxes, image_sizes=sizes)
        number = count_degenerate_boxes(boxes, sizes)
        assert number.tolist() == reference.count_degenerate_boxes(boxes, sizes).tolist() == [6, 0]
        assert not torch.isin(matches[0], torch.tensor([1, 2, 3, 4, 9, 10], device=device)).any()
        assert (matches[0] == 11).any()
    assert torch.isin(match_anchors(anchors, boxes)[0], torch.tensor([10], device=device)).any()
    padded = torch.stack((boxes[0][:7], boxes[0][5:]))
    counts = torch.tensor([3, 7], device=device)
    sizes = [(120, 130)] * 2
    check_is_the_references(anchors, padded, counts=counts, image_sizes=sizes)
    assert count_degenerate_boxes(padded, sizes, counts=counts).tolist() == [2, 2]
    assert count_degenerate_boxes([]).shape == (0,)


# ---- any boxes ----------------------------------------------------------------------------------

CORNERS = st.tuples(*[st.sampled_from([-3.0, 0, 1, 1.5, 2, 4, 7, 1e6, 1e30, math.nan])] * 4)
THRESHOLDS = st.sampled_from([-0.5, 0.0, 0.1, 0.25, 0.5, 1.0, 1.5])


@given(
    st.lists(CORNERS, min_size=1, max_size=40),
    st.lists(CORNERS, max_size=12),
    THRESHOLDS,
    THRESHOLDS,
    st.booleans(),
    st.sampled_from(["torchvision", "mmdet", "efficientdet"]),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_any_boxes(anchors, boxes, one, other, allow_low_quality, rule, crowd):
    """Inverted ones, which have a negative side, included."""
    check_is_the_references(
        torch.tensor(anchors),
        [torch.tensor(boxes).reshape(-1, 4)],
        max(one, other),
        min(one, other),
        allow_low_quality,
        rule=rule,
        crowd=[torch.tensor(crowd[: len(boxes)], dtype=torch.bool)] if sum(crowd) > 6 else None,
    )


# ---- class_index_targets ------------------------------------------------------------------------


def test_class_index_targets(device):
    matches = torch.tensor([[-1, 0, -2, 1, 0], [-1, -1, -2, -1, -1]], device=device)
    labels = [torch.tensor([7, 3], device=device), torch.empty(0, dtype=torch.int64, device=device)]
    expected = [[9, 7, -100, 3, 7], [9, 9, -100, 9, 9]]
    assert class_index_targets(matches, labels, num_classes=9).tolist() == expected
    padded = torch.tensor([[7, 3], [0, 0]], dtype=torch.int32, device=device)
    assert class_index_targets(matches, padded, num_classes=9).tolist() == expected
    assert class_index_targets(matches, labels, 9, ignore_index=-5)[0, 2] == -5
    assert class_index_targets(matches[:0], [], 9).shape == (0, 5)


def test_class_index_targets_are_the_references(device):
    anchors = anchor_grid(9, 11, device)
    counts = (7, 0, 40)
    matches = match_anchors(anchors, [random_boxes(n, 144, 176, device) for n in counts])
    labels = [torch.randint(0, 5, (n,), device=device) for n in counts]
    targets = class_index_targets(matches, labels, 5)
    assert torch.equal(targets, reference.class_index_targets(matches, labels, 5))


LABELS = "gt_labels[1] must lie in [0, 2], got "


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([[0], [3, 0]], LABELS + "3"),
        ([[0], [-100, 1]], LABELS + "-100"),
        ([[0], [-1, 1]], LABELS + "-1"),
        ([[0], [1]], "matches[1] must lie in [-2, 0], as gt_labels[1] has 1 labels, got 1"),
        ([[], [1, 1]], "matches[0] must lie in [-2, -1], as gt_labels[0] has 0 labels, got 0"),
    ],
)
def test_a_label_that_is_no_class(labels, sentence, monkeypatch):
    """An error where the host sees it; elsewhere a target that is no class, of which the losses make NaN."""
    matches = torch.tensor([[-1, 0, -2, -1], [0, 1, -2, -1]])
    tensors = [torch.tensor(of_image, dtype=torch.int64) for of_image in labels]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        class_index_targets(matches, tensors, num_classes=3)
    monkeypatch.setattr(matching, "host_sees", lambda tensor: False)
    for ignore_index, no_class in ((-100, 4), (4, 5)):
        targets = class_index_targets(matches, tensors, 3, ignore_index)
        assert (targets == no_class).any()
        assert torch.equal(
            targets, reference.class_index_targets(matches, tensors, 3, ignore_index)
        )
        if ignore_index == -100:
            padded = torch.full((2, 2), -1)
            for i, of_image in enumerate(tensors):
                padded[i, : len(of_image)] = of_image
            assert torch.equal(class_index_targets(matches, padded, 3), targets)


def test_matches_that_are_none():
    labels = [torch.tensor([0]), torch.tensor([1])]
    for match in (-3, 1, 2**40):
        matches = torch.tensor([[0, -1], [-2, match]])
        with pytest.raises(ValueError, match=re.escape("matches[1] must lie in [-2, 0]")):
            class_index_targets(matches, labels, 2)


def test_boxes_of_a_batch_in_different_dtypes(device):
    """They are padded in a dtype that holds all: not the first one's, which would round."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0.25, 0.25, 0.75, 0.75]], device=device)
    whole = torch.tensor([[0, 0, 10, 10]], device=device)
    fine = torch.tensor([[0.25, 0.25, 0.75, 0.75]], device=device)
    assert match_anchors(anchors, [whole, fine]).tolist() == [[0, -1], [-1, 0]]
    assert count_degenerate_boxes([whole, fine]).tolist() == [0, 0]


# ---- crowds by their own area, given IoUs -------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_crowds_by_their_own_area(threshold, dtype, device):
    anchors = anchor_grid(9, 11, device).to(dtype)
    gt_boxes = [random_boxes(n, 144, 176, device).to(dtype) for n in (40, 0, 300)]
    crowd = [torch.rand(len(boxes), device=device) < 0.3 for boxes in gt_boxes]
    options = {"crowd": crowd, "crowd_threshold": threshold}
    matches = check_is_the_references(anchors, gt_boxes, **options, ignore_wrt_candidates=False)
    if threshold:
        assert not torch.equal(matches, match_anchors(anchors, gt_boxes, **options))


def test_a_crowd_smaller_than_the_anchor(device):
    anchors = torch.tensor([[0.0, 0, 10, 10]], device=device)
    boxes, crowd = (
        torch.tensor([[[0.0, 0, 2, 2]]], device=device),
        torch.tensor([[True]], device=device),
    )
    assert match_anchors(anchors, boxes, crowd=crowd).tolist() == [[-1]]
    assert match_anchors(anchors, boxes, crowd=crowd, ignore_wrt_candidates=False).tolist() == [
        [-2]
    ]


@pytest.mark.parametrize("rule", ["torchvision", "detectron2", "mmdet", "efficientdet"])
@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.0, 0.0), (2.0, 1.5)], ids=str)
def test_match_iou_matrix_is_match_anchors(rule, thresholds, device):
    anchors = anchor_grid(9, 11, device)
    boxes = torch.stack([random_boxes(33, 144, 176, device) for _ in range(2)])
    for allow in (True, False):
        for min_pos_iou, take_all in ((0.0, True), (0.3, True), (0.3, False)):
            if rule != "mmdet" and (min_pos_iou or not take_all):
                continue
            options = {"rule": rule, "min_pos_iou": min_pos_iou, "gt_max_assign_all": take_all}
            matches = match_iou_matrix(box_iou(boxes, anchors), *thresholds, allow, **options)
            assert torch.equal(
                matches, match_anchors(anchors, boxes, *thresholds, allow, **options)
            )
            for match, of_image in zip(matches, boxes, strict=True):
                iou = box_iou(of_image, anchors)
                expected = reference.match_iou_matrix(iou, *thresholds, allow, **options)
                assert torch.equal(match, expected)


def test_match_iou_matrix_of_any_measure(device):
    iou = torch.tensor([[0.9, math.nan, 0.3, -1.0], [0.9, 0.2, 0.2, 0.0]], device=device)
    assert match_iou_matrix(iou).tolist() == [0, -1, -1, -1]
    assert match_iou_matrix(iou, rule="mmdet").tolist() == [1, -1, -1, -1]
    assert match_iou_matrix(iou, rule="efficientdet").tolist() == [0, -1, -1, -1]
    assert match_iou_matrix(iou.double(), 0.3, 0.25).tolist() == [0, -1, 0, -1]
    for tenth in range(1, 10):  # thresholds compare in the dtype of the IoUs, as in match_anchors
        value = torch.full((1, 1), tenth / 10, device=device)
        assert match_iou_matrix(value, tenth / 10, tenth / 10, False).item() == 0
    assert match_iou_matrix(iou[:0]).tolist() == [-1] * 4
    assert match_iou_matrix(iou[:, :0]).shape == (0,)


# ---- the compiler, errors -----------------------------------------------------------------------


def test_opcheck(device):
    anchors = anchor_grid(3, 3, device)
    boxes = torch.stack([random_boxes(5, 48, 48, device) for _ in range(2)])
    for counts in (None, torch.tensor([5, 2], device=device)):
        torch.library.opcheck(
            torch.ops.focalops.match_anchors.default, (anchors, boxes, counts, 0.5, 0.4, 1)
        )
    roles = torch.randint(0, 3, (2, 5), device=device).byte()
    arguments = (anchors, boxes, None, 0.5, 0.4, 3, 0.1, roles, 0.5)
    torch.library.opcheck(torch.ops.focalops.match_anchors.default, arguments)


def test_compiles_whole(device):
    anchors = anchor_grid(3, 3, device)
    boxes, labels = [random_boxes(5, 48, 48, device)], [torch.arange(5, device=device)]

    @torch.compile(fullgraph=True, dynamic=True)
    def f(anchors, boxes, labels):
        return class_index_targets(match_anchors(anchors, boxes), labels, 6)

    expected = class_index_targets(match_anchors(anchors, boxes), labels, 6)
    assert torch.equal(f(anchors, boxes, labels), expected)


def test_counts_out_of_range(backend, device):
    anchors, boxes = anchor_grid(3, 3, device), random_boxes(6, 48, 48, device).view(2, 3, 4)
    counts = torch.tensor([-2, 9], device=device)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"counts must lie in \[0, 3\], .* got -2"):
            match_anchors(anchors, boxes, counts=counts)
    else:  # the nearest that is in range
        expected = match_anchors(anchors, boxes, counts=counts.clamp(0, 3))
        assert torch.equal(match_anchors(anchors, boxes, counts=counts), expected)
