"""python -m models convert: a Pascal VOC folder as a COCO-format folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..data import read_voc, write_conversion

HELP = "a Pascal VOC folder as a COCO-format folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("voc", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier conversion wrote"
    )


def run(options: argparse.Namespace) -> None:
    conversion = read_voc(options.voc)
    for note in conversion.notes:
        print(note, file=sys.stderr)
    write_conversion(conversion, options.out, overwrite=options.overwrite)
    for split, dataset in conversion.splits.items():
        print(f"{options.out / split}.json: {len(dataset['images'])} images")
