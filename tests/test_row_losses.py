"""Weights, label smoothing and the losses with a quality score: against the papers' formulas and the reference in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from focalops import (
    dense_focal_loss,
    ia_bce_loss,
    matchability_aware_loss,
    quality_focal_loss,
    reference,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    softmax_focal_loss,
    varifocal_loss,
)
from focalops.row_losses import ROW_LOSSES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A row shorter than a 16-byte vector, vectors that straddle rows, more than one block and one chunk.
SHAPES = ((7, 1), (37, 13), (11, 91), (1500, 7))
LOSSES = {
    "quality": (quality_focal_loss, {}),
    "quality, beta 1.5": (quality_focal_loss, {"beta": 1.5}),
    "varifocal": (varifocal_loss, {}),
    "varifocal, gamma 1": (varifocal_loss, {"gamma": 1.0, "iou_weighted": False}),
    "varifocal, detached": (varifocal_loss, {"detach_weight": True}),
    "matchability": (matchability_aware_loss, {}),
    "matchability, alpha": (matchability_aware_loss, {"gamma": 2.0, "alpha": 0.6}),
    "ia_bce": (ia_bce_loss, {}),
    "ia_bce, gamma 1.5": (ia_bce_loss, {"alpha": 0.5, "gamma": 1.5}),
}
# The results are rounded to the dtype; float32 itself is exact to some ten roundings of exponents of up to 20.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 3e-5, torch.float64: 1e-11}


def make(rows: int, classes: int, device: str, dtype: torch.dtype = torch.float32):
    x = (torch.randn(rows, classes) * 4).to(device, dtype).requires_grad_()
    labels = torch.randint(0, classes + 1, (rows,))
    labels[torch.rand(rows) < 0.2] = -100
    scores = torch.rand(rows)
    scores[::5] = 0
    scores[1::5] = 1
    return x, labels.to(device), scores.to(device)


def check_against_float64(loss, x: Tensor, exact_loss) -> None:
    """Both are called with logits; their sums and gradients are compared."""
    total = loss(x)
    (grad,) = torch.autograd.grad(total, x)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_loss(exact_x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x)
    assert total.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-30)
    # Where the terms of a soft target cancel, what is left is as exact as they are.
    scale = exact_grad.abs().max().item()
    torch.testing.assert_close(
        grad.double(),
        exact_grad,
        rtol=TOLERANCE[x.dtype],
        atol=max(1e-6 * scale, torch.finfo(x.dtype).smallest_normal)
        if x.dtype != torch.float64
        else 1e-13 * scale,
    )


# ---- weights and smoothing ----------------------------------------------------------------------


def options_of(kind: str, rows: int, classes: int, device: str) -> dict:
    options = {}
    if "row" in kind:
        options["weight"] = torch.rand(rows, device=device) * 3
    if "class" in kind:
        options["class_weight"] = torch.rand(classes, device=device) * 3
    if "smoothed" in kind:
        options["label_smoothing"] = 0.1
    return options


@pytest.mark.parametrize("kind", ["row", "class", "row, class, smoothed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_focal_loss_with_extras(shape, dtype, kind, device):
    x, labels, _ = make(*shape, device, dtype)
    options = options_of(kind, *shape, device)
    for reduction in ("sum", "mean"):
        check_against_float64(
            lambda x, r=reduction: sigmoid_focal_loss(x, labels, reduction=r, **options),
            x,
            lambda x, r=reduction: reference.sigmoid_focal_loss(x, labels, reduction=r, **options),
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_focal_loss_with_extras_is_plain_arithmetic(alpha, gamma, device):
    """The weights multiply, and the cross entropy alone is smoothed."""
    x, labels, _ = make(37, 13, device, torch.float64)
    labels[labels < 0] = 13
    options = options_of("row, class, smoothed", 37, 13, device)
    one_hot = F.one_hot(labels, 14)[:, :13].double()
    factor = options["weight"].unsqueeze(1) * options["class_weight"]
    p = torch.sigmoid(x)
    modulation = torch.where(one_hot == 1, 1 - p, p) ** gamma
    balance = 1 if alpha < 0 else alpha * one_hot + (1 - alpha) * (1 - one_hot)
    cross_entropy = F.binary_cross_entropy_with_logits(x, one_hot * 0.9 + 0.05, reduction="none")
    exact = (balance * modulation * cross_entropy * factor).sum() / 5
    actual = sigmoid_focal_loss(x, labels, alpha, gamma, "sum", normalizer=5, **options)
    torch.testing.assert_close(actual, exact)
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(exact, x))
    elementwise = sigmoid_focal_loss(x, labels, alpha, gamma, **options)
    torch.testing.assert_close(elementwise.sum() / 5, actual)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["row", "class", "row, class, smoothed"])
def test_dense_focal_loss_with_extras(kind, dtype, layout, device):
    levels = [
        (torch.randn(2, 15, *size) * 4).to(device, dtype) for size in ((13, 21), (7, 11), (1, 1))
    ]
    if layout == "rows":
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    levels = [level.requires_grad_() for level in levels]
    labels = torch.randint(-1, 6, (2, 3 * 351), device=device)
    labels[labels < 0] = -100
    options = {"normalizer": torch.tensor([3.0, 7.0], device=device)}
    options |= options_of(kind, 2, 5, device)
    if "weight" in options:
        options["weight"] = torch.rand(2, 3 * 351, device=device)
    loss = dense_focal_loss(levels, labels, **options)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    exact = reference.dense_focal_loss(exact_levels, labels, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    tiny = torch.finfo(dtype).smallest_normal
    grads, exact_grads = (torch.autograd.grad(*p) for p in ((loss, levels), (exact, exact_levels)))
    for grad, exact_grad, level in zip(grads, exact_grads, levels, strict=True):
        assert grad.stride() == level.stride()
        torch.testing.assert_close(
            grad.double(), exact_grad, rtol=TOLERANCE[dtype], atol=max(1e-7, tiny)
        )
    over = [level * 1 for level in levels]
    inplace = dense_focal_loss(over, labels, **options, inplace_backward=True)
    assert torch.equal(inplace, loss)
    for grad, other in zip(torch.autograd.grad(inplace, levels), grads, strict=True):
        assert torch.equal(grad, other)


def test_invalid_labels_and_weights_of_ignored_rows(backend, device):
    x, labels, scores = make(20, 5, device)
    weight = torch.ones(20, device=device)
    weight[labels == -100] = math.nan
    loss = sigmoid_focal_loss(x, labels, reduction="sum", weight=weight)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and (grad[labels == -100] == 0).all()
    scores[labels == -100] = math.nan
    assert quality_focal_loss(x, (labels, scores), reduction="sum").isfinite()
    labels[3] = 7
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"quality_focal_loss: .* \[0, 5\] or .* got 7"):
            quality_focal_loss(x, (labels, scores), reduction="sum")
    else:
        loss = quality_focal_loss(x, (labels, scores), reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isnan() and grad[3].isnan().all() and grad.isnan().sum() == 5


# ---- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, name, device):
    function, options = LOSSES[name]
    x, labels, scores = make(*shape, device, dtype)
    exact = getattr(reference, function.__name__)
    weight = torch.rand(shape[0], device=device)
    class_weight = torch.rand(shape[1], device=device)
    cases = ({"normalizer": 7.0}, {"weight": weight}, {"class_weight": class_weight})
    for extras in cases[: 1 if dtype != torch.float32 else 3]:
        check_against_float64(
            lambda x, e=extras: function(x, (labels, scores), reduction="sum", **options, **e),
            x,
            lambda x, e=extras: exact(
                x, (labels, scores.double()), reduction="sum", **options, **e
            ),
        )


def in_plain_words(name: str, x: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """The default of each loss as its paper has it, row by row."""
    losses = []
    for row, label, q in zip(x, labels.tolist(), scores, strict=True):
        for k, logit in enumerate(row):
            p = torch.sigmoid(logit)
            cross_entropy = lambda t, p=p: -(t * p.log() + (1 - t) * (1 - p).log())  # noqa: E731
            is_class = k == label
            if name == "quality":
                y = q if is_class else torch.zeros_like(q)
                losses.append((y - p).abs() ** 2 * cross_entropy(y))
            elif name == "varifocal":
                if is_class and q > 0:
                    losses.append(q * cross_entropy(q))
                else:
                    losses.append(0.75 * p**2 * cross_entropy(0))
            elif name == "matchability":
                if is_class:
                    losses.append(cross_entropy(q**1.5))
                else:
                    losses.append(p.detach() ** 1.5 * cross_entropy(0))
            elif is_class:
                t = (p.detach() ** 0.25 * q**0.75).clamp(min=0.01)
                losses.append(cross_entropy(t))
            else:
                losses.append(p**2 * cross_entropy(0))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", ["quality", "varifocal", "matchability", "ia_bce"])
def test_is_the_papers_formula(name, device):
    function, _ = LOSSES[name]
    x, labels, scores = make(20, 4, device, torch.float64)
    labels[labels < 0] = 4
    exact = in_plain_words(name, x, labels, scores.double())
    for actual in (
        function(x, (labels, scores), reduction="sum"),
        function(x, (labels, scores)).sum(),
        function(x, (labels, scores), reduction="mean") * x.numel(),
    ):
        torch.testing.assert_close(actual, exact)
        (grad,), (exact_grad,) = (
            torch.autograd.grad(f, x, retain_graph=True) for f in (actual, exact)
        )
        torch.testing.assert_close(grad, exact_grad)


@pytest.mark.parametrize("name", ["quality", "quality, beta 1.5", "varifocal"])
def test_gradcheck(name, device):
    function, options = LOSSES[name]
    x = (torch.randn(5, 3, dtype=torch.float64) * 2).to(device).requires_grad_()
    targets = torch.tensor([0, 3, -100, 2, 1], device=device), torch.rand(5, device=device).double()

    def f(x):
        return function(x, targets, reduction="sum", normalizer=3, **options)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits(name, dtype, device):
    """Finite for finite logits, the limit at infinity, NaN only from NaN."""
    function, options = LOSSES[name]
    finite = [0.0, 20, -20, 100, -100, 1e4, -1e4]
    for values in (finite, [math.inf], [-math.inf], [math.nan]):
        x = torch.tensor(values, dtype=dtype).repeat(8).unsqueeze(1).to(device).requires_grad_()
        scores = torch.tensor([0.0, 1e-4, 0.5, 1.0]).repeat_interleave(2 * len(values)).to(device)
        labels = torch.tensor([0, 1]).repeat_interleave(len(values)).repeat(4).to(device)
        for one in range(len(labels)) if values is not finite else (slice(None),):
            row = x[one : one + 1] if isinstance(one, int) else x
            targets = labels[one].view(-1), scores[one].view(-1)
            loss = function(row, targets, reduction="sum", **options)
            (grad,) = torch.autograd.grad(loss, row)
            if math.isnan(values[0]):
                assert loss.isnan() and grad.isnan()
            else:
                assert not loss.isnan() and grad.isfinite().all()
                assert loss.isfinite() or values is not finite


AT_INFINITY = {
    **LOSSES,
    "quality, beta 0": (quality_focal_loss, {"beta": 0.0}),
    "varifocal, gamma 1.5, detached": (varifocal_loss, {"detach_weight": True, "gamma": 1.5}),
    "matchability, gamma 0": (matchability_aware_loss, {"gamma": 0.0}),
    "ia_bce, alpha 0": (ia_bce_loss, {"alpha": 0.0}),
    "varifocal, alpha 0": (varifocal_loss, {"alpha": 0.0}),
    "matchability, alpha 0": (matchability_aware_loss, {"alpha": 0.0}),
    **{
        f"focal, alpha {alpha}, gamma {gamma}, smoothed by {smoothing}": (
            lambda x, targets, **options: sigmoid_focal_loss(x, targets[0], **options),
            {"alpha": alpha, "gamma": gamma, "label_smoothing": smoothing},
        )
        for alpha in (0.0, 1.0)  # one half of the losses is 0 whatever the logit
        for gamma in (0.0, 2.0)
        for smoothing in (0.0, 0.1, 1.0)
    },
    **{
        f"focal star, alpha {alpha}": (
            lambda x, targets, **options: sigmoid_focal_loss_star(x, targets[0], **options),
            {"alpha": alpha},
        )
        for alpha in (0.0, 0.25, 1.0)
    },
    **{
        f"focal of dense targets, alpha {alpha}": (
            lambda x, targets, **options: sigmoid_focal_loss(
                x, (targets[0] == 0).unsqueeze(1), **options
            ),
            {"alpha": alpha},
        )
        for alpha in (0.0, 0.25, 1.0)
    },
    **{
        f"focal, gamma {gamma}, smoothed by {smoothing}": (
            lambda x, targets, gamma=gamma, smoothing=smoothing, **options: sigmoid_focal_loss(
                x, targets[0], gamma=gamma, label_smoothing=smoothing, **options
            ),
            {},
        )
        for gamma in (0.0, 0.5, 2.0)
        for smoothing in (0.0, 0.1, 1.0)
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AT_INFINITY)
def test_infinite_logits_have_one_limit_in_every_path(name, dtype, device):
    """The loss of a large logit and its limit differ only by the size of the logit: 0, or the same gradient."""
    function, options = AT_INFINITY[name]
    x = torch.tensor([math.inf, -math.inf], dtype=dtype).repeat(8).unsqueeze(1).to(device)
    scores = torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(4).to(device)
    labels = torch.tensor([0, 0, 1, 1]).repeat(4).to(device)
    x.requires_grad_()
    large = x.detach().nan_to_num(posinf=2e4, neginf=-2e4).requires_grad_()

    def losses_and_grads(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(x, (labels, scores), **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    losses, grad = losses_and_grads(x)
    expected, expected_grad = losses_and_grads(large)
    grows = expected > 1
    assert (losses[grows] == math.inf).all() and (losses[~grows] == 0).all()
    torch.testing.assert_close(grad, expected_grad)
    for row in range(len(x)):
        these = labels[row : row + 1], scores[row : row + 1]
        one = x[row : row + 1]
        total = function(one, these, reduction="sum", **options)
        assert total == losses[row].float()
        (of_sum,) = torch.autograd.grad(total, one, retain_graph=True)
        torch.testing.assert_close(of_sum, grad[row : row + 1])
        (twice,) = torch.autograd.grad(total, one, create_graph=True)
        torch.testing.assert_close(twice.detach(), of_sum)


@pytest.mark.parametrize("name", ["quality", "ia_bce"])
def test_kept_graphs_and_memory(name, device):
    function, _ = LOSSES[name]
    x, labels, scores = make(37, 13, device)
    loss = function(x, (labels, scores), reduction="sum") * 3
    first, last = (torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, last)
    logits = x * 1
    loss = function(logits, (labels, scores), reduction="sum", inplace_backward=True) * 3
    over_logits, over_x = torch.autograd.grad(loss, (logits, x))
    assert over_logits.data_ptr() == logits.data_ptr() and torch.equal(over_x, first)


def test_empty(device):
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        x = torch.empty(shape, device=device, requires_grad=True)
        labels = torch.zeros(shape[:-1], device=device).long()
        for function, options in LOSSES.values():
            loss = function(x, (labels, labels.float()), reduction="sum", **options)
            assert loss == 0
            assert torch.autograd.grad(loss, x)[0].shape == shape


def test_opcheck(device):
    x, labels, scores = make(9, 5, device)
    weight, class_weight = torch.rand(9, device=device), torch.rand(5, device=device)
    op = torch.ops.focalops.row_loss_sum.default
    for loss, row in ROW_LOSSES.items():
        parameters = [0.5] * len(row.parameters)
        arguments = (x, labels, scores, loss, parameters, weight, class_weight, -100, None, 1.0)
        torch.library.opcheck(op, (*arguments, loss != "sigmoid_focal_loss"))
        torch.library.opcheck(torch.ops.focalops._class_indices.default, (labels, loss, 5, -100))
    inplace = torch.ops.focalops._row_loss_sum_.default
    torch.library.opcheck(inplace, (x.detach().clone(), *arguments[1:]))


def test_compiles_whole(device):
    x, labels, scores = make(30, 5, device)

    def f(x, labels, scores):
        weighted = sigmoid_focal_loss(x * 2, labels, reduction="sum", weight=scores)
        return weighted + varifocal_loss(x, (labels, scores), reduction="mean")

    compiled = torch.compile(f, fullgraph=True)(x, labels, scores)
    eager = f(x, labels, scores)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(eager, x))


@pytest.mark.parametrize("name", ["quality", "varifocal", "ia_bce"])
def test_unreduced_losses_under_transforms(name, backend, device):
    """They look at the class indices there too."""
    function, _ = LOSSES[name]
    x, labels, scores = make(6, 5, device)

    def f(x: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        return function(x, (labels, scores))

    expected = f(x, labels, scores)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels, scores), expected)
    rows = [t.unflatten(0, (2, 3)) for t in (x, labels, scores)]
    torch.testing.assert_close(torch.vmap(f)(*rows), expected.unflatten(0, (2, 3)))
    shared = torch.vmap(f, in_dims=(0, None, None))(torch.stack((x, 2 * x)), labels, scores)
    torch.testing.assert_close(shared[0], expected)
    labels[2] = 7
    if backend == "cpu":
        for g in (compiled, lambda *rows: torch.vmap(f)(*(t.unsqueeze(0) for t in rows))):
            with pytest.raises(RuntimeError, match=r"\[0, 5\] or equal ignore_index, -100, got 7"):
                g(x, labels, scores)


# ---- weights that have a gradient ---------------------------------------------------------------

WEIGHTED = {
    "sigmoid": lambda x, labels, scores, **o: sigmoid_focal_loss(x, labels, **o),
    "smoothed": lambda x, labels, scores, **o: sigmoid_focal_loss(
        x, labels, label_smoothing=0.1, **o
    ),
    "softmax": lambda x, labels, scores, **o: softmax_focal_loss(
        x, labels.where(labels != x.shape[-1], 0), **o
    ),
    "quality": lambda x, labels, scores, **o: quality_focal_loss(x, (labels, scores), **o),
    "varifocal": lambda x, labels, scores, **o: varifocal_loss(x, (labels, scores), **o),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(40, 5), (2, 3, 7, 3), (0, 4)], ids=str)
def test_weight_has_a_gradient(shape, reduction, dtype, name, device):
    """That of the sum of its row's losses, and the one of the logits is as with a constant."""
    x, labels, scores = make(math.prod(shape[:-1]), shape[-1], device, dtype)
    x = x.detach().view(shape).requires_grad_()
    labels, scores = labels.view(shape[:-1]), scores.view(shape[:-1])
    weight = torch.rand_like(scores).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"reduction": reduction, "class_weight": torch.rand(shape[-1], device=device) + 0.5}
    if reduction == "sum":
        options["normalizer"] = torch.tensor(7.0, device=device)

    def loss(x, w):
        return WEIGHTED[name](x, labels, scores, weight=w, **options).sum()

    total = loss(x, weight.requires_grad_())
    by_logits, by_weight = torch.autograd.grad(total, (x, weight))
    constant = loss(x, weight.detach())
    (expected,) = torch.autograd.grad(constant, x)
    wide = x.detach().double(), weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(loss(*wide), wide[1])
    of_sums = 1e-12 if dtype == torch.float64 else 1e-5
    if reduction != "none":  # whose losses are rounded to the dtype
        torch.testing.assert_close(total, constant, rtol=of_sums, atol=1e-30, equal_nan=True)
        torch.testing.assert_close(by_weight.double(), exact, rtol=of_sums, atol=1e-7)
    rounding = TOLERANCE[dtype]
    torch.testing.assert_close(by_logits, expected, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradcheck_with_weights_of_the_logits(name, device):
    x, labels, scores = make(5, 3, device, torch.float64)

    def f(x):
        weight = x.sigmoid().mean(-1)
        return WEIGHTED[name](x, labels, scores.double(), weight=weight, reduction="sum")

    assert torch.autograd.gradcheck(f, [x])
    assert torch.autograd.gradgradcheck(f, [x])


# ---- dense targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["quality", "quality, beta 1.5", "varifocal", "varifocal, detached"]
)
def test_dense_scores(name, dtype, device):
    """Those of one true class a row are those of labels and scores; others are the reference's."""
    function, options = LOSSES[name]
    x, labels, scores = make(20, 5, device, dtype)
    labels[labels < 0] = 5
    scores[scores == 0] = 0.5
    dense = F.one_hot(labels, 6)[:, :5] * scores.unsqueeze(1)
    several = torch.rand(20, 5, device=device)
    weight = torch.rand(20, 5, device=device)
    class_weight = torch.rand(5, device=device)
    exact = getattr(reference, function.__name__)
    for reduction in ("none", "mean", "sum"):
        ours = function(x, dense, reduction=reduction, **options)
        rows = function(x, (labels, scores), reduction=reduction, **options)
        # float32 sums in another order
        torch.testing.assert_close(ours, rows, rtol=1e-6, atol=1e-7)
    for extras in ({}, {"weight": weight, "class_weight": class_weight}):
        for reduction in ("mean", "sum"):
            check_against_float64(
                lambda x, r=reduction, e=extras: function(x, several, reduction=r, **options, **e),
                x,
                lambda x, r=reduction, e=extras: exact(x, several, reduction=r, **options, **e),
            )


