"""python -m models configs: the recipes as JSON, which train --recipe takes."""

from __future__ import annotations

import argparse
import json

from ..commands.common import find_recipe
from ..recipes import RECIPES

HELP = "the recipes as JSON, which train --recipe takes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")


def run(options: argparse.Namespace) -> None:
    recipes = {name: find_recipe(name).to_dict() for name in options.names or RECIPES}
    only_one = len(options.names) == 1
    print(json.dumps(recipes[options.names[0]] if only_one else recipes, indent=1))
