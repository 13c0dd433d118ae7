"""python -m models check: reads a whole data set and says what is wrong with it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from ..commands.common import DATA_HELP, add_image_arguments
from ..data import DataError
from ..data.check import Report, check_data
from ..outputs import claim, write_whole

HELP = "read a whole data set, images included, and say what is wrong with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help=DATA_HELP)
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="default: all that DIR has")
    add_image_arguments(parser)
    parser.add_argument(
        "--workers", type=int, default=2, help="threads that read images (default: %(default)s)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything there, where the screen shortens",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report there")


def run(options: argparse.Namespace) -> None:
    if options.json is not None:
        claim([options.json], overwrite=options.overwrite)
        if options.json.exists() and not is_report(options.json):
            raise DataError(f"{options.json} is no report that check wrote, and stays")
    report = check_data(
        options.data,
        options.split,
        options.images,
        large_images=options.large_images,
        workers=options.workers,
    )
    print_report(report)
    if options.json is not None:
        write_whole(options.json, json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    if report.wrong:
        raise DataError(f"{options.data} needs mending before it is trained on or evaluated with")


def is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    fields = {field.name for field in dataclasses.fields(Report)}
    return isinstance(content, dict) and content.keys() == fields


def print_report(report: Report, limit: int = 20) -> None:
    for split, faults in report.faults.items():
        print(f"{split}: {report.summary.get(split, 'cannot be read')}")
        for fault in faults[:limit]:
            print(f"  wrong: {fault}")
        if faults[limit:]:
            print(f"  wrong: {len(faults) - limit} more such faults")
        for finding in report.findings[split]:
            print(f"  {'wrong' if finding.wrong else 'odd'}: {finding}")
    for finding in report.across:
        print(f"between splits, {'wrong' if finding.wrong else 'odd'}: {finding}")
    if not report.wrong:
        print("nothing stands against training on it")