def test_dense_scores_that_are_refused(device):
    x, _, scores = make(4, 5, device)
    dense = torch.rand(4, 5, device=device)
    cases = [
        (lambda: quality_focal_loss(x, dense[:3]), r"quality_focal_loss: dense targets must have the shape of inputs, \(4, 5\), got \(3, 5\)"),
        (lambda: quality_focal_loss(x, dense.long()), "quality_focal_loss: dense targets must be float16, bfloat16, float32 or float64, got torch.int64"),
        (lambda: quality_focal_loss(x, dense.clone().requires_grad_()), "targets must not require grad"),
        (lambda: varifocal_loss(x, dense, weight=scores), r"varifocal_loss: weight must have the shape of inputs, \(4, 5\), got \(4,\)"),
        (lambda: varifocal_loss(x, dense, class_weight=scores), r"varifocal_loss: class_weight must have shape \(5,\) .* got \(4,\)"),
        (lambda: varifocal_loss(x, dense, ignore_index=0), r"ignore_index and inplace_backward need targets \(labels, scores\)"),
        (lambda: ia_bce_loss(x, dense), r"targets must be \(labels, scores\), got Tensor"),
        (lambda: matchability_aware_loss(x, dense), r"targets must be \(labels, scores\), got Tensor"),
        (lambda: sigmoid_focal_loss(x, dense, ignore_index=0), "ignore_index need class-index targets"),
    ]  # fmt: skip
    for call, sentence in cases:
        with pytest.raises((ValueError, TypeError), match=sentence):
            call()


