"""The losses of boxes against the reference, torchvision and float64."""

import math

import pytest
import torch
import torchvision
from test_boxes import assert_close_to_float64, gradients, grid_boxes, random_boxes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from focalops import (
    box_iou,
    box_iou_loss,
    complete_box_iou_loss,
    decode_boxes,
    dense_box_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    matched_iou,
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


@pytest.mark.parametrize("shapes", [((6, 4), (4,)), ((6, 4), (1, 4)), ((2, 6, 4), (6, 4))], ids=str)
def test_pairs_broadcast_as_torchvisions(shapes, device):
    boxes1, boxes2 = (random_boxes(*shape[:-1], device=device) for shape in shapes)
    loss, grads = gradients(generalized_box_iou_loss, boxes1, boxes2)
    expected, expected_grads = gradients(torchvision.ops.generalized_box_iou_loss, boxes1, boxes2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    swapped = generalized_box_iou_loss(boxes2, boxes1)  # which torchvision does not take
    torch.testing.assert_close(swapped, loss, rtol=1e-5, atol=1e-6)


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


# ---- dense_box_loss -----------------------------------------------------------------------------

KINDS = ("l1", "smooth_l1", "iou", "giou", "diou", "ciou")
LAYOUTS = ("planes", "rows", "mixed")
SIZES = ((6, 8), (3, 5), (1, 1))


def head(
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "planes",
    images: int = 2,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Deltas of 3 anchors a position, anchors, 4 boxes an image, and matches of one anchor in four."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = []
    for i, (h, w) in enumerate(sizes):
        level = (torch.randn(images, 12, h, w) / 4).to(device, dtype)
        if layout == "rows" or (layout == "mixed" and i % 2):
            level = level.to(memory_format=torch.channels_last)
        levels.append(level.requires_grad_())
    rows = 3 * sum(h * w for h, w in sizes)
    anchors = random_boxes(rows, device=device, dtype=compute)
    gt_boxes = random_boxes(images, 4, device=device, dtype=compute)
    matches = torch.randint(0, 4, (images, rows))
    kind = torch.rand(images, rows)
    matches[kind < 0.75], matches[kind < 0.1] = -1, -2
    return levels, anchors, gt_boxes, matches.to(device)


def check_dense(levels, anchors, gt_boxes, matches, **options):
    """Against autograd of the reference in float64, with an upstream gradient that differs from anchor to anchor. Some
    twenty roundings a value in the compute dtype, and of a half gradient one more when it is saved and one when it is
    scaled."""
    value = dense_box_loss(levels, anchors, gt_boxes, matches, **options)
    exact_levels = [level.detach().double().requires_grad_() for level in levels]
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = reference.dense_box_loss(
        exact_levels, anchors.double(), gt_boxes.double(), matches, **in_double
    )
    unit = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), exact, rtol=64 * unit, atol=64 * unit)
    upstream = torch.rand_like(value) if value.dim() else torch.ones_like(value)
    grads = torch.autograd.grad(value, levels, upstream)
    expected = torch.autograd.grad(exact, exact_levels, upstream.double())
    roundings = 1 if value.dim() == 0 and options.get("weight") is None else 2
    for level, grad, other in zip(levels, grads, expected, strict=True):
        assert grad.dtype == level.dtype and grad.stride() == level.stride()
        half = torch.finfo(level.dtype).eps if level.dtype in DTYPES[:2] else 0
        smallest = torch.finfo(level.dtype).smallest_normal * torch.finfo(level.dtype).eps
        torch.testing.assert_close(grad.double(), other, rtol=roundings * half + 512 * unit, atol=64 * unit + smallest)  # fmt: skip
    return value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", KINDS)
def test_dense(loss, dtype, layout, device):
    arguments = head(device, dtype, layout)
    weights = (10.0, 10.0, 5.0, 5.0) if layout == "mixed" else (1.0, 1.0, 1.0, 1.0)
    check_dense(*arguments, loss=loss, weights=weights, beta=0.3)
    normalizer = torch.tensor([3.0, 0.5], device=device)
    check_dense(*arguments, loss=loss, normalizer=normalizer)


@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_dense_is_torchvisions(loss, device):
    """RetinaNet's box loss: of each image the sum over its foreground, by their number; then the mean."""
    levels, anchors, gt_boxes, matches = head(device, layout="mixed")
    number = (matches >= 0).sum(1)
    value = dense_box_loss(levels, anchors, list(gt_boxes), matches, loss=loss, normalizer=number)
    rows = [x.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]
    expected = []
    for i, x in enumerate(torch.cat(rows, 1)):
        foreground = torch.where(matches[i] >= 0)[0]
        box_loss = torchvision.models.detection._utils._box_loss(
            loss,
            torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0)),
            anchors[foreground],
            gt_boxes[i][matches[i, foreground]],
            x[foreground],
        )
        expected.append(box_loss / max(1, len(foreground)))
    torch.testing.assert_close(value, sum(expected))
    for grad, other in zip(torch.autograd.grad(value, levels), torch.autograd.grad(sum(expected), levels), strict=True):  # fmt: skip
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_dense_normalizers_and_settings(device):
    arguments = head(device)
    for options in (
        {"normalizer": 7},
        {"normalizer": torch.tensor(7, device=device)},
        {"normalizer": torch.tensor([0.0, 7], device=device), "min_normalizer": 3},
        {"loss": "smooth_l1", "beta": 0.0},
        {"loss": "ciou", "eps": 0.1, "clip": 0.2},
    ):
        check_dense(*arguments, **options)


