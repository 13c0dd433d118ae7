"""dense_equalized_focal_loss against plain autograd in float64, the reference and dense_focal_loss."""

import pytest
import torch
import torch.nn.functional as F
from test_dense_focal_loss import DTYPES, LAYOUTS, SIZES, concatenated, setup
from torch import Tensor

from focalops import dense_equalized_focal_loss, dense_focal_loss, reference


def gammas(classes: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    gamma = 2 + 8 * torch.rand(classes, dtype=dtype)
    gamma[::3] = torch.tensor([0.0, 0.5, 2.0, 3.0]).repeat(classes)[: len(gamma[::3])]
    return gamma.to(device)


def plain(
    levels: list[Tensor],
    labels: Tensor,
    gamma: Tensor,
    anchors: int,
    alpha: float = 0.25,
    divisor: Tensor | float = 1.0,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and gradient sums by torch's own functions and autograd, in float64."""
    levels = [level.detach().double().contiguous().requires_grad_() for level in levels]
    x = concatenated(levels, anchors)
    is_class = F.one_hot(labels.clamp(0, x.shape[-1]).long(), x.shape[-1] + 1)[..., :-1].bool()
    counts = (labels >= 0)[..., None]
    is_class = is_class & counts
    x_t = torch.where(is_class, x, -x)  # without 1 - p_t, which would cancel
    alpha_t = torch.where(is_class, alpha, 1 - alpha)
    losses = alpha_t * (-x_t).sigmoid() ** gamma.double() * -F.logsigmoid(x_t) * counts
    if weight is not None:
        losses = losses * weight[..., None].double()
    if class_weight is not None:
        of_class, of_foreground, of_background = class_weight.double()
        of_others = torch.where(is_class.any(-1, keepdim=True), of_foreground, of_background)
        losses = losses * torch.where(is_class, of_class, of_others)
    (by_logit,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    sums = [(by_logit * chosen).abs().sum((0, 1)) for chosen in (is_class, ~is_class)]
    loss = (losses.sum((1, 2)) / torch.as_tensor(divisor).double()).sum()
    return loss.detach(), list(torch.autograd.grad(loss, levels)), torch.stack(sums)


def check(levels: list[Tensor], labels: Tensor, gamma: Tensor, anchors: int, **options) -> None:
    loss, sums = dense_equalized_focal_loss(levels, labels, gamma, **options)
    grads = torch.autograd.grad(loss, levels)
    normalizer = options.pop("normalizer", None)
    divisor = 1.0 if normalizer is None else normalizer.clamp(min=1)
    exact, exact_grads, exact_sums = plain(
        levels, labels, gamma, anchors, divisor=divisor, **options
    )
    dtype = levels[0].dtype
    assert loss.shape == () and sums.shape == (2, len(gamma))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sums.dtype == torch.float64 and not sums.requires_grad
    # Computed in float32: exp(gamma log q) has |gamma log q| roundings.
    wide = dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-12 if wide else 4e-6, atol=1e-37)
    # A class may have a single logit, as small as e^-53: its exponent alone is 53 x 2^-24 wrong, 3.2e-6.
    torch.testing.assert_close(sums, exact_sums, rtol=1e-12 if wide else 1e-5, atol=1e-30)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 5e-5}.get(dtype, 1e-11)
    tiny = 1e-300 if wide else max(torch.finfo(dtype).smallest_normal, 1e-30)
    for level, grad, exact_grad in zip(levels, grads, exact_grads, strict=True):
        assert grad.dtype == dtype and grad.stride() == level.stride()
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=tiny)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchors", [1, 9])
@pytest.mark.parametrize("classes", [1, 3, 80, 91])
def test_matches_autograd_in_float64(classes, anchors, dtype, layout, device):
    sizes = SIZES if anchors * classes < 300 else SIZES[1:]
    levels, labels = setup(device, dtype, layout, 2, anchors, classes, sizes)
    index_dtype = torch.int32 if dtype == torch.bfloat16 else torch.int64
    check(
        levels,
        labels.to(index_dtype),
        gammas(classes, device, torch.float64 if dtype == torch.float64 else torch.float32),
        anchors,
        normalizer=torch.tensor([3.0, 0.5], device=device),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_in_the_sums(layout, device):
    levels, labels = setup(device, layout=layout)
    weight = torch.rand(labels.shape, device=device) * 2
    class_weight = torch.rand(3, 5, device=device) * 3
    check(levels, labels, gammas(5, device), 3, alpha=0.6, weight=weight, class_weight=class_weight)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("classes", [40, 257, 5000])
def test_many_classes(classes, layout, device):
    """Several slices of a plane's classes, more classes than threads, rows that are longer than a chunk."""
    sizes = ((3, 3), (1, 2)) if classes < 5000 else ((1, 1),)
    levels, labels = setup(device, layout=layout, images=1, anchors=1, classes=classes, sizes=sizes)
    labels[0, 0] = classes - 1
    check(levels, labels, gammas(classes, device), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_levels(layout, device):
    """More than one block, chunk and stretch of positions; a plane of whole vectors."""
    levels, labels = setup(device, layout=layout, sizes=((40, 64), (20, 32), (33, 35)))
    check(levels, labels, gammas(5, device), 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_gamma_is_the_focal_loss(layout, device):
    levels, labels = setup(device, layout=layout)
    for gamma in (0.0, 0.5, 2.0):
        uniform = torch.full((5,), gamma, device=device)
        loss, _ = dense_equalized_focal_loss(levels, labels, uniform, normalizer=7)
        expected = dense_focal_loss(levels, labels, gamma=gamma, normalizer=7)
        # q^2 is a product there, an exponential here.
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        grads, others = (torch.autograd.grad(total, levels) for total in (loss, expected))
        for grad, other in zip(grads, others, strict=True):
            torch.testing.assert_close(grad, other, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("normalizer", [None, 0.5, 7, "0-d", "per image", "integer"])
def test_matches_the_reference(normalizer, device):
    levels, labels = setup(device)
    normalizer = {
        "0-d": torch.tensor(12.0, device=device),
        "per image": torch.tensor([0.25, 12.0], device=device),
        "integer": torch.tensor([4, 12], device=device),
    }.get(normalizer, normalizer)
    gamma = gammas(5, device)
    sums = {}
    for least in (1, 0.25, 9):
        options = {"normalizer": normalizer, "min_normalizer": least}
        loss, sums[least] = dense_equalized_focal_loss(levels, labels, gamma, **options)
        expected, of_reference = reference.dense_equalized_focal_loss(
            levels, labels, gamma, **options
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sums[least], of_reference, rtol=2e-5, atol=1e-9)
        grads = torch.autograd.grad(loss, levels)
        for grad, other in zip(grads, torch.autograd.grad(expected, levels), strict=True):
            torch.testing.assert_close(grad, other, rtol=5e-5, atol=1e-7)
    assert torch.equal(sums[1], sums[9])  # no divisor is in them


def test_sums_of_parts_are_those_of_the_whole(device):
    levels, labels = setup(device, images=3)
    gamma = gammas(5, device)
    _, whole = dense_equalized_focal_loss(levels, labels, gamma, normalizer=3)
    parts = [
        dense_equalized_focal_loss([x[i : i + 1] for x in levels], labels[i : i + 1], gamma)[1]
        for i in range(3)
    ]
    # On CUDA blocks are added up in another order, in float64, after chunks in float32.
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_ignored_anchors(layout, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((6, 8), (3, 5)))
    labels[labels == -100] = 5
    labels[0, 5] = labels[0, 50] = 1
    with torch.no_grad():
        levels[0][0, :, 0, 5] = torch.nan
        levels[1][0, :, 0, 2] = torch.inf
    loss, sums = dense_equalized_focal_loss(levels, labels, gammas(5, device), ignore_index=1)
    assert loss.isfinite() and sums.isfinite().all() and sums[0, 1] == 0
    everything = torch.ones_like(labels)
    loss, sums = dense_equalized_focal_loss(levels, everything, gammas(5, device), ignore_index=1)
    assert loss == 0 and (sums == 0).all()


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_nan_logits(layout, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((3, 5),))
    labels[0, 4] = 2
    with torch.no_grad():
        levels[0][0, 3, 0, 4] = torch.nan
    loss, sums = dense_equalized_focal_loss(levels, labels, gammas(5, device))
    assert loss.isnan() and sums.isnan().all(0).tolist() == [False, False, False, True, False]
    assert sums[:, :3].isfinite().all()


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_invalid_label(layout, backend, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((3, 5),))
    labels[0, 7] = 6
    if backend == "cpu":
        sentence = r"dense_equalized_focal_loss: labels must lie in \[0, 5\] or .* got 6"
        with pytest.raises(RuntimeError, match=sentence):
            dense_equalized_focal_loss(levels, labels, gammas(5, device))
    else:
        loss, sums = dense_equalized_focal_loss(levels, labels, gammas(5, device))
        assert loss.isnan() and sums.isnan().all()


def test_infinite_logits_have_the_limits(device):
    levels, labels = setup(device, images=1, anchors=1, sizes=((3, 5),))
    labels[0, :2] = torch.tensor([0, 5])
    gamma = torch.tensor([0.0, 2.0, 4.5, 0.5, 10.0], device=device)
    for infinity in (-torch.inf, torch.inf):
        with torch.no_grad():
            levels[0][0, :, 0, :2] = infinity
        loss, sums = dense_equalized_focal_loss(levels, labels, gamma)
        expected, of_reference = reference.dense_equalized_focal_loss(levels, labels, gamma)
        assert loss == torch.inf == expected
        torch.testing.assert_close(sums, of_reference, rtol=2e-5, atol=1e-9)
        assert sums.isfinite().all()  # a slope of alpha_t at most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_gives_the_same_values(dtype, device):
    levels, labels = setup(device, dtype)
    normalizer = torch.tensor([4.0, 16.0], device=device)
    loss, _ = dense_equalized_focal_loss(levels, labels, gammas(5, device), normalizer=normalizer)
    first, last = (
        torch.autograd.grad(loss * 4, levels, retain_graph=retain) for retain in (True, False)
    )
    assert all(torch.equal(one, two) for one, two in zip(first, last, strict=True))


def test_no_gradient_is_written_where_none_is_wanted(device):
    levels, labels = setup(device)
    gamma = gammas(5, device)
    _, expected = dense_equalized_focal_loss(levels, labels, gamma)
    with torch.no_grad():
        loss, sums = dense_equalized_focal_loss(levels, labels, gamma)
    assert not loss.requires_grad and torch.equal(sums, expected)
    detached = [level.detach() for level in levels]
    arguments = (detached, labels, gamma, 0.25, None, None, -100, None, 1.0, False)
    assert torch.ops.focalops.dense_equalized_focal_loss(*arguments)[2] == []


@pytest.mark.parametrize("per_image", [False, True])
def test_gradcheck(per_image, device):
    sizes = ((2, 1), (1, 1))
    levels, labels = setup(device, torch.float64, images=2, anchors=2, classes=3, sizes=sizes)
    normalizer = torch.tensor([2.0, 3.0], device=device).double() if per_image else 3.0
    gamma = torch.tensor([0.0, 2.0, 4.5], device=device)
    class_weight = torch.rand(3, 3, device=device)

    def f(*levels):
        return dense_equalized_focal_loss(
            levels, labels, gamma, normalizer=normalizer, class_weight=class_weight
        )[0]

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [5, 80])
def test_the_same_bits_with_any_number_of_threads(classes, layout, backend, device):
    large = (9, 14) if backend in ("cuda-emulated", "cuda-ptx") else (25, 42)
    levels, labels = setup(device, layout=layout, classes=classes, sizes=(large, *SIZES))
    gamma = gammas(classes, device)
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4) if backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        for _ in range(2):
            loss, sums = dense_equalized_focal_loss(levels, labels, gamma, normalizer=3)
            runs.append((loss.detach(), sums, *torch.autograd.grad(loss, levels)))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("images", [0, 2])
def test_empty(images, device):
    for sizes in (((0, 3), (0, 0)), ((0, 3), (2, 2), (4, 0))):
        levels, labels = setup(device, layout="mixed", images=images, sizes=sizes)
        gamma = gammas(5, device)
        loss, sums = dense_equalized_focal_loss(levels, labels, gamma)
        grads = torch.autograd.grad(loss, levels)
        assert [grad.shape for grad in grads] == [level.shape for level in levels]
        expected, of_reference = reference.dense_equalized_focal_loss(levels, labels, gamma)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sums, of_reference, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("compute_grad", [True, False])
def test_opcheck(compute_grad, device):
    levels, labels = setup(device, sizes=((3, 5), (2, 2)))
    op = torch.ops.focalops.dense_equalized_focal_loss.default
    for normalizer in (None, torch.tensor([2.0, 3.0], device=device)):
        options = (None, torch.rand(3, 5, device=device), -100, normalizer, 1.0, compute_grad)
        torch.library.opcheck(op, (levels, labels, gammas(5, device), 0.25, *options))


def test_compiles_whole(device):
    levels, labels = setup(device)

    def f(levels, labels, gamma):
        loss, sums = dense_equalized_focal_loss([x * 2 for x in levels], labels, gamma)
        return loss * 3, sums

    gamma = gammas(5, device)
    compiled, sums = torch.compile(f, fullgraph=True)(levels, labels, gamma)
    eager, of_eager = f(levels, labels, gamma)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(sums, of_eager)
    grads, expected = torch.autograd.grad(compiled, levels), torch.autograd.grad(eager, levels)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
