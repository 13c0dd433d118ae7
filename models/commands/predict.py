"""python -m models predict: draw the detections on images."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from models.checkpoint import load_model
from models.commands.common import add_large_images
from models.data import DataError, read_image
from models.draw import draw_contact_sheet, draw_detections
from models.evaluate import detect

HELP = "draw the detections on images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, help="files, folders or patterns")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--min-score", type=float, default=0.3)
    add_large_images(parser)


def run(options: argparse.Namespace) -> None:
    model, recipe, categories = load_model(options.checkpoint, options.device)
    pictures = []
    for path in find_images(options.images):
        image = read_image(path, options.large_images)
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
