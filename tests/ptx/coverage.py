"""What of nvcc's PTX the tests executed: reads the files that FOCALOPS_PTX_COVERAGE asked for.

`python tests/ptx/coverage.py FOLDER` prints a line for each source line of which instructions were never
executed in any kernel, and for each kernel that was never launched.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


class Kernels:
    """For each kernel, by its name, its instructions, and which of them any process executed."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.sources: dict[str, list[str]] = {}
        self.executed: dict[str, list[bool]] = {}
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        rows = iter(file.read_text().splitlines())
        for row in rows:
            _, name, count = row.split("\t")
            instructions = [next(rows).split("\t", 2) for _ in range(int(count))]
            done = [executed == "1" for executed, _, _ in instructions]
            before = self.executed.get(name, [])
            if len(before) == len(done):
                self.executed[name] = [a or b for a, b in zip(before, done, strict=True)]
            elif not before:
                self.executed[name] = done
                self.sources[name] = [source for _, source, _ in instructions]

    def launched(self) -> list[str]:
        return [name for name, done in self.executed.items() if any(done)]


def shorten(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").replace("focalops::", "")
    return re.sub(r"c10::|torch::headeronly::|\([\w:]+\)(?=-?\d)", "", name)


def table(kernels: Kernels) -> list[str]:
    launched = kernels.launched()
    total = sum(len(kernels.executed[name]) for name in launched)
    done = sum(sum(kernels.executed[name]) for name in launched)
    lines = [
        f"{len(launched)} of {len(kernels.executed)} kernels were launched, {done / total:.1%} of their instructions executed."
    ]
    lines += ["", "Never launched:"]
    lines += sorted(f"  {shorten(name)}" for name in set(kernels.executed) - set(launched))
    never: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    ever: dict[str, int] = defaultdict(int)
    for name in launched:
        for source, executed in zip(kernels.sources[name], kernels.executed[name], strict=True):
            family = re.sub(r"<.*", "", shorten(name))
            if executed:
                ever[source] += 1
            else:
                never[source][family] += 1
    lines += ["", "Never executed, in no kernel (instructions):"]
    for source in sorted(set(never) - set(ever), key=by_line):
        families = ", ".join(f"{family} ({n})" for family, n in sorted(never[source].items()))
        lines.append(f"  {source}: {families}")
    return lines


def by_line(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return file, int(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.txt"))
    if not files:
        sys.exit(f"{arguments.folder} has no coverage: no test ran with FOCALOPS_PTX_COVERAGE")
    print("\n".join(table(Kernels(files))))


if __name__ == "__main__":
    main()
