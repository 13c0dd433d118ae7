"""decode_distances and distribution_focal_loss against the reference, float64, torchvision, and what mmdet and ultralytics gave."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder

from focalops import (
    complete_box_iou_loss,
    decode_distances,
    dense_box_loss,
    distribution_focal_loss,
    encode_distances,
    reference,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "distances.json").read_text())
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("planes", "rows", "mixed")
# Whole vectors of positions; planes that begin at any address; more than a block, and than a stretch; H = W = 1.
SIZES = ((6, 8), (3, 5), (1, 1))
STRIDES = (8, 16.5, 32)
IMAGE_SIZES = ((90, 70), (40, 110))


def head(
    device: str,
    bins: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "planes",
    sizes: tuple[tuple[int, int], ...] = SIZES,
    images: int = 2,
) -> tuple[list[Tensor], Tensor]:
    """Levels and points. Logits are 32nds, which every dtype holds."""
    levels = []
    for i, (h, w) in enumerate(sizes):
        level = ((torch.randn(images, 4 * bins, h, w) * 64).round() / 32).to(device, dtype)
        if layout == "rows" or (layout == "mixed" and i % 2):
            level = level.to(memory_format=torch.channels_last)
        levels.append(level.requires_grad_())
    points = torch.rand(sum(h * w for h, w in sizes), 2, device=device) * 100
    return levels, points


def check_decode(levels: list[Tensor], points: Tensor, strides=STRIDES, **options) -> Tensor:
    """Against autograd of the reference in float64. An exponential is off by an ulp for each unit of its argument, up to
    some ten here, and the sums of up to `bins` of them are each rescaled as often as a greater logit comes."""
    boxes = decode_distances(levels, points, strides, **options)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    exact = reference.decode_distances(exact_levels, points.double(), strides, **options)
    unit = torch.finfo(boxes.dtype).eps
    most = max(strides) * options.get("bins", 1)
    torch.testing.assert_close(boxes.double(), exact, rtol=8 * unit, atol=16 * unit * most)
    upstream = torch.rand_like(boxes) - 0.5
    grads = torch.autograd.grad(boxes, levels, upstream)
    expected = torch.autograd.grad(exact, exact_levels, upstream.double())
    for level, grad, other in zip(levels, grads, expected, strict=True):
        assert grad.dtype == level.dtype and grad.stride() == level.stride()
        half = torch.finfo(level.dtype).eps / 2 if level.dtype in DTYPES[:2] else 0
        smallest = torch.finfo(level.dtype).smallest_normal * torch.finfo(level.dtype).eps
        atol = 16 * unit * most + smallest
        torch.testing.assert_close(grad.double(), other, rtol=half + 32 * unit, atol=atol)
    return boxes


# ---- decode_distances ---------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 2, 16, 17, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype, layout, bins, device):
    levels, points = head(device, bins, dtype, layout)
    boxes = check_decode(levels, points, bins=bins)
    assert boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_decode(levels, points, bins=bins, image_sizes=IMAGE_SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bins", [1, 4])
def test_decode_any_size(bins, layout, device):
    """More positions than a block and a stretch have, and one more or fewer than vectors, warps and stretches have."""
    for sizes in (((33, 16), (0, 5), (17, 15)), ((1, 127), (1, 129), (1, 3)), ((2, 32),) * 3):
        check_decode(*head(device, bins, layout=layout, sizes=sizes), bins=bins)


def test_decode_is_torchvisions(device):
    """FCOS, whose coder divides by the size of its anchors: the stride."""
    levels, points = head(device, 1, layout="mixed")
    sizes = torch.tensor([h * w for h, w in SIZES])
    half = torch.tensor(STRIDES).repeat_interleave(sizes)[:, None].to(device) / 2
    anchors = torch.cat((points - half, points + half), dim=1)
    rows = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    expected = BoxLinearCoder(normalize_by_size=True).decode(rows, anchors)
    boxes = decode_distances(levels, points, STRIDES)
    torch.testing.assert_close(
        boxes, expected, rtol=1e-5, atol=1e-4
    )  # its points are the anchors' centers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_decode_is_mmdets_and_ultralytics(memory_format, device):
    levels = [
        torch.tensor(numbers, device=device).view(1, 64, side, side)
        for numbers, side in zip(GOLDEN["ultralytics"]["levels"], (2, 1), strict=True)
    ]
    levels = [level.to(memory_format=memory_format) for level in levels]
    points = torch.tensor(GOLDEN["points"], device=device)
    boxes = decode_distances(levels, points, [8, 16], bins=16)
    expected = torch.tensor(GOLDEN["ultralytics"]["boxes"])
    torch.testing.assert_close(boxes[0].cpu(), expected, rtol=1e-5, atol=1e-4)
    boxes = decode_distances(levels, points, [8, 16], bins=16, image_sizes=[(40, 60)])
    expected = torch.tensor(GOLDEN["mmdet"]["boxes"])
    torch.testing.assert_close(boxes[0].cpu(), expected, rtol=1e-5, atol=1e-4)


def test_decode_other_memory(device):
    """Strided levels are copied; one off a 16-byte boundary is read where it lies."""
    (level,), points = head(device, 16, sizes=((6, 8),))
    level = level.detach()
    expected = decode_distances([level], points, [8], bins=16)
    upstream = torch.rand_like(expected)
    wide = torch.cat((level, level), dim=3)[..., :8].requires_grad_()
    boxes = decode_distances([wide], points.T.contiguous().T, [8], bins=16)
    assert torch.equal(boxes, expected)
    (grad,) = torch.autograd.grad(
        boxes, wide, upstream.transpose(0, 1).contiguous().transpose(0, 1)
    )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        like = level.to(memory_format=memory_format)
        flat = torch.empty(level.numel() + 1, device=device)[1:]
        shifted = flat.as_strided(like.shape, like.stride()).copy_(like).requires_grad_()
        boxes = decode_distances([shifted], points, [8], bins=16)
        # The compiler contracts other products to fused operations for rows than for planes.
        torch.testing.assert_close(boxes, expected, rtol=1e-6, atol=1e-4)
        (other,) = torch.autograd.grad(boxes, shifted, upstream)
        torch.testing.assert_close(other, grad, rtol=1e-5, atol=2e-5)  # up to 8 x 15 p


def test_decode_nothing(device):
    for bins in (1, 16):
        for images, size in ((0, (2, 3)), (2, (0, 4))):
            levels, points = head(device, bins, sizes=(size,), images=images)
            boxes = decode_distances(levels, points, [8], bins=bins)
            assert boxes.shape == (images, len(points), 4)
            (grad,) = torch.autograd.grad(boxes.sum(), levels)
            assert grad.shape == levels[0].shape


@pytest.mark.parametrize("bins", [1, 3])
@pytest.mark.parametrize("image_sizes", [None, [(14, 9)]])
def test_decode_gradcheck(image_sizes, bins, device):
    levels, points = head(device, bins, torch.float64, "mixed", sizes=((2, 1), (1, 2)), images=1)

    def f(*levels):
        options = {"bins": bins, "image_sizes": image_sizes}
        return decode_distances(levels, points.double() / 10, [8, 16], **options)

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


def test_decode_gradient_at_the_bounds(device):
    """On the border, beyond it, and of a NaN; the host's sizes and a tensor's."""
    distances = torch.tensor([1.0, 0.5, 3.0, math.nan]).view(1, 4, 1, 1)
    points = torch.tensor([[8.0, 8.0]])
    for sizes in ([(50, 32)], torch.tensor([[50, 32]], device=device)):
        level = distances.to(device).requires_grad_()
        boxes = decode_distances([level], points.to(device), [8], image_sizes=sizes)
        assert boxes[0, 0, :3].tolist() == [0, 4, 32] and boxes[0, 0, 3].isnan()
        (grad,) = torch.autograd.grad(boxes.sum(), level)
        assert grad.flatten().tolist() == [0, -8, 0, 0]


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_decode_of_logits_that_are_not_finite(layout, device):
    levels, points = head(device, 3, layout=layout, sizes=((1, 5),), images=1)
    level = levels[0].detach()
    level[0, 0, 0, 0] = math.nan  # of the left side of the first position
    level[0, 4, 0, 1] = math.inf  # of the top one of the second
    level[0, 6:8, 0, 2] = -math.inf  # of the right one: the last bin is left
    level[0, 9:12, 0, 3] = -math.inf  # of the bottom one: none is
    boxes = decode_distances([level], points, [8], bins=3)
    expected = reference.decode_distances([level], points, [8], bins=3)
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert boxes.isnan().nonzero().tolist() == [[0, 0, 0], [0, 1, 1], [0, 3, 3]]
    torch.testing.assert_close(boxes[0, 2, 2], points[2, 0] + 16)


def test_decode_two_runs_give_the_same_bits(device):
    levels, points = head(device, 16, layout="mixed", sizes=((33, 20), (5, 7)))
    runs, before = [], torch.get_num_threads()
    for threads in (1, before):
        torch.set_num_threads(threads)
        boxes = decode_distances(levels, points, [8, 16], bins=16)
        runs.append((boxes.detach(), *torch.autograd.grad(boxes.sum(), levels)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- encode_distances ---------------------------------------------------------------------------


def test_encoding_undoes_decoding(device):
    levels, points = head(device, 1, sizes=((3, 5),))
    boxes = decode_distances(levels, points, [8])
    distances = encode_distances(points / 8, boxes / 8)
    rows = levels[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(distances, rows.detach(), rtol=1e-5, atol=1e-5)
    assert not distances.requires_grad


def test_encoded_distances_are_clamped(device):
    points = torch.tensor([[10.0, 10.0], [100.0, 10.0]], device=device)
    box = torch.tensor([8.0, 7.5, 40.0, 30.0], device=device)
    assert encode_distances(points, box).tolist() == [[2, 2.5, 30, 20], [92, 2.5, -60, 20]]
    clamped = encode_distances(points, box, max_distance=15)
    assert clamped.tolist() == [[2, 2.5, 15, 15], [15, 2.5, 0, 15]]
    assert encode_distances(points.long(), box.double()).dtype == torch.float64
    assert encode_distances(points, box.expand(3, 2, 4)).shape == (3, 2, 4)


# ---- distribution_focal_loss --------------------------------------------------------------------


def rows_of(device: str, shape: tuple[int, ...], bins: int, dtype: torch.dtype = torch.float32):
    """Logits and targets, some of them whole, some beyond the bins."""
    inputs = (torch.randn(*shape, bins) * 2).to(device, dtype).requires_grad_()
    targets = torch.rand(shape) * (bins + 1) - 1
    targets = torch.where(torch.rand(shape) < 0.2, targets.round(), targets)
    return inputs, targets.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def check_loss(inputs: Tensor, targets: Tensor, *weight: Tensor, **options) -> Tensor:
    """Against autograd of the reference in float64: some ten roundings of numbers up to ten, exponentials that are off by an
    ulp for each unit of their argument, and of a half gradient one more when it is saved and one when it is scaled."""
    loss = distribution_focal_loss(inputs, targets, *weight, **options)
    exact_inputs = inputs.detach().double().requires_grad_()
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = reference.distribution_focal_loss(
        exact_inputs, targets.double(), *(w.double() for w in weight), **in_double
    )
    unit = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), exact, rtol=32 * unit, atol=32 * unit)
    upstream = torch.rand_like(loss) - 0.5
    (grad,) = torch.autograd.grad(loss, inputs, upstream)
    (expected,) = torch.autograd.grad(exact, exact_inputs, upstream.double())
    assert grad.dtype == inputs.dtype and grad.shape == inputs.shape
    half = torch.finfo(inputs.dtype).eps if inputs.dtype in DTYPES[:2] else 0
    smallest = torch.finfo(inputs.dtype).smallest_normal * torch.finfo(inputs.dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=half + 64 * unit, atol=32 * unit + smallest)  # fmt: skip
    return loss


@pytest.mark.parametrize("bins", [2, 3, 16, 17, 33, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss(dtype, bins, device):
    for shape in ((1,), (70, 4)):
        loss = check_loss(*rows_of(device, shape, bins, dtype))
        assert loss.shape == shape
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(), (3,), (63,), (64,), (65,), (257, 4), (2, 3, 4)], ids=str)
def test_loss_any_shape(shape, device):
    for bins in (5, 8):
        check_loss(*rows_of(device, shape, bins))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_loss_reductions_weights_and_normalizers(dtype, device):
    inputs, targets = rows_of(device, (30, 4), 16, dtype)
    weight = torch.rand(30, 4, device=device)
    for of_rows in ((), (weight,), (weight[:, :1].expand(30, 4),)):
        for reduction in ("none", "mean", "sum"):
            check_loss(inputs, targets, *of_rows, reduction=reduction)
        for normalizer in (7, torch.tensor(7.0, device=device), torch.tensor(0.5, device=device)):
            options = {"reduction": "sum", "normalizer": normalizer, "min_normalizer": 2}
            check_loss(inputs, targets, *of_rows, **options)


def test_weight_has_the_loss_as_gradient(device):
    inputs, targets = rows_of(device, (6, 4), 16)
    weight = torch.rand(6, 4, device=device, requires_grad=True)
    loss = distribution_focal_loss(inputs, targets, weight, reduction="sum", normalizer=3)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad, distribution_focal_loss(inputs, targets).detach() / 3)


def test_loss_is_the_cross_entropies(device):
    inputs, targets = rows_of(device, (200,), 17)
    targets = targets.clamp(0, 15.9)
    left = targets.long()
    share = targets - left
    expected = F.cross_entropy(inputs, left, reduction="none") * (1 - share)
    expected = expected + F.cross_entropy(inputs, left + 1, reduction="none") * share
    loss = distribution_focal_loss(inputs, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), inputs)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), inputs)[0], rtol=1e-5, atol=1e-6)  # fmt: skip


def test_loss_is_mmdets_and_ultralytics(device):
    inputs = torch.tensor(GOLDEN["logits"], device=device, requires_grad=True)
    loss = distribution_focal_loss(inputs, torch.tensor(GOLDEN["targets"], device=device))
    expected = GOLDEN["mmdet"]
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected["loss"]), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), inputs)
    torch.testing.assert_close(grad.cpu(), torch.tensor(expected["gradient"]), rtol=1e-5, atol=1e-6)
    expected = GOLDEN["ultralytics"]
    logits = torch.tensor(expected["logits"], device=device).view(3, 4, 16)
    targets = torch.tensor(expected["targets"], device=device).clamp(max=14.99)  # as it does
    loss = distribution_focal_loss(logits, targets).mean(-1)
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected["loss"]), rtol=1e-5, atol=1e-5)


def test_targets_beyond_the_bins_are_the_nearest(device):
    inputs = torch.randn(6, 5, device=device, requires_grad=True)
    targets = torch.tensor([-1.0, -math.inf, 4.0, 4.5, 1e30, math.inf], device=device)
    loss = check_loss(inputs, targets)
    nearest = torch.tensor([0, 0, 4, 4, 4, 4], device=device)
    expected = F.cross_entropy(inputs, nearest, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_loss_of_what_is_not_finite(device):
    inputs = torch.zeros(5, 4, device=device)
    inputs[1, 2], inputs[2, 3], inputs[3], inputs[4, :2] = math.nan, math.inf, -math.inf, -math.inf
    inputs.requires_grad_()
    targets = torch.tensor([math.nan, 0.5, 0.5, 0.5, 2.0], device=device)
    loss = distribution_focal_loss(inputs, targets)
    (grad,) = torch.autograd.grad(loss.sum(), inputs)
    assert loss[:4].isnan().all() and grad[:4].isnan().all()
    # The bins that are impossible are not asked for.
    torch.testing.assert_close(loss[4].item(), math.log(2), rtol=1e-6, atol=0)
    assert grad[4].tolist() == [0, 0, -0.5, 0.5]
    loss = distribution_focal_loss(inputs.detach()[4:], targets[1:2])
    assert loss.item() == math.inf


def test_no_targets(device):
    inputs = torch.zeros(0, 4, 16, device=device, requires_grad=True)
    targets = torch.zeros(0, 4, device=device)
    assert distribution_focal_loss(inputs, targets).shape == (0, 4)
    for reduction in ("sum", "mean"):
        loss = distribution_focal_loss(inputs, targets, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, inputs)
        assert loss == 0 and grad.shape == inputs.shape


def test_loss_gradcheck(device):
    inputs, targets = rows_of(device, (3, 2), 4, torch.float64)
    targets = targets.clamp(0, 3)

    def f(x):
        return distribution_focal_loss(x, targets)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_loss_backward_again(device):
    inputs, targets = rows_of(device, (9, 4), 16, torch.float16)
    loss = distribution_focal_loss(inputs, targets, reduction="sum", normalizer=1e5)
    runs = [torch.autograd.grad(loss * 2.0**16, inputs, retain_graph=i < 2)[0] for i in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert (runs[0] != 0).any()  # they survive a large normalizer


def test_loss_memory_and_dtypes(device):
    inputs, targets = rows_of(device, (9, 4), 16)
    expected = distribution_focal_loss(inputs, targets)
    transposed = inputs.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(distribution_focal_loss(transposed, targets), expected)
    flat = torch.empty(inputs.numel() + 1, device=device)[1:].view(inputs.shape)
    shifted = flat.copy_(inputs.detach())
    torch.testing.assert_close(distribution_focal_loss(shifted, targets), expected, rtol=1e-5, atol=1e-5)  # fmt: skip
    whole = targets.round()
    for dtype in (torch.int64, torch.bfloat16):
        assert torch.equal(
            distribution_focal_loss(inputs, whole.to(dtype)), distribution_focal_loss(inputs, whole)
        )
    with torch.no_grad():
        assert not distribution_focal_loss(inputs, targets).requires_grad


NUMBERS = st.sampled_from([-1e30, -1e4, -90, -3.5, -1, 0, 0.5, 1, 20, 88, 1e4, 1e30, -math.inf])


@given(st.lists(NUMBERS, min_size=2, max_size=9), st.floats(-2, 10, width=32))
def test_any_logits(logits, target):
    """Large ones, and bins of probability 0."""
    inputs = torch.tensor([logits], dtype=torch.float32)
    targets = torch.tensor([target])
    loss = distribution_focal_loss(inputs, targets)
    expected = reference.distribution_focal_loss(inputs, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    level = inputs.view(1, -1, 1, 1).repeat(1, 4, 1, 1)
    options = {"bins": len(logits)}
    boxes = decode_distances([level], torch.zeros(1, 2), [1], **options)
    exact = reference.decode_distances([level], torch.zeros(1, 2), [1], **options)
    torch.testing.assert_close(boxes, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---- dense_box_loss of distances ----------------------------------------------------------------

KINDS = ("iou", "giou", "diou", "ciou")


def matched_head(
    device: str, bins: int, dtype: torch.dtype = torch.float32, layout: str = "planes", **sizes
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Levels, points, 4 boxes an image, and matches of one position in three."""
    levels, points = head(device, bins, dtype, layout, **sizes)
    images = levels[0].shape[0]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    corners = torch.rand(images, 4, 2) * 60
    gt_boxes = torch.cat((corners, corners + torch.rand(images, 4, 2) * 60 + 1), dim=-1)
    matches = torch.randint(0, 4, (images, len(points)))
    kind = torch.rand(matches.shape)
    matches[kind < 0.6], matches[kind < 0.1] = -1, -2
    return levels, points.to(compute), gt_boxes.to(device, compute), matches.to(device)


