"""The unified sample weighting network: its weights, its optimizer, its place in a run."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_fixtures import Killed
from test_models_retinanet import TINY
from test_models_train import assert_same
from test_models_weighting import leaves, loss_step, scene
from tiny_backbone import TINY_RECIPE
from torch import Tensor, nn

from models.checkpoint import load_checkpoint
from models.data import CocoDataset
from models.detectors import create
from models.losses import LossStep
from models.losses.unified import LIMIT, WeightingNetwork
from models.optimization import build_optimizers
from models.recipes import Recipe, with_model
from models.train import train

pytest_plugins = ["models_runs"]

KINDS = ["unified", "unified_mean"]
RECIPE = dataclasses.replace(with_model(TINY_RECIPE, weighting="unified"), clip_norm=1.0)


def constant(step: LossStep, m_class: float, m_box: float) -> Tensor:
    """Makes the network give these m for every anchor; returns what their gradients come to."""
    last = step.weighting_network.joined[-1]
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([m_class, m_box]))
    return last.bias


def trained(network: WeightingNetwork) -> WeightingNetwork:
    """Weights as of a network that has learned something: m differs from anchor to anchor."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return network


# ---- The weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", KINDS)
def test_m_of_0_is_the_plain_loss(weighting: str) -> None:
    outputs, anchors, targets = scene()
    step = loss_step(weighting)
    constant(step, 0, 0)
    losses = step(outputs, anchors, targets)
    plain = loss_step()(outputs, anchors, targets)
    assert losses.pop("weighting") == 0
    assert losses.keys() == plain.keys()
    for name, loss in plain.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-6, atol=1e-6)  # order of the sums
    # A new network is next to it.
    new = loss_step(weighting)(outputs, anchors, targets)
    assert abs(new.pop("weighting")) < 1e-6
    for name, loss in plain.items():
        torch.testing.assert_close(new[name], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", KINDS)
def test_the_best_m_is_the_logarithm_of_twice_the_loss(weighting: str) -> None:
    """Of e^-m L + m / 2; the gradient is 0 there and has the sign of m - log 2L beside it."""
    outputs, anchors, targets = scene()
    config = {"normalizer": "batch", "gamma": 5.0, "box_loss": "giou"}  # neither loss saturates m
    plain = loss_step(**config)(outputs, anchors, targets)
    # The sums over images are divided by what their positives are on average, as is the sum of their m / 2.
    best = [math.log(2 * loss.item()) for loss in plain.values()]
    assert all(abs(m) < LIMIT for m in best)
    for off in (-0.1, 0, 0.1):
        step = loss_step(weighting, **config)
        bias = constant(step, best[0] + off, best[1] + off)
        sum(step(outputs, anchors, targets).values()).backward()
        expected = (1 - math.exp(-off)) / 2
        torch.testing.assert_close(bias.grad, torch.full((2,), expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", KINDS)
def test_weights_lie_between_e_to_the_minus_2_and_e_to_the_2(weighting: str) -> None:
    outputs, anchors, targets = scene()
    plain = loss_step()(outputs, anchors, targets)
    for m in (-5.0, 5.0):
        step = loss_step(weighting)
        bias = constant(step, m, m)
        losses = step(outputs, anchors, targets)
        for name, loss in plain.items():
            torch.testing.assert_close(losses[name], loss * math.exp(-math.copysign(LIMIT, m)))
        sum(losses.values()).backward()
        assert (bias.grad == 0).all()


def known() -> tuple[Tensor, ...]:
    """IoU, probability, both losses and which are positive of (2, 3000) anchors, losses over all magnitudes."""
    is_positive = torch.rand(2, 3000) < 0.1
    ious, p = torch.rand(2, 2, 3000) * is_positive
    of_classes = 10 ** (torch.rand(2, 3000) * 8 - 7)
    of_classes[0, :9] = torch.tensor([0, 1e-9, 1e-6, 1e-3, 1, 20, 1e3, 1e4, 1e5])
    is_positive[0, :9] = False
    return ious, p, of_classes, torch.rand(2, 3000) * is_positive, is_positive


def test_the_table_is_the_network() -> None:
    """Positives exactly, negatives to what lines between the knots leave; so are the gradients of its parameters."""
    network = trained(WeightingNetwork())
    *features, is_positive = known()
    m = network.of_anchors(*features, is_positive)
    features[1] = torch.where(is_positive, features[1], 0)
    every = torch.stack([x.flatten().clamp(max=1e3) for x in features], dim=1)
    m_class, m_box = network(every).view(2, 3000, 2).unbind(dim=2)
    torch.testing.assert_close(m[0][is_positive], m_class[is_positive], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m[0], m_class, rtol=0, atol=0.03)  # of at most 2
    assert torch.equal(m[1] != 0, is_positive) and m[0].std() > 0.1
    torch.testing.assert_close(m[1][is_positive], m_box[is_positive], rtol=1e-6, atol=1e-6)
    factors = torch.rand(2, 3000)
    grads = [
        torch.autograd.grad((x * factors).sum(), [*network.parameters()], allow_unused=True)
        for x in (m[0], m_class)
    ]
    for tabulated, direct in zip(*grads, strict=True):
        torch.testing.assert_close(tabulated, direct, rtol=0.02, atol=0.02 * direct.abs().max())


def test_features_have_no_gradient() -> None:
    """The weights are functions of the losses that the network must not move by way of them."""
    outputs, anchors, targets = scene()
    step = loss_step("unified")
    trained(step.weighting_network)
    losses = step(outputs, anchors, targets)
    grads = torch.autograd.grad(losses["weighting"], leaves(outputs), allow_unused=True)
    assert all(grad is None for grad in grads)
    grads = torch.autograd.grad(losses["classification"], leaves(outputs), allow_unused=True)
    assert all(grad is not None for grad in grads[:2]) and grads[2:] == (None, None)


def test_positives_beyond_the_room_have_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.losses.unified.LEAST_ROWS", 7)
    network = WeightingNetwork()
    nn.init.constant_(network.joined[-1].bias, 1.0)
    *features, is_positive = known()
    network_rows = max(7, is_positive.numel() // 64)
    m_class, m_box = network.of_anchors(*features, is_positive)
    taken = is_positive.flatten().cumsum(0).view_as(is_positive) <= network_rows
    assert is_positive.sum() > network_rows
    torch.testing.assert_close(m_box, (is_positive & taken).float())
    torch.testing.assert_close(m_class, (~is_positive | taken).float())


def test_one_weight_for_all_class_losses() -> None:
    """The mean of m over the anchors that have a loss: those between the thresholds have none."""
    outputs, anchors, targets = scene()
    step, each = loss_step("unified_mean"), loss_step("unified")
    each.weighting_network = trained(step.weighting_network)
    losses, plain = (s(outputs, anchors, targets) for s in (step, loss_step()))
    matched = step.match(outputs, anchors, targets)
    seen: list[Tensor] = []
    of_anchors = WeightingNetwork.of_anchors

    def record(self: WeightingNetwork, *known: Tensor) -> tuple[Tensor, Tensor]:
        m = of_anchors(self, *known)
        seen.append(m[0])
        return m

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightingNetwork, "of_anchors", record)
        individual = each(outputs, anchors, targets)
    mean = seen[0][matched.classes != -100].mean()
    assert (matched.classes == -100).any()
    torch.testing.assert_close(losses["classification"], plain["classification"] * (-mean).exp())
    torch.testing.assert_close(losses["bbox_regression"], individual["bbox_regression"])
    assert not torch.allclose(losses["classification"], individual["classification"], rtol=1e-3)


# ---- Its training --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_its_parameters_have_an_optimizer_of_their_own(optimizer: str) -> None:
    recipe = Recipe(model=dataclasses.replace(TINY, weighting="unified"), optimizer=optimizer)  # type: ignore[arg-type]
    model = create(recipe.model)
    optimizers = build_optimizers(recipe, model)
    (group,) = optimizers["loss_optimizer"].param_groups
    assert type(optimizers["loss_optimizer"]) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)
    sets = [{*map(id, o.param_groups[0]["params"])} for o in optimizers.values()]
    assert sets[1] == {*map(id, model.loss_step.parameters())} and not sets[0] & sets[1]
    assert sets[0] | sets[1] == {id(p) for p in model.parameters() if p.requires_grad}
    assert [*build_optimizers(Recipe(model=TINY), create(TINY))] == ["optimizer"]


def test_the_gradient_of_the_network_does_not_count_where_gradients_are_clipped(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[int] = []
    original = nn.utils.clip_grad_norm_

    def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
        clipped.append(len(parameters))
        return original(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    train(dataclasses.replace(RECIPE, steps=1), data, tmp_path / "a.pt", pretrained=False)
    parameters = [p for p in create(TINY_RECIPE.model).parameters() if p.requires_grad]
    assert clipped == [len(parameters)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weighting", KINDS)
def test_a_killed_run_goes_on_to_the_same_bits(
    run, kill_after, tmp_path: Path, weighting: str, precision: str
) -> None:
    options = ("--weighting", weighting, "--precision", precision, "--clip-norm", "1")
    options += ("--resume", "--checkpoint-every", "1", "--log-every", "1")
    run(*options, folder="whole")
    kill_after(2)
    with pytest.raises(Killed):
        run(*options)
    kill_after(0)
    run(*options)
    whole, resumed = (
        load_checkpoint(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "run")
    )
    assert_same(resumed, whole)
    assert len(whole["loss_optimizer"]["state"]) == len([*WeightingNetwork().parameters()])
    bias = whole["model"]["loss_step.weighting_network.joined.2.bias"]
    assert (bias != 0).all()  # it has learned something
    assert (tmp_path / "whole" / "log.jsonl").read_text().count('"weighting"') == 4


RANK = """
import sys
from pathlib import Path

import torch
from test_models_unified import RECIPE

from models.data import CocoDataset
from models.distributed import gather, process_group, rank
from models.train import train

with process_group("cpu"):
    model = train(RECIPE, CocoDataset(sys.argv[1], "train"), Path(sys.argv[2]), pretrained=False)
    parts = gather([torch.cat([p.detach().flatten() for p in model.loss_step.parameters()])])
    if rank() == 0:
        assert torch.equal(*parts) and parts[0].any()
        print("the same")
"""


def test_several_processes_have_one_network(coco_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(coco_folder), str(tmp_path / "run.pt")]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("the same") == 1
