"""What of nvcc's PTX the tests executed: reads the files that FOCALOPS_PTX_COVERAGE asked for.

`python tests/ptx/coverage.py FOLDER` fails where not_executed.json differs from what was found: kernels that were never launched, and
lines of our sources of which no kernel executed an instruction, each with a reason. A line is named by its text. `--update` writes
the file, with an empty reason for what is new.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIST = Path(__file__).with_name("not_executed.json")

Reasons = dict[str, dict[str, str]]  # "kernels" or a file -> kernel or line -> reason


# nvcc makes other instructions of the same kernel for other GPUs.
Kernel = tuple[str, str]  # compute capability, name


class Kernels:
    """For each kernel, its instructions, and which of them any process executed."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.sources: dict[Kernel, list[str]] = {}
        self.executed: dict[Kernel, list[bool]] = {}
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        rows = iter(file.read_text().splitlines())
        for row in rows:
            _, name, count = row.split("\t")
            instructions = [next(rows).split("\t", 2) for _ in range(int(count))]
            done = [executed != "0" for executed, _, _ in instructions]
            kernel = (file.parent.name, name)
            before = self.executed.get(kernel, [])
            if len(before) == len(done):
                self.executed[kernel] = [a or b for a, b in zip(before, done, strict=True)]
            elif not before:
                self.executed[kernel] = done
                self.sources[kernel] = [source for _, source, _ in instructions]

    def launched(self) -> list[Kernel]:
        return [kernel for kernel, done in self.executed.items() if any(done)]


def shorten(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").replace("focalops::", "")
    return re.sub(r"c10::|torch::headeronly::|\([\w:]+\)(?=-?\d)", "", name)


def summary(kernels: Kernels) -> str:
    launched = kernels.launched()
    total = sum(len(kernels.executed[kernel]) for kernel in launched)
    done = sum(sum(kernels.executed[kernel]) for kernel in launched)
    return f"{len(launched)} of {len(kernels.executed)} kernels were launched, {done / total:.1%} of their instructions executed"


def not_executed(kernels: Kernels) -> dict[str, list[str]]:
    launched = kernels.launched()
    never, ever = set(), set()
    for kernel in launched:
        for source, executed in zip(kernels.sources[kernel], kernels.executed[kernel], strict=True):
            (ever if executed else never).add(source)
    idle = {name for _, name in kernels.executed} - {name for _, name in launched}
    found = {"kernels": sorted(shorten(name) for name in idle)}
    for source in sorted(never - ever, key=by_line):
        file, number = by_line(source)
        path = (ROOT / file).resolve()
        if path.is_relative_to(ROOT / "csrc"):
            text = path.read_text().splitlines()[number - 1].strip()
            found.setdefault(str(path.relative_to(ROOT)), []).append(text)
    return found


def by_line(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return file, int(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--update", action="store_true", help=f"write {LIST.name}")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*/*.txt"))
    if not files:
        sys.exit(f"{arguments.folder} has no coverage: no test ran with FOCALOPS_PTX_COVERAGE")
    kernels = Kernels(files)
    print(summary(kernels))
    found = not_executed(kernels)
    listed: Reasons = json.loads(LIST.read_text()) if LIST.exists() else {}
    if arguments.update:
        kept = {
            where: {what: listed.get(where, {}).get(what, "") for what in names}
            for where, names in found.items()
        }
        LIST.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        return
    problems = [
        f"{where}: {what}: never executed, and {LIST.name} has no reason"
        for where, names in found.items()
        for what in names
        if not listed.get(where, {}).get(what)
    ]
    problems += [
        f"{where}: {what}: executed or gone: take it out of {LIST.name}"
        for where, names in listed.items()
        for what in names
        if what not in found.get(where, [])
    ]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
