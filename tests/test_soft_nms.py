"""soft_nms against the reference, the paper's loop and NMS."""

import math

import pytest
import torch
from torch import Tensor

from focalops import multiclass_nms, reference, soft_nms

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("linear", "gaussian")


def setup(device, images=2, size=40, classes=3) -> tuple[Tensor, Tensor, Tensor]:
    center = torch.rand(images, size, 2) * 60
    half = 4 + torch.rand(images, size, 2) * 12
    boxes = torch.cat((center - half, center + half), dim=2)
    scores = (torch.rand(images, size).argsort(dim=1) + 1) / (size + 1)
    labels = torch.randint(0, classes, (images, size))
    return boxes.to(device), scores.to(device), labels.to(device)


def check_against_reference(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    results = soft_nms(*arguments, **options)
    expected = reference.soft_nms(*arguments, **options)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[2], expected[2])
    torch.testing.assert_close(results[1], expected[1], rtol=1e-5, atol=0)
    return results


def papers_loop(
    boxes: list[list[float]], scores: list[float], method: str
) -> list[tuple[int, float]]:
    """Figure 2 of the paper for one class, with N_t = 0.3 and sigma = 0.5, in Python's numbers."""
    left, kept = dict(enumerate(scores)), []
    while left:
        m = max(left, key=lambda i: (left[i], -i))
        if left[m] <= 0.001:
            break
        kept.append((m, left.pop(m)))
        for i in left:
            iou = reference.box_iou(*(torch.tensor([boxes[j]]).double() for j in (m, i))).item()
            linear = 1 - iou if iou > 0.3 else 1
            left[i] *= math.exp(-iou * iou / 0.5) if method == "gaussian" else linear
    return kept


@pytest.mark.parametrize("method", METHODS)
def test_is_the_papers_loop(method, device):
    boxes, scores, _ = setup(device, images=1, size=25)
    indices, kept_scores, num_kept = soft_nms(boxes, scores, method=method, max_detections=30)
    kept = papers_loop(boxes[0].tolist(), scores[0].tolist(), method)
    assert indices[0, : num_kept[0]].tolist() == [i for i, _ in kept]
    expected = torch.tensor([score for _, score in kept])
    torch.testing.assert_close(kept_scores[0, : num_kept[0]].cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=str)
def test_matches_the_reference(index_dtype, method, device):
    boxes, scores, labels = setup(device)
    labels = None if index_dtype is None else labels.to(index_dtype)
    for iou_threshold, score_threshold, most in ((0.3, 0.001, 15), (0.0, 0.3, 6), (0.6, -1, 4)):
        options = {"method": method, "score_threshold": score_threshold, "sigma": 0.3}
        indices, kept_scores, num_kept = check_against_reference(
            boxes, scores, labels, iou_threshold, most, **options
        )
        for i, count in enumerate(num_kept.tolist()):
            assert (indices[i, count:] == -1).all() and (kept_scores[i, count:] == 0).all()
            assert (kept_scores[i, :count].diff() <= 0).all()


def test_more_boxes_than_threads(device):
    check_against_reference(*setup(device, images=1, size=300), max_detections=5)


@pytest.mark.parametrize("box_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("score_dtype", FLOATING, ids=str)
def test_dtypes(box_dtype, score_dtype, device):
    boxes, scores, _ = setup(device, images=1, size=30)
    results = check_against_reference(boxes.to(box_dtype), scores.to(score_dtype), max_detections=9)
    either = torch.float64 in (box_dtype, score_dtype)
    assert results[1].dtype == (torch.float64 if either else torch.float32)


def test_a_decay_to_nothing_is_nms(device):
    boxes, scores, labels = setup(device)
    gaussian = {"method": "gaussian", "sigma": 1e-30}
    indices, _, num_kept = soft_nms(boxes, scores, labels, max_detections=40, **gaussian)
    expected, expected_num = multiclass_nms(boxes, scores, labels, 0.0, 40)
    assert torch.equal(indices, expected) and torch.equal(num_kept, expected_num)


@pytest.mark.parametrize("method", METHODS)
def test_hostile_input(method, device):
    boxes, scores, labels = setup(device)
    boxes[0, ::5, 1], scores[0, ::7] = torch.nan, torch.nan
    boxes[1, :10, 2:] = boxes[1, :10, :2]  # points
    boxes[1, 10:30] = boxes[1, 10]
    scores[1, 10:30] = 0.5
    scores[1, 31], scores[1, 32] = torch.inf, -torch.inf
    indices, kept_scores, _ = check_against_reference(boxes, scores, labels, method=method)
    assert not kept_scores.isnan().any()
    assert not ((indices[0] % 5 == 0) | (indices[0] % 7 == 0)).any()
    *_, num_kept = check_against_reference(boxes * torch.nan, scores, labels, method=method)
    assert (num_kept == 0).all()


def test_an_infinite_score_times_zero_is_none(device):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [30, 0, 40, 10]]])
    scores = torch.tensor([[torch.inf, torch.inf, 0.8]])
    indices, _, num_kept = check_against_reference(boxes.to(device), scores.to(device))
    assert indices[0, : num_kept[0]].tolist() == [0, 2]


@pytest.mark.parametrize(("images", "size", "most"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(images, size, most, device):
    indices, kept_scores, num_kept = soft_nms(*setup(device, images, size), max_detections=most)
    assert indices.shape == kept_scores.shape == (images, most)
    assert (num_kept == 0).all() and (indices == -1).all()


@pytest.mark.parametrize("with_labels", [False, True])
def test_opcheck(with_labels, device):
    boxes, scores, labels = setup(device, size=20)
    arguments = (boxes, scores, labels if with_labels else None, 0.3, 0.5, True, 0.1, 10)
    torch.library.opcheck(torch.ops.focalops.soft_nms.default, arguments)