def test_dense_other_memory(device):
    """Strided levels are copied; one off a 16-byte boundary is read where it lies."""
    levels, anchors, gt_boxes, matches = head(device, sizes=((6, 8),))
    level = levels[0].detach()
    expected = dense_box_loss([level], anchors, gt_boxes, matches)
    wide = torch.cat((level, level), dim=3)[..., :8].requires_grad_()
    (grad,) = torch.autograd.grad(dense_box_loss([wide], anchors, gt_boxes, matches), wide)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        like = level.to(memory_format=memory_format)
        flat = torch.empty(level.numel() + 1, device=device)[1:]
        shifted = flat.as_strided(like.shape, like.stride()).copy_(like).requires_grad_()
        value = dense_box_loss([shifted], anchors, gt_boxes, matches)
        torch.testing.assert_close(value.detach(), expected)
        assert torch.equal(torch.autograd.grad(value, shifted)[0], grad)


def test_dense_nothing(device):
    levels, anchors, gt_boxes, matches = head(device, sizes=((2, 3), (0, 4)))
    nothing = torch.full_like(matches, -1)
    for boxes in (gt_boxes, gt_boxes[:, :0]):
        value = dense_box_loss(levels, anchors, boxes, nothing, normalizer=(nothing >= 0).sum())
        grads = torch.autograd.grad(value, levels)
        assert value == 0 and all((grad == 0).all() for grad in grads)
    for shape in ((2, 12, 0, 4), (0, 12, 2, 2)):
        level = torch.zeros(shape, device=device, requires_grad=True)
        rows = 3 * shape[2] * shape[3]
        empty = anchors.new_zeros(rows, 4), gt_boxes.new_zeros(shape[0], 4, 4)
        value = dense_box_loss([level], *empty, matches.new_zeros(shape[0], rows))
        assert value == 0 and torch.autograd.grad(value, level)[0].shape == shape


def test_dense_backward_again_and_checkpointing(device):
    levels, *rest = head(device, torch.float16)
    normalizer = torch.tensor([1e5, 3e5], device=device)
    value = dense_box_loss(levels, *rest, normalizer=normalizer)
    runs = [torch.autograd.grad(value * 2.0**16, levels, retain_graph=i < 2) for i in range(3)]
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert any((grad != 0).any() for grad in runs[0])  # they survive a large normalizer
    levels, *rest = head(device)
    with torch.no_grad():
        assert not dense_box_loss(levels, *rest).requires_grad


@pytest.mark.parametrize("loss", KINDS[:5])  # the weight of the last is not differentiated
def test_dense_gradcheck(loss, device):
    levels, anchors, gt_boxes, matches = head(device, torch.float64, sizes=((2, 1),))
    matches[:, :4] = torch.arange(4, device=device)

    def f(*levels):
        return dense_box_loss(levels, anchors, gt_boxes, matches, loss=loss, normalizer=3)

    assert torch.autograd.gradcheck(f, levels)
    assert torch.autograd.gradgradcheck(f, levels)


