"""Losses an anchor of a head's levels: dense_focal_loss(reduction="none") and dense_quality_loss, against the reference in
float64; what weighs them; and class weights by part, of every loss that takes them."""

import math

import pytest
import torch
from test_dense_focal_loss import (
    DTYPES,
    LAYOUTS,
    SIZES,
    concatenated,
    make_labels,
    make_levels,
    setup,
)
from torch import Tensor

import focalops
from focalops import (
    dense_focal_loss,
    dense_quality_loss,
    quality_focal_loss,
    reference,
    sigmoid_focal_loss,
    soft_focal_loss,
)

QUALITY_LOSSES = (
    "soft_focal_loss",
    "quality_focal_loss",
    "varifocal_loss",
    "matchability_aware_loss",
    "ia_bce_loss",
)
# A gradient is rounded when it is saved and when it is multiplied; each loss has a product of powers, which float32 has to
# 2e-5, and what underflows in half precision is lost.
TOLERANCES = {
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-30},
    torch.float32: {"rtol": 4e-5, "atol": 1e-8},
    torch.float64: {"rtol": 1e-11, "atol": 1e-14},
}


# At its object the gradient of a loss with a score is the difference of a sigmoid and a power of the score, each of them up to
# 1 and within 5e-7, as wrong as CUDA's manual allows: where the two cancel it is their error that is left.
OF_A_DIFFERENCE = 1e-6


def extras(labels: Tensor, classes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A score and a weight of each anchor, and three weights of each class."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        "scores": torch.rand(labels.shape, dtype=dtype),
        "weight": torch.rand(labels.shape, dtype=dtype) + 0.1,
        "class_weight": torch.rand(3, classes, dtype=dtype) + 0.1,
    }
    given["scores"] = torch.where(given["scores"] < 0.2, given["scores"].round(), given["scores"])
    return {name: value.to(labels.device) for name, value in given.items()}


def check_against_float64(function, exact, levels, upstream=None, atol: float = 0) -> None:
    """Values and gradients of function(levels) against those of exact(levels in float64)."""
    dtype = levels[0].dtype
    losses = function(levels)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    exact_losses = exact(exact_levels)
    if upstream is None:
        upstream = torch.randn(losses.shape, dtype=losses.dtype).to(losses.device)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    of_values = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(losses.double(), exact_losses, **of_values)
    grads = torch.autograd.grad(losses, levels, upstream)
    exact_grads = torch.autograd.grad(exact_losses, exact_levels, upstream.double())
    for level, grad, other in zip(levels, grads, exact_grads, strict=True):
        assert grad.dtype == dtype and grad.stride() == level.stride()
        of_grads = TOLERANCES[dtype]
        if dtype != torch.float64:
            of_grads = of_grads | {"atol": max(atol, of_grads["atol"])}
        torch.testing.assert_close(grad.double(), other, **of_grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("anchors", "classes"), [(9, 1), (3, 3), (2, 4), (1, 5), (2, 9), (1, 80), (2, 91)]
)
def test_losses_of_anchors(anchors, classes, dtype, layout, device):
    sizes = SIZES if anchors * classes < 80 else SIZES[1:]
    levels, labels = setup(device, dtype, layout, 2, anchors, classes, sizes)
    given = extras(labels, classes, dtype)
    for options in ({}, {"weight": given["weight"], "class_weight": given["class_weight"]}):
        check_against_float64(
            lambda x, o=options: dense_focal_loss(x, labels, reduction="none", **o),
            lambda x, o=options: reference.dense_focal_loss(x, labels, reduction="none", **o),
            levels,
        )


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("classes", [33, 130, 1030])
def test_many_classes(classes, layout, device):
    """Several slices and chunks, and on the CPU blocks, of one anchor."""
    levels, labels = setup(
        device, layout=layout, anchors=1, classes=classes, sizes=((3, 5), (2, 2))
    )
    check_against_float64(
        lambda x: dense_focal_loss(x, labels, reduction="none"),
        lambda x: reference.dense_focal_loss(x, labels, reduction="none"),
        levels,
    )


