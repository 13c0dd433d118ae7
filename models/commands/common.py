"""What the commands share."""

from __future__ import annotations

import json
from pathlib import Path

from models.data import DataError
from models.recipes import RECIPES, Recipe
from models.run_folder import CHECKPOINT

__all__ = ["CHECKPOINT", "DATA_HELP", "find_recipe", "first_line"]

DATA_HELP = "a COCO-format folder, or 'trees', the built-in aerial photographs"


def find_recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    try:
        return Recipe.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(
            f"the recipe must be one of {', '.join(RECIPES)} or a file, got {name!r}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the file {name} is no recipe ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