def test_errors(device):
    x, labels, scores = make(4, 5, device)
    dense = torch.rand_like(x).detach()
    levels, rows = [torch.zeros(2, 6, 3, 1, device=device)], torch.zeros(2, 9, device=device).long()
    cases = [
        (lambda: sigmoid_focal_loss(x, dense, weight=scores), "weight, class_weight, label_smoothing and ignore_index need class-index targets: with dense ones multiply the losses"),
        (lambda: sigmoid_focal_loss(x, labels, reduction="sum", weight=scores[:3]), r"sigmoid_focal_loss: weight must have the shape of targets, \(4,\), .* got \(3,\)"),
        (lambda: sigmoid_focal_loss(x, labels, reduction="sum", class_weight=scores), r"sigmoid_focal_loss: class_weight must have shape \(5,\) or \(3, 5\) .* got \(4,\)"),
        (lambda: sigmoid_focal_loss(x, labels, reduction="sum", label_smoothing=2), r"label_smoothing must lie in \[0, 1\], got 2"),
        (lambda: sigmoid_focal_loss(x * 1, labels, reduction="sum", weight=scores.clone().requires_grad_(), inplace_backward=True), "weight must not require grad"),
        (lambda: quality_focal_loss(x, (labels, scores.clone().requires_grad_()), reduction="sum"), "scores must not require grad"),
        (lambda: quality_focal_loss(x, (labels, scores[:3]), reduction="sum"), r"quality_focal_loss: scores must have the shape of targets, \(4,\), .* got \(3,\)"),
        (lambda: quality_focal_loss(x, (labels, scores), beta=-1, reduction="sum"), "quality_focal_loss: beta must be >= 0, got -1"),
        (lambda: varifocal_loss(x, (dense, scores), reduction="sum"), r"varifocal_loss: class-index targets must have the shape of inputs, \(4, 5\), without"),
        (lambda: ia_bce_loss(x, (scores, scores), reduction="sum"), "class-index targets must be int32 or int64, got torch.float32"),
        (lambda: dense_focal_loss(levels, rows, weight=scores), r"dense_focal_loss: weight must have the shape of labels, \(2, 9\), .* got \(4,\)"),
        (lambda: dense_focal_loss(levels, rows, class_weight=scores), r"dense_focal_loss: class_weight must have shape \(2,\) or \(3, 2\) .* got \(4,\)"),
    ]  # fmt: skip
    for call, sentence in cases:
        with pytest.raises((RuntimeError, ValueError), match=sentence):
            call()


