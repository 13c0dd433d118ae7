"""matrix_nms against the reference and the paper's formula."""

import pytest
import torch
from test_soft_nms import FLOATING, METHODS, setup
from torch import Tensor

from focalops import matrix_nms, reference


def check_against_reference(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    results = matrix_nms(*arguments, **options)
    expected = reference.matrix_nms(*arguments, **options)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[2], expected[2])
    torch.testing.assert_close(results[1], expected[1], rtol=1e-5, atol=0)
    return results


def papers_scores(boxes: Tensor, scores: Tensor, labels: Tensor, method: str) -> Tensor:
    """Equations 4 and 5 of the paper in doubles, f being either penalty: each box's decayed score."""
    boxes, scores = boxes.double(), scores.double()
    penalty = {"linear": lambda iou: 1 - iou, "gaussian": lambda iou: torch.exp(-2 * iou * iou)}
    decayed = scores.clone()
    for j in range(len(scores)):
        for i in torch.where((scores > scores[j]) & (labels == labels[j]))[0]:
            better = (scores > scores[i]) & (labels == labels[i])
            iou = reference.box_iou(boxes[i, None], torch.cat((boxes[j, None], boxes[better])))[0]
            most = iou[1:].max() if better.any() else iou.new_zeros(())
            factor = penalty[method](iou[0]) / penalty[method](most)
            decayed[j] = torch.minimum(decayed[j], scores[j] * factor)
    return decayed


@pytest.mark.parametrize("method", METHODS)
def test_is_the_papers_formula(method, device):
    boxes, scores, labels = (t[0] for t in setup(device, images=1, size=25, classes=2))
    expected = papers_scores(boxes, scores, labels, method).float().sort(descending=True)
    indices, kept_scores, num_kept = matrix_nms(
        boxes[None], scores[None], labels[None], 25, method=method, score_threshold=-1
    )
    assert num_kept.tolist() == [25] and torch.equal(indices[0], expected.indices)
    torch.testing.assert_close(kept_scores[0], expected.values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=str)
def test_matches_the_reference(index_dtype, method, device):
    boxes, scores, labels = setup(device)
    labels = None if index_dtype is None else labels.to(index_dtype)
    for sigma, score_threshold, most in ((2.0, 0.001, 15), (0.5, 0.3, 6), (4.0, -1, 41)):
        options = {"method": method, "score_threshold": score_threshold, "sigma": sigma}
        indices, kept_scores, num_kept = check_against_reference(
            boxes, scores, labels, most, **options
        )
        for i, count in enumerate(num_kept.tolist()):
            assert (indices[i, count:] == -1).all() and (kept_scores[i, count:] == 0).all()
            assert (kept_scores[i, :count].diff() <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_boxes_of_many_classes_and_blocks(method, device):
    boxes, scores, labels = setup(device, images=3, size=300, classes=40)
    check_against_reference(boxes, scores, labels - 20, 300, method=method, score_threshold=0)


@pytest.mark.parametrize("box_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("score_dtype", FLOATING, ids=str)
def test_dtypes(box_dtype, score_dtype, device):
    boxes, scores, _ = setup(device, images=1, size=30)
    results = check_against_reference(boxes.to(box_dtype), scores.to(score_dtype), max_detections=9)
    either = torch.float64 in (box_dtype, score_dtype)
    assert results[1].dtype == (torch.float64 if either else torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_suppressed_itself_does_less(method, device):
    # IoU of A and B 0.8, of B and C 0.8, of A and C 7 / 11: C loses by A alone, not by B as well.
    left = torch.tensor([0.0, 1, 2], device=device) * (10 / 9)
    boxes = torch.stack((left, left * 0, left + 10, left * 0 + 10), dim=1)[None]
    scores = torch.tensor([[0.9, 0.8, 0.7]], device=device)
    indices, kept_scores, _ = matrix_nms(boxes, scores, method=method)
    pair = torch.tensor([[0, 2]], device=device)
    _, without_b, _ = matrix_nms(boxes[:, pair[0]], scores[:, pair[0]], method=method)
    assert indices[0, :3].tolist() == [0, 2, 1]
    assert torch.equal(kept_scores[0, :2], without_b[0, :2])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_box_many_times(method, device):
    boxes = torch.tensor([[1.0, 1, 5, 5]], device=device).repeat(1, 50, 1)
    scores = torch.linspace(0.9, 0.1, 50, device=device)[None]
    indices, kept_scores, num_kept = matrix_nms(boxes, scores, method=method)
    if method == "linear":  # those after the best are no more
        assert num_kept.tolist() == [1] and indices[0, 0] == 0
    else:  # the factor of the best counts: e^-2
        factor = torch.exp(torch.tensor(-2.0, device=device))
        torch.testing.assert_close(kept_scores[0, 1:50], scores[0, 1:] * factor)


@pytest.mark.parametrize("method", METHODS)
def test_hostile_input(method, device):
    boxes, scores, labels = setup(device)
    boxes[0, ::5, 1], scores[0, ::7] = torch.nan, torch.nan
    boxes[0, 3] = torch.tensor([-torch.inf, 0, torch.inf, 10])
    boxes[0, 4] = torch.tensor([30.0, 30, 20, 20])  # the wrong way round
    boxes[1, :10, 2:] = boxes[1, :10, :2]  # points
    boxes[1, 10:30] = boxes[1, 10]
    scores[1, 10:30] = 0.5
    scores[1, 31], scores[1, 32] = torch.inf, -torch.inf
    indices, kept_scores, _ = check_against_reference(boxes, scores, labels, method=method)
    assert not kept_scores.isnan().any()
    assert not (((indices[0] % 5 == 0) | (indices[0] % 7 == 0)) & (indices[0] >= 0)).any()
    *_, num_kept = check_against_reference(boxes * torch.nan, scores, labels, method=method)
    assert (num_kept == 0).all()


@pytest.mark.parametrize(("images", "size", "most"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(images, size, most, device):
    indices, kept_scores, num_kept = matrix_nms(*setup(device, images, size), most)
    assert indices.shape == kept_scores.shape == (images, most)
    assert (indices == -1).all() and num_kept.tolist() == [0] * images


def test_opcheck(device):
    boxes, scores, labels = setup(device, size=12)
    for arguments in (
        (boxes, scores, labels, 2.0, True, 0.1, 7),
        (boxes.double(), scores.double(), None, 2.0, False, 0.1, 7),
    ):
        torch.library.opcheck(torch.ops.focalops.matrix_nms.default, arguments)
