"""python -m models convert: a Pascal VOC folder as a COCO-format folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.data import convert_voc

HELP = "a Pascal VOC folder as a COCO-format folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("voc", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def run(options: argparse.Namespace) -> None:
    for split, count in convert_voc(options.voc, options.out).items():
        print(f"{options.out / split}.json: {count} images")