def test_dense_two_runs_give_the_same_bits(device):
    levels, *rest = head(device, layout="mixed", sizes=((33, 40), (5, 7)))
    runs, before = [], torch.get_num_threads()
    for threads in (1, before):
        torch.set_num_threads(threads)
        value = dense_box_loss(levels, *rest, loss="giou")
        runs.append((value.detach(), *torch.autograd.grad(value, levels)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_match_that_is_none(backend, device):
    levels, anchors, gt_boxes, matches = head(device, sizes=((3, 5),))
    matches[1, 7] = 4
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="matches must be less than the number of boxes, 4, got 4"):  # fmt: skip
            dense_box_loss(levels, anchors, gt_boxes, matches)
    else:
        value = dense_box_loss(levels, anchors, gt_boxes, matches)
        (grad,) = torch.autograd.grad(value, levels)
        assert value.isnan() and grad.isnan().sum() == 4


def test_dense_errors(device):
    levels, anchors, gt_boxes, matches = head(device, sizes=((3, 5), (2, 2)))
    x, y = levels
    good = {"anchors": anchors, "gt_boxes": gt_boxes, "matches": matches}
    cases = [
        ([], {}, "deltas must be 1 to 8 levels, got 0"),
        ([x.long(), y], {}, r"deltas\[0\] must be float16, bfloat16, float32 or float64, got torch.int64"),
        ([x, y.double()], {}, r"deltas\[1\] must be torch.float32 like deltas\[0\], got torch.float64"),
        ([x, y[:, 1:]], {}, r"deltas\[1\] must have shape \(B, A \* 4, H, W\), .* got \(2, 11, 2, 2\)"),
        ([x, y], {"anchors": anchors[1:]}, r"anchors must have shape \(57, 4\), .* got \(56, 4\)"),
        ([x, y], {"anchors": anchors > 0}, "anchors must be float32 .* got torch.bool"),
        ([x, y], {"gt_boxes": gt_boxes[:1]}, r"gt_boxes must be a list of 2 .* got \(1, 4, 4\)"),
        ([x, y], {"matches": matches.int()}, r"matches must be torch.int64 of shape \(2, 57\), got torch.int32"),
        ([x, y], {"weights": (1, 1)}, "weights must be 4 numbers, got 2"),
        ([x, y], {"beta": -1}, "beta must be >= 0, got -1"),
        ([x, y], {"normalizer": torch.ones(3, device=device)}, r"normalizer must be .* of shape \(2,\), got .* \(3,\)"),
    ]  # fmt: skip
    for deltas, options, sentence in cases:
        with pytest.raises(RuntimeError, match=f"dense_box_loss: {sentence}"):
            dense_box_loss(deltas, **{**good, **options})
        if deltas:
            meta = {
                k: v.to("meta") if isinstance(v, Tensor) else v
                for k, v in {**good, **options}.items()
            }
            with pytest.raises(RuntimeError, match=f"dense_box_loss: {sentence}"):
                dense_box_loss([level.to("meta") for level in deltas], **meta)
    with pytest.raises(ValueError, match=r"loss must be one of 'l1', .* got 'l2'"):
        dense_box_loss(levels, **good, loss="l2")
    with pytest.raises(ValueError, match="gt_boxes must not require grad"):
        dense_box_loss(levels, anchors, gt_boxes.requires_grad_(), matches)


def test_dense_opcheck_and_compiler(device):
    levels, *rest = head(device, sizes=((3, 5), (2, 2)))
    op = torch.ops.focalops.dense_box_loss.default
    for compute_grad, normalizer in (
        (True, None),
        (False, torch.tensor([2.0, 3.0], device=device)),
    ):
        settings = ([1.0] * 4, 4.0, 1.0, 1e-7)
        torch.library.opcheck(op, (levels, *rest, 3, *settings, normalizer, 1.0, compute_grad))

    def f(levels, normalizer):
        return (
            dense_box_loss([x * 2 for x in levels], *rest, loss="giou", normalizer=normalizer) * 3
        )

    normalizer = torch.tensor([2.0, 3.0], device=device)
    compiled = torch.compile(f, fullgraph=True)(levels, normalizer)
    eager = f(levels, normalizer)
    torch.testing.assert_close(compiled, eager)
    grads, expected = torch.autograd.grad(compiled, levels), torch.autograd.grad(eager, levels)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


# ---- dense_box_loss of single anchors, weights, matched_iou --------------------------------------


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", KINDS)
def test_losses_of_anchors(loss, dtype, layout, device):
    arguments = head(device, dtype, layout)
    matches = arguments[-1]
    options = {"loss": loss, "beta": 0.3, "weights": (10.0, 10.0, 5.0, 5.0)}
    losses = check_dense(*arguments, reduction="none", **options)
    assert losses.shape == matches.shape and (losses[matches < 0] == 0).all()
    assert (losses[matches >= 0] > 0).all()
    weight = torch.rand(matches.shape, device=device)
    check_dense(*arguments, reduction="none", weight=weight, **options)
    normalizer = torch.tensor([3.0, 0.5], device=device)
    check_dense(*arguments, weight=weight, normalizer=normalizer, min_normalizer=2.0, **options)


@pytest.mark.parametrize("loss", KINDS)
def test_they_sum_up_to_the_sum(loss, device):
    """An addition an anchor in float64: what is rounded is the result."""
    arguments = head(device, layout="mixed")
    ones = torch.ones(arguments[-1].shape, device=device)
    for normalizer in (None, 3, torch.tensor([3.0, 0.5], device=device)):
        options = {"loss": loss, "normalizer": normalizer}
        value = dense_box_loss(*arguments, **options)
        expected = torch.autograd.grad(value, arguments[0])
        for extra in ({"weight": ones}, {"weight": ones.long()}, {"return_iou": True}):
            other = dense_box_loss(*arguments, **options, **extra)
            other = other[0] if "return_iou" in extra else other
            # The CUDA kernel adds up the few losses of a thread in float32.
            torch.testing.assert_close(other, value, rtol=4e-7, atol=0)
            torch.testing.assert_close(torch.autograd.grad(other, arguments[0]), expected, rtol=4e-7, atol=1e-9)  # fmt: skip
    losses = dense_box_loss(*arguments, loss=loss, reduction="none")
    torch.testing.assert_close(losses.double().sum().float(), dense_box_loss(*arguments, loss=loss), rtol=4e-7, atol=0)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iou_is_that_of_the_decoded_boxes(dtype, layout, device):
    levels, anchors, gt_boxes, matches = head(device, dtype, layout)
    options = {"weights": (10.0, 10.0, 5.0, 5.0), "clip": 0.02}
    rows = torch.cat([x.detach().unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], 1)  # fmt: skip
    expected = torch.zeros(matches.shape, dtype=anchors.dtype, device=device)
    for image in range(2):
        decoded = decode_boxes(rows[image], anchors, **options)
        overlaps = box_iou(decoded, gt_boxes[image])
        foreground = matches[image] >= 0
        of_match = overlaps.gather(1, matches[image].clamp(min=0)[:, None])[:, 0]
        expected[image] = torch.where(foreground, of_match, 0)
    assert (expected > 0).any()
    iou = matched_iou(levels, anchors, gt_boxes, matches, **options)
    assert torch.equal(iou, expected) and not iou.requires_grad
    assert torch.equal(matched_iou(levels, anchors, list(gt_boxes), matches, **options), iou)
    for loss in KINDS:
        for reduction in ("none", "sum"):
            value, of_loss = dense_box_loss(
                levels,
                anchors,
                gt_boxes,
                matches,
                loss=loss,
                reduction=reduction,
                return_iou=True,
                **options,
            )
            assert torch.equal(of_loss, iou)
            assert value.requires_grad and not of_loss.requires_grad
    other = reference.matched_iou(levels, anchors, gt_boxes, matches, **options)
    torch.testing.assert_close(iou, other, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_weight_is_the_loss(device):
    levels, *rest = head(device, layout="mixed")
    matches = rest[-1]
    (weight,) = leaves(torch.rand(matches.shape, device=device))
    losses = dense_box_loss(levels, *rest, loss="giou", reduction="none").detach()
    upstream = torch.rand_like(losses)
    weighted = dense_box_loss(levels, *rest, loss="giou", reduction="none", weight=weight)
    assert torch.equal(weighted, losses * weight)
    assert torch.equal(torch.autograd.grad(weighted, weight, upstream)[0], upstream * losses)
    constants = [level.detach() for level in levels]
    for deltas in (levels, constants):
        number = torch.tensor([2.0, 3.0], device=device)
        value = dense_box_loss(deltas, *rest, loss="giou", weight=weight, normalizer=number)
        (grad,) = torch.autograd.grad(value, weight)
        torch.testing.assert_close(grad, losses / number[:, None])


def test_weights_that_scores_move(device):
    """CARL (Cao et al., 2019): weights of the probabilities, normalised to keep the sum of one, beside the plain loss."""
    levels, anchors, gt_boxes, matches = head(device)
    foreground = matches >= 0
    (logits,) = leaves(torch.randn(matches.shape, device=device))

    def carl(function, deltas, dtype):
        c = 0.2 + 0.8 * torch.sigmoid(logits.to(dtype))
        weight = c * foreground.sum() / c[foreground].sum()
        boxes = anchors.to(dtype), gt_boxes.to(dtype), matches
        return function(deltas, *boxes, loss="smooth_l1", weight=weight, normalizer=foreground.sum())  # fmt: skip

    value = carl(dense_box_loss, levels, torch.float32)
    exact_levels = leaves(*(level.double() for level in levels))
    exact = carl(reference.dense_box_loss, exact_levels, torch.float64)
    torch.testing.assert_close(value, exact.float())
    grads = torch.autograd.grad(value, [logits, *levels])
    expected = torch.autograd.grad(exact, [logits, *exact_levels])
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other.float())
    assert (grads[0] != 0).sum() == foreground.sum()


def test_weights_of_nothing(device):
    """What has no loss has none with any weight; a weight of 0 multiplies like other numbers, as in dense_focal_loss."""
    levels, anchors, gt_boxes, matches = head(device, sizes=((3, 5),))
    matches[:] = -1
    matches[0, :3] = 0
    (weight,) = leaves(torch.ones(matches.shape, device=device).masked_fill(matches < 0, math.nan))
    value = dense_box_loss(levels, anchors, gt_boxes, matches, weight=weight)
    assert torch.equal(value, dense_box_loss(levels, anchors, gt_boxes, matches, weight=torch.ones_like(weight)))  # fmt: skip
    grad, of_level = torch.autograd.grad(value, [weight, levels[0]])
    assert grad.isfinite().all() and (grad[matches < 0] == 0).all() and of_level.isfinite().all()
    none = torch.zeros_like(weight)
    value = dense_box_loss(levels, anchors, gt_boxes, matches, weight=none)
    (of_level,) = torch.autograd.grad(value, levels[0])
    assert value == 0 and (of_level == 0).all()


def test_losses_of_anchors_of_other_memory(device):
    """Strided levels are copied; matches, weights and upstream gradients may lie anyhow."""
    levels, anchors, gt_boxes, matches = head(device, sizes=((6, 8),))
    level = levels[0].detach()
    weight = torch.rand(matches.shape, device=device)
    losses = dense_box_loss(levels, anchors, gt_boxes, matches, reduction="none", weight=weight)
    upstream = torch.rand_like(losses)
    (expected,) = torch.autograd.grad(losses, levels[0], upstream)
    wide = torch.cat((level, level), dim=3)[..., :8].requires_grad_()
    transposed = [t.T.contiguous().T for t in (matches, weight, upstream)]
    other = dense_box_loss([wide], anchors, gt_boxes, transposed[0], reduction="none", weight=transposed[1])  # fmt: skip
    assert torch.equal(other, losses)
    assert torch.equal(torch.autograd.grad(other, wide, transposed[2])[0], expected)
    losses = dense_box_loss(levels, anchors, gt_boxes, matches, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), levels[0], retain_graph=True)
    one = torch.ones((), device=device).expand(losses.shape)
    assert torch.equal(torch.autograd.grad(losses, levels[0], one)[0], expected)


