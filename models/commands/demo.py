"""python -m models demo: train on trees, evaluate, draw."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from ..checkpoint import expected_bytes
from ..commands.common import add_model_argument, chosen_model, model_for, with_given
from ..commands.flags import add_fields, check_given, given_fields
from ..data import open_data, prepare_backbone_weights
from ..detectors import DETECTORS
from ..draw import draw_comparison
from ..evaluate import detect, evaluate, save_results, to_results
from ..outputs import claim_folder, locked, remade
from ..recipes import RANGES, RECIPES, Recipe
from ..run_folder import CHECKPOINT
from ..train import keep_freed_memory, train

HELP = "train on trees, evaluate, draw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s"
    )
    add_model_argument(parser)
    add_fields(parser, Recipe, RANGES, ["steps", "seed"])


def run(options: argparse.Namespace) -> None:
    given = given_fields(options, Recipe)
    check_given(given, RANGES)
    recipe = with_given(RECIPES["trees"], given)
    recipe = dataclasses.replace(recipe, model=model_for(recipe, chosen_model(options)))
    keep_freed_memory()
    claim_folder(options.out, 2 * expected_bytes(recipe))
    names = (CHECKPOINT, "not-finite.json", "results.json", "trees.png")
    with locked(options.out), remade(options.out, names):
        show(options, recipe)


def show(options: argparse.Namespace, recipe: Recipe) -> None:
    start = time.monotonic()
    prepare_backbone_weights(recipe.model.pretrained_backbone)
    data, val = open_data("trees", "train"), open_data("trees", "val")
    backbone, crowns = recipe.model.pretrained_backbone, len(data.coco.anns)
    name = DETECTORS[recipe.model.kind][1].__name__
    print(f"Training {name} ({backbone}) on an aerial photograph with {crowns} tree crowns.")
    model = train(recipe, data, options.out / CHECKPOINT, device=options.device)

    print(
        f"Evaluating on a photograph of another place with {len(val.coco.anns)} crowns: "
        f"{recipe.max_detections} detections count, where COCO lets 100."
    )
    image, truth = val[0]
    detections = detect(model, recipe, image)
    results = to_results(val.image_ids[0], detections, list(val.categories))
    save_results(options.out / "results.json", results)
    figures = evaluate(val.coco, results, recipe.max_detections)
    picture = options.out / "trees.png"
    title = f"Tree crowns: AP50 {figures['AP50']:.3f}, AP {figures['AP']:.3f}"
    draw_comparison(picture, title, image, detections, truth)
    print(f"The picture of detections beside the ground truth: {picture}")
    print(f"Training and evaluation took {(time.monotonic() - start) / 60:.1f} minutes.")