def check_dense(levels, points, gt_boxes, matches, **options):
    """Against autograd of the reference in float64, as check_decode and check_loss; the IoU losses divide by areas that may be
    a hundredth of the coordinates' squares."""
    options = {"coding": "distance", "strides": STRIDES[: len(levels)], **options}
    value = dense_box_loss(levels, points, gt_boxes, matches, **options)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = reference.dense_box_loss(
        exact_levels, points.double(), gt_boxes.double(), matches, **in_double
    )
    if options.get("return_iou"):
        (value, iou), (exact, exact_iou) = value, exact
        torch.testing.assert_close(iou.double(), exact_iou, rtol=1e-4, atol=1e-4)
        assert not iou.requires_grad
    unit = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), exact, rtol=256 * unit, atol=256 * unit)
    upstream = torch.rand_like(value) if value.dim() else torch.ones_like(value)
    grads = torch.autograd.grad(value, levels, upstream)
    expected = torch.autograd.grad(exact, exact_levels, upstream.double())
    for level, grad, other in zip(levels, grads, expected, strict=True):
        assert grad.dtype == level.dtype and grad.stride() == level.stride()
        half = torch.finfo(level.dtype).eps if level.dtype in DTYPES[:2] else 0
        smallest = torch.finfo(level.dtype).smallest_normal * torch.finfo(level.dtype).eps
        most = other.abs().max().item() if other.numel() else 0
        atol = 1024 * unit * max(most, 1e-3) + smallest
        torch.testing.assert_close(grad.double(), other, rtol=2 * half + 1024 * unit, atol=atol)
    return value


