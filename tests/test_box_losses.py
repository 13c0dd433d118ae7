"""The losses of boxes against the reference, torchvision and float64."""

import pytest
import torch
import torchvision
from test_boxes import assert_close_to_float64, gradients, grid_boxes, random_boxes
from torch import Tensor

from focalops import (
    box_iou_loss,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    reference,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOSSES = (box_iou_loss, generalized_box_iou_loss, distance_box_iou_loss, complete_box_iou_loss)
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def twin(loss):
    return getattr(reference, loss.__name__)


# ---- losses of pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 300])
@ALL_LOSSES
def test_pairs(loss, n, dtype, device):
    boxes1, boxes2 = (random_boxes(n, device=device, dtype=dtype) for _ in range(2))
    assert_close_to_float64(loss, twin(loss), boxes1, boxes2)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: loss.__name__)
def test_pairs_are_torchvisions(loss, reduction, device):
    theirs = getattr(torchvision.ops, loss.__name__)
    for dtype in DTYPES:
        boxes = [random_boxes(50, device=device, dtype=dtype).requires_grad_() for _ in range(2)]
        value, expected = loss(*boxes, reduction), theirs(*boxes, reduction)
        unit = torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, expected, rtol=64 * unit, atol=64 * unit)
        grads = torch.autograd.grad(value.sum(), boxes)
        for grad, other in zip(grads, torch.autograd.grad(expected.sum(), boxes), strict=True):
            # torchvision adds up a half gradient in half precision.
            half = torch.finfo(dtype).eps if dtype in DTYPES[:2] else 0
            torch.testing.assert_close(
                grad, other, rtol=4 * half + 1e3 * unit, atol=half / 16 + 64 * unit
            )


def test_box_iou_loss_is_one_minus_iou(device):
    boxes1, boxes2 = random_boxes(50, device=device), random_boxes(50, device=device)
    expected = 1 - torchvision.ops.box_iou(boxes1, boxes2).diagonal()
    torch.testing.assert_close(box_iou_loss(boxes1, boxes2), expected)


@ALL_LOSSES
def test_degenerate_pairs_are_finite(loss, device):
    boxes1, boxes2 = grid_boxes(300, device), grid_boxes(300, device)
    value, grads = gradients(loss, boxes1, boxes2)
    expected, expected_grads = gradients(twin(loss), boxes1, boxes2)
    assert value.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


@ALL_LOSSES
def test_pairs_gradcheck(loss, device):
    boxes = [random_boxes(3, device=device, dtype=torch.float64).requires_grad_() for _ in range(2)]
    if loss is not complete_box_iou_loss:  # its weight is not differentiated
        torch.autograd.gradcheck(loss, boxes)
    penalties = []
    for function in (loss, twin(loss)):
        (first,) = torch.autograd.grad(function(*boxes).sum(), boxes[0], create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), boxes[1])[0])
    torch.testing.assert_close(*penalties)


def test_shapes_and_layouts(device):
    boxes, others = random_boxes(2, 3, device=device), random_boxes(2, 3, device=device)
    expected = box_iou_loss(boxes, others)
    assert expected.shape == (2, 3)
    assert torch.equal(box_iou_loss(boxes[0, 0], others[0, 0]), expected[0, 0])
    transposed = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(box_iou_loss(transposed, others), expected)
    shifted = torch.cat((boxes.new_zeros(1), boxes.flatten()))[1:].view(boxes.shape)
    assert torch.equal(box_iou_loss(shifted, others), expected)
    integers = (boxes * 3).round()
    assert torch.equal(box_iou_loss(integers.long(), others), box_iou_loss(integers, others))
    mixed = box_iou_loss(boxes.double(), others)
    assert mixed.dtype == torch.float64


def test_upstream_gradients_of_any_strides(device):
    boxes = random_boxes(4, 6, device=device).requires_grad_()
    others = random_boxes(4, 6, device=device)
    upstream = torch.rand(6, 4, device=device).T
    for grad_output in (upstream, upstream[:, :1].expand(4, 6), torch.tensor(2.0, device=device).expand(4, 6)):  # fmt: skip
        (grad,) = torch.autograd.grad(complete_box_iou_loss(boxes, others), boxes, grad_output)
        expected = torch.autograd.grad(reference.complete_box_iou_loss(boxes, others), boxes, grad_output)  # fmt: skip
        torch.testing.assert_close(grad, expected[0], rtol=1e-4, atol=1e-6)


@ALL_LOSSES
def test_no_pairs(loss, device):
    boxes = torch.zeros(0, 4, device=device, requires_grad=True)
    assert loss(boxes, boxes).shape == (0,)
    for reduction in ("sum", "mean"):
        value = loss(boxes, boxes.detach(), reduction)
        (grad,) = torch.autograd.grad(value, boxes)
        assert value == 0 and grad.shape == (0, 4)


def test_only_the_wanted_gradient_is_computed(device):
    boxes1, boxes2 = (random_boxes(5, device=device).requires_grad_() for _ in range(2))
    upstream = torch.ones(5, device=device)
    op = torch.ops.focalops._box_pair_loss_backward
    plain = boxes1.detach(), boxes2.detach()
    grad1, grad2 = op(upstream, *plain, 1, 1e-7, True, False)
    assert grad1.shape == (5, 4) and grad2.numel() == 0
    generalized_box_iou_loss(boxes1.detach(), boxes2, "sum").backward()
    assert torch.equal(boxes2.grad, op(upstream, *plain, 1, 1e-7, False, True)[1])


def test_opcheck(device):
    boxes1, boxes2 = (random_boxes(5, device=device).requires_grad_() for _ in range(2))
    ops = torch.ops.focalops
    for kind in (0, 3):
        torch.library.opcheck(ops.box_pair_loss.default, (boxes1, boxes2, kind, 1e-7))
    arguments = (torch.rand(5, device=device), boxes1.detach(), boxes2.detach(), 2, 1e-7)
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(ops._box_pair_loss_backward.default, (*arguments, *wanted))


def test_compiles_whole(device):
    def f(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return complete_box_iou_loss(boxes1 * 2, boxes2, "mean")

    boxes1, boxes2 = random_boxes(9, device=device).requires_grad_(), random_boxes(9, device=device)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    (grad,) = torch.autograd.grad(compiled(boxes1, boxes2), boxes1)
    torch.testing.assert_close(grad, torch.autograd.grad(f(boxes1, boxes2), boxes1)[0])


ERRORS = [
    (lambda x: box_iou_loss(x[:, :3], x), r"box_iou_loss: boxes1 must have shape \(..., 4\), got \(5, 3\)"),
    (lambda x: generalized_box_iou_loss(x, x[:3]), r"generalized_box_iou_loss: boxes2 must have the shape of boxes1, \(5, 4\), got \(3, 4\)"),
    (lambda x: distance_box_iou_loss(x > 0, x > 0), "distance_box_iou_loss: boxes1 must be float32 or float64, got torch.bool"),
    (lambda x: complete_box_iou_loss(x, x > 0), "complete_box_iou_loss: boxes2 must be torch.float32 like boxes1, got torch.bool"),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", ERRORS)
def test_errors(call, sentence, device):
    for where in (device, "meta"):
        with pytest.raises(RuntimeError, match=sentence):
            call(torch.zeros(5, 4, device=where))


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'x'"):
        box_iou_loss(torch.zeros(1, 4), torch.zeros(1, 4), "x")
