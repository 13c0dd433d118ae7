"""python -m models train: train a detector."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from models.checkpoint import load_checkpoint
from models.commands.common import CHECKPOINT, add_data_arguments, find_recipe, open_split
from models.data import CocoDataset, check_categories, prepare_backbone_weights
from models.distributed import rank
from models.draw import draw_comparison
from models.evaluate import detect
from models.log import Log
from models.losses import CLASSIFICATION_LOSSES
from models.recipes import PRECISIONS, RECIPES, Recipe
from models.retinanet import BACKBONES, BOX_LOSSES, TIMM, RetinaNet
from models.train import keep_freed_memory, train

HELP = "train a detector"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, split="train")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"where {CHECKPOINT} is written"
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"go on from DIR/{CHECKPOINT}, with the recipe in it"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument(
        "--log-every", type=int, default=20, metavar="STEPS", help="losses go to DIR/log.jsonl"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write them for TensorBoard too, with a picture at each checkpoint",
    )
    parser.add_argument(
        "--no-pretrained", action="store_true", help="start the backbone without ImageNet weights"
    )
    recipe = parser.add_argument_group("recipe", "what differs from the recipe of the data set")
    recipe.add_argument(
        "--recipe",
        help=f"{', '.join(RECIPES)} or a file that configs printed; default: trees for trees, "
        "else coco",
    )
    recipe.add_argument("--backbone", help=f"{', '.join(BACKBONES)} or {TIMM}NAME")
    recipe.add_argument("--steps", type=int)
    recipe.add_argument("--batch-size", type=int, help="of all processes together")
    recipe.add_argument("--accumulate", type=int, help="pieces that a batch is computed in")
    recipe.add_argument("--precision", choices=PRECISIONS, help="of the convolutions")
    recipe.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="backbone, head and loss, by torch.compile",
    )
    recipe.add_argument("--optimizer", choices=("sgd", "adamw"))
    recipe.add_argument("--learning-rate", type=float)
    recipe.add_argument("--warmup-steps", type=int)
    recipe.add_argument("--schedule", choices=("steps", "cosine"))
    recipe.add_argument("--clip-norm", type=float, help="limit of the gradient's norm")
    recipe.add_argument("--ema-decay", type=float, help="of a running average of the weights")
    recipe.add_argument(
        "--normalizer", choices=("image", "batch"), help="what losses are divided by"
    )
    recipe.add_argument("--classification-loss", choices=CLASSIFICATION_LOSSES)
    recipe.add_argument("--alpha", type=float, help="of the focal losses; -1: no balance")
    recipe.add_argument("--gamma", type=float, help="of the focal losses; 0: cross entropy")
    recipe.add_argument("--box-loss", choices=BOX_LOSSES)
    recipe.add_argument("--seed", type=int)
    recipe.add_argument(
        "--min-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="shorter side that images are resized to; one of several is drawn for each image",
    )
    recipe.add_argument("--max-size", type=int, help="limit of the longer side")
    recipe.add_argument("--crop", type=int, help="train on random squares of this side")
    recipe.add_argument("--window", type=int, help="detect in overlapping windows of this side")
    recipe.add_argument(
        "--symmetries",
        action="store_true",
        default=None,
        help="detect in all eight symmetries of an image, and let the boxes vote",
    )


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()
    checkpoint_file = options.out / CHECKPOINT
    if options.resume:
        recipe = load_checkpoint(checkpoint_file)["recipe"]
    else:
        recipe = find_recipe(options.recipe or ("trees" if options.data == "trees" else "coco"))
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "min_size" in given:
        sizes = tuple(given["min_size"])
        given["min_size"] = sizes[0] if len(sizes) == 1 else sizes
    training = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    model = {f.name: given[f.name] for f in dataclasses.fields(recipe.model) if f.name in given}
    if options.resume and (training or model or options.recipe):
        raise ValueError(
            "--resume goes on with the checkpoint's recipe, so no option of the recipe can be given"
        )
    data = open_split(options, options.split)
    if options.resume:
        check_categories(load_checkpoint(checkpoint_file)["categories"], data)
    else:
        model["num_classes"] = len(data.categories)
        if "crop" in training:
            model.setdefault("min_size", None)  # crops keep their size unless told otherwise
        recipe = dataclasses.replace(
            recipe, **training, model=dataclasses.replace(recipe.model, **model)
        )
        if not options.no_pretrained:
            prepare_backbone_weights(recipe.model.backbone)
    with Log(options.out, options.log_every, options.tensorboard) as log:
        train(
            recipe,
            data,
            checkpoint_file,
            device=options.device,
            pretrained=not options.no_pretrained,
            resume=options.resume,
            workers=options.workers,
            checkpoint_every=options.checkpoint_every,
            log=log,
            saved=progress_picture(recipe, data, options.out, log) if options.tensorboard else None,
        )
    if rank() == 0:
        print(f"trained: {checkpoint_file}")


def progress_picture(
    recipe: Recipe, data: CocoDataset, out: Path, log: Log
) -> Callable[[int, RetinaNet], None]:
    """Draws the detections on the first image beside its ground truth, for DIR/detections.png and the log."""

    def draw(step: int, model: RetinaNet) -> None:
        image, truth = data[0]
        picture = out / "detections.png"
        title = f"{data.image_path(0).name} after {step} steps"
        draw_comparison(picture, title, image, detect(model, recipe, image), truth)
        log.picture(step, picture)

    return draw
