"""Runs focalops once on every case of the benchmarks, for a profiler to watch: `python -m benchmarks.once [OP ...]`."""

from __future__ import annotations

import sys

import torch

from benchmarks.harness import OURS
from benchmarks.run import OPS, cases


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in cases(sys.argv[1:] or list(OPS), device, quick=False):
        print(f"{case.op}  {case.size}", flush=True)
        case.contestants[OURS]()
        if device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
