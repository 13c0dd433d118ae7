"""Checkpoint files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from models.data import DataError
from models.recipes import Recipe
from models.retinanet import RetinaNet


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
