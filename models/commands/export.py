"""python -m models export: package a checkpoint for C++, and time the ways to run it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from focalops._library import CUDA_LIBRARY, LIBRARY

from ..checkpoint import load_model
from ..deploy import StaticDetector, disagreement, forms, milliseconds
from ..outputs import claim
from ..ranges import check, whole

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
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    for side in options.size:
        check("--size", side, whole(1))
    check("--batch-size", options.batch_size, whole(1))
    if options.out.suffix != ".pt2":
        raise ValueError(f"--out must be a file ending in .pt2, got {str(options.out)!r}")
    claim([options.out], overwrite=options.overwrite, inputs=[options.checkpoint])
    model, _, _ = load_model(options.checkpoint, options.device)
    detector = StaticDetector(model)
    noise = torch.rand(options.batch_size, 3, *options.size, device=options.device)
    batch = detector.to_batch(list(noise))
    inputs = detector.prepare(*batch)
    ways = forms(detector, *batch, options.out)
    expected = detector(*inputs)
    height, width = inputs[0].shape[-2:]
    print(f"{options.batch_size} images of {height} x {width}, milliseconds:")
    for name, run in ways.items():
        difference = disagreement(run(*inputs), expected)
        print(
            f"{milliseconds(run, *inputs):9.1f}  {name}{f' ({difference})' if difference else ''}"
        )
    libraries = [LIBRARY, *([CUDA_LIBRARY] if noise.is_cuda else [])]
    print(f"without Python, once `make -C {cpp()} PYTHON={sys.executable} OUT=$PWD` built detect:")
    print(f"  ./detect {options.out} IMAGE.ppm {' '.join(map(str, libraries))}")
    if detector.size_limits is not None:
        least, most = detector.size_limits
        print(
            f"detect resizes images: the shorter side to {least} unless the longer one would exceed "
            f"{most}; other callers do so before the graph, as StaticDetector.prepare does"
        )


def cpp() -> Path:
    """The folder of detect.cpp, as it is reached from here."""
    folder = Path(__file__).resolve().parents[1] / "cpp"
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
