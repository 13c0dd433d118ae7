"""python -m models export: package a checkpoint for C++, and time the ways to run it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from focalops._library import CUDA_LIBRARY, LIBRARY
from models.checkpoint import load_model
from models.deploy import Detector, disagreement, forms, milliseconds, to_batch

HELP = "package a checkpoint for C++, and time the ways to run it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("detector.pt2"),
        metavar="FILE",
        help="runs on batches of any size (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1344),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images that are timed (default: 800 1344)",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="of those (default: %(default)s)")


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
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
