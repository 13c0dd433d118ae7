"""softmax_focal_loss against its formula and the reference in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_row_losses import DTYPES, check_against_float64
from torch import Tensor

from focalops import reference, softmax_focal_loss

# One class; a lane, some and all lanes of a warp a row; rows that are vectors and that are not; more than one block and one chunk.
SHAPES = ((7, 1), (300, 2), (37, 13), (40, 16), (9, 80), (11, 91), (3, 1203), (2300, 8))


def make(rows: int, classes: int, device: str, dtype: torch.dtype = torch.float32):
    x = (torch.randn(rows, classes) * 4).to(device, dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,))
    labels[torch.rand(rows) < 0.2] = -100
    return x, labels.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, device):
    x, labels = make(*shape, device, dtype)
    cases = (
        {"reduction": "sum", "normalizer": 7.0},
        {"reduction": "sum", "gamma": 0.5, "alpha": -1.0},
        {"reduction": "mean", "gamma": 1.5, "class_weight": torch.rand(shape[1], device=device)},
        {"reduction": "mean", "weight": torch.rand(shape[0], device=device)},
    )
    for options in cases[: 4 if dtype == torch.float32 else 1]:
        check_against_float64(
            lambda x, o=options: softmax_focal_loss(x, labels, **o),
            x,
            lambda x, o=options: reference.softmax_focal_loss(x, labels, **o),
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_is_the_formula(gamma, device):
    x, labels = make(20, 4, device, torch.float64)
    labels[labels < 0] = 3
    p = x.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    exact = -0.25 * (1 - p) ** gamma * p.log()
    losses = softmax_focal_loss(x, labels, gamma=gamma)
    torch.testing.assert_close(losses, exact)
    for reduction in ("sum", "mean"):
        actual = softmax_focal_loss(x, labels, gamma=gamma, reduction=reduction)
        expected = getattr(exact, reduction)()
        torch.testing.assert_close(actual, expected)
        (grad,), (exact_grad,) = (
            torch.autograd.grad(f, x, retain_graph=True) for f in (actual, expected)
        )
        torch.testing.assert_close(grad, exact_grad)


def test_gamma_0_is_the_cross_entropy(device):
    x, labels = make(37, 13, device)
    weight = torch.rand(13, device=device)
    ours = softmax_focal_loss(x, labels, -1, 0, "sum", class_weight=weight)
    theirs = F.cross_entropy(x, labels, weight, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_easy_examples_keep_their_digits(device):
    """1 - p of a float32 p would have none beyond a margin of 17."""
    margins = torch.linspace(0, 40, 81)
    x = torch.stack((margins, torch.zeros(81)), dim=1).to(device).requires_grad_()
    labels = torch.zeros(81, device=device).long()
    for row in range(81):
        loss = softmax_focal_loss(x[row : row + 1], labels[:1], reduction="sum")
        exact_x = x.detach()[row : row + 1].double().requires_grad_()
        exact = reference.softmax_focal_loss(exact_x, labels[:1], reduction="sum")
        # exp(-40) in float32 is off by 40 roundings, and the loss has its third power.
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-37)
        (grad,), (exact_grad,) = torch.autograd.grad(loss, x), torch.autograd.grad(exact, exact_x)
        torch.testing.assert_close(grad[row].double(), exact_grad[0], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma, device):
    x = (torch.randn(5, 3, dtype=torch.float64) * 2).to(device).requires_grad_()
    labels = torch.tensor([0, 2, -100, 2, 1], device=device)

    def f(x: Tensor) -> Tensor:
        return softmax_focal_loss(x, labels, gamma=gamma, reduction="sum", normalizer=3)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits(gamma, dtype, device):
    values = (0.0, 1e4, -1e4)
    rows = torch.cartesian_prod(*[torch.tensor(values)] * 3).to(device, dtype).requires_grad_()
    labels = torch.zeros(len(rows), device=device).long()
    loss = softmax_focal_loss(rows, labels, gamma=gamma, reduction="sum")
    (grad,) = torch.autograd.grad(loss, rows)
    assert loss.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(
        grad.double().sum(1), torch.zeros(len(rows), dtype=torch.float64, device=device), atol=2e-3, rtol=0
    )  # fmt: skip
    # Classes that are masked out.
    x = torch.tensor([[1.0, -math.inf, 2.0]], device=device, dtype=dtype).requires_grad_()
    masked = softmax_focal_loss(x, labels[:1], gamma=gamma, reduction="sum")
    without = softmax_focal_loss(x[:, ::2], labels[:1], gamma=gamma, reduction="sum")
    torch.testing.assert_close(masked, without)
    assert torch.autograd.grad(masked, x)[0][0, 1] == 0
    # Where the true class's logit is -inf the loss is infinite, and its gradient that of the cross entropy.
    x = torch.tensor([[-math.inf, 1.0, 2.0]], device=device, dtype=dtype).requires_grad_()
    lost = softmax_focal_loss(x, labels[:1], gamma=gamma, reduction="sum")
    assert lost == math.inf and softmax_focal_loss(x, labels[:1], gamma=gamma) == math.inf
    expected = 0.25 * x.detach().softmax(1).double() - torch.tensor([[0.25, 0, 0]], device=device)
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(lost, x, retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(
            grad.double(), expected, rtol=2e-3 if dtype.itemsize == 2 else 1e-6, atol=0
        )
    x = torch.tensor([[1.0, math.nan]], device=device, dtype=dtype).requires_grad_()
    assert softmax_focal_loss(x, labels[:1], reduction="sum").isnan()


def test_ignored_and_invalid_rows(device, backend):
    x, labels = make(20, 5, device)
    labels[:3] = torch.tensor([-100, 4, 2], device=device)
    with torch.no_grad():
        x[0] = math.nan
    loss = softmax_focal_loss(x, labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and (grad[labels == -100] == 0).all() and (grad[1] != 0).all()
    others = labels.where(labels != -100, 4)
    ignored = softmax_focal_loss(x, others, reduction="sum", ignore_index=4)
    assert (torch.autograd.grad(ignored, x)[0][others == 4] == 0).all()
    labels[1] = 5  # background is no class here
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"softmax_focal_loss: .* \[0, 4\] or .* got 5"):
            softmax_focal_loss(x, labels, reduction="sum")
    else:
        loss = softmax_focal_loss(x, labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isnan() and grad[1].isnan().all() and grad.isnan().sum() == 5
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"softmax_focal_loss: .* \[0, 4\] or .* got 5"):
            softmax_focal_loss(x, labels)
    else:
        assert softmax_focal_loss(x, labels)[1].isnan()


@pytest.mark.parametrize("classes", [12, 13])
def test_kept_graphs_and_memory(classes, device):
    x, labels = make(37, classes, device)
    loss = softmax_focal_loss(x, labels, reduction="sum") * 3
    first, last = (torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, last)
    logits = x * 1
    loss = softmax_focal_loss(logits, labels, reduction="sum", inplace_backward=True) * 3
    over_logits, over_x = torch.autograd.grad(loss, (logits, x))
    assert over_logits.data_ptr() == logits.data_ptr() and torch.equal(over_x, first)


def test_shapes_and_strides(device):
    x = (torch.randn(2, 5, 7, 3) * 4).to(device)
    labels = torch.randint(0, 5, (2, 7, 3), device=device).int()
    view = x.movedim(1, -1).requires_grad_()
    contiguous = view.detach().contiguous().requires_grad_()
    losses = [softmax_focal_loss(t, labels, reduction="sum") for t in (view, contiguous)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(*pair)[0] for pair in zip(losses, (view, contiguous), strict=True)]
    assert torch.equal(*grads)
    assert softmax_focal_loss(view, labels).shape == labels.shape
    unaligned = torch.empty(1 + x.numel(), device=device)[1:].view(contiguous.shape)
    unaligned.copy_(contiguous.detach())
    assert torch.equal(softmax_focal_loss(unaligned, labels, reduction="sum"), losses[0].detach())
    for shape in ((0, 5), (2, 0, 4)):
        x = torch.empty(shape, device=device, requires_grad=True)
        loss = softmax_focal_loss(x, torch.zeros(shape[:-1], device=device).long(), reduction="sum")
        assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == shape
