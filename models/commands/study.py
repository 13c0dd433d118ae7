"""python -m models study: a comparison of the papers', with several seeds or of the losses alone: table and picture."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..checkpoint import load_model
from ..commands.common import (
    add_data_arguments,
    add_recipe_arguments,
    chosen_model,
    chosen_recipe,
    for_data,
    model_for,
    open_split,
    with_given,
)
from ..commands.flags import add_fields, check_given, given_fields
from ..curves import CURVES, run_curves
from ..data import CocoDataset, prepare_backbone_weights
from ..distribution import DISTRIBUTION, run_distribution
from ..outputs import claim, claim_folder, locked
from ..ranges import check, whole
from ..recipes import RANGES, Recipe
from ..simulation import BOX_REGRESSION, run_box_regression
from ..study import STUDIES, run_study
from ..train import (
    TrainingInterrupted,
    TrainingStopped,
    keep_freed_memory,
    train,
    training_stream,
)

HELP = "a comparison of the papers', with several seeds: table and picture"
WHEN_INTERRUPTED = (
    "the record holds the runs that are done, and the same command goes on after them"
)

OF_LOSSES = {BOX_REGRESSION: run_box_regression, CURVES: run_curves}  # neither data nor training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        choices=(*STUDIES, DISTRIBUTION, *OF_LOSSES),
        help=f"{' and '.join(OF_LOSSES)} are of losses alone: of the options they know --out, --overwrite and "
        "--device",
    )
    add_data_arguments(parser, split="train", data="trees")
    parser.add_argument("--val-split", default="val", help="default: %(default)s")
    own = " and ".join(f"{study.recipe} for {n}" for n, study in STUDIES.items() if study.recipe)
    add_recipe_arguments(parser, f"; the study changes what it compares; default: {own}")
    add_fields(parser, Recipe, RANGES, ["steps"])
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("study"),
        metavar="DIR",
        help="runs that its record holds are not repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace tables and pictures that belong to no record, and {DISTRIBUTION}'s; never a record",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="as in train")
    parser.add_argument(
        "--checkpoint", type=Path, help=f"of {DISTRIBUTION}: a trained model (default: trains one)"
    )
    parser.add_argument(
        "--samples", type=int, default=64, help=f"of {DISTRIBUTION} (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    check("--seeds", options.seeds, whole(1))
    check("--samples", options.samples, whole(1))
    given = given_fields(options, Recipe)
    check_given(given, RANGES)
    if options.checkpoint is not None and options.name != DISTRIBUTION:
        raise ValueError(f"--checkpoint is of {DISTRIBUTION}, not of {options.name}")
    keep_freed_memory()
    if options.name in OF_LOSSES:
        show(of_losses(options))
        return
    if options.name in STUDIES and options.recipe is None:
        options.recipe = STUDIES[options.name].recipe
    recipe = chosen_recipe(options)
    recipe = dataclasses.replace(recipe, model=model_for(recipe, chosen_model(options)))
    data = open_split(options, options.split)
    recipe = with_given(for_data(recipe, data), given)
    claim_folder(options.out)
    with locked(options.out):
        if options.name == DISTRIBUTION:
            table = distribution(options, recipe, data)
        else:
            table = comparison(options, recipe, data)
    show(table)


def show(table: Path) -> None:
    text = table.read_text(encoding="utf-8")
    print(f"\n{text}\n{table.with_suffix('.png')}")


def of_losses(options: argparse.Namespace) -> Path:
    options.when_interrupted = ""  # nothing is written before the end
    claim_folder(options.out)
    with locked(options.out):
        outputs = [options.out / f"{options.name}{ending}" for ending in (".md", ".png")]
        claim(outputs, overwrite=options.overwrite)
        return OF_LOSSES[options.name](options.out, options.device)


def comparison(options: argparse.Namespace, recipe: Recipe, data: CocoDataset) -> Path:
    val = open_split(options, options.val_split)
    if not options.no_pretrained:
        backbones = {
            variant.recipe.model.pretrained_backbone: None
            for variant in STUDIES[options.name].variants(recipe)
        }
        for backbone in backbones:
            prepare_backbone_weights(backbone)
    try:
        return run_study(
            options.name,
            recipe,
            data,
            val,
            options.out,
            seeds=options.seeds,
            device=options.device,
            pretrained=not options.no_pretrained,
            overwrite=options.overwrite,
        )
    except TrainingInterrupted as error:
        raise TrainingStopped(f"{error}: {WHEN_INTERRUPTED}") from None


def distribution(options: argparse.Namespace, recipe: Recipe, data: CocoDataset) -> Path:
    outputs = [options.out / f"{DISTRIBUTION}{ending}" for ending in (".md", ".png")]
    trained = options.out / f"{DISTRIBUTION}.pt"
    if options.checkpoint is not None:
        claim(outputs, overwrite=options.overwrite, inputs=[options.checkpoint])
        model, recipe, _ = load_model(options.checkpoint, options.device)
        source = options.checkpoint.name
    else:
        claim([*outputs, trained], overwrite=options.overwrite)
        if not options.no_pretrained:
            prepare_backbone_weights(recipe.model.pretrained_backbone)
        pretrained = not options.no_pretrained
        model = train(recipe, data, trained, device=options.device, pretrained=pretrained)
        source = f"{recipe.steps} steps on {data.annotation_file.name}"
    stream = training_stream(recipe, data)
    return run_distribution(model, stream, options.out, source, options.samples, options.device)