def test_losses_of_no_anchors(device):
    levels, anchors, gt_boxes, matches = head(device, sizes=((2, 3), (0, 4)))
    nothing = torch.full_like(matches, -1)
    options = {"reduction": "none", "return_iou": True}
    for boxes in (gt_boxes, gt_boxes[:, :0], [gt_boxes[0], gt_boxes[1, :0]]):
        losses, iou = dense_box_loss(levels, anchors, boxes, nothing, **options)
        grads = torch.autograd.grad(losses, levels, torch.ones_like(losses))
        assert all((t == 0).all() for t in (losses, iou, *grads))
    for shape in ((2, 12, 0, 4), (0, 12, 2, 2)):
        level = torch.zeros(shape, device=device, requires_grad=True)
        empty = anchors.new_zeros(3 * shape[2] * shape[3], 4), gt_boxes.new_zeros(shape[0], 4, 4)
        none = matches.new_zeros(shape[0], 3 * shape[2] * shape[3])
        losses, iou = dense_box_loss([level], *empty, none, **options)
        assert losses.shape == iou.shape == none.shape
        assert torch.autograd.grad(losses.sum(), level)[0].shape == shape
        weight = torch.zeros(none.shape, device=device, requires_grad=True)
        value = dense_box_loss([level], *empty, none, weight=weight, normalizer=torch.zeros(shape[0], device=device))  # fmt: skip
        assert value == 0 and torch.autograd.grad(value, weight)[0].shape == none.shape
        assert matched_iou([level], *empty, none).shape == none.shape


