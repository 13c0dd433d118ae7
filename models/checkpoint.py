"""Checkpoint files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .data import DataError
from .detector import Detector
from .detectors import create
from .outputs import reason, written_whole
from .recipes import Recipe

CHECKSUM = "checksum"


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Atomic: whenever the process dies, `path` is the old checkpoint or the new one.

    Raises:
        DataError: it cannot be written; what was there stays, and nothing else is left.
    """
    with written_whole(path) as file:
        try:
            torch.save({**checkpoint, CHECKSUM: checksum(checkpoint)}, file)
        except RuntimeError as error:
            raise of_system(error) or error from None


def of_system(error: BaseException | None) -> OSError | None:
    """The OSError that torch.save met, which it hides behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def checksum(checkpoint: dict[str, Any]) -> str:
    """SHA-256 of all there is in it: tensors by their bytes, everything in the order of the names."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)
        elif isinstance(value, (Mapping, list, tuple)):
            digest.update(f"{name} {len(value)}\n".encode())
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in sorted(items, key=lambda pair: repr(pair[0])):
                add(f"{name}/{key!r}", item)
        else:
            digest.update(f"{name} {value!r}\n".encode())

    add("", {name: value for name, value in checkpoint.items() if name != CHECKSUM})
    return digest.hexdigest()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What save_checkpoint was given, the recipe as a Recipe.

    Raises:
        DataError: there is no such file, it is no checkpoint, or not as it was written.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"the checkpoint {path} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"the checkpoint {path} cannot be read ({reason(error)})") from None
    except Exception:  # a damaged pickle raises anything
        checkpoint = None
    needed = ("model", "recipe", "categories")
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), dict) for name in needed
    ):
        raise DataError(
            f"{path} is not a checkpoint of the command train, or not all of one is there"
        )
    if CHECKSUM in checkpoint and checkpoint.pop(CHECKSUM) != checksum(checkpoint):
        raise DataError(f"{path} is damaged: its content is not what its checksum says")
    try:
        recipe = Recipe.from_dict(checkpoint["recipe"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{path} was written by another version of focalops' models, or is damaged: {error}"
        ) from None
    if len(checkpoint["categories"]) != recipe.model.num_classes:
        raise DataError(
            f"{path} must have one category for each of its {recipe.model.num_classes} classes, "
            f"got {len(checkpoint['categories'])}"
        )
    return {**checkpoint, "recipe": recipe}


def load_model(path: Path, device: str = "cpu") -> tuple[Detector, Recipe, dict[int, str]]:
    """The model (its averaged weights where there are any), recipe, categories in label order."""
    checkpoint = load_checkpoint(path)
    recipe = checkpoint["recipe"]
    model = create(recipe.model)
    if "average" in checkpoint:
        average = AveragedModel(model)
        load_weights(average, checkpoint["average"], path)
        model = cast(Detector, average.module)
    else:
        load_weights(model, checkpoint["model"], path)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), recipe, checkpoint["categories"]


def load_weights(module: nn.Module, weights: Any, path: Path, whose: str = "its recipe") -> None:
    """module.load_state_dict(weights); where they do not fit, one sentence that names the file."""
    expected = module.state_dict()
    if not isinstance(weights, dict):
        raise DataError(f"{path} holds no weights, but {type(weights).__name__}")
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        needed, value = tuple(expected[name].shape), weights[name]
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != needed:
            wrong.append(f"{name} must have shape {needed}, got {got}")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(f"the weights in {path} do not fit {whose}: {min(wrong)}{more}")
    module.load_state_dict(weights)


def expected_bytes(recipe: Recipe) -> int:
    """The size that a run's checkpoint will have, but for a few percent."""
    with torch.device("meta"):  # shapes without memory
        model = create(recipe.model)
    state = model.state_dict().values()
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = {"sgd": 1, "adamw": 2}[recipe.optimizer]
    copies = 1 + (recipe.ema_decay is not None)
    of_a_tensor = 400  # its entry in the file, and the padding
    return sum(copies * (t.nbytes + of_a_tensor) for t in state) + sum(
        moments * (p.nbytes + of_a_tensor) for p in trained
    )