@pytest.mark.parametrize("bins", [1, 5, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", KINDS)
def test_dense(loss, dtype, layout, bins, device):
    arguments = matched_head(device, bins, dtype, layout)
    options = {"loss": loss, "bins": bins, "dfl_weight": 0.2 if bins > 1 else 0}
    check_dense(*arguments, **options, return_iou=True, reduction="none")
    check_dense(*arguments, **options, normalizer=torch.tensor([3.0, 0.5], device=device))


def test_dense_weights_and_normalizers(device):
    arguments = matched_head(device, 16, layout="mixed")
    weight = torch.rand(arguments[3].shape, device=device)
    for options in (
        {"weight": weight},
        {"weight": weight, "reduction": "none"},
        {"normalizer": 7, "eps": 0.1},
        {"normalizer": torch.tensor([0.0, 7], device=device), "min_normalizer": 3},
    ):
        for dfl_weight in (0, 0.5):
            check_dense(*arguments, loss="giou", bins=16, dfl_weight=dfl_weight, **options)


def test_dense_is_the_parts(device):
    """Decoding everything, gathering the foreground, the losses of pairs and the distribution focal loss."""
    levels, points, gt_boxes, matches = matched_head(device, 16, layout="mixed")
    options = {"coding": "distance", "strides": STRIDES, "bins": 16}
    whole = dense_box_loss(
        levels, points, gt_boxes, matches, loss="ciou", dfl_weight=0.2, **options
    )
    boxes = decode_distances(levels, points, STRIDES, bins=16)
    image, row = torch.where(matches >= 0)
    truth = gt_boxes[image, matches[image, row]]
    sizes = torch.tensor([h * w for h, w in SIZES])
    stride = torch.tensor(STRIDES).repeat_interleave(sizes).to(device)[row, None]
    logits = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    targets = encode_distances(points[row], truth) / stride
    dfl = distribution_focal_loss(logits[image, row].view(-1, 4, 16), targets).mean(-1)
    parts = complete_box_iou_loss(boxes[image, row], truth) + 0.2 * dfl
    torch.testing.assert_close(whole, parts.sum(), rtol=1e-5, atol=1e-4)
    for grad, other in zip(
        torch.autograd.grad(whole, levels), torch.autograd.grad(parts.sum(), levels), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_dense_any_size(device):
    for sizes in (((33, 16), (0, 5), (17, 15)), ((1, 257), (1, 129), (1, 3))):
        for layout in ("planes", "rows"):
            arguments = matched_head(device, 3, layout=layout, sizes=sizes)
            check_dense(*arguments, loss="giou", bins=3, dfl_weight=0.2)


def test_dense_nothing(device):
    levels, points, gt_boxes, matches = matched_head(device, 4, sizes=((2, 3), (0, 4)))
    options = {"coding": "distance", "strides": [8, 16], "bins": 4, "loss": "giou"}
    for boxes in (gt_boxes, gt_boxes[:, :0], list(gt_boxes[:, :0])):
        value = dense_box_loss(levels, points, boxes, torch.full_like(matches, -1), **options)
        grads = torch.autograd.grad(value, levels)
        assert value == 0 and all((grad == 0).all() for grad in grads)
    levels, points, gt_boxes, matches = matched_head(device, 4, sizes=((2, 3), (0, 4)), images=0)
    value = dense_box_loss(levels, points, gt_boxes, matches, **options)
    assert value == 0 and torch.autograd.grad(value, levels)[0].shape == levels[0].shape


@pytest.mark.parametrize("bins", [1, 3])
def test_dense_gradcheck(bins, device):
    arguments = matched_head(device, bins, torch.float64, "mixed", sizes=((2, 2), (1, 2)))
    levels, points, gt_boxes, matches = arguments
    matches[:, :3] = torch.arange(3, device=device)

    def f(*levels):
        options = {"coding": "distance", "strides": [8, 16], "bins": bins}
        options |= {"dfl_weight": 0.5 if bins > 1 else 0, "loss": "giou"}
        return dense_box_loss(levels, points, gt_boxes, matches, normalizer=3, **options)

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


def test_a_match_that_is_none(backend, device):
    levels, points, gt_boxes, matches = matched_head(device, 3, sizes=((3, 5),))
    matches[1, 7] = 4
    options = {"coding": "distance", "strides": [8], "bins": 3, "loss": "giou", "dfl_weight": 0.2}
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="matches must be less than the number of boxes, 4, got 4"):  # fmt: skip
            dense_box_loss(levels, points, gt_boxes, matches, **options)
    else:
        value = dense_box_loss(levels, points, gt_boxes, matches, **options)
        (grad,) = torch.autograd.grad(value, levels)
        assert value.isnan() and grad.isnan().sum() == 12


def test_distances_are_left_alone_with_deltas(device):
    levels, points, gt_boxes, matches = matched_head(device, 1, sizes=((3, 5),))
    anchors = torch.cat((points, points + 8), dim=1)
    for name, value, right in (("strides", [8], None), ("bins", 3, 1), ("dfl_weight", 0.2, 0)):
        said = f"^{name} must be {right} unless coding is 'distance', got"
        with pytest.raises(ValueError, match=said):
            dense_box_loss(levels, anchors, gt_boxes, matches, **{name: value})


def test_dense_compiles_whole_and_loops_under_vmap(device):
    levels, points, gt_boxes, matches = matched_head(device, 4, sizes=((3, 5), (2, 2)))

    def f(*levels):
        options = {"coding": "distance", "strides": [8, 16], "bins": 4, "loss": "ciou"}
        return dense_box_loss(levels, points, gt_boxes, matches, dfl_weight=0.2, **options)

    value = f(*levels)
    grads = torch.autograd.grad(value, levels)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)(*levels)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, levels), grads)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(f(*levels), value)
    batch = [torch.stack((level.detach(), level.detach() / 2)) for level in levels]
    together = torch.vmap(f)(*batch)
    torch.testing.assert_close(together[0], value.detach())


