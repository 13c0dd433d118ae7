"""python -m models study: a comparison of the paper's, with several seeds: table and picture."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from models.checkpoint import load_model
from models.commands.common import add_data_arguments, find_recipe, interruptible, open_split
from models.data import prepare_backbone_weights
from models.outputs import claim
from models.ranges import check, optional, whole
from models.run_folder import CHECKPOINT
from models.study import DISTRIBUTION, STUDIES, run_distribution, run_study, with_model
from models.train import keep_freed_memory, train, training_stream

HELP = "a comparison of the paper's, with several seeds: table and picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=(*STUDIES, DISTRIBUTION))
    add_data_arguments(parser, split="train", data="trees")
    parser.add_argument("--val-split", default="val", help="default: %(default)s")
    parser.add_argument("--recipe", help="as in train; the study changes what it compares")
    parser.add_argument("--steps", type=int, help="of each run (default: the recipe's)")
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


@interruptible()
def run(options: argparse.Namespace) -> None:
    check("--seeds", options.seeds, whole(1))
    check("--samples", options.samples, whole(1))
    check("--steps", options.steps, optional(whole(1)))
    keep_freed_memory()
    recipe = find_recipe(options.recipe or ("trees" if options.data == "trees" else "coco"))
    data, val = (open_split(options, s) for s in (options.split, options.val_split))
    recipe = with_model(recipe, num_classes=len(data.categories))
    if options.steps is not None:
        recipe = dataclasses.replace(
            recipe, steps=options.steps, warmup_steps=min(recipe.warmup_steps, options.steps // 10)
        )
    pretrained = not options.no_pretrained
    if options.name == DISTRIBUTION:
        outputs = [options.out / f"{DISTRIBUTION}{ending}" for ending in (".md", ".png")]
        trained = [] if options.checkpoint is not None else [options.out / CHECKPOINT]
        inputs = [] if options.checkpoint is None else [options.checkpoint]
        claim([*outputs, *trained], overwrite=options.overwrite, inputs=inputs)
    if pretrained and options.checkpoint is None:
        prepare_backbone_weights(recipe.model.backbone)
    if options.name != DISTRIBUTION:
        table = run_study(
            options.name,
            recipe,
            data,
            val,
            options.out,
            seeds=options.seeds,
            device=options.device,
            pretrained=pretrained,
            overwrite=options.overwrite,
        )
    else:
        if options.checkpoint is not None:
            model, recipe, _ = load_model(options.checkpoint, options.device)
            source = options.checkpoint.name
        else:
            checkpoint = options.out / CHECKPOINT
            model = train(recipe, data, checkpoint, device=options.device, pretrained=pretrained)
            source = f"{recipe.steps} steps on {data.annotation_file.name}"
        table = run_distribution(
            model,
            training_stream(recipe, data),
            options.out,
            source,
            options.samples,
            options.device,
        )
    print(f"\n{table.read_text()}\n{table.with_suffix('.png')}")
