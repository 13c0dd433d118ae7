"""python -m models train: train a detector."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import expected_bytes, load_checkpoint
from ..commands.common import (
    add_data_arguments,
    add_recipe_arguments,
    chosen_model,
    chosen_recipe,
    find_recipe,
    for_data,
    model_for,
    open_split,
)
from ..commands.flags import add_fields, given_fields
from ..config import DetectorConfig
from ..data import CocoDataset, prepare_backbone_weights
from ..detector import Detector
from ..detectors import DETECTORS
from ..distributed import from_first, rank
from ..draw import draw_comparison
from ..evaluate import category_ids, check_truth, detect, detect_all, evaluate
from ..finetune import take_weights
from ..log import Log
from ..outputs import claim_folder, locked
from ..ranges import Range, check, option, optional, whole
from ..recipes import RANGES, Recipe, with_model
from ..resume import differences, fingerprint, other_recipe
from ..run_folder import (
    BEST,
    CHECKPOINT,
    PICTURE,
    checkpoint_to_resume,
    claim_run,
    remove_run,
)
from ..train import TrainingInterrupted, TrainingStopped, keep_freed_memory, train
from ..validation import Validation

HELP = "train a detector"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, split="train")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"where {CHECKPOINT} is written"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"go on from DIR/{CHECKPOINT}, with the recipe in it; start where there is none",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that DIR holds by a new one"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="CHECKPOINT",
        help="start from another run's weights, also with other categories, and by its recipe",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument(
        "--log-every", type=int, default=20, metavar="STEPS", help="losses go to DIR/log.jsonl"
    )
    parser.add_argument(
        "--val-split", metavar="SPLIT", help=f"evaluate on it; the best model goes to DIR/{BEST}"
    )
    parser.add_argument(
        "--evaluate-every", type=int, metavar="STEPS", help="default: --checkpoint-every"
    )
    parser.add_argument(
        "--patience", type=int, metavar="N", help="stop after N evaluations that bring no better AP"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write them for TensorBoard too, with a picture at each checkpoint",
    )
    parser.add_argument(
        "--no-pretrained", action="store_true", help="start the backbone without ImageNet weights"
    )
    recipe = parser.add_argument_group(
        "recipe",
        "what differs from the recipe of the data set; where a value may be nothing, the word is none",
    )
    add_recipe_arguments(recipe)
    known = {"model", "num_classes", "class_frequencies"}  # these two are what the data have
    for config, ranges in configs():
        names = [f.name for f in dataclasses.fields(config) if f.name not in known]
        add_fields(recipe, config, ranges, names)
        known |= set(names)


def configs() -> list[tuple[type, Mapping[str, Range]]]:
    """The dataclasses whose fields are options, and what these may hold."""
    return [(Recipe, RANGES), *((config, config.ranges()) for config, _ in DETECTORS.values())]


def run(options: argparse.Namespace) -> None:
    keep_freed_memory()
    check_options(options)
    given = recipe_options(options)
    new = None if options.resume else new_run(options, given)
    with contextlib.ExitStack() as held:
        last = from_first(lambda: claim(options, held))
        checkpoint = None if last is None else load_checkpoint(last)
        data = open_split(options, options.split)
        source = None
        if checkpoint is None or last is None:
            recipe, source = new or new_run(options, given)
            recipe = for_data(recipe, data)
        else:
            recipe = checkpoint["recipe"]
            check_same_recipe(options, last, recipe, given)
        validation = validator(options, recipe, data)
        pretrained = not options.no_pretrained and checkpoint is None
        if source is not None and same_backbone(source["recipe"], recipe):
            pretrained = False  # what --weights has takes their place
        if pretrained:
            prepare_backbone_weights(recipe.model.pretrained_backbone)
        from_first(lambda: make_room(options, recipe))
        with Log(options.out, options.log_every, options.tensorboard) as log:
            if options.resume and checkpoint is None:
                log.resume(0, None)  # a run that ended before its first checkpoint
            with resumable(options.out / CHECKPOINT):
                train(
                    recipe,
                    data,
                    options.out / CHECKPOINT,
                    device=options.device,
                    pretrained=pretrained,
                    initialise=None if source is None else starter(options.weights, source, data),
                    resume=checkpoint is not None,
                    workers=options.workers,
                    checkpoint_every=options.checkpoint_every,
                    log=log,
                    saved=progress_picture(recipe, data, options.out, log)
                    if options.tensorboard
                    else None,
                    validation=validation,
                    begin=(lambda: remove_run(options.out)) if options.overwrite else None,
                )
    if rank() == 0:
        say_trained(options.out, recipe, validation)


def same_backbone(source: Recipe, recipe: Recipe) -> bool:
    return source.model.pretrained_backbone == recipe.model.pretrained_backbone


@contextlib.contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except TrainingInterrupted as error:
        raise TrainingStopped(f"{error}; {checkpoint} holds it, and --resume goes on") from None


def check_options(options: argparse.Namespace) -> None:
    for name, rule in (
        ("workers", whole(0)),
        ("checkpoint_every", whole(1)),
        ("log_every", whole(1)),
        ("evaluate_every", optional(whole(1))),
        ("patience", optional(whole(1))),
    ):
        check(option(name), getattr(options, name), rule)
    chosen_model(options)
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give only one")
    for name in ("evaluate_every", "patience"):
        if getattr(options, name) is not None and options.val_split is None:
            raise ValueError(f"{option(name)} needs --val-split, the images to evaluate on")


# ---- The recipe ----------------------------------------------------------------------------------


def recipe_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe and of its model that were given as options."""
    return given_fields(options, *(config for config, _ in configs()))


