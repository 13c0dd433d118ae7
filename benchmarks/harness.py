"""Times an op beside its rivals: they first have to agree, then take turns, so that noise meets all of them alike."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from focalops.info import describe

# The profiler counts bytes here, and has nothing to say beside that.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Contestant = Callable[[], Any]

OURS = "focalops"
SECONDS = 1.5  # for one contestant of one case
MIN_RUNS, MAX_RUNS, RUNS_OF_TURN = 4, 200, 2
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


@dataclass
class Case:
    """One op on one size. `least_bytes` is the traffic that no implementation can avoid."""

    op: str
    size: str
    least_bytes: int
    contestants: dict[str, Contestant]
    agree: Callable[[Any, Any], None]  # raises where two results differ


@dataclass
class Timing:
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float  # of the least traffic
    of_copy: float  # gb_per_s / the device's own copy in this run
    peak_extra_mb: float


@dataclass
class Row:
    op: str
    size: str
    least_mb: float
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def speedup(self, rival: str) -> float:
        return self.timings[rival].median_ms / self.timings[OURS].median_ms


def agreeing(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants, whose results agree with ours, and why another one cannot take part."""
    contestants, failures = dict(case.contestants), {}
    ours = contestants[OURS]()
    for name, run in case.contestants.items():
        if name == OURS:
            continue
        try:
            theirs = run()
        except torch.OutOfMemoryError:
            failures[name] = "out of memory"
            del contestants[name]
            continue
        case.agree(ours, theirs)
        del theirs
    return contestants, failures


def run_case(case: Case, device: torch.device, copy_gb_per_s: float) -> Row:
    contestants, failures = agreeing(case)
    row = Row(case.op, case.size, case.least_bytes / 1e6, failures=failures)
    peaks = {name: peak_extra_bytes(run, device) for name, run in contestants.items()}
    for name, seconds in take_turns(contestants, device).items():
        p20, median, p80 = quantiles(seconds)
        rate = case.least_bytes / median / 1e9
        row.timings[name] = Timing(
            median * 1e3, p20 * 1e3, p80 * 1e3, rate, rate / copy_gb_per_s, peaks[name] / 1e6
        )
    return row


def take_turns(contestants: dict[str, Contestant], device: torch.device) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    remaining = dict(contestants)
    while remaining:
        for name, run in list(remaining.items()):
            taken = times[name]
            # Not timed: memory that another one has freed may have gone back to the host of a virtual
            # machine, and getting it again can take many times as long as the op.
            run()
            taken += [seconds_of(run, device) for _ in range(RUNS_OF_TURN)]
            if len(taken) >= MAX_RUNS or (len(taken) >= MIN_RUNS and sum(taken) > SECONDS):
                del remaining[name]
    return times


def seconds_of(run: Contestant, device: torch.device) -> float:
    if device.type == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return (
        ordered[len(ordered) // 5],
        statistics.median(ordered),
        ordered[(len(ordered) * 4) // 5],
    )


def peak_extra_bytes(run: Contestant, device: torch.device) -> int:
    """The most memory that torch had allocated during a run above what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def copy_gb_per_s(device: torch.device) -> float:
    """What copying a large tensor reads plus writes a second."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * size / statistics.median(times) / 1e9


def run_all(cases: Iterator[Case], device: torch.device) -> dict[str, Any]:
    """Prints a table as it grows; returns the record."""
    copy = copy_gb_per_s(device)
    record = {**describe(device), "copy_gb_per_s": copy, "rows": []}
    print(f"{record['device']}, torch {record['torch']}; copy {copy:.1f} GB/s")
    for case in cases:
        row = run_case(case, device, copy)
        print_row(row)
        record["rows"].append(asdict(row))
    return record


def print_row(row: Row) -> None:
    print(f"\n{row.op}  {row.size}  (at least {row.least_mb:.1f} MB)")
    print(
        f"  {'':24}{'median ms':>11}{'p20':>9}{'p80':>9}{'GB/s':>8}{'of copy':>9}{'extra MB':>10}"
    )
    for name, t in row.timings.items():
        beside = "" if name == OURS else f"   {row.speedup(name):.1f}x slower"
        print(
            f"  {name:24}{t.median_ms:11.3f}{t.p20_ms:9.3f}{t.p80_ms:9.3f}{t.gb_per_s:8.1f}"
            f"{t.of_copy:9.3f}{t.peak_extra_mb:10.1f}{beside}",
            flush=True,
        )
    for name, reason in row.failures.items():
        print(f"  {name:24}{reason:>11}")


def write_record(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
