"""Detectors built on focalops, and the commands that train, evaluate and run them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .deploy import StaticDetector
    from .detector import Detector
    from .detectors import DETECTORS, create
    from .recipes import RECIPES, Recipe
    from .retinanet import RetinaNet, RetinaNetConfig

# Names come when they are asked for: `python -m models` must arrange what Ctrl-C does before torch is imported.
_FILES = {
    "DETECTORS": "detectors",
    "RECIPES": "recipes",
    "Detector": "detector",
    "Recipe": "recipes",
    "RetinaNet": "retinanet",
    "RetinaNetConfig": "retinanet",
    "StaticDetector": "deploy",
    "create": "detectors",
    "load_model": "checkpoint",
}
__all__ = [
    "DETECTORS",
    "RECIPES",
    "Detector",
    "Recipe",
    "RetinaNet",
    "RetinaNetConfig",
    "StaticDetector",
    "create",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
