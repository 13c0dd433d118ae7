"""Compiles csrc/cuda/*.cu with the host compiler, into build/emulation/<variant>/."""

import fcntl
import functools
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).parent

# watched: memory.cpp sees each access, through the calls that the compiler inserts for
# ThreadSanitizer.
VARIANTS = {
    "watched": [
        "-fsanitize=thread",
        "--param=tsan-instrument-func-entry-exit=0",
        "--param=tsan-distinguish-volatile=1",
    ],
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}

COMPILE = [
    *shlex.split(os.environ.get("CXX", "g++")),
    *["-x", "c++", "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"],
    *["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
    *[f"-I{HERE / 'include'}", "-isystem", str(TORCH / "include")],
]

RUNTIME = [HERE / "emulation.cpp", HERE / "memory.cpp"]
# What executes nvcc's PTX in place of the host compiler's code.
INTERPRETER = sorted((HERE.parent / "ptx").glob("*.cpp"))


@functools.cache
def library(variant: str) -> Path:
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return _build(
        variant,
        "libfocalops_emulated.so",
        [ROOT / "csrc" / "library.cpp", *kernels, HERE / "torch_stubs.cpp", *INTERPRETER],
        ["-shared", "-Wl,-Bsymbolic,-z,defs", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"],
    )


@functools.cache
def executable(variant: str, source: str) -> Path:
    return _build(variant, Path(source).stem, [HERE / source], [])


def _build(variant: str, name: str, sources: list[Path], link_flags: list[str]) -> Path:
    directory = ROOT / "build" / "emulation" / variant
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["rule run", "  command = $cmd", "  description = $out"]

    def edge(output: Path, inputs: list[Path], command: list[str], depfile: str = "") -> None:
        lines.append(f"build {output}: run {' '.join(map(str, inputs))}")
        lines.append(f"  cmd = {shlex.join(command).replace('$', '$$')}")
        if depfile:
            lines.extend([f"  depfile = {depfile}", "  deps = gcc"])

    objects = []
    for source in [*sources, *RUNTIME]:
        output = directory / f"{source.name}.o"
        # The runtime switches stacks and is called for each access: it is not instrumented itself.
        of_source = ["-O2"] if source in RUNTIME else ["-O1", *VARIANTS[variant]]
        if source in INTERPRETER:
            of_source = ["-O2", "-std=c++20"]
        if source in RUNTIME and variant == "sanitized":
            of_source += ["-DSANITIZED"]
        command = [*COMPILE, *of_source, "-MMD", "-MF", f"{output}.d"]
        edge(output, [source], [*command, "-c", str(source), "-o", str(output)], f"{output}.d")
        objects.append(output)

    output = directory / name
    link = [COMPILE[0], "-o", str(output), *map(str, objects), *link_flags, "-ldl", "-pthread"]
    if variant == "sanitized":
        link += VARIANTS[variant]
    edge(output, objects, link)

    file = directory / f"{name}.ninja"
    ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait
        file.write_text(f"builddir = {directory}\n" + "\n".join(lines) + "\n")
        done = subprocess.run(
            [*ninja, "-f", str(file), "-j", jobs], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"the emulation of csrc/cuda does not compile:\n{done.stdout[-6000:]}")
    return output


if __name__ == "__main__":
    for path in map(library, sys.argv[1:] or VARIANTS):
        print(path)