def test_a_row_that_is_longer_than_a_chunk(device):
    levels, labels = setup(
        device, torch.float64, "rows", 1, anchors=1, classes=1100, sizes=((2, 3),)
    )
    check_against_float64(
        lambda x: dense_focal_loss(x, labels, reduction="none"),
        lambda x: reference.dense_focal_loss(x, labels, reduction="none"),
        levels,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_levels(layout, device):
    """More than one item, block and stretch."""
    levels, labels = setup(device, layout=layout, images=1, sizes=((40, 64), (20, 32), (33, 35)))
    check_against_float64(
        lambda x: dense_focal_loss(x, labels, 0.25, 1.5, "none", label_smoothing=0.1),
        lambda x: reference.dense_focal_loss(x, labels, 0.25, 1.5, "none", label_smoothing=0.1),
        levels,
    )


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", QUALITY_LOSSES)
def test_quality_losses(loss, dtype, layout, device):
    levels, labels = setup(device, dtype, layout, sizes=SIZES[1:])
    given = extras(labels, 5, dtype)
    scores, normalizer = given.pop("scores"), torch.tensor([3.0, 7.0], device=device)
    for reduction, options in (
        ("none", {}),
        ("none", given),
        ("sum", given | {"normalizer": normalizer}),
        ("sum", {"normalizer": 5}),
    ):
        check_against_float64(
            lambda x, r=reduction, o=options: dense_quality_loss(x, labels, scores, loss, r, **o),
            lambda x, r=reduction, o=options: reference.dense_quality_loss(
                x, labels, scores, loss, r, **o
            ),
            levels,
            atol=OF_A_DIFFERENCE,
        )


@pytest.mark.parametrize(
    ("loss", "parameters"),
    [
        ("quality_focal_loss", {"beta": 1.5}),
        ("varifocal_loss", {"alpha": 0.5, "gamma": 1.5, "iou_weighted": False}),
        ("varifocal_loss", {"detach_weight": True}),
        ("matchability_aware_loss", {"gamma": 2.0, "alpha": 0.5}),
        ("ia_bce_loss", {"alpha": 0.5, "gamma": 1.5}),
        ("soft_focal_loss", {"alpha": 0.5, "gamma": 0.5}),
        ("soft_focal_loss", {"alpha": -1, "gamma": 2}),
    ],
)
def test_parameters_are_those_of_the_loss_of_rows(loss, parameters, device):
    levels, labels = setup(device)
    scores = extras(labels, 5, torch.float32)["scores"]
    total = dense_quality_loss(levels, labels, scores, loss, **parameters)
    rows = concatenated(levels, 3)
    expected = getattr(focalops, loss)(rows, (labels, scores), reduction="sum", **parameters)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    defaults = dense_quality_loss(levels, labels, scores, loss)
    expected = getattr(focalops, loss)(rows, (labels, scores), reduction="sum")
    torch.testing.assert_close(defaults, expected, rtol=1e-5, atol=1e-6)


def test_unknown_parameters_are_named():
    levels, labels = setup("cpu")
    sentence = "the parameters of quality_focal_loss must be among beta, got 'gamma'"
    with pytest.raises(TypeError, match=sentence):
        dense_quality_loss(levels, labels, torch.rand(labels.shape), gamma=2)


# ---- weights that have a gradient ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("normalizer", [None, 5.0, "per image"])
def test_weight_has_the_gradient_of_the_reference(normalizer, dtype, device):
    levels, labels = setup(device, dtype)
    if normalizer == "per image":
        normalizer = torch.tensor([3.0, 7.0], device=device)
    given = extras(labels, 5, dtype)["weight"].requires_grad_()
    exact_weight = given.detach().double().requires_grad_()

    def loss(function, x, w):
        return function(x, labels, weight=w, normalizer=normalizer)

    check_against_float64(
        lambda x: loss(dense_focal_loss, x, given),
        lambda x: loss(reference.dense_focal_loss, x, exact_weight),
        levels,
    )
    (grad,) = torch.autograd.grad(loss(dense_focal_loss, levels, given), given)
    exact_levels = [level.detach().double() for level in levels]
    (exact,) = torch.autograd.grad(
        loss(reference.dense_focal_loss, exact_levels, exact_weight), exact_weight
    )
    torch.testing.assert_close(grad.double(), exact, rtol=2e-5, atol=1e-7)


def test_weights_that_depend_on_the_logits(device):
    """As CARL's do on the class scores: the gradient goes both ways."""
    levels, labels = setup(device, torch.float64, anchors=1, classes=2, sizes=((2, 3), (1, 1)))

    def f(*x):
        weight = torch.cat([level.sigmoid().mean(1).flatten(1) for level in x], dim=1)
        return dense_focal_loss(list(x), labels, weight=weight, normalizer=3)

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


def test_constant_weights_and_weights_with_a_gradient_agree(device):
    levels, labels = setup(device)
    weight = extras(labels, 5, torch.float32)["weight"]
    constant = dense_focal_loss(levels, labels, weight=weight, normalizer=3)
    with_gradient = dense_focal_loss(levels, labels, weight=weight.requires_grad_(), normalizer=3)
    torch.testing.assert_close(constant, with_gradient)
    with pytest.raises(ValueError, match="weight must not require grad"):
        dense_focal_loss(levels, labels, weight=weight, inplace_backward=True)


# ---- class weights by part ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_weights_by_part(dtype, layout, device):
    levels, labels = setup(device, dtype, layout)
    weights = extras(labels, 5, dtype)
    for options in (
        {"class_weight": weights["class_weight"]},
        {"class_weight": weights["class_weight"], "weight": weights["weight"]},
    ):
        check_against_float64(
            lambda x, o=options: dense_focal_loss(x, labels, normalizer=7, **o),
            lambda x, o=options: reference.dense_focal_loss(x, labels, normalizer=7, **o),
            levels,
        )


@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("loss", ["sigmoid_focal_loss", *QUALITY_LOSSES])
def test_class_weights_by_part_of_rows(loss, classes, device):
    x = (torch.randn(50, classes) * 4).to(device).requires_grad_()
    labels = make_labels(((5, 10),), 1, 1, classes, device)[0]
    given = extras(labels, classes, torch.float32)
    targets = labels if loss == "sigmoid_focal_loss" else (labels, given["scores"])
    total = getattr(focalops, loss)(
        x, targets, reduction="sum", class_weight=given["class_weight"], weight=given["weight"]
    )
    each = getattr(reference, loss)(x.double(), targets)
    of_positive, of_foreground, of_background = given["class_weight"].double()
    is_class = (labels >= 0) & (labels < classes)
    factors = torch.where(is_class[:, None], of_foreground, of_background)
    positive = labels[:, None] == torch.arange(classes, device=device)
    factors = torch.where(positive, of_positive, factors) * given["weight"].double()[:, None]
    torch.testing.assert_close(total.double(), (each * factors).sum(), rtol=1e-5, atol=1e-8)
    (grad,) = torch.autograd.grad(total, x)
    (exact,) = torch.autograd.grad((each * factors).sum(), x)
    torch.testing.assert_close(grad, exact, rtol=4e-5, atol=1e-7)


def test_equalization_loss(device):
    """Tan et al., "Equalization Loss for Long-Tailed Object Recognition", 2020: negatives of rare classes do not count in
    foreground rows. It is what three passes over the logits give."""
    levels, labels = setup(device, torch.float64, anchors=1)
    is_rare = torch.tensor([0, 1, 0, 1, 1], device=device).double()
    by_part = torch.stack((torch.ones_like(is_rare), 1 - is_rare, torch.ones_like(is_rare)))
    loss = dense_focal_loss(levels, labels, class_weight=by_part)
    is_foreground = ((labels >= 0) & (labels < 5)).double()
    of_background = dense_focal_loss(levels, labels, weight=1 - is_foreground)
    of_frequent = dense_focal_loss(levels, labels, weight=is_foreground, class_weight=1 - is_rare)
    each = sigmoid_focal_loss(concatenated(levels, 1), labels)
    rare_truth = torch.nn.functional.one_hot(labels.clamp(0, 4), 5) * is_rare
    of_rare = (each * rare_truth * is_foreground[..., None]).sum()
    torch.testing.assert_close(loss, of_background + of_frequent + of_rare)


# ---- the soft label -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_soft_focal_loss_is_linear_in_the_score(reduction, device):
    x = torch.randn(40, 5, dtype=torch.float64).to(device) * 4
    labels = make_labels(((5, 8),), 1, 1, 5, device)[0]
    scores = torch.rand(40, dtype=torch.float64).to(device)
    loss = soft_focal_loss(x, (labels, scores), 0.25, 2.0, "none")
    as_positive = sigmoid_focal_loss(x, labels, 0.25, 2.0)
    background = torch.where((labels >= 0) & (labels < 5), 5, labels)
    as_negative = sigmoid_focal_loss(x, background, 0.25, 2.0)
    expected = scores[:, None] * as_positive + (1 - scores[:, None]) * as_negative
    torch.testing.assert_close(loss, expected)
    total = soft_focal_loss(x, (labels, scores), 0.25, 2.0, "sum")
    torch.testing.assert_close(total, expected.sum())
    ones = torch.ones_like(scores)
    hard = sigmoid_focal_loss(x, labels, 0.25, 2.0, reduction)
    torch.testing.assert_close(soft_focal_loss(x, (labels, ones), reduction=reduction), hard)


def test_soft_focal_loss_at_infinite_logits(device):
    """Each term has its limit; one that does not count has none."""
    x = torch.tensor([[math.inf], [-math.inf]] * 3, device=device).requires_grad_()
    labels = torch.zeros(6, dtype=torch.long, device=device)
    scores = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.5], device=device)
    for reduction in ("none", "sum"):
        losses = torch.stack(
            [
                soft_focal_loss(
                    x[i : i + 1], (labels[:1], scores[i : i + 1]), reduction=reduction
                ).flatten()[0]
                for i in range(6)
            ]
        )
        expected = torch.tensor([0, math.inf, math.inf, 0, math.inf, math.inf], device=device)
        torch.testing.assert_close(losses, expected)
        assert torch.autograd.grad(losses.sum(), x)[0].isfinite().all()


