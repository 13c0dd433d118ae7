"""python -m models convert: a Pascal VOC folder as a COCO-format folder, weights of effdet's as a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from ..checkpoint import save_checkpoint
from ..data import read_voc, write_conversion
from ..detectors import PUBLISHED
from ..efficientdet import EfficientDetConfig
from ..from_effdet import from_effdet_file
from ..outputs import claim
from ..ranges import check, one_of
from ..recipes import RECIPES, Recipe

HELP = (
    "a Pascal VOC folder as a COCO-format folder, or weights of the package effdet as a checkpoint"
)
EFFICIENTDETS = tuple(name for name in PUBLISHED if name.startswith("efficientdet_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the folder, or with --model the file"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"of what the file has the weights: {', '.join(EFFICIENTDETS)}",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="a folder, or the checkpoint"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier conversion wrote"
    )


def run(options: argparse.Namespace) -> None:
    if options.model is not None:
        convert_weights(options)
        return
    conversion = read_voc(options.source)
    for note in conversion.notes:
        print(note, file=sys.stderr)
    write_conversion(conversion, options.out, overwrite=options.overwrite)
    for split, dataset in conversion.splits.items():
        print(f"{options.out / split}.json: {len(dataset['images'])} images")


def convert_weights(options: argparse.Namespace) -> None:
    check("--model", options.model, one_of(EFFICIENTDETS))
    claim([options.out], overwrite=options.overwrite, inputs=[options.source])
    published = PUBLISHED[options.model]
    assert isinstance(published, EfficientDetConfig)
    model = from_effdet_file(options.source, options.model, drop_path=published.drop_path)
    recipe = dataclasses.replace(RECIPES.get(options.model, Recipe()), model=model.config)
    categories = categories_of(model.config.num_classes)
    save_checkpoint(
        options.out,
        {"model": model.state_dict(), "recipe": recipe.to_dict(), "categories": categories},
    )
    print(f"{options.out}: {options.model}, {len(categories)} classes")


def categories_of(num_classes: int) -> dict[int, str]:
    """effdet's class 1 is id 1, and so on; with 90 of them they are COCO's, whose ids have gaps."""
    if num_classes != 90:
        return {id: f"class {id}" for id in range(1, num_classes + 1)}
    _, *names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {id: name if name != "N/A" else f"N/A {id}" for id, name in enumerate(names, start=1)}
