"""inplace_backward: the gradient over the logits, and where that is refused."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from focalops import dense_focal_loss, sigmoid_focal_loss

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rows(device, dtype=torch.float32, n=37, classes=13):
    x = (torch.randn(n, classes) * 4).to(device, dtype).requires_grad_()
    targets = torch.randint(0, classes + 1, (n,), device=device)
    targets[::7] = -100
    return x, targets


def head(device, dtype=torch.float32):
    """Two images, 3 anchors, 5 classes; both layouts, and planes that begin off a 16-byte boundary."""
    levels = [(torch.randn(2, 15, *size) * 4).to(device, dtype) for size in ((7, 11), (3, 5))]
    levels[0] = levels[0].contiguous(memory_format=torch.channels_last)
    labels = torch.randint(-1, 6, (2, 3 * 92), device=device)
    labels[labels < 0] = -100
    return [level.requires_grad_() for level in levels], labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"normalizer": 1e4}, {}], ids=str)
@pytest.mark.parametrize("kind", ["classes", "dense"])
def test_is_the_same_gradient_in_the_logits_memory(kind, options, dtype, device):
    x, targets = rows(device, dtype)
    if kind == "dense":
        targets = torch.rand_like(x).detach()
    options = {"reduction": "sum", **options}
    expected = sigmoid_focal_loss(x * 2, targets, **options)
    (expected_grad,) = torch.autograd.grad(expected * 8, x)
    logits = x * 2
    loss = sigmoid_focal_loss(logits, targets, **options, inplace_backward=True)
    assert torch.equal(loss, expected)
    over_logits, over_x = torch.autograd.grad(loss * 8, (logits, x))
    assert torch.equal(over_x, expected_grad)
    assert over_logits.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_levels(per_image, dtype, device):
    levels, labels = head(device, dtype)
    normalizer = torch.tensor([4.0, 1e4], device=device) if per_image else None
    expected = dense_focal_loss([level * 2 for level in levels], labels, normalizer=normalizer)
    expected_grads = torch.autograd.grad(expected * 8, levels)
    logits = [level * 2 for level in levels]
    loss = dense_focal_loss(logits, labels, normalizer=normalizer, inplace_backward=True)
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss * 8, [*logits, *levels])
    for level, over_level in zip(logits, grads, strict=False):
        assert over_level.data_ptr() == level.data_ptr()
    for grad, other in zip(grads[2:], expected_grads, strict=True):
        assert torch.equal(grad, other)


def test_starts_off_a_16_byte_boundary(device):
    """No op returns such memory that is not a view."""
    x, targets = rows(device)
    memory = torch.empty(x.numel() + 1, device=device)
    logits = torch.empty(0, device=device).set_(memory.untyped_storage(), 1, x.shape)
    logits.copy_(x.detach())
    arguments = (logits, targets, 0.25, 2.0, None, -100, None, 1.0)
    of_row = (logits, targets, None, "quality_focal_loss", [2.0], None, None, -100, None, 1.0)
    for op, given in (
        (torch.ops.focalops._sigmoid_focal_loss_sum_, arguments),
        (torch.ops.focalops._row_loss_sum_, of_row),
    ):
        with pytest.raises(RuntimeError, match="needs inputs to begin at a multiple of 16 bytes"):
            op(*given)


def test_whoever_saved_the_logits_is_told(device):
    """The version of the logits goes up, once in the forward and once in the backward."""
    x, targets = rows(device)
    logits = x * 2
    squared = logits.square().sum()  # saves the logits
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", inplace_backward=True)
    assert logits._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss + squared, x)
    logits = x * 2
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", inplace_backward=True)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)
    levels, labels = head(device)
    logits = [level * 2 for level in levels]
    squared = logits[1].square().sum()
    loss = dense_focal_loss(logits, labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss + squared, levels)


def test_kept_graphs_are_refused(device):
    x, targets = rows(device)
    levels, labels = head(device)
    for options in ({"retain_graph": True}, {"create_graph": True}):
        one = sigmoid_focal_loss(x * 2, targets, reduction="sum", inplace_backward=True)
        other = dense_focal_loss([level * 2 for level in levels], labels, inplace_backward=True)
        for loss in (one, other):
            with pytest.raises(RuntimeError, match="neither retain_graph nor create_graph"):
                torch.autograd.grad(loss, [x, *levels], allow_unused=True, **options)


def test_refusals(device):
    x, targets = rows(device)
    levels, labels = head(device)
    logits = x * 2

    def rows_of(inputs):
        return sigmoid_focal_loss(inputs, targets, reduction="sum", inplace_backward=True)

    def head_of(*cls_logits):
        return dense_focal_loss(cls_logits, labels, inplace_backward=True)

    first, second = (level * 2 for level in levels)
    cases = [
        (lambda: rows_of(x), "inputs to be computed by an op, and it is a leaf"),
        (lambda: rows_of(logits.view(-1, 13)), "inputs to not be a view"),
        (lambda: rows_of(x.t().mul(2).t()), "inputs to not be a view"),
        (lambda: rows_of(torch.ones(13, 37, device=device, requires_grad=True).t() * 2), "inputs to be contiguous, and it is not"),
        (lambda: torch.func.grad(lambda x: rows_of(x * 2))(x), "inputs to be a plain tensor"),
        (lambda: sigmoid_focal_loss(logits, targets, inplace_backward=True), "reduction 'sum' or 'mean', got 'none'"),
        (lambda: head_of(first, levels[1]), r"cls_logits\[1\] to be computed by an op"),
        (lambda: head_of(first, second.detach()), r"cls_logits\[1\] to require grad"),
        (lambda: head_of(first[:], second), r"cls_logits\[0\] to not be a view"),
        (lambda: dense_focal_loss([first] * 2, labels, inplace_backward=True), "different tensors for different levels"),
        (lambda: head_of(first, torch.ones(2, 15, 5, 3, device=device, requires_grad=True).mT * 2), r"cls_logits\[1\] to be contiguous or channels_last"),
    ]  # fmt: skip
    for call, sentence in cases:
        with pytest.raises((RuntimeError, ValueError), match=f"inplace_backward needs {sentence}"):
            call()
    with pytest.raises(Exception, match="inputs to be a plain tensor in eager mode"):
        torch.compile(lambda x: rows_of(x * 2), fullgraph=True, backend="eager")(x)


def test_without_a_gradient_nothing_is_overwritten(device):
    x, targets = rows(device)
    levels, labels = head(device)
    logits = x * 2
    for inputs in (logits.detach(), logits):
        before = inputs.clone()
        with torch.set_grad_enabled(not inputs.requires_grad):
            sigmoid_focal_loss(inputs, targets, reduction="sum", inplace_backward=True)
        assert torch.equal(inputs, before) and inputs._version == 0
    with torch.no_grad():
        before = [level.clone() for level in levels]
        dense_focal_loss(levels, labels, inplace_backward=True)
    assert all(torch.equal(a, b) for a, b in zip(levels, before, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    x, targets = rows(device)

    def f(x):
        return sigmoid_focal_loss(x * 2, targets, reduction="sum", inplace_backward=True)

    (expected,) = torch.autograd.grad(f(x), x)
    checkpoint(f, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, expected)


def test_a_loss_that_is_not_used_leaves_no_gradient(device):
    x, targets = rows(device)
    logits = x * 2
    unused = sigmoid_focal_loss(logits, targets, reduction="sum", inplace_backward=True)
    assert unused.requires_grad
    (x * 3).sum().backward()
    assert (x.grad == 3).all()


def test_other_consumers_of_the_logits_add_to_the_gradient(device):
    x, targets = rows(device)
    expected = sigmoid_focal_loss(x * 2, targets, reduction="sum") + (x * 2).sum()
    logits = x * 2
    total = logits.sum()
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", inplace_backward=True)
    torch.testing.assert_close(
        torch.autograd.grad(loss + total, x), torch.autograd.grad(expected, x)
    )


def test_opcheck(device):
    x, targets = rows(device)
    levels, labels = head(device)
    arguments = (x.detach().clone(), targets, 0.25, 2.0, None, -100, None, 1.0)
    torch.library.opcheck(torch.ops.focalops._sigmoid_focal_loss_sum_.default, arguments)
    options = (0.25, 2.0, 0.0, None, None, -100, None, 1.0)
    arguments = ([level.detach().clone() for level in levels], labels, *options)
    torch.library.opcheck(torch.ops.focalops._dense_focal_loss_.default, arguments)