def new_run(
    options: argparse.Namespace, given: dict[str, Any]
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe of a new run, and the checkpoint whose weights it starts from."""
    source = load_checkpoint(options.weights) if options.weights else None
    if source is None or options.recipe is not None:
        base = chosen_recipe(options)
    else:
        base = source["recipe"]
    return with_options(base, given, chosen_model(options)), source


def with_options(
    base: Recipe, given: dict[str, Any], model: DetectorConfig | None = None
) -> Recipe:
    """The recipe with its fields that were given, and with the model, where there is one, in place of its own.

    A ValueError names the options that were given, and the fields of the recipe otherwise.
    """
    network = model_for(base, model)
    fields = {f.name for f in dataclasses.fields(Recipe)}
    of_model = {name: value for name, value in given.items() if name not in fields}
    if "crop" in given and given["crop"] != base.crop:
        of_model.setdefault("min_size", None)  # crops keep their size unless told otherwise
        of_model.setdefault("letterbox", False)
    fills = network.min_size == network.max_size and of_model.get("letterbox", network.letterbox)
    if fills and network.ranges()["max_size"].holds(given.get("max_size")):
        of_model.setdefault("min_size", given["max_size"])  # images go on to fill the square
    own = {name: value for name, value in given.items() if name in fields}
    unknown = of_model.keys() - {f.name for f in dataclasses.fields(network)}
    if unknown:
        raise ValueError(f"{option(min(unknown))} is nothing that a {network.kind} has")
    try:
        return dataclasses.replace(base, **own, model=dataclasses.replace(network, **of_model))
    except ValueError as error:
        names = "|".join(given) or "$^"
        # What may be chosen and what was given are no names, though they may read as some.
        said, *values = re.split("( one of |, got )", str(error), maxsplit=1)
        named = re.sub(rf"\b({names})\b", lambda match: option(match[0]), said)
        raise ValueError("".join([named, *values])) from None


def check_same_recipe(
    options: argparse.Namespace, file: Path, recipe: Recipe, given: dict[str, Any]
) -> None:
    """Options given together with --resume must say what the checkpoint says."""
    base = recipe if options.recipe is None else find_recipe(options.recipe)
    base = with_model(base, num_classes=recipe.model.num_classes)
    changed = differences(recipe, with_options(base, given, chosen_model(options)))
    if changed:
        raise other_recipe(file, {option(n) if n in given else n: v for n, v in changed.items()})


# ---- The folder ----------------------------------------------------------------------------------


def claim(options: argparse.Namespace, held: contextlib.ExitStack) -> Path | None:
    """The checkpoint to go on from, if there is one; the folder is locked until `held` closes."""
    claim_folder(options.out)
    held.enter_context(locked(options.out))
    inputs = [Path(p) for p in (options.weights, options.recipe) if p is not None]
    claim_run(options.out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    return checkpoint_to_resume(options.out) if options.resume else None


def make_room(options: argparse.Namespace, recipe: Recipe) -> None:
    """For the checkpoint, the next one beside it, and the best; what they replace is there already."""
    names = (CHECKPOINT, *([BEST] if options.val_split else []))
    files = [path for path in (options.out / name for name in names) if path.is_file()]
    needed = (1 + len(names)) * expected_bytes(recipe) - sum(p.stat().st_size for p in files)
    claim_folder(options.out, max(needed, 0))


# ---- What train() is given -----------------------------------------------------------------------


def validator(options: argparse.Namespace, recipe: Recipe, data: CocoDataset) -> Validation | None:
    if options.val_split is None:
        return None
    val = open_split(options, options.val_split)
    ids = category_ids(data.categories, val)  # or a sentence, before the first step
    check_truth(val)
    if val.annotation_file == data.annotation_file and rank() == 0:
        print(
            f"{val.annotation_file} is what is trained on, too: the AP on it says nothing of other images",
            file=sys.stderr,
        )

    def evaluation(model: Detector) -> dict[str, float]:
        results = detect_all(model, recipe, ids, val)

        def figures() -> dict[str, float]:
            with contextlib.redirect_stdout(io.StringIO()):  # the table, which the log replaces
                return evaluate(val.coco, results or [], recipe.max_detections)

        return from_first(figures)

    return Validation(
        evaluation,
        options.evaluate_every or options.checkpoint_every,
        options.patience,
        fingerprint(val),
    )


def starter(file: Path, source: dict[str, Any], data: CocoDataset) -> Callable[[Detector], None]:
    def start(model: Detector) -> None:
        taken = take_weights(model, file, source, data.categories)
        if rank() == 0:
            print(taken)

    return start


def say_trained(out: Path, recipe: Recipe, validation: Validation | None) -> None:
    if validation is not None and validation.exhausted and validation.last_step < recipe.steps:
        print(
            f"stopped early after step {validation.last_step} of {recipe.steps}: "
            f"{validation.without_gain} evaluations brought no better AP"
        )
    print(f"trained: {out / CHECKPOINT}")
    if validation is not None:
        print(f"best: {out / BEST} (AP {validation.best:.3f} after step {validation.best_step})")


def progress_picture(
    recipe: Recipe, data: CocoDataset, out: Path, log: Log
) -> Callable[[int, Detector], None]:
    """Draws the detections on the first image beside its ground truth, for DIR/detections.png and the log."""

    def draw(step: int, model: Detector) -> None:
        image, truth = data[0]
        picture = out / PICTURE
        title = f"{data.image_path(0).name} after {step} steps"
        draw_comparison(picture, title, image, detect(model, recipe, image), truth)
        log.picture(step, picture)

    return draw
