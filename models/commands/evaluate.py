"""python -m models evaluate: pycocotools' table for a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

from ..checkpoint import load_model
from ..commands.common import add_data_arguments, files_of, open_split
from ..commands.flags import add_fields, check_given, given_fields
from ..data import DataError
from ..draw import draw_curves
from ..evaluate import category_ids, compare, detect_all, save_figures, save_results
from ..outputs import claim
from ..recipes import RANGES, Recipe

HELP = "pycocotools' table for a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    add_data_arguments(parser, split="val")
    parser.add_argument(
        "--out", type=Path, default=Path("results.json"), help="COCO results (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results, and their figures and curves beside them",
    )
    add_fields(parser, Recipe, RANGES, ["max_detections"])


def run(options: argparse.Namespace) -> None:
    given = given_fields(options, Recipe)
    check_given(given, RANGES)
    figures, curves = (
        options.out.with_name(options.out.stem + suffix)
        for suffix in ("-figures.json", "-curves.png")
    )
    model, recipe, categories = load_model(options.checkpoint, options.device)
    recipe = dataclasses.replace(recipe, **given)
    data = open_split(options, options.split)
    if len(data) == 0:
        raise DataError(f"{data.annotation_file} has no images")
    # As COCO publishes its test sets: there is nothing to compare the results with.
    has_truth = data.has_annotations
    outputs = [options.out, figures, curves] if has_truth else [options.out]
    inputs = itertools.chain([options.checkpoint], files_of(data))
    claim(outputs, overwrite=options.overwrite, inputs=inputs)
    results = detect_all(model, recipe, category_ids(categories, data), data)
    if results is None:
        return  # rank 0 has them
    save_results(options.out, results)
    if not has_truth:
        print(f"{data.annotation_file} has no annotations: there is nothing to compare with")
        print(f"results: {options.out}")
        return
    evaluation = compare(data.coco, results, recipe.max_detections)
    evaluation.summarize()
    rows = evaluation.by_category(data.categories)
    print("\n     AP   AP50  category")
    for row in rows:
        name = " ".join(row["name"].split())  # one may hold line breaks
        print(f"{row['AP']:7.3f} {row['AP50']:6.3f}  {name}")
    save_figures(figures, evaluation.figures(), rows)
    draw_curves(curves, f"{options.checkpoint.parent.name}, {data.annotation_file.name}", rows)
    print(f"\nresults: {options.out}, {figures}, {curves}")
