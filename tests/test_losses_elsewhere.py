"""The lines of docs/coming_from/ against the losses and gradients that the peers gave."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focalops import (
    dense_focal_loss,
    reference,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    softmax_focal_loss,
    varifocal_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
CLASSES = 4


def given(name: str, device: str) -> Tensor:
    return torch.tensor(GOLDEN[name], device=device)


def labels_on(device: str, ignored: int) -> Tensor:
    """0..K-1 a class, K background; what the other libraries do not ignore becomes `ignored`."""
    labels = given("labels", device)
    return torch.where(labels == -100, ignored, labels)


def their_labels(device: str) -> Tensor:
    """apex's and EfficientDet's: -1 is background, -2 ignored."""
    labels = given("labels", device)
    return torch.where(labels == CLASSES, -1, torch.where(labels == -100, -2, labels))


def effdet(x: Tensor, case: dict) -> Tensor:
    theirs = their_labels(x.device.type)
    ours = torch.where(theirs == -1, CLASSES, theirs)
    positives = (theirs >= 0).sum()
    # Two levels of 2 anchors: 4 and 2 positions.
    levels = [part.reshape(1, -1, 1, 2 * CLASSES).permute(0, 3, 1, 2) for part in (x[:8], x[8:])]
    return dense_focal_loss(
        levels, ours[None], normalizer=positives + 1, ignore_index=-2, **case["call"]
    )


def apex(x: Tensor, case: dict) -> Tensor:
    theirs = their_labels(x.device.type)
    ours = torch.where(theirs == -1, CLASSES, theirs)
    return sigmoid_focal_loss(
        x, ours, reduction="sum", normalizer=7, ignore_index=-2, **case["call"]
    )


def mmcv_sigmoid(x: Tensor, case: dict) -> Tensor:
    labels = labels_on(x.device.type, 0)
    weight = None
    if case["call"]["weight"]:  # of a row's class; theirs reads that of background out of bounds
        weight = torch.nn.functional.pad(given("class_weight", x.device.type), (0, 1), value=1)
        weight = weight[labels]
    return sigmoid_focal_loss(x, labels, 0.25, 2.0, "sum", weight=weight) / len(x)


def mmcv_softmax(x: Tensor, case: dict) -> Tensor:
    labels = labels_on(x.device.type, 0).clamp(max=CLASSES - 1)
    weight = given("class_weight", x.device.type) if case["call"]["weight"] else None
    return softmax_focal_loss(x, labels, 0.25, 2.0, "mean", class_weight=weight)


def fvcore(x: Tensor, case: dict) -> Tensor:
    return sigmoid_focal_loss(x, given("soft_targets", x.device.type), alpha=-1, **case["call"])


def fvcore_star(x: Tensor, case: dict) -> Tensor:
    options = {"alpha": -1, "gamma": 1} | case["call"]
    return sigmoid_focal_loss_star(x, given("soft_targets", x.device.type), **options)


def kornia_binary(x: Tensor, case: dict) -> Tensor:
    return sigmoid_focal_loss(x, labels_on(x.device.type, 0), **case["call"])


def kornia_binary_pos_weight(x: Tensor, case: dict) -> Tensor:
    labels = labels_on(x.device.type, 0)
    is_class = reference.one_hot(labels, CLASSES)
    factor = torch.where(is_class, given("class_weight", x.device.type), 1)
    return sigmoid_focal_loss(x, labels, **case["call"]) * factor


def kornia_focal(x: Tensor, case: dict) -> Tensor:
    """alpha is 1 - alpha for class 0, and "mean" divides by all elements, ignored or not."""
    labels = given("labels", x.device.type)
    labels = torch.where(labels == CLASSES, 0, labels)
    weight = None
    if "0.25" in case["name"]:
        weight = torch.tensor([0.75, *[0.25] * (CLASSES - 1)], device=x.device)
    loss = softmax_focal_loss(x, labels, -1, 2.0, "sum", class_weight=weight)
    return loss / x.numel() if case["call"]["reduction"] == "mean" else loss


def rt_detr(x: Tensor, case: dict) -> Tensor:
    labels = labels_on(x.device.type, CLASSES)
    targets = labels, given("scores", x.device.type)
    positives = (labels < CLASSES).sum()
    return varifocal_loss(
        x, targets, reduction="sum", normalizer=positives, detach_weight=True, **case["call"]
    )


LINES: dict[str, Callable[[Tensor, dict], Tensor]] = {
    "effdet": effdet,
    "apex": apex,
    "mmcv sigmoid": mmcv_sigmoid,
    "mmcv softmax": mmcv_softmax,
    "fvcore": fvcore,
    "fvcore star": fvcore_star,
    "kornia binary": kornia_binary,
    "kornia binary pos_weight": kornia_binary_pos_weight,
    "kornia focal": kornia_focal,
    "rtdetr": rt_detr,
}


def line_of(name: str) -> Callable[[Tensor, dict], Tensor]:
    return LINES[max((line for line in LINES if name.startswith(line)), key=len)]


@pytest.mark.parametrize("name", CASES)
def test_gives_their_loss_and_gradient(name, device):
    case = CASES[name]
    x = given("logits", device).requires_grad_()
    loss = line_of(name)(x, case)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    # Theirs are float32 too, and their 1 - p cancels: an error of an ulp of 1, over a loss or gradient of up to 1.
    options = {"rtol": 2e-5, "atol": 2e-7}
    expected = torch.tensor(case["loss"], device=device).reshape(loss.shape)
    torch.testing.assert_close(loss.detach(), expected, **options)
    torch.testing.assert_close(grad.flatten(), torch.tensor(case["grad"], device=device), **options)


def test_every_line_has_numbers():
    assert {line_of(name) for name in CASES} == set(LINES.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fvcore_computes_in_float32_and_returns_it(dtype, device):
    """So do we with inputs.float(); without it losses of "none" have the dtype of the logits."""
    x, targets = given("logits", device).to(dtype), given("soft_targets", device)
    losses = sigmoid_focal_loss(x.float(), targets, alpha=-1)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(sigmoid_focal_loss(x, targets, alpha=-1), losses.to(dtype))
