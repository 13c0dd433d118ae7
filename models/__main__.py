"""The commands: python -m models train | evaluate | predict | export | study | configs | ..."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from focalops._library import CUDA_LIBRARY, LIBRARY
from models.bench import bench, table
from models.data import (
    CocoDataset,
    DataError,
    TrainingStream,
    collate,
    convert_voc,
    open_data,
    prepare_backbone_weights,
    read_image,
)
from models.deploy import Detector, disagreement, forms, milliseconds, to_batch
from models.distributed import process_group, rank
from models.draw import draw_comparison, draw_contact_sheet, draw_curves, draw_detections
from models.evaluate import (
    compare,
    detect,
    detect_all,
    evaluate,
    save_figures,
    save_results,
    to_results,
)
from models.log import Log
from models.losses import CLASSIFICATION_LOSSES
from models.retinanet import BACKBONES, BOX_LOSSES, TIMM, RetinaNet
from models.study import DISTRIBUTION, STUDIES, run_distribution, run_study, with_model
from models.train import (
    PRECISIONS,
    RECIPES,
    Recipe,
    TrainingStopped,
    keep_freed_memory,
    load_checkpoint,
    load_model,
    to_device,
    train,
    training_stream,
)

CHECKPOINT = "checkpoint.pt"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with process_group(options.device) as options.device:
            options.run(options)
    except (DataError, ValueError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({first_line(error)}); {LESS_MEMORY}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's allocator of a CPU's memory
            raise
        print(f"error: out of memory ({first_line(error)}); {LESS_MEMORY}", file=sys.stderr)
        return 1
    except URLError as error:
        print(
            f"error: the ImageNet weights could not be downloaded ({error.reason}); "
            "--no-pretrained does without",
            file=sys.stderr,
        )
        return 1
    return 0


LESS_MEMORY = (
    "lower --batch-size, --min-size or --crop, compute a batch in pieces with --accumulate, or use "
    "--precision bfloat16"
)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m models", description="Train and run the reference RetinaNet."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        return sub

    data_help = "a COCO-format folder, or 'trees', the built-in aerial photographs"

    sub = command(run_train, "train", "train a detector")
    sub.add_argument("--data", required=True, metavar="DIR", help=data_help)
    sub.add_argument("--split", default="train")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"where {CHECKPOINT} is written"
    )
    sub.add_argument(
        "--resume", action="store_true", help=f"go on from DIR/{CHECKPOINT}, with the recipe in it"
    )
    sub.add_argument("--workers", type=int, default=0, help="processes that load images")
    sub.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    sub.add_argument(
        "--log-every", type=int, default=20, metavar="STEPS", help="losses go to DIR/log.jsonl"
    )
    sub.add_argument(
        "--tensorboard",
        action="store_true",
        help="write them for TensorBoard too, with a picture at each checkpoint",
    )
    sub.add_argument(
        "--no-pretrained", action="store_true", help="start the backbone without ImageNet weights"
    )
    recipe = sub.add_argument_group("recipe", "what differs from the recipe of the data set")
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

    sub = command(run_evaluate, "evaluate", "pycocotools' table for a checkpoint")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--data", required=True, metavar="DIR", help=data_help)
    sub.add_argument("--split", default="val")
    sub.add_argument(
        "--out", type=Path, default=Path("results.json"), help="COCO results (default: %(default)s)"
    )
    sub.add_argument(
        "--max-detections", type=int, help="detections an image that count (default: the recipe's)"
    )

    sub = command(run_predict, "predict", "draw the detections on images")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("images", nargs="+", type=Path, help="files, folders or patterns")
    sub.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s"
    )
    sub.add_argument("--min-score", type=float, default=0.3)

    sub = command(run_export, "export", "package a checkpoint for C++, and time the ways to run it")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("detector.pt2"),
        metavar="FILE",
        help="runs on batches of any size (default: %(default)s)",
    )
    sub.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1344),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images that are timed (default: 800 1344)",
    )
    sub.add_argument("--batch-size", type=int, default=2, help="of those (default: %(default)s)")

    sub = command(
        run_study_command,
        "study",
        "a comparison of the paper's, with several seeds: table and picture",
    )
    sub.add_argument("name", choices=(*STUDIES, DISTRIBUTION))
    sub.add_argument("--data", default="trees", metavar="DIR", help=f"{data_help} (default: trees)")
    sub.add_argument("--split", default="train")
    sub.add_argument("--val-split", default="val")
    sub.add_argument("--recipe", help="as in train; the study changes what it compares")
    sub.add_argument("--steps", type=int, help="of each run (default: the recipe's)")
    sub.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("study"),
        metavar="DIR",
        help="runs that its record holds are not repeated (default: %(default)s)",
    )
    sub.add_argument("--no-pretrained", action="store_true", help="as in train")
    sub.add_argument(
        "--checkpoint", type=Path, help=f"of {DISTRIBUTION}: a trained model (default: trains one)"
    )
    sub.add_argument(
        "--images", type=int, default=64, help=f"of {DISTRIBUTION}: samples (default: %(default)s)"
    )

    sub = command(run_configs, "configs", "the recipes as JSON, which train --recipe takes")
    sub.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")

    sub = command(run_convert, "convert", "a Pascal VOC folder as a COCO-format folder")
    sub.add_argument("voc", type=Path, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = command(run_bench, "bench", "time the parts of a training step beside torchvision's")
    sub.add_argument("--model", choices=BENCH_MODELS, default=BENCH_MODELS[0])
    sub.add_argument(
        "--data", metavar="DIR", help=f"{data_help} (default: noise, 8 boxes an image)"
    )
    sub.add_argument("--split", default="train")
    sub.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, or what those of --data are resized to (default: 800 1333)",
    )
    sub.add_argument("--batch-size", type=int, default=1)
    sub.add_argument("--precision", choices=PRECISIONS, default="float32")
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")

    sub = command(run_demo, "demo", "train on trees, evaluate, draw, time the kernels")
    sub.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s"
    )
    sub.add_argument("--seed", type=int, default=0)
    return top


def find_recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    try:
        return Recipe.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(
            f"the recipe must be one of {', '.join(RECIPES)} or a file, got {name!r}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the file {name} is no recipe ({first_line(error)})") from None


def run_configs(options: argparse.Namespace) -> None:
    recipes = {name: dataclasses.asdict(find_recipe(name)) for name in options.names or RECIPES}
    only_one = len(options.names) == 1
    print(json.dumps(recipes[options.names[0]] if only_one else recipes, indent=1))


def run_train(options: argparse.Namespace) -> None:
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
    data = open_data(options.data, options.split)
    if data.left_out and rank() == 0:
        ids = ", ".join(map(str, data.left_out[:10])) + (", ..." if len(data.left_out) > 10 else "")
        print(
            f"{data.annotation_file}: {len(data.left_out)} boxes without an area inside their image "
            f"are left out (annotations {ids})",
            file=sys.stderr,
        )
    if not options.resume:
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


def run_evaluate(options: argparse.Namespace) -> None:
    model, recipe, categories = load_model(options.checkpoint, options.device)
    if options.max_detections is not None:
        recipe = dataclasses.replace(recipe, max_detections=options.max_detections)
    data = open_data(options.data, options.split)
    results = detect_all(model, recipe, categories, data)
    if results is None:
        return  # rank 0 has them
    save_results(options.out, results)
    evaluation = compare(data.coco, results, recipe.max_detections)
    evaluation.summarize()
    rows = evaluation.by_category(data.categories)
    print("\n     AP   AP50  category")
    for row in rows:
        print(f"{row['AP']:7.3f} {row['AP50']:6.3f}  {row['name']}")
    figures, curves = (
        options.out.with_name(options.out.stem + suffix)
        for suffix in ("-figures.json", "-curves.png")
    )
    save_figures(figures, evaluation.figures(), rows)
    draw_curves(curves, f"{options.checkpoint.parent.name}, {data.annotation_file.name}", rows)
    print(f"\nresults: {options.out}, {figures}, {curves}")


def run_predict(options: argparse.Namespace) -> None:
    model, recipe, categories = load_model(options.checkpoint, options.device)
    pictures = []
    for path in find_images(options.images):
        image = read_image(path)
        out = options.out / f"{path.stem}.png"
        draw_detections(
            out,
            path.name,
            image,
            detect(model, recipe, image),
            list(categories.values()),
            options.min_score,
        )
        pictures.append(out)
        print(out)
    if len(pictures) > 1:
        sheet = options.out / "contact-sheet.png"
        draw_contact_sheet(sheet, pictures)
        print(sheet)


@torch.no_grad()
def run_export(options: argparse.Namespace) -> None:
    model, _, _ = load_model(options.checkpoint, options.device)
    detector = Detector(model)
    noise = torch.rand(options.batch_size, 3, *options.size, device=options.device)
    images, sizes = to_batch(list(noise))
    ways = forms(detector, images, sizes, options.out)
    expected = detector(images, sizes)
    print(f"{options.batch_size} images of {images.shape[2]} x {images.shape[3]}, milliseconds:")
    for name, run in ways.items():
        difference = disagreement(run(images, sizes), expected)
        print(
            f"{milliseconds(run, images, sizes):9.1f}  {name}{f' ({difference})' if difference else ''}"
        )
    libraries = [LIBRARY, *([CUDA_LIBRARY] if images.is_cuda else [])]
    print(
        f"without Python: models/cpp/detect {options.out} IMAGE.ppm {' '.join(map(str, libraries))}"
    )


def run_study_command(options: argparse.Namespace) -> None:
    keep_freed_memory()
    recipe = find_recipe(options.recipe or ("trees" if options.data == "trees" else "coco"))
    data, val = (open_data(options.data, s) for s in (options.split, options.val_split))
    recipe = with_model(recipe, num_classes=len(data.categories))
    if options.steps is not None:
        recipe = dataclasses.replace(
            recipe, steps=options.steps, warmup_steps=min(recipe.warmup_steps, options.steps // 10)
        )
    pretrained = not options.no_pretrained
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
            options.images,
            options.device,
        )
    print(f"\n{table.read_text()}\n{table.with_suffix('.png')}")


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are, the images of folders, what patterns match."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            of_folder = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not of_folder:
                raise DataError(f"the folder {path} holds no images")
            found += of_folder
        elif not path.exists() and glob.has_magic(str(path)):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"no file matches {path}")
            found += map(Path, matches)
        else:
            found.append(path)
    return found


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def run_convert(options: argparse.Namespace) -> None:
    for split, count in convert_voc(options.voc, options.out).items():
        print(f"{options.out / split}.json: {count} images")


BENCH_MODELS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")


def run_bench(options: argparse.Namespace) -> None:
    keep_freed_memory()
    num_classes = 91
    if options.data:
        data = open_data(options.data, options.split)
        num_classes = len(data.categories)
        start = time.perf_counter()
        stream = TrainingStream(data, options.batch_size, seed=0)
        samples = [stream[n] for n in range(options.batch_size)]
        loading = (time.perf_counter() - start) * 1000
        print(f"data: {loading:.1f} ms for {options.batch_size} images in one process")
    else:
        height, width = options.size
        corners = torch.rand(options.batch_size, 8, 2) * torch.tensor([width, height]) * 0.7
        sides = torch.rand(options.batch_size, 8, 2) * torch.tensor([width, height]) * 0.25 + 4
        boxes, labels = torch.cat([corners, corners + sides], dim=2), torch.arange(8)
        samples = [(torch.rand(3, height, width), {"boxes": b, "labels": labels}) for b in boxes]
    images, targets = to_device(collate(samples), options.device)
    figures, peaks = bench(
        options.model,
        images,
        targets,
        num_classes,
        options.size,
        options.device,
        options.precision,
        options.rounds,
    )
    print(table(figures, peaks))
    if options.out:
        settings = {
            name: getattr(options, name)
            for name in ("model", "data", "size", "batch_size", "precision", "rounds", "device")
        }
        record = {**settings, "torch": torch.__version__, "ms": figures, "peak_gib": peaks}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"figures: {options.out}")


def run_demo(options: argparse.Namespace) -> None:
    from benchmarks import quick_table

    keep_freed_memory()
    start = time.monotonic()
    recipe = dataclasses.replace(RECIPES["trees"], seed=options.seed)
    prepare_backbone_weights(recipe.model.backbone)
    data, val = open_data("trees", "train"), open_data("trees", "val")
    backbone, crowns = recipe.model.backbone, len(data.coco.anns)
    print(f"Training RetinaNet ({backbone}) on an aerial photograph with {crowns} tree crowns.")
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
    print(f"Training and evaluation took {(time.monotonic() - start) / 60:.1f} minutes.\n")
    quick_table()


if __name__ == "__main__":
    sys.exit(main())
