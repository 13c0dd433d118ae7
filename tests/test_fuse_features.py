"""fuse_features against its reference, and that against PyTorch's own ops, composed as a BiFPN composes them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focalops import fuse_features, reference
from focalops._ops import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("fast", "softmax", "sum", "unbounded")
# (height, width) of the maps of a node: one with a smaller, with a larger, with both; odd sizes; one pixel; maps of no level.
NODES = {
    "up": [(4, 6), (2, 3)],
    "own, own, down": [(4, 8), (4, 8), (8, 16)],
    "odd": [(5, 7), (3, 4), (10, 13)],
    "odd, two larger": [(5, 7), (9, 14), (10, 13)],
    "one pixel": [(1, 1), (2, 1), (1, 2), (1, 1)],
    "a row": [(1, 9), (1, 5), (1, 18)],
    "up by no whole number": [(7, 9), (2, 4), (5, 9)],
    "one map": [(3, 3)],
}
# Sums of the same terms in another order, and one rounding to the dtype.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5, torch.float64: 1e-12}


def make(sizes, dtype=torch.float32, device="cpu", channels=3, images=2, last=()) -> list[Tensor]:
    maps = []
    for i, size in enumerate(sizes):
        x = torch.randn(images, channels, *size).to(device, dtype)
        layout = torch.channels_last if i in last else torch.contiguous_format
        maps.append(x.contiguous(memory_format=layout).requires_grad_())
    return maps


def make_weights(count: int, mode: str, device="cpu", dtype=torch.float32) -> Tensor | None:
    if mode == "sum":
        return None
    return (
        torch.linspace(0.8, -0.3 if count > 2 else 0.4, count, dtype=dtype)
        .to(device)
        .requires_grad_()
    )


def with_gradients(function, maps, weights, upstream, **options) -> list[Tensor]:
    output = function(maps, weights, **options)
    inputs = [*maps, *([] if weights is None else [weights])]
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def check_against_reference(maps, weights, **options) -> None:
    upstream = torch.randn(maps[0].shape).to(maps[0])
    exact_maps = [x.detach().double().requires_grad_() for x in maps]
    exact_weights = None if weights is None else weights.detach().double().requires_grad_()
    if options.get("activation") == "relu6":
        # On a bend of the activation the last bit of a sum decides on its derivative.
        total = reference.fuse_features(exact_maps, exact_weights, **options | {"activation": None})
        upstream[(total.abs() < 1e-5) | ((total - 6).abs() < 1e-5)] = 0
    actual = with_gradients(fuse_features, maps, weights, upstream, **options)
    expected = with_gradients(
        reference.fuse_features, exact_maps, exact_weights, upstream.double(), **options
    )
    dtype = maps[0].dtype
    for i, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == exact.shape
        is_map = i <= len(maps)
        assert ours.dtype == (dtype if is_map else weights.dtype)
        rtol = TOLERANCE[
            dtype if is_map else torch.float64 if dtype == torch.float64 else torch.float32
        ]
        # What is left where terms of the size of the largest cancel.
        atol = rtol * exact.abs().max().item() if exact.numel() else 0
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "mixed, last first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", NODES.values(), ids=NODES)
def test_matches_the_reference(sizes, dtype, layout, device):
    last = {"contiguous": (), "mixed": (1,), "mixed, last first": (0,)}.get(layout, range(9))
    options = itertools.cycle(itertools.product((None, "silu", "relu6"), ("same", "symmetric")))
    for mode, (activation, padding) in zip(MODES * 2, options):  # noqa: B905
        maps = make(sizes, dtype, device, last=last)
        weights = make_weights(
            len(maps), mode, device, torch.float64 if dtype == torch.float64 else torch.float32
        )
        check_against_reference(maps, weights, mode=mode, activation=activation, padding=padding)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, last", [(16, range(4)), (3, ())], ids=["channels", "columns"])
@pytest.mark.parametrize("rows", [(3, 2, 5), (4, 2, 8), (1, 1, 1)], ids=str)
def test_vectors(rows, channels, last, dtype, padding, device):
    """Rows of 16 bytes and their multiples, along channels or along columns; heights are odd, even and 1."""
    height, above, below = rows
    sizes = [(height, 16), (above, 8), (below, 32), (height, 16)]
    for count in (3, 4):  # the CUDA kernels have three maps at a time
        maps = make(sizes[:count], dtype, device, channels, images=1, last=last)
        weights = make_weights(count, "fast", device, compute_dtype(dtype))
        check_against_reference(maps, weights, padding=padding, activation="silu")


def test_views_that_begin_anywhere(device):
    def view(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(1), x.detach().flatten()))[1:].view(x.shape).requires_grad_()

    maps = [view(x) for x in make([(2, 16), (1, 8), (4, 32)], device=device)]
    check_against_reference(maps, make_weights(3, "fast", device), activation="silu")


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 1), st.integers(0, 1),
    st.sampled_from(("same", "symmetric")), st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_any_size(height, width, odd_y, odd_x, padding, last, channels):
    sizes = [
        (height, width),
        ((height + 1) // 2, (width + 1) // 2),
        (2 * height - odd_y, 2 * width - odd_x),
    ]
    maps = make(sizes, channels=channels, last=range(3) if last else ())
    check_against_reference(maps, make_weights(3, "fast"), padding=padding, activation="silu")


def test_wide_rows_and_many_rows(device):
    """More than one piece of parallel work."""
    for last in ((), range(3)):
        maps = make([(33, 64), (17, 32), (66, 127)], channels=5, device=device, last=last)
        check_against_reference(maps, make_weights(3, "fast", device), activation="silu")


@pytest.mark.parametrize("last", [(), range(3)], ids=["contiguous", "channels_last"])
def test_bits_are_those_of_pytorch_ops_composed(last, device):
    """Term times weight, divided, added in the order given: as effdet has it."""
    own, up, down = make([(8, 12), (4, 6), (16, 24)], device=device, last=last)
    e = torch.tensor([0.7, 1.3, 0.2], device=device)
    maps = (
        own,
        F.interpolate(up, scale_factor=2, mode="nearest"),
        F.max_pool2d(F.pad(down, (0, 1, 0, 1), value=-math.inf), 3, 2),
    )
    divisor = torch.relu(e).sum() + 1e-4
    terms = [x * w / divisor for x, w in zip(maps, torch.relu(e), strict=True)]
    expected = terms[0] + terms[1] + terms[2]
    assert torch.equal(fuse_features([own, up, down], e), expected)
    assert torch.equal(reference.fuse_features([own, up, down], e), expected)
    symmetric = (own, maps[1], F.max_pool2d(down, 3, 2, 1))
    expected = symmetric[0] + symmetric[1] + symmetric[2]
    assert torch.equal(fuse_features([own, up, down], mode="sum", padding="symmetric"), expected)
    softmax = sum(x * w for x, w in zip(maps, e.softmax(0), strict=True))
    torch.testing.assert_close(fuse_features([own, up, down], e, "softmax"), softmax)


def test_the_nearest_pixel_is_that_of_interpolate():
    for size in range(1, 300):
        x = torch.arange((size + 1) // 2, dtype=torch.float32).view(1, 1, 1, -1)
        own = torch.zeros(1, 1, 1, size)
        expected = F.interpolate(x, size=(1, size), mode="nearest")
        assert torch.equal(fuse_features([own, x], mode="sum"), expected)


@pytest.mark.parametrize("last", [(), range(2)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_the_first_of_equal_maxima_gets_the_gradient(padding, last, device):
    own, down = make([(5, 4), (9, 8)], device=device, last=last)
    x = torch.randint(0, 2, down.shape).to(down)
    x[0, 0, :4] = -math.inf
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x.requires_grad_()
    upstream = torch.randn_like(own)
    (grad,) = torch.autograd.grad(
        fuse_features([own.detach(), x], mode="sum", padding=padding), x, upstream
    )
    expected = reference.fuse_features([own.detach(), x], mode="sum", padding=padding)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, upstream)[0])


def test_nan_stays_through_the_pooling(device):
    own, down = make([(3, 4), (6, 8)], device=device)
    down = down.detach()
    down[0, 1, 2, 3] = math.nan
    result = fuse_features([own, down], mode="sum")
    assert torch.equal(result.isnan(), reference.fuse_features([own, down], mode="sum").isnan())
    assert result.isnan().any()


def test_weights_that_are_all_negative_give_zeros(device):
    maps = make([(4, 4), (2, 2)], device=device)
    weights = torch.tensor([-1.0, -0.5], device=device, requires_grad=True)
    result = fuse_features(maps, weights)
    assert not result.any()
    assert not any(g.any() for g in torch.autograd.grad(result.sum(), [*maps, weights]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_nothing(shape, device):
    maps = [torch.zeros(shape, device=device), torch.zeros(*shape[:2], 2, 2, device=device)]
    weights = torch.ones(2, device=device, requires_grad=True)
    result = fuse_features(maps, weights)
    assert result.shape == shape
    assert torch.equal(torch.autograd.grad(result.sum(), weights)[0], torch.zeros_like(weights))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation, mode, device):
    maps = make([(3, 4), (2, 2), (5, 8)], torch.float64, device, channels=2, images=1)
    weights = make_weights(3, mode, device, torch.float64)

    def function(*inputs):
        return fuse_features(
            inputs[:3], inputs[3] if mode != "sum" else None, mode, activation=activation
        )

    inputs = (*maps, *([] if weights is None else [weights]))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_two_runs_and_any_number_of_threads_give_the_same_bits(device):
    maps = make([(33, 64), (17, 32), (66, 127)], device=device)
    weights = make_weights(3, "fast", device)
    upstream = torch.randn_like(maps[0])
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(with_gradients(fuse_features, maps, weights, upstream, activation="silu"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_layout_of_the_output(device):
    for last in (False, True):
        maps = make([(4, 4), (2, 2)], device=device, last=range(2) if last else ())
        result = fuse_features(maps, mode="sum")
        layout = torch.channels_last if last else torch.contiguous_format
        assert result.is_contiguous(memory_format=layout)
    own, up = make([(4, 4), (2, 2)], device=device)
    wide = torch.cat((own, own), dim=3)[..., :4]
    assert torch.equal(fuse_features([wide, up], mode="sum"), fuse_features([own, up], mode="sum"))


def test_half_precision_weights_are_those_of_float32(device):
    maps = make([(4, 4), (2, 2)], torch.bfloat16, device)
    weights = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, device=device, requires_grad=True)
    result = fuse_features(maps, weights)
    assert torch.equal(result, fuse_features(maps, weights.float()))
    assert torch.autograd.grad(result.sum(), weights)[0].dtype == torch.bfloat16


def test_opcheck(device):
    maps = make([(3, 4), (2, 2), (6, 7)], device=device)
    weights = make_weights(3, "fast", device)
    arguments = (maps, weights, 0, 1e-4, 1, False)
    torch.library.opcheck(torch.ops.focalops.fuse_features.default, arguments)
    plain = [x.detach() for x in maps], weights.detach(), *arguments[2:]
    torch.library.opcheck(
        torch.ops.focalops._fuse_features_backward.default, (maps[0].detach(), *plain)
    )
