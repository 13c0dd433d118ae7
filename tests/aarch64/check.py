"""`make aarch64`: compiles the CPU sources for aarch64, and executes their formulas there in an emulator.

What promises the same bits everywhere must give those of this machine. Losses, whose products and sums a compiler may
contract, must be as close to float64 as the tests of the ops demand. Torch itself is not there: the ops do not run.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "aarch64"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
EXACT = ("exponential", "logarithm", "arctangent", "IoU", "foreground", "GIoU", "DIoU", "CIoU")
LOSSES = ("focal, gamma 2", "focal, gamma 1.5", "focal, gamma 0.5", "quality focal")
OF_A_LOSS = ("negative", "its gradient", "positive", "its gradient")


def main() -> None:
    for tool, package in ((CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(tool) is None:
            sys.exit(f"make aarch64 needs {tool}: apt install {package}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*setup["COMMON_FLAGS"], *setup["CXX_FLAGS"], *setup["CPU_FLAGS"], "-Werror"]
    compile_sources(flags, setup["CPU_FLAGS_OF"])
    execute_formulas(flags, setup["LOSS_FLAGS"])


def compile_sources(flags: list[str], flags_of: dict[str, list[str]]) -> None:
    include = Path(torch.__file__).parent / "include"
    headers = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    sources = ["csrc/library.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]

    def compile_one(source: str) -> Path:
        result = FOLDER / f"{Path(source).stem}.o"
        command = [CROSS, *flags, *flags_of.get(source, ()), *headers, "-c", source]
        subprocess.run([*command, "-o", str(result)], cwd=ROOT, check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = dict(zip(sources, threads.map(compile_one, sources), strict=True))
    lanes = vector_instructions(results["csrc/cpu/focal_loss.cpp"])
    assert lanes, "no loop of focal_loss.cpp was vectorised"
    print(f"{len(sources)} sources compiled; {lanes} vector products and sums in focal_loss.cpp")


def vector_instructions(compiled: Path) -> int:
    """How many instructions multiply or add four floats."""
    tool = CROSS.replace("g++", "objdump")
    command = [tool, "--disassemble", "--no-show-raw-insn", str(compiled)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\tf(?:mul|add|sub|mla|mls)\tv\d+\.4s", listing))


def execute_formulas(flags: list[str], loss_flags: list[str]) -> None:
    inputs = {"exact": rows_of_boxes(), "losses": rows_of_logits()}
    outputs = {}
    for compiler, runner in (("g++", []), (CROSS, [EMULATOR])):
        for what, more in (("exact", []), ("losses", loss_flags)):
            program = FOLDER / f"{what}-{Path(compiler).name}"
            source = str(Path(__file__).with_name("math.cpp"))
            command = [compiler, *flags, *more, "-static", source, "-o", str(program)]
            subprocess.run(command, check=True)
            outputs[compiler, what] = subprocess.run(
                [*runner, str(program), what],
                input=inputs[what].tobytes(),
                capture_output=True,
                check=True,
            ).stdout
    here, there = (
        np.frombuffer(outputs[compiler, "exact"], np.float32).reshape(len(EXACT), -1)
        for compiler in ("g++", CROSS)
    )
    for name, ours, theirs in zip(EXACT, here, there, strict=True):
        same = (ours.view(np.uint32) == theirs.view(np.uint32)) | np.isnan(ours) & np.isnan(theirs)
        assert same.all(), f"{name}: {(~same).sum()} of {len(same)} results differ"
        print(f"{name}: {len(same):,} results, the same bits")
    compare_losses(inputs["losses"], outputs[CROSS, "losses"])


def compare_losses(inputs: np.ndarray, output: bytes) -> None:
    columns, rows = len(LOSSES) * len(OF_A_LOSS), len(inputs)
    single = np.frombuffer(output, np.float32, columns * rows).reshape(columns, rows)
    double = np.frombuffer(output, np.float64, offset=single.nbytes).reshape(columns, rows)
    names = [f"{loss}, {part}" for loss in LOSSES for part in OF_A_LOSS]
    for name, ours, exact in zip(names, single, double, strict=True):
        assert (np.isnan(ours) == np.isnan(exact)).all(), name
        finite = np.isfinite(exact)
        assert (ours[~finite & ~np.isnan(exact)] == exact[~finite & ~np.isnan(exact)]).all(), name
        error = np.abs(ours[finite] - exact[finite])
        # As the tests of the ops: some roundings of the loss, and those of what underflows.
        bound = 1e-6 * np.abs(exact[finite]) + 1e-37
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.1f} times the bound"
        print(f"{name}: {len(ours):,} results, at most {(error / bound).max():.2f} of the bound")


def rows_of_boxes() -> np.ndarray:
    """Two boxes a row, near, apart, equal, empty and without numbers; the first number is also that of a function."""
    generator = np.random.default_rng(0)
    corner = generator.uniform(-50, 200, (100_000, 2, 2))
    size = generator.exponential(40, (100_000, 2, 2)) * (generator.random((100_000, 2, 2)) < 0.95)
    boxes = np.concatenate((corner, corner + size), axis=2).astype(np.float32)
    boxes[::7, 1] = boxes[::7, 0]
    odd = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, 3e38, -3e38], np.float32)
    generator.shuffle(boxes[:1000])
    boxes[:1000, 0, 0] = generator.choice(odd, 1000)
    bits = generator.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    boxes[50_000:, 0, 0] = bits
    return boxes.reshape(-1, 8)


def rows_of_logits() -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = np.zeros((100_000, 8), np.float32)
    rows[:, 0] = generator.normal(0, 8, len(rows))
    rows[:7, 0] = [np.nan, np.inf, -np.inf, 0, -0.0, 80, -80]
    return rows


if __name__ == "__main__":
    main()
