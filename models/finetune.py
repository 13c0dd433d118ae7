"""A new run that starts from another one's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .data import DataError
from .detector import Detector


def take_weights(
    model: Detector, path: Path, source: dict[str, Any], categories: dict[int, str]
) -> str:
    """Gives a new model what fits of the checkpoint `source`, read from `path`; says what that was.

    Every tensor of the same name and shape is taken, but for the loss step's. Of the class layers the rows of the categories
    of the same name are, wherever they stand; the others start anew.

    Raises:
        DataError: nothing fits.
    """
    weights = averaged(source)
    own = {  # shares the model's memory; what the loss step remembers is of the other run
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("loss_step.")
    }
    whole = [name for name in own if not name.startswith(model.class_layers)]
    of_classes = [name for name in own if name.startswith(model.class_layers)]
    fitting = [n for n in whole if getattr(weights.get(n), "shape", None) == own[n].shape]
    if not fitting:
        raise DataError(f"no weights in {path} fit this model: theirs must have the same backbone")
    for name in fitting:
        own[name].copy_(weights[name])
    now = list(categories.values())
    shared = take_classes(own, of_classes, weights, list(source["categories"].values()), now)
    return (
        f"{path}: {len(fitting)} of {len(whole)} tensors are taken"
        f"{without(whole, fitting)}, and of the class layer the rows of {len(shared)} of "
        f"{len(now)} categories{without(now, shared)}"
    )


def averaged(source: dict[str, Any]) -> dict[str, Any]:
    """The weights that the checkpoint's run was evaluated by."""
    if "average" not in source:
        return dict(source["model"])
    prefix = "module."
    return {n.removeprefix(prefix): v for n, v in source["average"].items() if n.startswith(prefix)}


def take_classes(
    own: dict[str, Tensor],
    of_classes: list[str],
    weights: dict[str, Any],
    before: list[str],
    now: list[str],
) -> list[str]:
    """Copies the rows of the categories that both have, and returns them."""
    layers = []  # (ours, theirs), both as (A, K, ...)
    for name in of_classes:
        ours = own[name].unflatten(0, (-1, len(now)))
        theirs = weights.get(name)
        shape = (ours.shape[0] * len(before), *ours.shape[2:])
        if not isinstance(theirs, Tensor) or tuple(theirs.shape) != shape:
            return []  # other anchors, or another width
        layers.append((ours, theirs.unflatten(0, (-1, len(before)))))
    shared = [name for name in now if name in before]
    for ours, theirs in layers:
        for name in shared:
            ours[:, now.index(name)] = theirs[:, before.index(name)]
    return shared


def without(all_names: list[str], taken: list[str]) -> str:
    left = [name for name in all_names if name not in taken]
    return f" (not {', '.join(left[:5])}{', ...' if len(left) > 5 else ''})" if left else ""
