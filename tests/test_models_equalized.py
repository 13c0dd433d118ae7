"""EQLv2 and EFL: the papers' formulas, and the state that they keep from step to step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from models_fixtures import Killed, make_coco_folder
from test_models_retinanet import TINY
from test_models_train import assert_same
from test_models_weighting import scene
from torch import Tensor

from focalops import dense_focal_loss
from models.checkpoint import load_checkpoint, load_model
from models.data import open_data
from models.finetune import take_weights
from models.losses import LossStep
from models.recipes import Recipe
from models.retinanet import RetinaNet
from models.structures import HeadOutputs
from models.train import train

NAMES = ["eqlv2", "efl"]
K = TINY.num_classes


def loss_step(name: str, **config) -> LossStep:
    model = dataclasses.replace(TINY, classification_loss=name, **config)
    return LossStep(model, model, 8)


def expected(name: str, sums: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Gamma (K,) and weights (3, K) from the gradients so far, as the papers have them, number by number."""
    gammas, weights = [], []
    for own, others in sums.T.tolist():
        g = own / (others + 1e-10)
        if name == "eqlv2":
            r = 1 / (1 + math.exp(-12 * (g - 0.8)))
            gammas.append(gamma)
            weights.append((1 + 4 * (1 - r), r, r))
        else:
            gammas.append(gamma + 8 * (1 - min(max(g, 0), 1)))
            weights.append([gammas[-1] / gamma] * 3)
    return torch.tensor(gammas), torch.tensor(weights).T


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_the_focal_loss(name):
    outputs, anchors, targets = scene()
    step = loss_step(name)
    loss = step(outputs, anchors, targets)["classification"]
    plain = loss_step("focal")(outputs, anchors, targets)["classification"]
    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)  # q^2 is an exponential here
    assert (step.balance.gradient_sums > 0).any() and step.balance.gradient_sums.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_later_steps_have_the_papers_formulas(name):
    outputs, anchors, targets = scene()
    step = loss_step(name)
    step(outputs, anchors, targets)
    sums = step.balance.gradient_sums.clone()
    gamma, weight = expected(name, sums, TINY.alpha, TINY.gamma)
    loss = step(outputs, anchors, targets)["classification"] * len(targets)
    matched = step.match(outputs, anchors, targets)
    total = sum(
        dense_focal_loss(
            [
                level.view(3, -1, K, *level.shape[2:])[:, :, k].detach()
                for level in outputs.cls_logits
            ],
            torch.where(matched.classes == k, 0, torch.where(matched.classes < 0, -100, 1)),
            TINY.alpha,
            float(gamma[k]),
            normalizer=matched.normalizers,
            # A negative is one of an anchor without this class: with another one, or without any.
            class_weight=torch.stack((weight[0, k], weight[1, k], weight[2, k]))[:, None],
        )
        for k in range(K)
    )
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    assert (step.balance.gradient_sums >= sums).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_training_moves_the_sums(name):
    outputs, anchors, targets = scene()
    step = loss_step(name)
    step(outputs, anchors, targets)
    before = step.balance.gradient_sums.clone()
    step.eval()(outputs, anchors, targets)
    assert torch.equal(step.balance.gradient_sums, before)
    step.train()(outputs, anchors, targets)
    assert not torch.equal(step.balance.gradient_sums, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_compiles_whole(name):
    outputs, anchors, targets = scene()
    eager, compiled = loss_step(name), loss_step(name)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = [f(outputs, anchors, targets)["classification"] for f in (eager, step)]
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(compiled.balance.gradient_sums, eager.balance.gradient_sums)


def dense_scene() -> tuple[HeadOutputs, Tensor, list[dict[str, Tensor]]]:
    """Four objects in 20,000 anchors, and scores of 0.01 as the prior has them."""
    x, y = torch.meshgrid(torch.arange(100.0), torch.arange(200.0), indexing="xy")
    corners = torch.stack((x, y), dim=-1).view(-1, 2) * 8
    anchors = torch.cat((corners, corners + 16), dim=1)
    prior = -math.log(99)
    logits = torch.full((1, K, 200, 100), prior) + torch.randn(1, K, 200, 100) * 0.1
    labels = torch.arange(4) % K
    targets = [{"boxes": anchors[[50, 5000, 9000, 15000]], "labels": labels}]
    return HeadOutputs([logits], [torch.zeros(1, 4, 200, 100)]), anchors, targets


def test_eqlv2_switches_the_negatives_of_a_dense_head_off_and_efl_does_not():
    """By its formula, on cross entropy: all anchors without an object are negatives of every class."""
    outputs, anchors, targets = dense_scene()
    eqlv2 = loss_step("eqlv2", alpha=-1.0, gamma=0.0, box_loss="l1")
    efl = loss_step("efl")
    steps = {}
    for name, step in (("eqlv2", eqlv2), ("efl", efl)):
        sums = [step.balance.gradient_sums.clone()]
        for _ in range(2):
            step(outputs, anchors, targets)
            sums.append(step.balance.gradient_sums.clone())
        steps[name] = [later - before for before, later in itertools.pairwise(sums)]
    ratio = steps["eqlv2"][0][0] / steps["eqlv2"][0][1]
    assert (ratio < 0.1).all()
    # r: what is left of the negatives' gradients in the second step.
    assert (steps["eqlv2"][1][1] < 1e-3 * steps["eqlv2"][0][1]).all()
    # The focal loss comes first: with it the objects' gradients are not the smaller ones.
    assert (steps["efl"][0][0] > 0.2 * steps["efl"][0][1]).all()


def test_efl_needs_a_gamma():
    with pytest.raises(ValueError, match="gamma must be above 0 with classification_loss efl"):
        loss_step("efl", gamma=0.0)


# ---- State --------------------------------------------------------------------------------------


def recipe_of(name: str, **options) -> Recipe:
    model = dataclasses.replace(TINY, classification_loss=name, min_size=None)
    return Recipe(model=model, steps=4, batch_size=2, warmup_steps=0, **options)


@pytest.mark.parametrize(("name", "ema_buffers"), [("eqlv2", False), ("efl", True)])
def test_a_resumed_run_has_the_same_bits(name, ema_buffers, tmp_path: Path):
    data = open_data(str(make_coco_folder(tmp_path / "data")), "train2017")
    recipe = recipe_of(name, ema_decay=0.9, ema_buffers=ema_buffers)
    whole, resumed = tmp_path / "whole.pt", tmp_path / "resumed.pt"

    def die(step: int, model: RetinaNet) -> None:
        raise Killed

    train(recipe, data, whole, pretrained=False)
    with pytest.raises(Killed):
        train(recipe, data, resumed, pretrained=False, checkpoint_every=2, saved=die)
    train(recipe, data, resumed, pretrained=False, resume=True)
    checkpoint = load_checkpoint(whole)
    assert_same(load_checkpoint(resumed), checkpoint)
    sums = checkpoint["model"]["loss_step.balance.gradient_sums"]
    assert sums.dtype == torch.float64 and (sums[1] > 0).all()
    model, *_ = load_model(whole)
    assert model.loss_step.balance.gradient_sums.dtype == torch.float64


def test_other_weights_bring_no_sums(tmp_path: Path):
    model = RetinaNet(dataclasses.replace(TINY, classification_loss="efl"))
    other = copy.deepcopy(model)
    other.loss_step.balance.gradient_sums.fill_(3)
    categories = {i: str(i) for i in range(K)}
    source = {"model": other.state_dict(), "categories": categories}
    take_weights(model, tmp_path / "x.pt", source, categories)
    assert (model.loss_step.balance.gradient_sums == 0).all()


def test_older_checkpoints_have_no_sums():
    assert not any("gradient_sums" in name for name in loss_step("focal").state_dict())


def sums_of_rank(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    outputs, anchors, targets = torch.load(f"{folder}/scene.pt", weights_only=False)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    part = HeadOutputs(*([level[own] for level in levels] for levels in outputs))
    step = loss_step("efl")
    for _ in range(3):
        step(part, anchors, targets[own])
    torch.save(step.balance.gradient_sums, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_sums_of_one(tmp_path: Path):
    outputs, anchors, targets = scene()
    outputs = HeadOutputs(*([level.detach() for level in levels] for levels in outputs))
    torch.save((outputs, anchors, targets), tmp_path / "scene.pt")
    step = loss_step("efl")
    for _ in range(3):
        step(outputs, anchors, targets)
    torch.multiprocessing.spawn(sums_of_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    # The images are added up in another order, in float64; the weights that come of it are float32.
    torch.testing.assert_close(first, step.balance.gradient_sums, rtol=1e-6, atol=0)
