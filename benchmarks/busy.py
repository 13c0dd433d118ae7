"""What other work on the cores costs an op: its time beside busy processes over its time alone, beside that of a copy."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch

from benchmarks.harness import OURS, Case, agreeing, take_turns
from focalops.info import describe

COPY = "copy"


class BusyProcesses:
    """Processes that do nothing but take time, while they are resumed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> BusyProcesses:
        spin = [sys.executable, "-S", "-c", "while True: pass"]
        self.processes = [subprocess.Popen(spin) for _ in range(self.count)]
        self.pause()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)


@dataclass
class Slowdown:
    alone_ms: float
    busy_ms: float

    @property
    def factor(self) -> float:
        return self.busy_ms / self.alone_ms


def run_busy(cases: Iterator[Case], device: torch.device, count: int) -> dict[str, Any]:
    """Prints a table as it grows; returns the record."""
    record = {**describe(device), "busy_processes": count, "rows": []}
    print(f"{record['device']}, torch {record['torch']}; alone, and beside {count} busy processes")
    with BusyProcesses(count) as others:
        for case in cases:
            slowdowns = slowdowns_of(case, device, others)
            print_slowdowns(case, slowdowns)
            row = {"op": case.op, "size": case.size}
            timings = {name: asdict(slowdown) for name, slowdown in slowdowns.items()}
            record["rows"].append({**row, "timings": timings})
    return record


def slowdowns_of(case: Case, device: torch.device, others: BusyProcesses) -> dict[str, Slowdown]:
    """Of each contestant, and of a copy that moves the bytes that the op cannot avoid."""
    contestants, _ = agreeing(case)
    source = torch.zeros(max(1, case.least_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    contestants[COPY] = lambda: target.copy_(source)
    alone = take_turns(contestants, device)
    others.resume()
    busy = take_turns(contestants, device)
    others.pause()
    return {
        name: Slowdown(1e3 * statistics.median(alone[name]), 1e3 * statistics.median(busy[name]))
        for name in contestants
    }


def print_slowdowns(case: Case, slowdowns: dict[str, Slowdown]) -> None:
    print(f"\n{case.op}  {case.size}")
    print(f"  {'':24}{'alone, ms':>11}{'busy, ms':>11}{'slowdown':>10}")
    of_copy = slowdowns[COPY].factor
    for name, slowdown in slowdowns.items():
        beside = f"   {slowdown.factor / of_copy:.2f} of a copy's" if name == OURS else ""
        print(
            f"  {name:24}{slowdown.alone_ms:11.3f}{slowdown.busy_ms:11.3f}{slowdown.factor:9.1f}x{beside}",
            flush=True,
        )
