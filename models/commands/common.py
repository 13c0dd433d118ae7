"""What the commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import DetectorConfig
from ..data import BUILT_IN, CocoDataset, DataError, open_data
from ..detectors import DETECTORS, PUBLISHED, named
from ..distributed import rank
from ..recipes import RECIPES, Recipe, with_model

DATA_HELP = (
    "a COCO-format folder, or what is built in: 'trees', aerial photographs, or 'shapes', drawn ones of 30 classes, most "
    "of them rare"
)


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


def add_recipe_arguments(parser: argparse._ActionsContainer, note: str = "") -> None:
    parser.add_argument(
        "--recipe",
        help=f"{', '.join(RECIPES)} or a file that configs printed{note}; default: that of built-in data, else "
        "what --model has of its own, else coco",
    )
    add_model_argument(parser)


def add_model_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--model",
        dest="model_name",  # model is a field of the recipe
        metavar="NAME",
        help=f"in place of the recipe's model: {', '.join((*DETECTORS, *PUBLISHED))}",
    )


def chosen_model(options: argparse.Namespace) -> DetectorConfig | None:
    """That of --model, if it was given."""
    return None if options.model_name is None else named(options.model_name)


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """That of --recipe, or what belongs to the data or to --model; with its own model."""
    own = options.model_name if options.model_name in RECIPES else "coco"
    return find_recipe(options.recipe or (options.data if options.data in BUILT_IN else own))


def model_for(recipe: Recipe, model: DetectorConfig | None) -> DetectorConfig:
    """The model in place of the recipe's: for the same classes, and for crops as they are where the recipe crops."""
    if model is None:
        return recipe.model
    crops = {} if recipe.crop is None else {"min_size": None, "letterbox": False}
    return dataclasses.replace(model, num_classes=recipe.model.num_classes, **crops)  # type: ignore[arg-type]


def add_data_arguments(
    parser: argparse.ArgumentParser, split: str, data: str | None = None
) -> None:
    """--data, needed unless there is a default, --split, --images and --large-images."""
    default = "" if data is None else f" (default: {data})"
    parser.add_argument(
        "--data", required=data is None, default=data, metavar="DIR", help=DATA_HELP + default
    )
    parser.add_argument("--split", default=split, help="default: %(default)s")
    add_image_arguments(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the folder of the images, or of a folder for each split (default: looked for in the data set)",
    )
    add_large_images(parser)


def add_large_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--large-images",
        action="store_true",
        help="read images of any size, also above Pillow's limit for files that nobody vouches for",
    )


def open_split(options: argparse.Namespace, split: str) -> CocoDataset:
    """A split of --data; says what is odd about it."""
    data = open_data(options.data, split, options.images, large_images=options.large_images)
    if rank() == 0:
        for finding in data.survey():
            print(f"{data.annotation_file}: {finding}", file=sys.stderr)
    return data


def for_data(recipe: Recipe, data: CocoDataset) -> Recipe:
    """The recipe with as many classes as the data set has categories, and their frequencies where its loss asks for them."""
    if not data.categories:
        raise DataError(f"{data.annotation_file} has no categories")
    changes: dict[str, Any] = {"num_classes": len(data.categories)}
    if recipe.model.classification_loss == "eql" and recipe.model.class_frequencies is None:
        changes["class_frequencies"] = data.class_frequencies()
    return with_model(recipe, **changes)


def with_given(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with fields that were given; a run warms up for a tenth of the steps given at most."""
    if "steps" in given:
        given = {"warmup_steps": min(recipe.warmup_steps, given["steps"] // 10), **given}
    return dataclasses.replace(recipe, **given)


def files_of(data: CocoDataset) -> Iterator[Path]:
    """What a command reads of a split."""
    yield data.annotation_file
    yield from (data.image_path(index) for index in range(len(data)))


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