@pytest.mark.parametrize("loss", KINDS[:5])  # the weight of the last is not differentiated
def test_losses_of_anchors_gradcheck(loss, device):
    levels, anchors, gt_boxes, matches = head(device, torch.float64, sizes=((2, 1),))
    matches[:, :4] = torch.arange(4, device=device)
    (weight,) = leaves(torch.rand(matches.shape, dtype=torch.float64, device=device) + 0.5)

    def f(weight, *levels, reduction="none"):
        return dense_box_loss(levels, anchors, gt_boxes, matches, loss=loss, weight=weight, reduction=reduction)  # fmt: skip

    assert torch.autograd.gradcheck(f, (weight, *levels))
    assert torch.autograd.gradgradcheck(f, (weight, *levels))
    assert torch.autograd.gradcheck(lambda *x: f(*x, reduction="sum"), (weight, *levels))


def test_losses_of_anchors_backward_again(device):
    levels, *rest = head(device, torch.float16)
    losses = dense_box_loss(levels, *rest, reduction="none")
    upstream = torch.rand_like(losses)
    runs = [torch.autograd.grad(losses, levels, upstream, retain_graph=i < 2) for i in range(3)]
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with torch.no_grad():
        assert not dense_box_loss(levels, *rest, reduction="none").requires_grad
    # A gradient survives a normalizer that would make it 0 in float16.
    weight = torch.ones_like(upstream)
    value = dense_box_loss(levels, *rest, weight=weight, normalizer=1e6)
    assert any((grad != 0).any() for grad in torch.autograd.grad(value * 2.0**16, levels))