# ---- the rest of an op's promises ---------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    levels, labels = setup(device, layout=layout, sizes=((25, 42), *SIZES))
    upstream = torch.randn(labels.shape).to(device)
    runs, before = [], torch.get_num_threads()
    for threads in (1, before):
        torch.set_num_threads(threads)
        losses = dense_focal_loss(levels, labels, reduction="none")
        runs.append((losses.detach(), *torch.autograd.grad(losses, levels, upstream)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_gives_the_same_values(dtype, device):
    levels, labels = setup(device, dtype)
    losses = dense_focal_loss(levels, labels, reduction="none")
    upstream = torch.randn(labels.shape).to(device)
    first, last = (
        torch.autograd.grad(losses, levels, upstream, retain_graph=retain)
        for retain in (True, False)
    )
    for one, two, level in zip(first, last, levels, strict=True):
        assert torch.equal(one, two) and one.stride() == two.stride() == level.stride()


@pytest.mark.parametrize("per_image", [False, True])
def test_float16_gradients_survive_a_large_normalizer(per_image, device):
    levels, labels = setup(device, torch.float16)
    scores = extras(labels, 5, torch.float16)["scores"]
    normalizer = torch.tensor([1e5, 3e5] if per_image else 2e5, device=device)
    check_against_float64(
        lambda x: dense_quality_loss(x, labels, scores, normalizer=normalizer) * 2.0**16,
        lambda x: reference.dense_quality_loss(x, labels, scores, normalizer=normalizer) * 2.0**16,
        levels,
        torch.ones((), device=device),
    )


def test_only_some_levels_want_a_gradient(device):
    levels, labels = setup(device)
    expected = torch.autograd.grad(dense_focal_loss(levels, labels), levels)
    levels[0].requires_grad_(False)
    dense_focal_loss(levels, labels, reduction="none").sum().backward()
    assert levels[0].grad is None
    for level, grad in zip(levels[1:], expected[1:], strict=True):
        torch.testing.assert_close(level.grad, grad)
    with torch.no_grad():
        assert not dense_focal_loss(levels, labels, reduction="none").requires_grad


def test_gradcheck(device):
    levels, labels = setup(
        device, torch.float64, images=2, anchors=2, classes=2, sizes=((2, 1), (1, 1))
    )
    scores = extras(labels, 2, torch.float64)["scores"]
    for f in (
        lambda *x: dense_focal_loss(x, labels, reduction="none"),
        lambda *x: dense_quality_loss(x, labels, scores, "soft_focal_loss", normalizer=3),
    ):
        assert torch.autograd.gradcheck(f, levels)
        assert torch.autograd.gradgradcheck(f, levels)


def test_batched_gradients(device):
    levels, labels = setup(device)
    losses = dense_focal_loss(levels, labels, reduction="none")
    upstream = torch.randn(3, *labels.shape).to(device)
    (batched, *_) = torch.autograd.grad(
        losses, levels, upstream, is_grads_batched=True, retain_graph=True
    )
    for i in range(3):
        (one, *_) = torch.autograd.grad(losses, levels, upstream[i], retain_graph=True)
        torch.testing.assert_close(batched[i], one)


@pytest.mark.parametrize("images", [0, 2])
def test_empty(images, device):
    for sizes in (((0, 3), (0, 0)), ((0, 3), (2, 2), (4, 0))):
        levels, labels = setup(device, layout="mixed", images=images, sizes=sizes)
        losses = dense_focal_loss(levels, labels, reduction="none")
        assert losses.shape == labels.shape
        grads = torch.autograd.grad(losses, levels, torch.ones_like(losses))
        assert [grad.shape for grad in grads] == [level.shape for level in levels]
        expected = reference.dense_focal_loss(levels, labels, reduction="none")
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("invalid", [-1, 6, 2**40])
def test_invalid_label(invalid, layout, backend, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((3, 5),))
    labels[labels == -100] = 5
    labels[0, 7] = invalid
    if backend == "cpu":
        sentence = rf"labels must lie in \[0, 5\] or .* got {invalid}"
        with pytest.raises(RuntimeError, match=f"dense_focal_loss: {sentence}"):
            dense_focal_loss(levels, labels, reduction="none")
    else:
        losses = dense_focal_loss(levels, labels, reduction="none")
        assert losses[0, 7].isnan() and losses.isnan().sum() == 1


@pytest.mark.parametrize("compute_grad", [True, False])
def test_opcheck(compute_grad, device):
    levels, labels = setup(device, sizes=((3, 5), (2, 2)))
    given = extras(labels, 5, torch.float32)
    op = torch.ops.focalops.dense_row_losses.default
    numbers = (given["scores"], "quality_focal_loss", [2.0], given["weight"], given["class_weight"])
    arguments = (levels, labels, *numbers, -100, torch.tensor([2.0, 3.0], device=device), 1.0)
    torch.library.opcheck(op, (*arguments, compute_grad))
    level = levels[0].detach().clone()
    torch.library.opcheck(torch.ops.focalops._scale_rows_.default, (level, given["weight"], 3, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_whole(dtype, device):
    levels, labels = setup(device, dtype)
    scores = extras(labels, 5, dtype)["scores"]

    def f(levels, labels, scores):
        levels = [x * 2 for x in levels]
        weight = torch.softmax(dense_focal_loss(levels, labels, reduction="none"), dim=1)
        return dense_quality_loss(levels, labels, scores, weight=weight) * 3

    compiled = torch.compile(f, fullgraph=True)(levels, labels, scores)
    eager = f(levels, labels, scores)
    torch.testing.assert_close(compiled, eager)
    grads, expected = torch.autograd.grad(compiled, levels), torch.autograd.grad(eager, levels)
    # The softmax takes a rounding of a loss of 10 for a relative difference of 1e-6.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, **tolerance)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 4, 21])
def test_scale_rows(channels, dtype, layout, device):
    """Planes and rows that begin off a 16-byte boundary among them."""
    for height, width in ((5, 8), (7, 11), (1, 1)):
        (level,) = make_levels(((height, width),), 2, 3, channels, dtype, device, layout)
        level = level.detach()
        scale = torch.randn(2, 4 + 3 * height * width + 2, device=device)
        scale = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
        factors = scale[:, 4:-2].reshape(2, height, width, 3, 1).permute(0, 3, 4, 1, 2)
        expected = (level.unflatten(1, (3, channels)).to(scale.dtype) * factors).flatten(1, 2)
        torch.ops.focalops._scale_rows_(level, scale, 3, 4)
        assert torch.equal(level, expected.to(dtype))


def test_quality_focal_loss_of_levels_is_that_of_rows(device):
    levels, labels = setup(device, torch.float64)
    scores = extras(labels, 5, torch.float64)["scores"]
    losses = dense_quality_loss(levels, labels, scores, reduction="none")
    each = quality_focal_loss(concatenated(levels, 3), (labels, scores), reduction="none")
    torch.testing.assert_close(losses, each.sum(2))
