"""The IoU family, encode_boxes and decode_boxes against the reference, torchvision and float64."""

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

import focalops
from focalops import (
    box_iou,
    complete_box_iou,
    decode_boxes,
    distance_box_iou,
    encode_boxes,
    generalized_box_iou,
    reference,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# One pair, fewer columns than a 16-byte vector, rows that begin at 16-byte boundaries and rows that do not, more columns
# than a tile, more rows than a block, more columns than one partial gradient sums over.
SHAPES = ((1, 1), (3, 2), (7, 4), (33, 8), (300, 17), (5, 1030), (2, 4100), (270, 1))
IOU_FUNCTIONS = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    center, size = torch.rand(*shape, 2) * 100, torch.rand(*shape, 2) * 60 + 1
    return torch.cat((center - size / 2, center + size / 2), dim=-1).to(device, dtype)


def grid_boxes(n: int, device: str) -> Tensor:
    """On whole pixels and small: many are empty, touch, share an edge or are equal."""
    corners = torch.randint(0, 5, (n, 2, 2)).sort(dim=1).values
    return corners.reshape(n, 4).float().to(device)


def gradients(function, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients for an upstream gradient that is the same in each dtype and on each device."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*tensors)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    upstream = upstream[..., torch.randperm(output.shape[-1], generator=torch.manual_seed(1))]
    return output, list(torch.autograd.grad(output, tensors, upstream.to(output)))


def assert_close_to_float64(function, exact_function, *tensors: Tensor) -> None:
    """Every value is the result of some ten operations on numbers no greater than the greatest value, each rounded in the
    compute dtype; a gradient sums up to thousands of such terms, of which the errors mostly cancel; a half gradient is
    rounded once more at the end."""
    output, grads = gradients(function, *tensors)
    exact, exact_grads = gradients(exact_function, *(tensor.double() for tensor in tensors))
    assert output.dtype == (
        torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
    )
    for actual, expected, half in [
        (output, exact, 0.0),
        *((g, e, torch.finfo(t.dtype).eps / 2) for g, e, t in zip(grads, exact_grads, tensors, strict=True)),
    ]:  # fmt: skip
        unit = torch.finfo(output.dtype).eps
        most = expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(
            actual.double(), expected, rtol=32 * unit + half, atol=32 * unit * most
        )


# ---- box_iou ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_box_iou_is_the_references_to_the_bit(shape, dtype, device):
    n, m = shape
    boxes1, boxes2 = (random_boxes(k, device=device, dtype=dtype) for k in (n, m))
    assert torch.equal(box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_box_iou_gradients(shape, dtype, device):
    n, m = shape
    boxes1, boxes2 = (random_boxes(k, device=device, dtype=dtype) for k in (n, m))
    assert_close_to_float64(box_iou, reference.box_iou, boxes1, boxes2)


def test_box_iou_is_torchvisions(device):
    boxes1, boxes2 = random_boxes(40, device=device), random_boxes(30, device=device)
    iou, grads = gradients(box_iou, boxes1, boxes2)
    expected, expected_grads = gradients(torchvision.ops.box_iou, boxes1, boxes2)
    assert torch.equal(iou, expected)
    # Sums of 30 and 40 terms below 1 in another order.
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


def test_box_iou_of_boxes_that_touch_are_equal_or_empty(device):
    boxes1, boxes2 = grid_boxes(60, device), grid_boxes(50, device)
    iou, grads = gradients(box_iou, boxes1, boxes2)
    expected, expected_grads = gradients(reference.box_iou, boxes1, boxes2)
    assert torch.equal(iou, expected)
    assert iou.isfinite().all()
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_box_iou_of_a_batch(batch, device):
    boxes1, boxes2 = random_boxes(batch, 37, device=device), random_boxes(batch, 5, device=device)
    iou, grads = gradients(box_iou, boxes1, boxes2)
    expected, expected_grads = gradients(reference.box_iou, boxes1, boxes2)
    assert torch.equal(iou, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-6)
    assert torch.equal(iou[0], box_iou(boxes1[0], boxes2[0]))


def test_box_iou_of_integers_and_of_mixed_dtypes(device):
    integers = (random_boxes(9, device=device) * 3).round()
    boxes = random_boxes(7, device=device)
    expected = reference.box_iou(integers, boxes)
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(box_iou(integers.to(dtype), boxes), expected)
    mixed = box_iou(integers.to(torch.bfloat16), boxes.double())
    assert mixed.dtype == torch.float64
    assert torch.equal(mixed, reference.box_iou(integers.to(torch.bfloat16), boxes.double()))


def test_box_iou_gradcheck(device):
    boxes1, boxes2 = (
        random_boxes(n, device=device, dtype=torch.float64).requires_grad_() for n in (4, 3)
    )
    torch.autograd.gradcheck(box_iou, (boxes1, boxes2))
    torch.autograd.gradgradcheck(box_iou, (boxes1, boxes2))


def test_box_iou_of_what_is_not_a_number(device):
    boxes = torch.tensor([[0.0, 0, 4, 4], [math.nan, 0, 4, 4], [0, 0, math.inf, 4]], device=device)
    iou = box_iou(boxes, boxes[:1])[:, 0]
    assert iou[0] == 1 and iou[1].isnan() and iou[2] == 0


COORDINATES = st.sampled_from([-1e30, -1e4, -3.5, -1, 0, 0.5, 1, 2, 1e-20, 1e-40, 7, 1e4, 1e30])


@given(st.lists(st.tuples(*[COORDINATES] * 4), min_size=2, max_size=12), st.integers(1, 11))
def test_box_iou_of_any_boxes(corners, split):
    boxes = torch.tensor(corners, dtype=torch.float32)
    boxes = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)  # fmt: skip
    boxes1, boxes2 = boxes[: split % len(boxes)], boxes[split % len(boxes) :]
    iou = box_iou(boxes1, boxes2)
    assert torch.equal(iou.nan_to_num(-1), reference.box_iou(boxes1, boxes2).nan_to_num(-1))
    assert torch.equal(iou.nan_to_num(-1), box_iou(boxes2, boxes1).T.nan_to_num(-1))
    # The area of the larger ones is infinite in float32; of the others each IoU is a number in [0, 1].
    small = (boxes1.abs().amax(1) < 1e18)[:, None] & (boxes2.abs().amax(1) < 1e18)
    assert ((iou >= 0) & (iou <= 1))[small].all()


# ---- generalized, distance and complete IoU -----------------------------------------------------

FAMILY = (generalized_box_iou, distance_box_iou, complete_box_iou)
FAMILY_IDS = ("generalized", "distance", "complete")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2), (33, 8), (5, 1030), (2, 4100)], ids=str)
@pytest.mark.parametrize("function", FAMILY, ids=FAMILY_IDS)
def test_family(function, shape, dtype, device):
    n, m = shape
    boxes1, boxes2 = (random_boxes(k, device=device, dtype=dtype) for k in (n, m))
    exact = getattr(reference, function.__name__)
    assert_close_to_float64(function, exact, boxes1, boxes2)