def test_losses_of_anchors_two_runs_give_the_same_bits(device):
    levels, *rest = head(device, layout="mixed", sizes=((33, 40), (5, 7)))
    (weight,) = leaves(torch.rand(rest[-1].shape, device=device))
    upstream = torch.rand(rest[-1].shape, device=device)
    runs, before = [], torch.get_num_threads()
    for threads in (1, before):
        torch.set_num_threads(threads)
        losses, iou = dense_box_loss(levels, *rest, loss="giou", reduction="none", return_iou=True)
        value = dense_box_loss(levels, *rest, loss="giou", weight=weight)
        grads = torch.autograd.grad(losses, levels, upstream)
        of_sum = torch.autograd.grad(value, [weight, *levels])
        runs.append((losses.detach(), iou, value.detach(), *grads, *of_sum))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_match_that_is_none_of_one_anchor(layout, backend, device):
    levels, anchors, gt_boxes, matches = head(device, layout=layout, sizes=((3, 5),))
    matches[1, 7] = 4
    arguments = levels, anchors, gt_boxes, matches
    if backend == "cpu":
        sentence = "matches must be less than the number of boxes, 4, got 4"
        with pytest.raises(RuntimeError, match=f"dense_box_loss: {sentence}"):
            dense_box_loss(*arguments, reduction="none")
        with pytest.raises(RuntimeError, match=f"matched_iou: {sentence}"):
            matched_iou(*arguments)
    else:
        losses, iou = dense_box_loss(*arguments, reduction="none", return_iou=True)
        (grad,) = torch.autograd.grad(losses, levels, torch.ones_like(losses))
        of_anchor = torch.zeros(matches.shape, dtype=torch.bool, device=device)
        of_anchor[1, 7] = True
        assert torch.equal(losses.isnan(), of_anchor) and torch.equal(iou.isnan(), of_anchor)
        assert grad.isnan().sum() == 4


