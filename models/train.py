"""Training: recipes, the loop, checkpoints."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models.data import CocoDataset, DataError, TrainingStream, collate
from models.retinanet import RetinaNet, RetinaNetConfig


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained and run. The defaults are the paper's, for COCO."""

    model: RetinaNetConfig = field(default_factory=RetinaNetConfig)
    steps: int = 90_000
    batch_size: int = 16
    seed: int = 0
    # Optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    schedule: Literal["steps", "cosine"] = "steps"
    warmup_steps: int = 500
    clip_norm: float | None = None
    ema_decay: float | None = (
        None  # of a running average of the weights, which is then what is evaluated
    )
    # Samples
    crop: int | None = None  # the side of random squares to train on, instead of whole images
    crop_zoom: tuple[float, float] = (1.0, 1.0)
    dihedral: bool = False  # all eight symmetries of the square instead of the horizontal flip
    photometric: bool = False
    # Evaluation
    window: int | None = None  # the side of overlapping windows to detect in, for large images
    window_overlap: int = 128
    max_detections: int = 100  # an image

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of dataclasses.asdict."""
        return cls(**{**values, "model": RetinaNetConfig.from_dict(values["model"])})


# For two CPU cores: a small model, and anchors for tree crowns, 8 to 107 pixels wide. They are large
# for their strides (8 and 16), or crowns would lie too far from the nearest anchor to match it.
# There is one photograph to learn from: longer training fits it better and other places worse.
TREES = Recipe(
    model=RetinaNetConfig(
        num_classes=1,
        backbone="mobilenet_v2",
        trainable_stages=3,
        max_level=4,
        pyramid_channels=96,
        head_depth=2,
        head_std=None,
        anchor_sizes=((14, 20, 28, 40), (52, 68, 88, 112)),
        aspect_ratios=(1.0,),
        score_threshold=0.02,
        detections_per_image=1000,
        nms_threshold=0.4,
        min_size=None,
    ),
    steps=500,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=10.0,
    ema_decay=0.99,
    crop=256,
    crop_zoom=(0.67, 1.5),
    dihedral=True,
    photometric=True,
    window=512,
    max_detections=1000,
)

RECIPES = {"coco": Recipe(), "trees": TREES}


def train(
    recipe: Recipe,
    data: CocoDataset,
    checkpoint_file: Path,
    *,
    device: str = "cpu",
    pretrained: bool = True,
    resume: bool = False,
    workers: int = 0,
    checkpoint_every: int = 1000,
) -> RetinaNet:
    """Trains, writes checkpoint_file now and then and at the end, returns the evaluation model."""
    torch.manual_seed(recipe.seed)
    model = RetinaNet(recipe.model, pretrained_backbone=pretrained and not resume)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        if recipe.ema_decay
        else None
    )
    optimizer = build_optimizer(recipe, model)
    state = {"model": model, "average": average, "optimizer": optimizer}

    start = 0
    if resume:
        checkpoint = load_checkpoint(checkpoint_file)
        for name, part in state.items():
            if part is not None:
                part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng_state"])
        start = checkpoint["step"]

    stream = TrainingStream(
        data,
        recipe.steps * recipe.batch_size,
        recipe.seed,
        recipe.crop,
        recipe.crop_zoom,
        recipe.dihedral,
        recipe.photometric,
    )
    loader = DataLoader(
        Subset(stream, range(start * recipe.batch_size, len(stream))),
        batch_size=recipe.batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.startswith("cuda"),
        generator=torch.Generator(),  # of its own: a resumed run must not draw twice
    )
    model.train()
    progress = tqdm(
        loader, desc="train", unit="step", initial=start, total=recipe.steps, mininterval=1.0
    )
    for step, (images, targets) in enumerate(progress, start=start):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * lr_factor(recipe, step)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in t.items()}
            for t in targets
        ]
        losses: dict[str, Tensor] = model(images, targets)
        loss = sum(losses.values(), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        if step % 10 == 0:  # not every step: reading a loss makes the host wait for the device
            progress.set_postfix({name: f"{value.item():.3f}" for name, value in losses.items()})
        done = step + 1
        if done % checkpoint_every == 0 or done == recipe.steps:
            save_checkpoint(
                checkpoint_file,
                {name: part.state_dict() for name, part in state.items() if part is not None}
                | {
                    "step": done,
                    "rng_state": torch.get_rng_state(),
                    "recipe": dataclasses.asdict(recipe),
                    "categories": data.categories,
                },
            )
    return (model if average is None else cast(RetinaNet, average.module)).eval()


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def lr_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a half cosine to 0 or the paper's drops at 2/3 and 8/9 of the run."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    drops = (recipe.steps * 2 // 3, recipe.steps * 8 // 9)
    return 0.1 ** sum(step >= drop for drop in drops)


def keep_freed_memory() -> None:
    """Lets glibc's malloc reuse large blocks instead of returning each to the system.

    A training step on a CPU allocates the same hundreds of megabytes again and again; the page
    faults of fresh ones are a fifth of its time. Call it before torch starts its threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of <malloc.h>


# ---- Checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Atomic: whenever the process dies, `path` is the old checkpoint or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What save_checkpoint was given, the recipe as a Recipe."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"the checkpoint {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        checkpoint = None
    if (
        not isinstance(checkpoint, dict)
        or not {"model", "recipe", "categories"} <= checkpoint.keys()
    ):
        raise DataError(f"{path} is not a checkpoint of python -m models train")
    try:
        checkpoint["recipe"] = Recipe.from_dict(checkpoint["recipe"])
    except (TypeError, KeyError):
        raise DataError(f"{path} was written by another version of focalops' models") from None
    return checkpoint


def load_model(path: Path, device: str = "cpu") -> tuple[RetinaNet, Recipe, dict[int, str]]:
    """The model (its averaged weights where there are any), recipe, categories in label order."""
    checkpoint = load_checkpoint(path)
    recipe = checkpoint["recipe"]
    model = RetinaNet(recipe.model)
    if "average" in checkpoint:
        average = AveragedModel(model)
        average.load_state_dict(checkpoint["average"])
        model = cast(RetinaNet, average.module)
    else:
        model.load_state_dict(checkpoint["model"])
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), recipe, checkpoint["categories"]
