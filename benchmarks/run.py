"""The command, and the short table that `make demo` ends with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import (
    assigners,
    box_losses,
    boxes,
    detections,
    distances,
    focal_loss,
    fusion,
    loss_step,
    matching,
    nms,
)
from benchmarks.busy import run_busy
from benchmarks.harness import OURS, Case, copy_gb_per_s, run_all, run_case, write_record
from focalops.info import describe

OPS = {
    "focal_loss": focal_loss.cases,
    "box_iou": boxes.iou_cases,
    "box_coding": boxes.coding_cases,
    "box_losses": box_losses.cases,
    "matching": matching.cases,
    "assigners": assigners.cases,
    "distances": distances.cases,
    "fuse_features": fusion.cases,
    "loss_step": loss_step.cases,
    "nms": nms.cases,
    "detections": detections.cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the record as JSON, and a picture beside it"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile")
    parser.add_argument(
        "--busy",
        type=int,
        metavar="NUMBER",
        help="time each op alone and beside that many processes that keep the cores busy; no memory, no picture",
    )
    arguments = parser.parse_args()
    for op in arguments.ops:
        if op not in OPS:
            parser.error(f"OP must be one of {', '.join(OPS)}, got {op!r}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if arguments.busy is not None and arguments.busy < 1:
        parser.error(f"--busy must be at least 1, got {arguments.busy}")
    wanted = cases(arguments.ops or list(OPS), device, arguments.quick)
    record = run_busy(wanted, device, arguments.busy) if arguments.busy else run_all(wanted, device)
    if arguments.out:
        write_record(record, arguments.out)
        if not arguments.busy and (not arguments.ops or "focal_loss" in arguments.ops):
            focal_loss.draw(record, arguments.out.with_suffix(".png"))


def cases(ops: list[str], device: torch.device, quick: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    for op in ops:
        yield from OPS[op](device, quick)


def quick_table() -> None:
    """One line an op: milliseconds here and in plain PyTorch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copy = copy_gb_per_s(device)
    print(f"{describe(device)['device']}: focalops and the same in plain PyTorch, milliseconds")
    print(f"{'':46}{OURS:>10}{'PyTorch':>10}{'':>9}")
    for case in cases(list(OPS), device, quick=True):
        row = run_case(case, device, copy)
        ours, theirs = row.timings[OURS], row.timings["reference"]
        name = f"{row.op}, {row.size}"
        print(
            f"{name:46}{ours.median_ms:10.2f}{theirs.median_ms:10.2f}{row.speedup('reference'):8.1f}x"
        )
