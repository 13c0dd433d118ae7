"""python -m models predict: the detections in images, drawn and as data."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from pathlib import Path

from PIL import Image

from ..checkpoint import load_model
from ..commands.common import add_large_images
from ..data import IMAGE_SUFFIXES, DataError, list_files
from ..data.images import decode
from ..draw import draw_contact_sheet, draw_detections, draw_tile, is_ours
from ..evaluate import detect
from ..outputs import claim, claim_folder, locked
from ..predictions import FILES, Found, rounded, writers
from ..ranges import check, real

HELP = "the detections in images, drawn and as data"
DESCRIPTION = (
    "Draws the detections on images, and writes them as JSON, CSV or COCO results. A picture has the name of its "
    "image, with .png behind it unless it ends so, in the subfolder that the image has below the folder common to all. "
    "Images that cannot be read are left out, and the exit status is then 1. Memory: about 16 bytes a pixel "
    "of the largest image, beside the model's."
)
WHEN_INTERRUPTED = "pictures that are drawn stay, no data is written"
SHEET = "contact-sheet.png"
TILES_A_SHEET = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, help="files, folders or patterns")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.3,
        help="what pictures and every format leave out: scores not above it (default: %(default)s; the model "
        "itself leaves out those not above its recipe's score_threshold)",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=[],
        choices=tuple(FILES),
        help="data to write beside the pictures: json: predictions.json, an image a line; csv: predictions.csv, a "
        "detection a line; coco: coco-results.json, and coco-images.json with the images' ids. Boxes are "
        "x1, y1, x2, y2 in pixels, in coco x, y, width, height",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write data alone")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace pictures that predict made and the files of --format",
    )
    add_large_images(parser)


def run(options: argparse.Namespace) -> None:
    check("--min-score", options.min_score, real(0, 1))
    if options.no_pictures and not options.format:
        raise ValueError("--no-pictures needs a --format, or nothing would be written")
    files = find_images(options.images)
    claim_folder(options.out)
    with locked(options.out):
        predict(options, files)


def predict(options: argparse.Namespace, files: list[Path]) -> None:
    names = picture_names(files)
    pictures = {} if options.no_pictures else {f: options.out / n for f, n in names.items()}
    options.format = [*dict.fromkeys(options.format)]
    data = [options.out / name for chosen in options.format for name in FILES[chosen]]
    inputs = [options.checkpoint, *files]
    claim_pictures([*pictures.values(), *sheets(options, len(files))], options.overwrite, inputs)
    claim(data, overwrite=options.overwrite, inputs=inputs)

    model, recipe, categories = load_model(options.checkpoint, options.device)
    labels = list(categories.values())
    root = common_folder(files)
    tiles = Tiles(sheets(options, len(files)))
    skipped = 0
    with writers(options.out, options.format, categories, options.min_score) as add:
        for number, path in enumerate(files, start=1):
            try:
                image = decode(path, options.large_images)  # not kept: none is read twice
                try:
                    found = detect(model, recipe, image)
                except DataError as error:
                    raise DataError(f"{path}: {error}") from None
            except DataError as error:
                if len(files) == 1:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                skipped += 1
                continue
            name = relative(path, root)
            height, width = image.shape[-2:]
            detections = rounded(found, categories, options.min_score)
            add(Found(number, name, width, height, detections))
            if not options.no_pictures:
                drawn = (image, found, labels, options.min_score)
                draw_detections(pictures[path], name, *drawn)
                print(pictures[path], flush=True)
                tiles.add(draw_tile(name, *drawn))
        tiles.finish()
    for path in data:
        print(path, flush=True)
    if skipped:
        raise DataError(f"{skipped} of {len(files)} images were left out")


# ---- Files ---------------------------------------------------------------------------------------


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are, the images of folders, what patterns match; each once."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            of_folder = list_files(path, IMAGE_SUFFIXES)
            if not of_folder:
                raise DataError(f"the folder {path} holds no images")
            found += of_folder
        elif not path.exists() and glob.has_magic(str(path)):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise DataError(f"no file matches {path}")
            found += [match for match in matches if not match.is_dir()]
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"the image {path} does not exist")
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def common_folder(files: list[Path]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])


def relative(path: Path, root: str) -> str:
    return os.path.relpath(os.path.abspath(path), root)


def picture_names(files: list[Path]) -> dict[Path, str]:
    """Of each file the name of its picture, different from all others' and the contact sheets'.

    It is the path below the folder that all files lie in, and .png behind it unless it ends so: frame0.jpg.png
    and frame0.png lie beside each other.
    """
    root = common_folder(files)
    taken = set(sheet_names(len(files)))
    names: dict[Path, str] = {}
    # Those that keep their names come first, so that no other takes one.
    for path in sorted(files, key=lambda path: path.suffix.lower() != ".png"):
        name = relative(path, root)
        if path.suffix.lower() != ".png":
            name += ".png"
        while name in taken:
            name += ".png"
        taken.add(name)
        names[path] = name
    return names


def sheet_names(count: int) -> list[str]:
    """contact-sheet.png, and with many images contact-sheet-2.png, ..."""
    stem, _, ending = SHEET.rpartition(".")
    more = range(2, -(-count // TILES_A_SHEET) + 1)
    return [SHEET, *(f"{stem}-{number}.{ending}" for number in more)]


def sheets(options: argparse.Namespace, count: int) -> list[Path]:
    if options.no_pictures or count < 2:
        return []
    return [options.out / name for name in sheet_names(count)]


def claim_pictures(paths: list[Path], overwrite: bool, inputs: list[Path]) -> None:
    """As claim; --overwrite replaces pictures that predict made, and no photograph of the same name."""
    claim(paths, overwrite=overwrite, inputs=inputs)
    for path in paths:
        if path.exists() and not is_ours(path):
            raise DataError(
                f"{path} is no picture that predict made, and stays; choose another --out"
            )


# ---- Output --------------------------------------------------------------------------------------


class Tiles:
    """Contact sheets, written as they fill, so that no more than one is held."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.tiles = iter(paths), list[Image.Image]()
        self.wanted = bool(paths)

    def add(self, tile: Image.Image) -> None:
        if self.wanted:
            self.tiles.append(tile)
            if len(self.tiles) == TILES_A_SHEET:
                self.finish()

    def finish(self) -> None:
        if self.tiles:
            path = next(self.paths)
            draw_contact_sheet(path, self.tiles)
            self.tiles.clear()
            print(path, flush=True)