def test_errors_of_reductions_and_weights(device):
    levels, *rest = head(device, sizes=((3, 5), (2, 2)))
    weight = torch.ones(rest[-1].shape, device=device)
    cases = [
        ({"reduction": "mean"}, ValueError, "reduction must be 'none' or 'sum', got 'mean'"),
        ({"reduction": "none", "normalizer": 2}, ValueError, "normalizer must be None unless reduction is 'sum', got reduction 'none'"),
        ({"weight": weight[:1]}, ValueError, "dense_box_loss: weight must have the shape of matches, (2, 57), and be float32 (float64 for float64 deltas), got (1, 57) and torch.float32"),
        ({"weight": weight, "normalizer": torch.ones(3, device=device)}, ValueError, "dense_box_loss: normalizer must be a number, a 0-d tensor or a tensor of shape (2,), got a tensor of shape (3,)"),
        ({"weight": 1.0}, TypeError, "weight must be a Tensor, got float"),
        ({"return_iou": 1}, TypeError, "return_iou must be True or False, got int"),
    ]  # fmt: skip
    for options, kind, sentence in cases:
        for where in (device, "meta"):
            moved = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in options.items()}
            with pytest.raises(kind) as raised:
                dense_box_loss([x.to(where) for x in levels], *(t.to(where) for t in rest), **moved)
            assert str(raised.value) == sentence
    with pytest.raises(RuntimeError, match=r"matched_iou: matches must be torch.int64 of shape \(2, 57\)"):  # fmt: skip
        matched_iou(levels, *rest[:2], rest[2][:1])


def test_ops_of_single_anchors(device):
    levels, *rest = head(device, sizes=((3, 5), (2, 2)))
    op = torch.ops.focalops.dense_box_losses.default
    constants = [level.detach() for level in levels]
    settings = ([1.0] * 4, 4.0, 1.0, 1e-7)
    for wanted in ((True, True), (True, False)):
        torch.library.opcheck(op, (levels, *rest, 3, *settings, *wanted))
    torch.library.opcheck(op, (constants, *rest, -1, *settings, False, True))
    losses, iou, grads = op(constants, *rest, 0, *settings, False, False)
    assert losses.shape == (2, 57) and iou.shape == (0,) and grads == []
    losses, iou, grads = op(constants, *rest, -1, *settings, False, True)
    assert losses.shape == (0,) and iou.shape == (2, 57) and grads == []
    for loss, sentence in ((6, r"lie in \[-1, 5\], got 6"), (-2, r"lie in \[-1, 5\], got -2")):
        for where in (constants, [level.to("meta") for level in constants]):
            others = [t.to(where[0].device) for t in rest]
            with pytest.raises(RuntimeError, match=f"dense_box_loss: loss must {sentence}"):
                op(where, *others, loss, *settings, False, False)
    with pytest.raises(RuntimeError, match=r"dense_box_loss: loss must lie in \[0, 5\], got -1"):
        torch.ops.focalops.dense_box_loss(constants, *rest, -1, *settings, None, 1.0, False)


def test_losses_of_anchors_under_transforms(device):
    levels, *rest = head(device, sizes=((3, 5), (2, 2)))
    (weight,) = leaves(torch.rand(rest[-1].shape, device=device))
    normalizer = torch.tensor([2.0, 3.0], device=device)

    def f(weight, *levels):
        deltas = [x * 2 for x in levels]
        losses, iou = dense_box_loss(
            deltas, *rest, loss="giou", reduction="none", weight=weight.sigmoid(), return_iou=True
        )
        value = dense_box_loss(deltas, *rest, weight=weight, normalizer=normalizer)
        return losses.sum() * 3 + value, iou, matched_iou(deltas, *rest)

    def with_gradients(f):
        value, *ious = f(weight, *levels)
        return value, *ious, *torch.autograd.grad(value, [weight, *levels])

    eager = with_gradients(f)
    torch.testing.assert_close(with_gradients(torch.compile(f, fullgraph=True)), eager)
    checkpointed = with_gradients(lambda *x: checkpoint(f, *x, use_reentrant=False))
    torch.testing.assert_close(checkpointed, eager, rtol=0, atol=0)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(with_gradients(f), eager, rtol=0, atol=0)
    stacked = [torch.stack((t, 2 * t)).detach() for t in (weight, *levels)]
    together = torch.vmap(f)(*stacked)
    torch.testing.assert_close(tuple(t[0] for t in together), tuple(t.detach() for t in eager[:3]))


# ---- the compiler, errors -----------------------------------------------------------------------


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


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'x'"):
        box_iou_loss(torch.zeros(1, 4), torch.zeros(1, 4), "x")
