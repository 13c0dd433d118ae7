"""A loss that needs no gradient has kernels of its own on CUDA: in every dtype they give what those give that write one.

The loss is the same to some last bits: nvcc may contract a product and a sum in one kernel and not in the other.
"""

import pytest
import torch

from focalops import (
    dense_box_loss,
    dense_focal_loss,
    dense_quality_loss,
    ia_bce_loss,
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    soft_focal_loss,
    softmax_focal_loss,
    varifocal_loss,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS, CLASSES = 37, 7
OF_ROWS = {
    "focal": lambda x, t, s, gamma: sigmoid_focal_loss(x, t, gamma=gamma, reduction="sum"),
    "weighted": lambda x, t, s, gamma: sigmoid_focal_loss(
        x, t, gamma=gamma, reduction="sum", weight=s
    ),
    "smoothed": lambda x, t, s, gamma: sigmoid_focal_loss(
        x, t, gamma=gamma, reduction="sum", label_smoothing=0.1
    ),
    "dense targets": lambda x, t, s, gamma: sigmoid_focal_loss(
        x, s[:, None].expand(x.shape).to(x.dtype), gamma=gamma, reduction="sum"
    ),
    "float32 targets": lambda x, t, s, gamma: sigmoid_focal_loss(
        x, s[:, None].expand(x.shape), gamma=gamma, reduction="sum"
    ),
    "star": lambda x, t, s, gamma: sigmoid_focal_loss_star(x, t, gamma=gamma, reduction="sum"),
    "star, dense targets": lambda x, t, s, gamma: sigmoid_focal_loss_star(
        x, s[:, None].expand(x.shape).to(x.dtype), gamma=gamma, reduction="sum"
    ),
    "star, float32 targets": lambda x, t, s, gamma: sigmoid_focal_loss_star(
        x, s[:, None].expand(x.shape), gamma=gamma, reduction="sum"
    ),
    "softmax": lambda x, t, s, gamma: softmax_focal_loss(
        x, t.clamp(max=CLASSES - 1), gamma=gamma, reduction="sum"
    ),
    "quality": lambda x, t, s, gamma: quality_focal_loss(x, (t, s), beta=gamma, reduction="sum"),
    "varifocal": lambda x, t, s, gamma: varifocal_loss(x, (t, s), gamma=gamma, reduction="sum"),
    "varifocal, detached": lambda x, t, s, gamma: varifocal_loss(
        x, (t, s), gamma=gamma, reduction="sum", detach_weight=True
    ),
    "matchability": lambda x, t, s, gamma: matchability_aware_loss(
        x, (t, s), gamma=gamma, reduction="sum"
    ),
    "ia_bce": lambda x, t, s, gamma: ia_bce_loss(x, (t, s), gamma=gamma, reduction="sum"),
    "soft": lambda x, t, s, gamma: soft_focal_loss(x, (t, s), gamma=gamma, reduction="sum"),
}
GAMMA_OF = {"quality_focal_loss": "beta"}  # the others call it gamma


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OF_ROWS)
def test_rows(name, dtype, gamma, device):
    logits = (torch.randn(ROWS, CLASSES) * 3).to(device, dtype)
    labels = torch.randint(0, CLASSES + 1, (ROWS,), device=device)
    scores = torch.rand(ROWS, device=device)
    if dtype == torch.float64:
        scores = scores.double()
    check(lambda x: OF_ROWS[name](x, labels, scores, gamma), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_of_rows_of_whole_vectors(dtype, device):
    logits = (torch.randn(ROWS, 16) * 3).to(device, dtype)
    labels = torch.randint(0, 16, (ROWS,), device=device)
    check(lambda x: softmax_focal_loss(x, labels, reduction="sum"), logits)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("loss", [sigmoid_focal_loss, sigmoid_focal_loss_star])
def test_losses_of_logits(loss, wide, dtype, gamma, device):
    """And their gradient is that of the sum, which is rounded once as well."""
    logits = (torch.randn(ROWS, CLASSES) * 3).to(device, dtype)
    targets = torch.rand(ROWS, CLASSES, device=device).to(torch.float32 if wide else dtype)
    check(lambda x: loss(x, targets, gamma=gamma, reduction="none"), logits)
    x = logits.requires_grad_()
    grads = [
        torch.autograd.grad(loss(x, targets, gamma=gamma, reduction=reduction).sum(), x)[0]
        for reduction in ("none", "sum")
    ]
    torch.testing.assert_close(*grads, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", ["none", "weight", "smoothed", "anchors", "anchors, weight", "anchors, smoothed"]
)
def test_focal_loss_of_a_head(options, dtype, gamma, device):
    logits = (torch.randn(2, 3 * CLASSES, 4, 5) * 3).to(device, dtype)
    labels = torch.randint(0, CLASSES + 1, (2, 60), device=device)
    weight = torch.rand(2, 60, device=device).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    keywords = {
        "none": {},
        "weight": {"weight": weight},
        "smoothed": {"label_smoothing": 0.1},
        "anchors": {"reduction": "none"},
        "anchors, weight": {"reduction": "none", "weight": weight},
        "anchors, smoothed": {"reduction": "none", "label_smoothing": 0.1},
    }[options]
    check(lambda x: dense_focal_loss([x], labels, gamma=gamma, **keywords), logits)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "loss",
    ["quality_focal_loss", "varifocal_loss", "varifocal_loss, detached", "soft_focal_loss", "matchability_aware_loss", "ia_bce_loss"],
)  # fmt: skip
def test_quality_loss_of_a_head(loss, dtype, gamma, device):
    logits = (torch.randn(2, 3 * CLASSES, 4, 5) * 3).to(device, dtype)
    labels = torch.randint(0, CLASSES + 1, (2, 60), device=device)
    scores = torch.rand(2, 60, device=device)
    loss, _, detached = loss.partition(", ")
    parameters = {GAMMA_OF.get(loss, "gamma"): gamma}
    if detached:
        parameters["detach_weight"] = True
    check(lambda x: dense_quality_loss([x], labels, scores, loss, **parameters), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["iou", "giou", "diou", "ciou"])
def test_distances_of_a_head(loss, dtype, device):
    distances = torch.rand(1, 4, 4, 5).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    points = torch.rand(20, 2, device=device, dtype=wide) * 64
    boxes = [torch.tensor([[4.0, 4, 60, 60]], device=device, dtype=wide)]
    matches = torch.zeros(1, 20, device=device, dtype=torch.int64)

    def of(x):
        return dense_box_loss(
            [x], points, boxes, matches, loss=loss, coding="distance", strides=[8], reduction="none"
        )

    check(of, distances)


def check(loss, inputs) -> None:
    without = loss(inputs)
    assert not without.requires_grad
    of_both = loss(inputs.clone().requires_grad_())
    rtol = 4 * torch.finfo(without.dtype).eps
    torch.testing.assert_close(without, of_both.detach(), rtol=rtol, atol=0)
