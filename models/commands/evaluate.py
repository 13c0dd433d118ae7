"""python -m models evaluate: pycocotools' table for a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from models.checkpoint import load_model
from models.commands.common import add_data_arguments, open_split
from models.draw import draw_curves
from models.evaluate import compare, detect_all, save_figures, save_results

HELP = "pycocotools' table for a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    add_data_arguments(parser, split="val")
    parser.add_argument(
        "--out", type=Path, default=Path("results.json"), help="COCO results (default: %(default)s)"
    )
    parser.add_argument(
        "--max-detections", type=int, help="detections an image that count (default: the recipe's)"
    )


def run(options: argparse.Namespace) -> None:
    model, recipe, categories = load_model(options.checkpoint, options.device)
    if options.max_detections is not None:
        recipe = dataclasses.replace(recipe, max_detections=options.max_detections)
    data = open_split(options, options.split)
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