def sentence_of(call) -> str | None:
    try:
        call()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


def test_both_tables_of_the_row_losses_say_the_same(device):
    """The names of the losses, the parameters of each and what those must be: C++'s and Python's."""
    x, labels, _ = (t.detach() for t in make(4, 5, device))
    labels.clamp_(0, 4)

    def native_and_fake(loss: str, parameters: list[float]) -> list[str | None]:
        def call(x, labels):
            rest = (None, None, -100, None, 1.0, False)
            torch.ops.focalops.row_loss_sum(x, labels, None, loss, parameters, *rest)

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = mode.from_tensor(x), mode.from_tensor(labels)
            fake = sentence_of(lambda: call(*fakes))
        return [sentence_of(lambda: call(x, labels)), fake]

    native, fake = native_and_fake("focal_loss", [1.0])
    names = ", ".join(map(repr, ROW_LOSSES))
    assert native == fake == f"row_loss_sum: loss must be one of {names}, got 'focal_loss'"
    for loss, row in ROW_LOSSES.items():
        count = len(row.parameters)
        native, fake = native_and_fake(loss, [1.0] * (count + 1))
        assert native == fake and f"of {loss}, ({', '.join(row.parameters)}), got " in native
        right = [0.5] * count
        assert native_and_fake(loss, right) == [None, None]
        native, fake = native_and_fake(loss, [math.nan] * count)  # the first is named
        assert native == fake is not None
        for i in range(count):
            for wrong in (-1.0, 1.5, math.nan):
                native, fake = native_and_fake(loss, [*right[:i], wrong, *right[i + 1 :]])
                assert native == fake, (loss, i, wrong)


def test_of_two_wrong_numbers_each_path_names_the_first(device):
    x, labels, _ = make(4, 5, device)
    rows = torch.zeros(1, 4, device=device).long()
    sentences = [
        sentence_of(lambda: sigmoid_focal_loss(x, labels, 2.0, -1.0, "sum")),
        sentence_of(lambda: sigmoid_focal_loss(x, labels, 2.0, -1.0, "sum", label_smoothing=0.1)),
        sentence_of(lambda: dense_focal_loss([x.new_zeros(1, 5, 2, 2)], rows, 2.0, -1.0)),
    ]
    assert len({sentence.split(": ")[1] for sentence in sentences}) == 1, sentences


def test_unknown_name_of_class_indices(device):
    labels = torch.zeros(3, device=device).long()
    names = ", ".join(map(repr, ROW_LOSSES))
    with pytest.raises(RuntimeError) as error:
        torch.ops.focalops._class_indices(labels, "", 5, -100)
    assert f"_class_indices: loss must be one of {names}, got ''" in str(error.value)
