"""sigmoid_focal_loss against the reference, torchvision and float64."""

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from focalops import reference, sigmoid_focal_loss, sigmoid_focal_loss_star

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ALPHAS = (-1.0, 0.0, 0.25, 1.0)
# (rows, classes): one element, a row shorter than a 16-byte vector, vectors that straddle two or more rows, rows of more
# than one block, more rows than one chunk.
SHAPES = ((1, 1), (3, 1), (7, 2), (5, 3), (37, 13), (9, 80), (11, 91), (2, 4099), (1500, 17))


def class_indices(rows: int, classes: int, device: str) -> Tensor:
    targets = torch.randint(0, classes + 1, (rows,))
    targets[torch.rand(rows) < 0.2] = -100
    return targets.to(device)


def soft_targets(*shape: int, device: str) -> Tensor:
    """A third each of 0, 1 and values between."""
    values, kind = torch.rand(shape), torch.randint(0, 3, shape)
    return torch.where(kind == 0, 0, torch.where(kind == 1, 1, values)).to(device)


def dense(targets: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(targets.long().clamp(min=0), classes + 1)[..., :classes]


def logits(*shape: int, dtype: torch.dtype, device: str, scale: float = 4) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


def error_bound(dtype: torch.dtype, exact: Tensor, s: Tensor, gamma: float) -> Tensor:
    """What the arithmetic allows: each operation rounds, an exponential of y loses |y| roundings, and the result is
    rounded to the dtype once."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    relative = (8 + (gamma + 1) * torch.nn.functional.softplus(-s)) * unit
    half_ulp = torch.finfo(dtype).eps / 2
    bound = exact.abs() * (relative + half_ulp) + torch.finfo(dtype).tiny
    return bound + torch.finfo(torch.float32).tiny


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    error = (actual.double() - exact).abs()
    worst = (error / bound).max() if error.numel() else torch.tensor(0.0)
    assert (error <= bound).all(), f"error is {worst:.2f} times its bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_class_indices_match_the_reference(shape, dtype, index_dtype, device):
    rows, classes = shape
    x = logits(rows, classes, dtype=dtype, device=device).requires_grad_()
    targets = class_indices(rows, classes, device).to(index_dtype)
    check_against_float64(x, targets, 0.25, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 5, 7), (70001,)], ids=str)
def test_dense_targets_match_the_reference(shape, dtype, device):
    x = logits(*shape, dtype=dtype, device=device).requires_grad_()
    check_against_float64(x, soft_targets(*shape, device=device).to(dtype), 0.25, 2.0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_parameters(alpha, gamma, device):
    x = logits(300, 13, dtype=torch.float32, device=device).requires_grad_()
    check_against_float64(x, class_indices(300, 13, device), alpha, gamma)
    check_against_float64(x, soft_targets(300, 13, device=device), alpha, gamma)


def check_against_float64(x: Tensor, targets: Tensor, alpha: float, gamma: float) -> None:
    exact_x = x.detach().double().requires_grad_()
    exact_targets = targets.double() if targets.shape == x.shape else targets
    exact = reference.sigmoid_focal_loss(exact_x, exact_targets, alpha, gamma)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)

    loss = sigmoid_focal_loss(x, targets, alpha, gamma)
    assert loss.dtype == x.dtype and loss.shape == x.shape
    if targets.shape == x.shape:
        # softplus(-s) of the sign that the element would have; a soft target has parts of both
        s = -exact_x.detach().abs()
    else:
        positive = dense(targets, x.shape[-1]).bool()
        s = torch.where(positive, -exact_x, exact_x).detach()
    assert_within(loss.detach(), exact.detach(), error_bound(x.dtype, exact.detach(), s, gamma))

    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    # The gradient adds two terms of one sign (class indices); the terms of a soft target cancel, so that its error is
    # relative to their size, which the loss and q^gamma bound.
    size = exact_grad.abs()
    if targets.shape == x.shape:
        size = size + exact.detach().abs() * (1 + gamma) + 1
    assert_within(grad, exact_grad, 2 * error_bound(x.dtype, size, s, gamma))

    for reduction in ("sum", "mean"):
        total = sigmoid_focal_loss(x, targets, alpha, gamma, reduction)
        assert total.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        expected = reference.sigmoid_focal_loss(exact_x, exact_targets, alpha, gamma, reduction)
        torch.testing.assert_close(total.double(), expected, rtol=2e-6, atol=1e-37)
        (grad,) = torch.autograd.grad(total, x)
        (expected_grad,) = torch.autograd.grad(expected, exact_x)
        # Normalized, a half-precision gradient lies among the subnormal numbers; elsewhere: three roundings more.
        tiny = torch.finfo(x.dtype).smallest_normal
        scale = expected_grad.abs().max() / exact_grad.abs().max().clamp(min=1e-300)
        bound = 2 * error_bound(x.dtype, size, s, gamma) * scale
        assert_within(grad, expected_grad, 2 * bound + tiny * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_is_torchvisions_for_dense_targets(alpha, gamma, reduction, dtype, device):
    x = logits(50, 13, dtype=dtype, device=device).requires_grad_()
    targets = soft_targets(50, 13, device=device).to(dtype)
    ours = sigmoid_focal_loss(x, targets, alpha, gamma, reduction)
    theirs = torchvision.ops.sigmoid_focal_loss(x, targets, alpha, gamma, reduction)
    # torchvision's 1 - p_t cancels: its own error is about 1e-6 of the loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.rand_like(ours)
    (our_grad,) = torch.autograd.grad(ours, x, upstream)
    (their_grad,) = torch.autograd.grad(theirs, x, upstream)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_class_indices_are_the_one_hot_of_dense_targets(reduction, device):
    x = logits(40, 7, dtype=torch.float32, device=device)
    targets = torch.randint(0, 8, (40,), device=device)
    torch.testing.assert_close(
        sigmoid_focal_loss(x, targets, reduction=reduction),
        sigmoid_focal_loss(x, dense(targets, 7), reduction=reduction),
        rtol=1e-6,  # two forms of one formula
        atol=0,
    )


@pytest.mark.parametrize("kind", ["classes", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma, reduction, kind, device):
    x = logits(4, 3, dtype=torch.float64, device=device, scale=2).requires_grad_()
    targets = torch.tensor([0, 3, -100, 2], device=device)
    if kind == "soft":
        targets = soft_targets(4, 3, device=device).double()

    def f(x):
        return sigmoid_focal_loss(x, targets, 0.25, gamma, reduction)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def is_limit(gradient: torch.Tensor, limit: float, backend: str) -> bool:
    """Whether it is that of an infinite logit, of which 1 / (1 + e) is 1: exactly where a division is one.

    CUDA's fast reciprocal of a float is within 2 ulp, also that of 1; for gamma = 2 the gradient is its third power.
    """
    is_approximate = backend.startswith("cuda") and backend != "cuda-emulated"
    is_double = gradient.dtype == torch.float64
    slack = 8 * torch.finfo(torch.float32).eps if is_approximate and not is_double else 0
    return abs(gradient.item() - limit) <= limit * slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_logits(gamma, dtype, backend, device):
    """Finite for finite logits, the limit at infinity, NaN only from NaN."""
    inf = math.inf
    values = [0.0, -0.0, 20, -20, 100, -100, 1e4, -1e4, inf, -inf, math.nan]
    x = torch.tensor(values, device=device, dtype=dtype).unsqueeze(1).requires_grad_()
    for target, right in ((0, inf), (1, -inf)):  # right: the logit of a perfect answer
        targets = torch.full((len(values),), target, device=device)
        loss = sigmoid_focal_loss(x, targets, 0.25, gamma)
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        finite, at = x.detach().isfinite(), (x == right).squeeze(1).nonzero().item()
        assert loss[finite].isfinite().all() and grad[finite].isfinite().all()
        assert loss[at] == 0 and grad[at] == 0
        assert loss[values.index(-right)] == inf
        limit = 0.25 if target == 0 else 0.75
        assert is_limit(grad[values.index(-right)].abs(), limit, backend)
        assert loss[-1].isnan() and grad[-1].isnan()
        soft = sigmoid_focal_loss(x, 1.0 - torch.full_like(x, target), 0.25, gamma)
        # 1 - p_t underflows to a power of 0 in another place of the soft form: below the normal numbers
        torch.testing.assert_close(
            soft, loss, rtol=torch.finfo(dtype).eps * 8 if dtype != torch.float64 else 1e-13,
            atol=torch.finfo(dtype).tiny, equal_nan=True,
        )  # fmt: skip
        (soft_grad,) = torch.autograd.grad(soft, x, torch.ones_like(soft))
        assert soft_grad[:-1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_have_neither_loss_nor_gradient(dtype, device):
    x = logits(6, 5, dtype=dtype, device=device)
    x[1], x[4] = math.nan, math.inf
    x.requires_grad_()
    targets = torch.tensor([0, 7, 5, 1, 7, 2], device=device)
    loss = sigmoid_focal_loss(x, targets, ignore_index=7)
    assert (loss[[1, 4]] == 0).all()
    for reduction in ("sum", "mean"):
        total = sigmoid_focal_loss(x, targets, reduction=reduction, ignore_index=7)
        kept = sigmoid_focal_loss(
            x[[0, 2, 3, 5]], targets[[0, 2, 3, 5]], reduction=reduction, ignore_index=7
        )
        torch.testing.assert_close(total, kept)
        (grad,) = torch.autograd.grad(total, x)
        assert (grad[[1, 4]] == 0).all() and grad[0].abs().sum() > 0


def test_ignore_index_wins_over_a_class_of_that_index(device):
    x = logits(3, 4, dtype=torch.float32, device=device)
    targets = torch.tensor([0, 1, 4], device=device)
    for ignored in (0, 4):
        loss = sigmoid_focal_loss(x, targets, ignore_index=ignored)
        assert (loss[targets == ignored] == 0).all() and (loss[targets != ignored] > 0).all()


@pytest.mark.parametrize("invalid", [-1, 6, -101, 2**40, -(2**40)])
def test_invalid_class_index(invalid, backend, device):
    x = logits(4, 5, dtype=torch.float32, device=device)
    targets = torch.tensor([0, 5, invalid, 1], device=device)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=rf"must lie in \[0, 5\] or .* got {invalid}"):
            sigmoid_focal_loss(x, targets)
    else:
        loss = sigmoid_focal_loss(x, targets)
        assert loss[2].isnan().all() and loss[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty(shape, reduction, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    for targets in (
        torch.empty(shape, device=device),
        torch.zeros(shape[:-1], device=device).long(),
    ):
        loss = sigmoid_focal_loss(x, targets, reduction=reduction)
        assert loss.sum() == 0
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.shape == shape


def test_all_rows_ignored(device):
    x = logits(3, 4, dtype=torch.float32, device=device).requires_grad_()
    targets = torch.full((3,), -100, device=device)
    for reduction in ("mean", "sum"):
        loss = sigmoid_focal_loss(x, targets, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, device):
    """Transposed, strided, expanded inputs, and views that begin off a 16-byte boundary."""

    def assert_same(actual: Tensor, expected: Tensor, in_memory_order: bool) -> None:
        if not in_memory_order:
            assert torch.equal(actual, expected)
            return
        # An element lies in another lane, or in the loop's remainder, where its products are rounded once more; the
        # terms of a soft target's gradient, of up to gamma times the loss, cancel.
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(
            actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=32 * unit
        )

    base = logits(14, 66, dtype=dtype, device=device)
    flat = logits(1 + 12 * 11, dtype=dtype, device=device)
    for x in (base.t(), base[:, ::2], base[1:, 3:], base[:1].expand(5, -1), flat[1:].view(12, 11)):
        targets = class_indices(*x.shape, device)
        soft = soft_targets(*x.shape[::-1], device=device).to(dtype).t()
        for t in (targets, soft):
            expected = sigmoid_focal_loss(x.clone(memory_format=torch.contiguous_format), t.clone())
            in_memory_order = x.t().is_contiguous() and t is soft
            assert_same(sigmoid_focal_loss(x, t), expected, in_memory_order)
            x_grad = x.detach().requires_grad_()
            upstream = torch.rand(x.shape[::-1], device=device).to(dtype).t()
            (grad,) = torch.autograd.grad(sigmoid_focal_loss(x_grad, t), x_grad, upstream)
            copy = x.clone(memory_format=torch.contiguous_format).requires_grad_()
            (expected,) = torch.autograd.grad(
                sigmoid_focal_loss(copy, t.clone()), copy, upstream.contiguous()
            )
            assert_same(grad, expected, in_memory_order)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_dense_losses_keep_the_memory_layout(reduction, device):
    """As elementwise ops of torch do; no copy is made of logits that are dense in some order of dimensions."""
    x = logits(2, 5, 3, 4, dtype=torch.float32, device=device)
    targets = soft_targets(2, 5, 3, 4, device=device)
    expected = sigmoid_focal_loss(x, targets, reduction=reduction)
    (grad,) = torch.autograd.grad(
        sigmoid_focal_loss(x.requires_grad_(), targets, reduction=reduction).sum(), x
    )
    for reorder in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        other = reorder(x.detach()).requires_grad_()
        loss = sigmoid_focal_loss(other, reorder(targets), reduction=reduction)
        torch.testing.assert_close(loss, expected)
        (other_grad,) = torch.autograd.grad(loss.sum(), other)
        torch.testing.assert_close(other_grad, grad)
        assert other_grad.stride() == other.stride()
        if reduction == "none":
            assert loss.stride() == other.stride()


def test_alpha_and_gamma_may_be_tensors_of_the_host(device):
    x, targets = logits(4, 3, dtype=torch.float32, device=device), class_indices(4, 3, device)
    for reduction in ("none", "sum"):
        torch.testing.assert_close(
            sigmoid_focal_loss(x, targets, torch.tensor(0.75), torch.tensor(3), reduction),
            sigmoid_focal_loss(x, targets, 0.75, 3, reduction),
            rtol=0, atol=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="gamma must not require grad"):
        sigmoid_focal_loss(x, targets, gamma=torch.tensor(2.0, requires_grad=True))


def test_roundings_of_dense_targets_are_taken(device):
    x = torch.tensor([-8.0, 0, 8], device=device)
    for dtype, gamma in ((torch.float32, 2.0), (torch.bfloat16, 1.5)):
        above = torch.nextafter(
            torch.ones(3, device=device, dtype=dtype),
            torch.full((3,), 2, device=device, dtype=dtype),
        )
        for targets in (above, 1 - above):
            assert sigmoid_focal_loss(x.to(dtype), targets, gamma=gamma).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, 1, 7, 1000.0])
def test_normalizer(value, dtype, device):
    x = logits(30, 5, dtype=dtype, device=device).requires_grad_()
    targets = class_indices(30, 5, device)
    plain = sigmoid_focal_loss(x, targets, reduction="sum")
    (plain_grad,) = torch.autograd.grad(plain, x)
    for normalizer in (value, torch.tensor(value, device=device)):
        loss = sigmoid_focal_loss(x, targets, reduction="sum", normalizer=normalizer)
        torch.testing.assert_close(loss, plain / max(value, 1))
        (grad,) = torch.autograd.grad(loss * 8, x)
        torch.testing.assert_close(grad, plain_grad * (8 / max(value, 1)))
    clamped = sigmoid_focal_loss(x, targets, reduction="sum", normalizer=0.5, min_normalizer=0.25)
    torch.testing.assert_close(clamped, plain / 0.5)


def test_float16_gradients_survive_a_large_normalizer(device):
    """Under a loss scaler: the factor arrives with the backward, and must not find zeros."""
    x = torch.full((4, 3), -4.0, device=device, dtype=torch.float16, requires_grad=True)
    targets = torch.full((4,), 3, device=device)
    loss = sigmoid_focal_loss(x, targets, reduction="sum", normalizer=1e5)
    (grad,) = torch.autograd.grad(loss * 2.0**16, x)
    exact_x = x.detach().double().requires_grad_()
    exact = reference.sigmoid_focal_loss(exact_x, targets, reduction="sum")
    (exact_grad,) = torch.autograd.grad(exact * (2.0**16 / 1e5), exact_x)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_backward_gives_the_same_values(reduction, dtype, device):
    x = logits(30, 5, dtype=dtype, device=device).requires_grad_()
    loss = sigmoid_focal_loss(x, class_indices(30, 5, device), reduction=reduction).sum()
    first, second, last = (
        torch.autograd.grad(loss * 3, x, retain_graph=retain)[0] for retain in (True, True, False)
    )
    assert torch.equal(first, second) and torch.equal(first, last)


def test_the_loss_used_twice(device):
    x = logits(30, 5, dtype=torch.float32, device=device).requires_grad_()
    targets = class_indices(30, 5, device)
    loss = sigmoid_focal_loss(x, targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss + loss * loss, x)
    (once,) = torch.autograd.grad(sigmoid_focal_loss(x, targets, reduction="sum"), x)
    torch.testing.assert_close(grad, once * (1 + 2 * loss.detach()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    x = logits(30, 5, dtype=torch.float32, device=device).requires_grad_()
    targets = class_indices(30, 5, device)

    def f(x):
        return sigmoid_focal_loss(x * 2, targets, reduction="sum", normalizer=4)

    (expected,) = torch.autograd.grad(f(x), x)
    checkpoint(f, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, expected)


def test_no_gradient_is_computed_where_none_is_wanted(device):
    x = logits(30, 5, dtype=torch.float32, device=device)
    targets = class_indices(30, 5, device)
    assert not sigmoid_focal_loss(x, targets, reduction="sum").requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not sigmoid_focal_loss(x, targets, reduction="sum").requires_grad


def test_two_runs_give_the_same_bits(device):
    x = logits(5000, 91, dtype=torch.float32, device=device).requires_grad_()
    targets = class_indices(5000, 91, device)
    runs = []
    for threads in (1, torch.get_num_threads()):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        loss = sigmoid_focal_loss(x, targets, reduction="sum")
        runs.append((loss.detach(), *torch.autograd.grad(loss, x)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_takes_logits_as_they_are(device):
    x = logits(30, 5, dtype=torch.bfloat16, device=device)
    targets = class_indices(30, 5, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(sigmoid_focal_loss(x, targets), sigmoid_focal_loss(x, targets))
        assert sigmoid_focal_loss(x, targets).dtype == torch.bfloat16
        assert sigmoid_focal_loss(x.float(), targets).dtype == torch.float32


def test_dense_targets_of_other_dtypes(device):
    x = logits(30, 5, dtype=torch.bfloat16, device=device)
    targets = torch.randint(0, 2, (30, 5), device=device)
    expected = sigmoid_focal_loss(x, targets.to(x.dtype))
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64):
        assert torch.equal(sigmoid_focal_loss(x, targets.to(dtype)), expected)
    # Soft targets in float32 keep their digits beside bfloat16 logits.
    soft = torch.rand(30, 5, device=device)
    exact = reference.sigmoid_focal_loss(x.double(), soft.double())
    torch.testing.assert_close(sigmoid_focal_loss(x, soft).double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_opcheck(kind, beta, device):
    x = logits(9, 5, dtype=torch.float32, device=device).requires_grad_()
    targets = class_indices(9, 5, device) if kind == "classes" else torch.rand_like(x).detach()
    arguments = (x, targets, 0.25, 2.0, beta, -100)
    ops = torch.ops.focalops
    torch.library.opcheck(ops.sigmoid_focal_loss.default, arguments)
    upstream = torch.rand_like(x).detach()
    plain = (x.detach(), *arguments[1:])
    torch.library.opcheck(ops._sigmoid_focal_loss_backward.default, (upstream, *plain))
    normalizer = torch.tensor(3.0, device=device)
    for rest in ((normalizer, 1.0, True), (None, 1.0, False)):
        torch.library.opcheck(ops.sigmoid_focal_loss_sum.default, (*arguments, *rest))
    torch.library.opcheck(ops._scale_.default, (x.detach().clone(), normalizer))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_compiles_whole(reduction, device):
    targets = class_indices(30, 5, device)

    @torch.compile(fullgraph=True, dynamic=True)
    def f(x, targets):
        return sigmoid_focal_loss(x * 2, targets, reduction=reduction).sum() * 3

    x = logits(30, 5, dtype=torch.float32, device=device).requires_grad_()
    (compiled,) = torch.autograd.grad(f(x, targets), x)
    (eager,) = torch.autograd.grad(
        sigmoid_focal_loss(x * 2, targets, reduction=reduction).sum() * 3, x
    )
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", ["classes", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_vmap(reduction, kind, device):
    x = logits(6, 5, 3, dtype=torch.float32, device=device).requires_grad_()
    targets = torch.randint(0, 4, (6, 5), device=device)
    if kind == "soft":
        targets = torch.rand(6, 5, 3, device=device)

    def f(x, t):
        return sigmoid_focal_loss(x, t, reduction=reduction)

    loss = torch.vmap(f)(x, targets)
    expected = torch.stack([f(*sample) for sample in zip(x, targets, strict=True)])
    torch.testing.assert_close(loss, expected)
    shared = torch.vmap(f, in_dims=(0, None))(x, targets[0])
    torch.testing.assert_close(shared, torch.stack([f(sample, targets[0]) for sample in x]))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_batched_gradients(reduction, retain_graph, device):
    x = logits(5, 3, dtype=torch.float32, device=device).requires_grad_()
    loss = sigmoid_focal_loss(x, class_indices(5, 3, device), reduction=reduction)
    upstream = torch.randn(4, *loss.shape, device=device)
    rows = [torch.autograd.grad(loss, x, row, retain_graph=True)[0] for row in upstream]
    (batched,) = torch.autograd.grad(
        loss, x, upstream, is_grads_batched=True, retain_graph=retain_graph
    )
    torch.testing.assert_close(batched, torch.stack(rows))


# ---- FL* ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("gamma", "beta"), [(2.0, 0.0), (2.0, 1.0), (4.0, 0.0), (0.5, -1.5)])
def test_star_matches_the_reference(gamma, beta, reduction, dtype, device):
    x = logits(50, 13, dtype=dtype, device=device).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    for targets in (class_indices(50, 13, device), soft_targets(50, 13, device=device)):
        exact = reference.sigmoid_focal_loss_star(
            exact_x, targets, 0.25, gamma, reduction, beta=beta
        )
        loss = sigmoid_focal_loss_star(x, targets, 0.25, gamma, reduction, beta=beta)
        # gamma x + beta rounds by an ulp of its size, which softplus passes on
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5}.get(
            dtype, 1e-12
        )
        tiny = torch.finfo(dtype).tiny
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tiny)
        upstream = torch.rand(loss.shape, device=device)
        (grad,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
        (expected,) = torch.autograd.grad(exact, exact_x, upstream.to(loss.dtype).double())
        torch.testing.assert_close(grad.double(), expected, rtol=2 * tolerance, atol=2 * tiny)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_star_gradcheck(reduction, device):
    x = logits(4, 3, dtype=torch.float64, device=device, scale=2).requires_grad_()
    for targets in (torch.tensor([0, 3, -100, 2], device=device), torch.rand(4, 3, device=device)):

        def f(x, targets=targets):
            return sigmoid_focal_loss_star(x, targets, reduction=reduction, beta=0.5)

        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_star_at_the_limits(backend, device):
    inf = math.inf
    x = torch.tensor([inf, -inf, 1e4, -1e4, math.nan], device=device).unsqueeze(1).requires_grad_()
    negative = torch.ones(5, device=device).long()
    loss = sigmoid_focal_loss_star(x, negative, beta=1.0)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert loss[0] == inf and loss[1] == 0 and loss[2].isfinite() and loss[4].isnan()
    assert is_limit(grad[0], 0.75, backend) and grad[1] == 0
    assert grad[4].isnan() and grad[:4].isfinite().all()


LOGITS = st.floats(-60, 60, width=32)


@given(
    st.lists(LOGITS, min_size=1, max_size=40),
    st.sampled_from(GAMMAS),
    st.sampled_from(ALPHAS),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_any_logits(values, gamma, alpha, classes, random):
    rows = -(-len(values) // classes)
    x = torch.tensor(values + [0.0] * (rows * classes - len(values))).view(rows, classes)
    x.requires_grad_()
    targets = torch.tensor([random.choice([*range(classes + 1), -100]) for _ in range(rows)])
    check_against_float64(x, targets, alpha, gamma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded_once(dtype, device):
    # All of float16, denormal numbers among them, and ends that fill no vector.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    x = every[every.isfinite()].to(dtype)[:63_485].reshape(-1, 5).to(device)
    targets = torch.randint(0, 6, (len(x),), device=device)
    results = []
    for inputs in (x, x.float()):
        inputs = inputs.clone().requires_grad_()
        each = sigmoid_focal_loss(inputs, targets)
        sigmoid_focal_loss(inputs, targets, reduction="sum").backward()
        results.append((each.detach().to(dtype), inputs.grad.to(dtype)))
    for half, rounded in zip(*results, strict=True):
        assert torch.equal(half, rounded)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
def test_smoothing_of_float64_is_float64(label_smoothing, device):
    """In the reference, and in what is made of it: "none" and a graph that is kept."""
    x = (torch.randn(9, 3, dtype=torch.float64) * 3).to(device).requires_grad_()
    targets = torch.arange(9, device=device) % 4
    p = torch.sigmoid(x)
    hard = torch.nn.functional.one_hot(targets, 4)[:, :3].double()
    t = hard * (1 - label_smoothing) + label_smoothing / 2
    cross_entropy = -(t * p.log() + (1 - t) * (1 - p).log())
    alpha_t = 0.25 * hard + 0.75 * (1 - hard)
    expected = alpha_t * (1 - torch.where(hard == 1, p, 1 - p)) ** 2 * cross_entropy
    # At an infinite logit, whose gradient is that of the cross entropy alone.
    infinite = torch.full((1, 3), -math.inf, dtype=torch.float64, device=device, requires_grad=True)
    slope = torch.full((1, 3), -0.25 * (1 - label_smoothing / 2), dtype=torch.float64)
    slope[:, 1:] = 0
    for function in (sigmoid_focal_loss, reference.sigmoid_focal_loss):
        losses = function(x, targets, label_smoothing=label_smoothing)
        torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-15)
        for reduction in ("none", "sum"):
            loss = function(
                infinite, targets[:1], label_smoothing=label_smoothing, reduction=reduction
            )
            (grad,) = torch.autograd.grad(loss.sum(), infinite, create_graph=True)
            torch.testing.assert_close(grad.detach().cpu(), slope, rtol=1e-15, atol=0)
