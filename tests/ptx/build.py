"""Compiles csrc/cuda/*.cu to PTX with nvcc, into build/ptx/9.0/ or the folder of what compute capability FOCALOPS_PTX_ARCH names."""

import fcntl
import functools
import os
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent.parent
TORCH = Path(torch.__file__).parent
ARCH = os.environ.get("FOCALOPS_PTX_ARCH", "9.0")
FOLDER = ROOT / "build" / "ptx" / ARCH


@functools.cache
def _setup() -> dict:
    """The names of setup.py, which finds the compiler and knows its flags."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@functools.cache
def no_ptx_reason() -> str | None:
    """Why there is no PTX to execute; None where there is."""
    try:
        _setup()["nvcc_for_torch"]()
    except _setup()["CannotBuildCuda"] as reason:
        return str(reason)
    return None


@functools.cache
def folder() -> Path:
    """Where the PTX of every file is, compiled anew where it, a header or the compiler changed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    nvcc, _ = _setup()["nvcc_for_torch"]()
    flags = [*_setup()["COMMON_FLAGS"], "-DUSE_CUDA", "--expt-relaxed-constexpr"]
    # -lineinfo changes no instruction, and says which line each comes from.
    flags += ["-isystem", str(TORCH / "include"), "-lineinfo", "-ptx"]
    flags += [f"-arch=compute_{ARCH.replace('.', '')}"]
    lines = ["rule compile", "  command = $cmd", "  description = $out", "  deps = gcc"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        output = FOLDER / f"{source.stem}.ptx"
        command = [nvcc, *flags, "-MD", "-MF", f"{output}.d", "-o", str(output), str(source)]
        lines.append(f"build {output}: compile {source}")
        lines.append(f"  cmd = {shlex.join(command).replace('$', '$$')}")
        lines.append(f"  depfile = {output}.d")
    outputs = {FOLDER / f"{source.stem}.ptx" for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait
        for left_over in set(FOLDER.glob("*.ptx")) - outputs:
            left_over.unlink()
        file = FOLDER / "build.ninja"
        file.write_text(f"builddir = {FOLDER}\n" + "\n".join(lines) + "\n")
        done = subprocess.run(
            [*ninja, "-f", str(file), "-j", jobs], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"csrc/cuda does not compile to PTX:\n{done.stdout[-6000:]}")
    return FOLDER


if __name__ == "__main__":
    print(folder())