# ---- all of them----------------------------------------------------------------------------------


def test_opcheck(device):
    levels, points = head(device, 5, layout="mixed", sizes=((3, 2), (1, 1)))
    sizes = torch.tensor(IMAGE_SIZES, device=device, dtype=torch.float32)
    for image_sizes in (None, sizes):
        arguments = (levels, points, [8.0, 16.0], 5, image_sizes)
        torch.library.opcheck(torch.ops.focalops.decode_distances.default, arguments)
        plain = ([level.detach() for level in levels], *arguments[1:])
        upstream = torch.rand(2, len(points), 4, device=device)
        torch.library.opcheck(torch.ops.focalops._decode_distances_backward.default, (upstream, *plain))  # fmt: skip
    matched = matched_head(device, 5, layout="mixed", sizes=((3, 2), (1, 1)))
    for flags in ((True, True), (False, False)):
        arguments = (*matched, [8.0, 16.0], 5, 3, 1e-7, 0.2, *flags)
        torch.library.opcheck(torch.ops.focalops.dense_distance_losses.default, arguments)
    inputs, targets = rows_of(device, (5, 4), 6)
    for compute_grad in (True, False):
        arguments = (inputs, targets, compute_grad)
        torch.library.opcheck(torch.ops.focalops.distribution_focal_loss.default, arguments)


def test_what_the_backward_refuses(device):
    levels, points = head(device, 2, sizes=((1, 2),))
    plain = [levels[0].detach()]
    op = torch.ops.focalops._decode_distances_backward
    for upstream, said in (
        (torch.zeros(2, 2, 4).double(), "grad_output must be torch.float32 like points"),
        (torch.zeros(2, 3, 4), r"grad_output must have the shape of the output, \(2, 2, 4\), got"),
    ):
        for to in (device, "meta"):
            with pytest.raises(RuntimeError, match=said):
                op(upstream.to(to), [p.to(to) for p in plain], points.to(to), [8.0], 2, None)