@pytest.mark.parametrize("function", FAMILY, ids=FAMILY_IDS)
def test_family_is_torchvisions(function, device):
    boxes1, boxes2 = (random_boxes(2, n, device=device, dtype=torch.float64) for n in (40, 31))
    theirs = getattr(torchvision.ops, function.__name__)
    for a, b in ((boxes1, boxes2), (boxes1[0], boxes2[1])):
        values, grads = gradients(function, a, b)
        expected, expected_grads = gradients(theirs, a, b)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", FAMILY, ids=FAMILY_IDS)
def test_family_of_degenerate_boxes_is_finite(function, device):
    boxes1, boxes2 = grid_boxes(60, device), grid_boxes(50, device)
    values, grads = gradients(function, boxes1, boxes2)
    expected, expected_grads = gradients(getattr(reference, function.__name__), boxes1, boxes2)
    assert values.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    # Sums of up to 60 terms, of which the greatest are some 10.
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("function", FAMILY, ids=FAMILY_IDS)
def test_family_gradcheck(function, device):
    boxes = [random_boxes(n, device=device, dtype=torch.float64).requires_grad_() for n in (3, 2)]
    if function is not complete_box_iou:  # its weight is not differentiated
        torch.autograd.gradcheck(function, boxes)
    (first,) = torch.autograd.grad(function(*boxes).sum(), boxes[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), boxes[1])
    twin = getattr(reference, function.__name__)
    (first,) = torch.autograd.grad(twin(*boxes).sum(), boxes[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), boxes[1])[0])


