"""Detections in a service: one image at a time, and several Python threads at once, `python -m benchmarks.service`."""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.detections import contestants_of
from benchmarks.harness import OURS, Contestant
from focalops.info import describe

SIZE, CLASSES = (640, 640), 80
REQUESTS, REQUESTS_OF_TURN = 1000, 50
SECONDS = 3.0  # of each number of Python threads
PYTHON_THREADS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu")
    contestants = contestants_of(1, CLASSES, "trained", SIZE, device)
    del contestants["reference"]
    record: dict[str, Any] = {**describe(device), "latency": [], "throughput": []}
    print(f"{record['device']}, torch {record['torch']}; one image of 640 x 640, K = {CLASSES}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, milliseconds in latencies(contestants).items():
            p50, p99 = (statistics.quantiles(milliseconds, n=100)[i] for i in (49, 98))
            row = {"torch_threads": threads, "name": name, "p50_ms": p50, "p99_ms": p99}
            record["latency"].append(row)
            print(f"{threads} threads of torch, {name:12} p50 {p50:7.3f} ms, p99 {p99:7.3f} ms")
    torch.set_num_threads(1)
    for count in PYTHON_THREADS:
        for name, run in contestants.items():
            rate = requests_per_second(run, count)
            record["throughput"].append({"python_threads": count, "name": name, "per_second": rate})
            print(f"{count} Python threads, {name:12} {rate:8.1f} images a second", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def latencies(contestants: dict[str, Contestant]) -> dict[str, list[float]]:
    """Milliseconds of each request; the contestants take turns."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    while len(taken[OURS]) < REQUESTS:
        for name, run in contestants.items():
            run()
            for _ in range(REQUESTS_OF_TURN):
                begin = time.perf_counter()
                run()
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def requests_per_second(run: Contestant, count: int) -> float:
    """Of so many Python threads, each with one of torch's."""
    finished = [0] * count
    start = threading.Barrier(count + 1)
    end = threading.Event()

    def serve(index: int) -> None:
        torch.set_num_threads(1)
        run()
        start.wait()
        while not end.is_set():
            run()
            finished[index] += 1

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    time.sleep(SECONDS)
    end.set()
    for thread in threads:
        thread.join()
    return sum(finished) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
