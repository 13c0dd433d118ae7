"""`make cuda-check`: what can be said of the CUDA kernels without a GPU.

Compiles every kernel for each supported architecture, warnings being errors, and compares its
registers and shared memory with cuda_resources.json (`make cuda-check ARGS=--update` rewrites it).
No kernel may use local memory, and the memory-bound ones read and write 16 bytes at a time.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_name("cuda_resources.json")

# The kernels whose time is that of the memory they move, and whether they load and store 16 bytes.
# A scalar path beside them, for views that are not aligned, is no fault.
MEMORY_BOUND = {
    r"focal_loss_kernel<": ("load", "store"),
    r"dense_(equalized_focal_loss|focal_loss|row_losses)_kernel<": ("load", "store"),
    r"softmax_focal_loss_kernel<\w+, true": ("load", "store"),
    r"decode_distances_kernel<false,": ("load",),
    r"decode_distances_kernel<true,": ("load", "store"),
    r"dense_distance_loss_kernel<true,": ("store",),
    r"distribution_focal_loss_kernel<\w+, true": ("load", "store"),
    r"scale_(rows_|planes_)?kernel<": ("load", "store"),
    # Units of one number are for maps that do not fit 16 bytes.
    r"(fuse_features|fusion_gradient|resampled_gradient)_kernel<\w+, [248],": ("load", "store"),
    r"box_iou_kernel<.*, true>": (
        "store",
    ),  # true: rows of the matrix begin at multiples of 16 bytes
}
# Those of them that only add up.
NO_STORE = r"SumLoss<[^>]*, false>|(dense|softmax)_focal_loss_kernel<false,"
# Those whose time is that of the arithmetic.
NOT_MEMORY_BOUND = r"<double[,>]"

Resources = dict[str, dict[str, dict[str, int]]]  # arch -> kernel -> resource -> number


def settings() -> dict:
    """The names of setup.py, which knows the compiler, its flags and the architectures."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def find_tool(name: str, nvcc: str) -> str:
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    for path in (Path(nvcc).parent / name, shutil.which(name), wheel / name):
        if path and Path(path).is_file():
            return str(path)
    raise SystemExit(f"cuda-check needs {name}: it comes with the CUDA toolkit and with `triton`")


def compile_kernels(source: Path, arch: str, nvcc: str, flags: Iterable[str]) -> dict:
    """Registers, bytes and 16-byte instructions of each kernel of the file."""
    number = arch.replace(".", "")
    cubin = ROOT / "build" / "cuda-check" / f"{source.stem}.sm_{number}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, *flags, "-Werror=all-warnings", "-Xptxas=-v", "-isystem", include]
    command += [f"-arch=sm_{number}", "-cubin", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = "\n".join(re.findall(r".*(?:error|warning).*", done.stderr))
        raise SystemExit(f"{source.name} does not compile for {arch}:\n{said}")
    kernels = {}
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'[^\n]*\n(.*?Used [^\n]*)", done.stderr, re.DOTALL
    ):

        def number_of(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels[name] = {
            "registers": number_of(r"Used (\d+) registers"),
            "shared": number_of(r"(\d+) bytes smem"),
            "stack": number_of(r"(\d+) bytes stack frame"),
            "spills": number_of(r"(\d+) bytes spill stores")
            + number_of(r"(\d+) bytes spill loads"),
        }
    sass = subprocess.run(
        [find_tool("cuobjdump", nvcc), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    for name, code in re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL):
        kernels[name]["load"] = len(re.findall(r"\bLDG\.E[\w.]*\.128\b", code))
        kernels[name]["store"] = len(re.findall(r"\bSTG\.E[\w.]*\.128\b", code))
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = {shorten(name): kernel for name, kernel in zip(names, kernels.values(), strict=True)}
    assert len(short) == len(kernels), f"kernels of {source.name} share a short name"
    return short


def shorten(name: str) -> str:
    """Without namespaces, return type and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("focalops::", "")
    name = re.sub(r"c10::|torch::headeronly::", "", name).removeprefix("void ")
    name = re.sub(r"\([\w:]+\)(-?\d+)", r"\1", name)
    return re.sub(r"\(.*", "", name)


def faults(resources: Resources) -> list[str]:
    found = []
    for arch, kernels in resources.items():
        for name, kernel in kernels.items():
            where = f"{name} for {arch}"
            if kernel["stack"] or kernel["spills"]:
                found.append(
                    f"{where} uses local memory: {kernel['stack']} bytes of stack,"
                    f" {kernel['spills']} of spills"
                )
            if re.search(NOT_MEMORY_BOUND, name):
                continue
            for pattern, accesses in MEMORY_BOUND.items():
                for access in accesses if re.match(pattern, name) else ():
                    excused = access == "store" and re.search(NO_STORE, name)
                    if not kernel[access] and not excused:
                        found.append(f"{where} has no {access} of 16 bytes")
    return found


def table_of(resources: Resources) -> dict[str, dict[str, list[int]]]:
    """Registers and bytes of shared memory: kernel -> arch -> numbers."""
    table: dict[str, dict[str, list[int]]] = {}
    for arch, kernels in resources.items():
        for name, kernel in kernels.items():
            table.setdefault(name, {})[arch] = [kernel["registers"], kernel["shared"]]
    return dict(sorted(table.items()))


def write_table(nvcc: str, kernels: dict[str, dict[str, list[int]]]) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in kernels.items()]
    body = ",\n".join(lines)
    TABLE.write_text(
        f'{{\n "nvcc": "{nvcc}",\n "registers and shared bytes": {{\n{body}\n }}\n}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write cuda_resources.json")
    arguments = parser.parse_args()

    build = settings()
    nvcc, version = build["nvcc_for_torch"]()
    # Spills are counted, and listed all together: ptxas need not stop at the first.
    flags = {*build["COMMON_FLAGS"], *build["NVCC_FLAGS"]} - {"-Xptxas=-warn-spills"}
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    archs = build["DEFAULT_ARCHS"]
    resources: Resources = {arch: {} for arch in archs}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        jobs = [(source, arch) for source in sources for arch in archs]
        kernels = pool.map(lambda job: compile_kernels(*job, nvcc, flags), jobs)
        for (_, arch), of_source in zip(jobs, kernels, strict=True):
            resources[arch] |= of_source

    problems = faults(resources)
    table = table_of(resources)
    if arguments.update:
        write_table(version, table)
    committed = json.loads(TABLE.read_text())
    if committed["nvcc"] == version:
        before = committed["registers and shared bytes"]
        for name in sorted({*table, *before}):
            if table.get(name) != before.get(name):
                problems.append(f"{name}: {before.get(name)} in the table, now {table.get(name)}")
    else:
        print(f"the table is of nvcc {committed['nvcc']}: not compared with this, {version}")
    count = sum(map(len, resources.values()))
    print(f"{count} kernels, nvcc {version}, compute capability {', '.join(archs)}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