def test_eps_is_added_to_the_diagonal(device):
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 1, 2, 2]], device=device)
    for function in (distance_box_iou, complete_box_iou):
        assert function(boxes[:1], boxes[1:], 2.0).item() == pytest.approx(-0.2)
        assert function(boxes[:1], boxes[1:], eps=0).item() == pytest.approx(-0.25)


@given(st.lists(st.tuples(*[COORDINATES] * 4), min_size=2, max_size=12))
def test_family_of_any_boxes(corners):
    boxes = torch.tensor(corners, dtype=torch.float64)
    boxes = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)  # fmt: skip
    iou = box_iou(boxes, boxes)
    for function in FAMILY:
        values = function(boxes, boxes)
        torch.testing.assert_close(values, getattr(reference, function.__name__)(boxes, boxes))
        torch.testing.assert_close(values, values.T)
        assert (values <= iou + 1e-9).all() and (values >= -3).all()
    assert (generalized_box_iou(boxes, boxes) >= -1 - 1e-9).all()


# ---- encode_boxes and decode_boxes --------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 300])
def test_encode_boxes(n, dtype, weights, device):
    boxes, anchors = (random_boxes(n, device=device, dtype=dtype) for _ in range(2))
    assert_close_to_float64(
        lambda b, a: encode_boxes(b, a, weights),
        lambda b, a: reference.encode_boxes(b, a, weights),
        boxes,
        anchors,
    )


@pytest.mark.parametrize("image_size", [None, (90, 70)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 300])
def test_decode_boxes(n, dtype, weights, image_size, device):
    # Multiples of 1/16, so that those at the clip of log(1000 / 16) are on the same side of it in every dtype.
    deltas = (torch.randn(n, 4) * 32).round() / 16 * torch.tensor(weights)
    deltas[::5, 2:] = 5 * weights[2]
    deltas = deltas.to(device, dtype)
    anchors = random_boxes(n, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)  # fmt: skip
    assert_close_to_float64(
        lambda d, a: decode_boxes(d, a, weights, image_size=image_size),
        lambda d, a: reference.decode_boxes(d, a, weights, image_size=image_size),
        deltas,
        anchors,
    )


