"""python -m models bench: time the parts of a training step beside torchvision's or effdet's."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from focalops.info import describe

from ..bench import BENCH_MODELS, bench, table
from ..commands.common import DATA_HELP, files_of
from ..config import DetectorConfig
from ..data import TrainingStream, collate, open_data
from ..detectors import DETECTORS, PUBLISHED, named
from ..outputs import claim, write_whole
from ..ranges import check, whole
from ..recipes import PRECISIONS
from ..train import keep_freed_memory, to_device

HELP = "time the parts of a training step beside torchvision's or effdet's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        default=BENCH_MODELS[0],
        help=f"beside torchvision's {', '.join(BENCH_MODELS)}, beside effdet's, where it is installed, "
        f"{', '.join(name for name in PUBLISHED if name not in BENCH_MODELS)}, alone {', '.join(DETECTORS)} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help=f"{DATA_HELP} (default: noise, 8 boxes an image)"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, or what those of --data are resized to (default: 800 1333, or the square of the "
        "model's letterbox)",
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")


def sizes_of(config: DetectorConfig) -> tuple[int, int]:
    return (config.max_size, config.max_size) if config.letterbox else (800, 1333)


def run(options: argparse.Namespace) -> None:
    config = named(options.model)
    options.size = options.size or sizes_of(config)
    for side in options.size:
        check("--size", side, whole(1))
    check("--batch-size", options.batch_size, whole(1))
    check("--rounds", options.rounds, whole(1))
    keep_freed_memory()
    num_classes = 91
    data = open_data(options.data, options.split) if options.data else None
    if options.out:
        claim(
            [options.out],
            overwrite=options.overwrite,
            inputs=() if data is None else files_of(data),
        )
    if data is not None:
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
    figures, memory = bench(
        options.model,
        images,
        targets,
        num_classes,
        options.size,
        options.device,
        options.precision,
        options.rounds,
    )
    print(table(figures, memory))
    if options.out:
        settings = {
            name: getattr(options, name)
            for name in ("model", "data", "size", "batch_size", "precision", "rounds")
        }
        where = describe(torch.device(options.device))
        record = {**settings, **where, "ms": figures, "gib": memory}
        write_whole(options.out, json.dumps(record, indent=1) + "\n")
        print(f"figures: {options.out}")
