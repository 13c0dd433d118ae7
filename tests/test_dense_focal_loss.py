"""dense_focal_loss against permute, cat and the loss in float64, and against the reference."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from focalops import dense_focal_loss, reference, sigmoid_focal_loss

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = {"planes": [False], "rows": [True], "mixed": [True, False, False, True]}
# One position, planes that end inside a vector, planes that begin off a 16-byte boundary.
SIZES = ((13, 21), (7, 11), (3, 5), (1, 1))


def make_levels(
    sizes, images, anchors, classes, dtype, device, layout="planes", scale=4.0
) -> list[Tensor]:
    levels = []
    for i, (height, width) in enumerate(sizes):
        level = torch.randn(images, anchors * classes, height, width) * scale
        level = level.to(device, dtype)
        if LAYOUTS[layout][i % len(LAYOUTS[layout])]:
            level = level.contiguous(memory_format=torch.channels_last)
        levels.append(level.requires_grad_())
    return levels


def make_labels(sizes, images, anchors, classes, device, positives=0.2) -> Tensor:
    shape = images, sum(h * w for h, w in sizes) * anchors
    labels = torch.randint(0, classes, shape)
    kind = torch.rand(shape)
    labels[kind > positives] = classes
    labels[kind > 0.9] = -100
    return labels.to(device)


def setup(device, dtype=torch.float32, layout="mixed", images=2, anchors=3, classes=5, sizes=SIZES):
    return (
        make_levels(sizes, images, anchors, classes, dtype, device, layout),
        make_labels(sizes, images, anchors, classes, device),
    )


def concatenated(levels: list[Tensor], anchors: int) -> Tensor:
    """The rows of all levels, as torchvision's head makes them."""
    rows = []
    for level in levels:
        batch, channels, height, width = level.shape
        rows.append(
            level.view(batch, anchors, channels // anchors, height, width)
            .permute(0, 3, 4, 1, 2)
            .reshape(batch, -1, channels // anchors)
        )
    return torch.cat(rows, dim=1)


def check_against_float64(levels, labels, anchors, alpha=0.25, gamma=2.0, **options) -> None:
    loss = dense_focal_loss(levels, labels, alpha, gamma, **options)
    grads = torch.autograd.grad(loss, levels)

    exact_levels = [level.detach().double().contiguous().requires_grad_() for level in levels]
    losses = sigmoid_focal_loss(concatenated(exact_levels, anchors), labels, alpha, gamma)
    divisor = torch.as_tensor(options.get("normalizer", 1.0), dtype=torch.float64)
    exact = (losses.sum((1, 2)) / divisor.to(losses.device).clamp(min=1)).sum()
    exact_grads = torch.autograd.grad(exact, exact_levels)

    dtype = levels[0].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-37)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5}.get(dtype, 1e-12)
    tiny = torch.finfo(dtype).smallest_normal
    for level, grad, exact_grad in zip(levels, grads, exact_grads, strict=True):
        assert grad.dtype == dtype and grad.stride() == level.stride()
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=tiny)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchors", [1, 9])
@pytest.mark.parametrize("classes", [1, 3, 80, 91])
def test_matches_the_loss_of_the_concatenation(classes, anchors, dtype, layout, device):
    sizes = SIZES if anchors * classes < 300 else SIZES[1:]
    levels, labels = setup(device, dtype, layout, 2, anchors, classes, sizes)
    index_dtype = torch.int32 if dtype == torch.bfloat16 else torch.int64
    normalizer = torch.tensor([3.0, 0.5], device=device)
    check_against_float64(levels, labels.to(index_dtype), anchors, normalizer=normalizer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_levels(layout, device):
    """More than one block, chunk and stretch of positions; a plane of whole vectors."""
    levels, labels = setup(device, layout=layout, sizes=((40, 64), (20, 32), (33, 35)))
    check_against_float64(levels, labels, 3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_parameters(alpha, gamma, device):
    levels, labels = setup(device)
    check_against_float64(levels, labels, 3, alpha, gamma)


@pytest.mark.parametrize("normalizer", [None, 0.5, 7, "0-d", "per image", "integer"])
def test_matches_the_reference(normalizer, device):
    levels, labels = setup(device)
    normalizer = {
        "0-d": torch.tensor(12.0, device=device),
        "per image": torch.tensor([0.25, 12.0], device=device),
        "integer": torch.tensor([4, 12], device=device),
    }.get(normalizer, normalizer)
    for least in (1, 0.25, 9):
        options = {"normalizer": normalizer, "min_normalizer": least}
        loss = dense_focal_loss(levels, labels, **options)
        expected = reference.dense_focal_loss(levels, labels, **options)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, levels)
        for grad, other in zip(grads, torch.autograd.grad(expected, levels), strict=True):
            torch.testing.assert_close(grad, other, rtol=2e-5, atol=1e-7)


def test_eight_levels(device):
    sizes = [(1 + i, 9 - i) for i in range(8)]
    levels, labels = setup(device, sizes=sizes)
    check_against_float64(levels, labels, 3)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_other_memory(layout, device):
    """Strided levels are copied; one that begins off a 16-byte boundary is read where it lies."""
    (level, *_), labels = setup(device, layout=layout, sizes=((6, 8),))
    level = level.detach()
    expected = dense_focal_loss([level], labels)
    wide = torch.cat((level, level), dim=3)[..., :8].requires_grad_()
    assert not wide.is_contiguous()
    loss = dense_focal_loss([wide], labels)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, wide)
    assert grad.is_contiguous()
    flat = torch.empty(level.numel() + 1, device=device)[1:]
    shifted = flat.as_strided(level.shape, level.stride()).copy_(level).requires_grad_()
    loss = dense_focal_loss([shifted], labels)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, shifted)[0], grad)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_ignored_anchors(layout, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((6, 8), (3, 5)))
    labels[0, 5], labels[0, 50] = 1, 7
    with torch.no_grad():
        levels[0][0, :, 0, 5] = torch.nan
        levels[1][0, :, 0, 2] = torch.inf
    for ignored in (labels == 7) | (labels == 1), torch.ones_like(labels, dtype=torch.bool):
        these = torch.where(ignored, 1, labels)
        these[(these != 1) & ~((these >= 0) & (these <= 5))] = 5
        loss = dense_focal_loss(levels, these, ignore_index=1)
        grads = torch.autograd.grad(loss, levels)
        assert loss.isfinite()
        flat = torch.cat([grad.flatten(2) for grad in grads], dim=2)[0]  # (K, N)
        assert (flat[:, ignored[0]] == 0).all() and flat.isfinite().all()
    assert loss == 0


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("invalid", [-1, 6, 2**40])
def test_invalid_label(invalid, layout, backend, device):
    levels, labels = setup(device, layout=layout, images=1, anchors=1, sizes=((3, 5),))
    labels[labels == -100] = 5
    labels[0, 7] = invalid
    if backend == "cpu":
        sentence = rf"labels must lie in \[0, 5\] or .* got {invalid}"
        with pytest.raises(RuntimeError, match=f"dense_focal_loss: {sentence}"):
            dense_focal_loss(levels, labels)
    else:
        loss = dense_focal_loss(levels, labels)
        (grad,) = torch.autograd.grad(loss, levels)
        is_nan = grad.flatten(2).isnan()[0]
        assert loss.isnan() and is_nan[:, 7].all() and is_nan.sum() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_second_backward_gives_the_same_values(per_image, dtype, device):
    levels, labels = setup(device, dtype)
    normalizer = torch.tensor([4.0, 16.0] if per_image else 8.0, device=device)
    loss = dense_focal_loss(levels, labels, normalizer=normalizer)
    first, second, last = (
        torch.autograd.grad(loss * 4, levels, retain_graph=retain) for retain in (True, True, False)
    )
    for one, two, three, level in zip(first, second, last, levels, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert one.stride() == three.stride() == level.stride() and one.dtype == dtype


def test_float16_gradients_survive_a_large_normalizer(device):
    """Under a loss scaler: the factor arrives with the backward, and must not find zeros."""
    levels, labels = setup(device, torch.float16, "mixed")
    normalizer = torch.tensor([1e5, 3e5], device=device)
    loss = dense_focal_loss(levels, labels, normalizer=normalizer)
    grads = torch.autograd.grad(loss * 2.0**16, levels)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    exact = reference.dense_focal_loss(exact_levels, labels, normalizer=normalizer.double())
    for grad, other in zip(grads, torch.autograd.grad(exact * 2.0**16, exact_levels), strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=3e-3, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    levels, labels = setup(device)

    def f(*levels):
        return dense_focal_loss([level * 2 for level in levels], labels, normalizer=4)

    expected = torch.autograd.grad(f(*levels), levels)
    checkpoint(f, *levels, use_reentrant=use_reentrant).backward()
    for level, grad in zip(levels, expected, strict=True):
        assert torch.equal(level.grad, grad)


def test_only_some_levels_want_a_gradient(device):
    levels, labels = setup(device)
    expected = torch.autograd.grad(dense_focal_loss(levels, labels), levels)
    levels[0].requires_grad_(False)
    dense_focal_loss(levels, labels).backward()
    assert levels[0].grad is None
    for level, grad in zip(levels[1:], expected[1:], strict=True):
        assert torch.equal(level.grad, grad)


def test_no_gradient_is_computed_where_none_is_wanted(device):
    levels, labels = setup(device)
    with torch.no_grad():
        assert not dense_focal_loss(levels, labels).requires_grad
    detached = [level.detach() for level in levels]
    assert not dense_focal_loss(detached, labels).requires_grad
    op = torch.ops.focalops.dense_focal_loss
    _, grads = op(detached, labels, 0.25, 2.0, 0.0, None, None, -100, None, 1.0, False)
    assert grads == []


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradcheck(per_image, gamma, device):
    levels, labels = setup(
        device, torch.float64, images=2, anchors=2, classes=2, sizes=((2, 1), (1, 1))
    )
    normalizer = torch.tensor([2.0, 3.0], device=device).double() if per_image else 3.0

    def f(*levels):
        return dense_focal_loss(levels, labels, 0.25, gamma, normalizer=normalizer)

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


def test_batched_gradients(device):
    levels, labels = setup(device)
    loss = dense_focal_loss(levels, labels)
    upstream = torch.randn(3, device=device)
    (one, *_) = torch.autograd.grad(loss, levels, retain_graph=True)
    (batched, *_) = torch.autograd.grad(loss, levels, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, upstream.view(-1, 1, 1, 1, 1) * one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout, device):
    levels, labels = setup(device, layout=layout, sizes=((25, 42), *SIZES))
    runs = []
    before = torch.get_num_threads()
    for threads in (1, before):
        torch.set_num_threads(threads)
        loss = dense_focal_loss(levels, labels, normalizer=3)
        runs.append((loss.detach(), *torch.autograd.grad(loss, levels)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("images", [0, 2])
def test_empty(images, device):
    for sizes in (((0, 3), (0, 0)), ((0, 3), (2, 2), (4, 0))):
        levels, labels = setup(device, layout="mixed", images=images, sizes=sizes)
        loss = dense_focal_loss(levels, labels)
        grads = torch.autograd.grad(loss, levels)
        assert [grad.shape for grad in grads] == [level.shape for level in levels]
        if labels.numel() == 0:
            assert loss == 0
        else:
            torch.testing.assert_close(loss, reference.dense_focal_loss(levels, labels))


@pytest.mark.parametrize("compute_grad", [True, False])
def test_opcheck(compute_grad, device):
    levels, labels = setup(device, sizes=((3, 5), (2, 2)))
    op = torch.ops.focalops.dense_focal_loss.default
    for normalizer in (None, torch.tensor([2.0, 3.0], device=device)):
        arguments = (
            levels,
            labels,
            0.25,
            2.0,
            0.0,
            None,
            None,
            -100,
            normalizer,
            1.0,
            compute_grad,
        )
        torch.library.opcheck(op, arguments)
    scale = torch.tensor([2.0, 3.0], device=device)
    torch.library.opcheck(torch.ops.focalops._scale_.default, (levels[0].detach().clone(), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_whole(dtype, device):
    levels, labels = setup(device, dtype)

    def f(levels, labels, normalizer):
        return dense_focal_loss([x * 2 for x in levels], labels, normalizer=normalizer) * 3

    normalizer = torch.tensor([2.0, 3.0], device=device)
    compiled = torch.compile(f, fullgraph=True)(levels, labels, normalizer)
    eager = f(levels, labels, normalizer)
    torch.testing.assert_close(compiled, eager)
    grads, expected = torch.autograd.grad(compiled, levels), torch.autograd.grad(eager, levels)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