@pytest.mark.parametrize("image_size", [None, (50, 100), [(50, 100)] * 4])
def test_decode_boxes_gradient_at_the_bounds(image_size, device):
    """A coordinate on the image's border, or a NaN, is where torch.clamp ends."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [90, 40, 100, 50], [5, 5, 6, 6], [0, 0, 100, 50]])
    grads = []
    for decode, where in ((decode_boxes, device), (reference.decode_boxes, "cpu")):
        deltas = torch.zeros(4, 4, device=where)
        deltas[2, 0] = float("nan")
        deltas.requires_grad_()
        size = image_size
        if isinstance(size, list):  # that of each image
            size = torch.tensor(size, device=where)
        boxes = decode(deltas, anchors.to(where), image_size=size)
        weights = torch.arange(1.0, 5, device=where)
        grads.append(torch.autograd.grad((boxes * weights).sum(), deltas)[0].cpu())
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coding_is_torchvisions(dtype, device):
    coder = BoxCoder(WEIGHTS)
    anchors, boxes = (random_boxes(100, device=device, dtype=dtype) for _ in range(2))
    deltas = encode_boxes(boxes, anchors, WEIGHTS)
    (expected,) = coder.encode([boxes], [anchors])
    # The logarithm and the exponential are within 2 ulp of torch's; all else is the same operations.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(deltas, expected, rtol=8 * unit, atol=8 * unit)
    decoded = decode_boxes(deltas * 1.5, anchors, WEIGHTS, image_size=(64, 80))
    expected = torchvision.ops.clip_boxes_to_image(
        coder.decode(deltas * 1.5, [anchors])[:, 0], (64, 80)
    )
    torch.testing.assert_close(decoded, expected, rtol=8 * unit, atol=800 * unit)


def test_decoding_undoes_encoding(device):
    boxes, anchors = random_boxes(50, device=device), random_boxes(50, device=device)
    decoded = decode_boxes(encode_boxes(boxes, anchors), anchors)
    torch.testing.assert_close(decoded, boxes, rtol=1e-5, atol=1e-4)  # of coordinates up to 130


@pytest.mark.parametrize("shapes", [
    ((3, 40, 4), (40, 4)), ((40, 4), (3, 40, 4)), ((3, 1, 4), (40, 4)), ((2, 3, 5, 4), (2, 1, 5, 4)),
    ((3, 40, 4), (4,)), ((4,), (4,)), ((5, 1, 4), (5, 2, 4)),
], ids=str)  # fmt: skip
def test_broadcasting(shapes, device):
    first, second = (random_boxes(*shape[:-1], device=device) for shape in shapes)
    for function, expected_function in (
        (encode_boxes, reference.encode_boxes),
        (decode_boxes, reference.decode_boxes),
    ):
        if function is decode_boxes:
            first = first / 100
        output, grads = gradients(function, first, second)
        expected, expected_grads = gradients(expected_function, first, second)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-3)


def test_coding_gradcheck(device):
    boxes, anchors = (
        random_boxes(3, device=device, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    deltas = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    for function, first in (
        (lambda b, a: encode_boxes(b, a, WEIGHTS), boxes),
        (lambda d, a: decode_boxes(d, a, WEIGHTS), deltas),
        (lambda d, a: decode_boxes(d, a, clip=0.3, image_size=(60, 70)), deltas),
    ):
        torch.autograd.gradcheck(function, (first, anchors))
        torch.autograd.gradgradcheck(function, (first, anchors))


def test_only_the_wanted_gradients_are_computed(device):
    anchors = random_boxes(5, device=device)
    deltas = torch.zeros(5, 4, device=device, requires_grad=True)
    decode_boxes(deltas, anchors).sum().backward()
    assert deltas.grad is not None and anchors.grad is None
    anchors.requires_grad_()
    decode_boxes(deltas.detach(), anchors).sum().backward()
    assert anchors.grad is not None


def test_degenerate_boxes_code_as_in_the_reference(device):
    boxes = torch.tensor([[1.0, 1, 1, 3], [2, 2, 2, 2], [0, 0, 4, 4]], device=device)
    anchors = boxes[[2, 2, 0]]
    torch.testing.assert_close(
        encode_boxes(boxes, anchors), reference.encode_boxes(boxes, anchors), equal_nan=True
    )
    deltas = torch.tensor([[math.nan, 0, 0, 1], [0, math.inf, 1, 1], [0, 0, math.inf, -math.inf]], device=device)  # fmt: skip
    for image_size in (None, (3, 2)):
        decoded = decode_boxes(deltas, boxes, image_size=image_size)
        expected = reference.decode_boxes(deltas, boxes, image_size=image_size)
        torch.testing.assert_close(decoded, expected, equal_nan=True)


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((0, 4), (5, 4)), ((5, 4), (0, 4)), ((0, 4), (0, 4)), ((2, 0, 4), (2, 3, 4))], ids=str)  # fmt: skip
def test_empty_sets(shapes, device):
    boxes1, boxes2 = (torch.zeros(shape, device=device) for shape in shapes)
    output, grads = gradients(lambda a, b: box_iou(a, b).reshape(-1, 1), boxes1, boxes2)
    assert output.numel() == 0
    assert [grad.tolist() for grad in grads] == [boxes1.tolist(), boxes2.tolist()]


@pytest.mark.parametrize("shapes", [((0, 4), (0, 4)), ((3, 0, 4), (0, 4)), ((0, 4), (1, 4))], ids=str)  # fmt: skip
def test_nothing_to_code(shapes, device):
    first, second = (torch.ones(shape, device=device) for shape in shapes)
    for function in (encode_boxes, decode_boxes):
        output, grads = gradients(function, first, second)
        assert output.shape == torch.broadcast_shapes(*shapes)
        assert [grad.tolist() for grad in grads] == [(0 * first).tolist(), (0 * second).tolist()]


def test_layouts(device):
    """Transposed, strided, and at an odd offset, where nothing is aligned to 16 bytes."""
    boxes, others = random_boxes(21, device=device), random_boxes(21, device=device)

    def layouts(x):
        yield x.T.contiguous().T
        yield torch.stack((x, -x), dim=1)[:, 0]
        yield torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        yield torch.cat((x, x), dim=1)[:, :4]

    for a, b in zip(layouts(boxes), layouts(others), strict=True):
        for function in (box_iou, encode_boxes, decode_boxes):
            output, grads = gradients(function, a, b)
            expected, expected_grads = gradients(function, boxes, others)
            assert torch.equal(output.nan_to_num(), expected.nan_to_num())
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                assert torch.equal(grad.nan_to_num(), expected_grad.nan_to_num())


def test_two_runs_give_the_same_bits(device):
    boxes1, boxes2 = random_boxes(3, device=device), random_boxes(9000, device=device)
    _, first = gradients(box_iou, boxes1, boxes2)
    _, second = gradients(box_iou, boxes1, boxes2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(device):
    ops = torch.ops.focalops
    boxes1, boxes2 = (random_boxes(n, device=device).requires_grad_() for n in (5, 3))
    torch.library.opcheck(ops.box_iou.default, (boxes1, boxes2))
    plain1, plain2 = boxes1.detach(), boxes2.detach()
    upstream = torch.rand(5, 3, device=device)
    torch.library.opcheck(ops._box_iou_backward.default, (upstream, plain1, plain2))
    torch.library.opcheck(ops.box_iou.default, (boxes1, boxes2, 3, 1e-7))
    torch.library.opcheck(ops._box_iou_backward.default, (upstream, plain1, plain2, 1, 1e-7))
    weights, anchors = list(WEIGHTS), random_boxes(5, device=device).requires_grad_()
    torch.library.opcheck(ops.encode_boxes.default, (boxes1, anchors, weights))
    upstream, plain_anchors = torch.rand(5, 4, device=device), anchors.detach()
    torch.library.opcheck(
        ops._encode_boxes_backward.default, (upstream, plain1, plain_anchors, weights)
    )
    deltas = torch.randn(5, 4, device=device, requires_grad=True)
    torch.library.opcheck(ops.decode_boxes.default, (deltas, anchors, weights, 4.0, [70.0, 80.0]))
    arguments = (upstream, deltas.detach(), plain_anchors, weights, 4.0, [])
    for compute_grad_anchors in (True, False):
        torch.library.opcheck(
            ops._decode_boxes_backward.default, (*arguments, compute_grad_anchors)
        )


def test_compiles_whole(device):
    def f(deltas, anchors, boxes):
        decoded = decode_boxes(deltas, anchors, image_size=(90, 90))
        return box_iou(decoded, boxes).sum() + encode_boxes(decoded, anchors)[..., :2].sum()

    deltas = torch.randn(9, 4, device=device, requires_grad=True)
    anchors, boxes = random_boxes(9, device=device), random_boxes(4, device=device)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    (grad,) = torch.autograd.grad(compiled(deltas, anchors, boxes), deltas)
    (expected,) = torch.autograd.grad(f(deltas, anchors, boxes), deltas)
    torch.testing.assert_close(grad, expected)


# ---- formats, batches that broadcast, the intersection over one area ------------------------------


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
def test_formats_are_torchvisions(fmt, device):
    boxes1, boxes2 = (
        torchvision.ops.box_convert(random_boxes(n, device=device), "xyxy", fmt) for n in (40, 30)
    )
    iou, grads = gradients(lambda a, b: box_iou(a, b, fmt), boxes1, boxes2)
    expected, expected_grads = gradients(
        lambda a, b: torchvision.ops.box_iou(a, b, fmt), boxes1, boxes2
    )
    # torchvision has the area from width and height, here it is that of the corners: an ulp of 160 in a side of 1.
    torch.testing.assert_close(iou, expected, rtol=4e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(iou, reference.box_iou(boxes1, boxes2, fmt), rtol=0, atol=0)
    whole = (boxes1 * 2).long()
    expected = torchvision.ops.box_iou(whole, whole, fmt=fmt)
    torch.testing.assert_close(box_iou(whole, whole, fmt=fmt), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", IOU_FUNCTIONS)
@pytest.mark.parametrize(
    "shapes", [((7,), (3, 5)), ((2, 1, 4), (3, 5)), ((1, 4), (3, 5)), ((2, 0, 4), (1, 5)), ((2, 3, 4), (2, 3, 5))], ids=str
)  # fmt: skip
def test_batches_broadcast_as_torchvisions(name, shapes, device):
    ours, theirs = getattr(focalops, name), getattr(torchvision.ops, name)
    boxes1, boxes2 = (random_boxes(*shape, device=device) for shape in shapes)
    iou, grads = gradients(ours, boxes1, boxes2)
    expected, expected_grads = gradients(theirs, boxes1, boxes2)
    assert iou.shape == expected.shape
    # Complete IoU has an arctangent of its own, within 3 ulp.
    torch.testing.assert_close(iou, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shapes", [((1, 0), (0,)), ((2, 0), (3,)), ((2, 3), (0,))], ids=str)
def test_batches_without_boxes_broadcast(shapes, device):
    boxes1, boxes2 = (random_boxes(*shape, device=device) for shape in shapes)
    batch, rows = shapes[0]
    assert focalops.box_iou(boxes1, boxes2).shape == (batch, rows, *shapes[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (33, 8), (3, 300)], ids=str)
def test_iof_is_the_references(shape, dtype, device):
    def iof(function):
        return lambda a, b: function(a, b, mode="iof")

    boxes1, boxes2 = (random_boxes(n, device=device, dtype=dtype) for n in shape)
    assert torch.equal(iof(box_iou)(boxes1, boxes2), iof(reference.box_iou)(boxes1, boxes2))
    assert_close_to_float64(iof(box_iou), iof(reference.box_iou), boxes1, boxes2)
    empty = torch.tensor([[3.0, 3, 3, 9]], device=device)
    assert iof(box_iou)(empty, empty).item() == 0
    leaf = boxes1.clone().requires_grad_()
    assert not torch.autograd.grad(iof(box_iou)(leaf, boxes2).sum(), leaf)[0].requires_grad


def test_iof_gradcheck(device):
    boxes1, boxes2 = (random_boxes(n, device=device, dtype=torch.float64) for n in (3, 4))
    inputs = (boxes1.requires_grad_(), boxes2.requires_grad_())
    torch.autograd.gradcheck(lambda a, b: box_iou(a, b, mode="iof"), inputs)
    torch.library.opcheck(torch.ops.focalops.box_iou, (boxes1.detach(), boxes2.detach(), 4))


# ---- decoding: sizes of each image, a bound of the shift ------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 300), (3, 1), (2, 3, 5), (2, 0)], ids=str)
def test_decode_to_each_images_size(shape, dtype, device):
    deltas = torch.randn(*shape, 4, device=device).to(dtype)
    anchors = random_boxes(*shape[1:], device=device)
    sizes = [(40.0 + 20 * i, 70.0 - 10 * i) for i in range(shape[0])]
    tensor = torch.tensor(sizes, device=device)
    boxes = decode_boxes(deltas, anchors, image_size=tensor)
    assert torch.equal(boxes, decode_boxes(deltas, anchors, image_size=sizes))
    for i, size in enumerate(sizes):
        assert torch.equal(boxes[i], decode_boxes(deltas[i], anchors, image_size=size))

    def decode(function):
        return lambda d, a: function(d, a, image_size=tensor.to(d.device))

    if dtype == torch.float64:
        anchors = anchors.double()
    assert_close_to_float64(decode(decode_boxes), decode(reference.decode_boxes), deltas, anchors)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ctr_clamp(weights, dtype, device):
    deltas = (torch.randn(3, 50, 4, device=device) * torch.tensor(weights, device=device)).to(dtype)
    anchors = random_boxes(50, device=device).to(torch.promote_types(dtype, torch.float32))

    def decode(function):
        return lambda d, a: function(d, a, weights, image_size=(90, 80), ctr_clamp=8.0)

    assert_close_to_float64(decode(decode_boxes), decode(reference.decode_boxes), deltas, anchors)
    unclamped = decode_boxes(deltas, anchors, weights, image_size=(90, 80))
    assert not torch.equal(decode(decode_boxes)(deltas, anchors), unclamped)


def test_bool_boxes_of_another_format_are_refused_in_a_sentence():
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"boxes1 must be .*, got torch\.bool") as error:
            box_iou(
                torch.ones(2, 4, dtype=torch.bool, device=device),
                torch.ones(2, 4, device=device),
                fmt="cxcywh",
            )
        assert "\n" not in str(error.value)


def test_the_gradient_of_half_anchors_is_rounded_once():
    """ctr_clamp leads to the anchors a second way, whose gradient has to be added before that."""
    deltas = torch.tensor([[-3.1934, 17.2344, 4.9219, -0.2379]]).half()
    anchors = torch.tensor([[-13.6094, 16.3750, -10.1484, 21.8906]]).half()
    grads = []
    for dtype in (torch.float16, torch.float32):
        x = anchors.detach().to(dtype).requires_grad_()
        boxes = decode_boxes(deltas.to(dtype), x, clip=0.5, ctr_clamp=32)
        boxes.backward(torch.tensor([[0.375, 1, -0.5, 0.125]]))
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1].half())
