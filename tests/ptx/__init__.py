"""The CUDA kernels as nvcc compiles them: its PTX, executed on the CPU in place of the host compiler's code.

CONTRIBUTING.md says how. `FOCALOPS_PTX_SEED` chooses the errors of the approximate instructions, `FOCALOPS_PTX_ARCH` the compute
capability that nvcc compiles for, and `FOCALOPS_PTX_COVERAGE` names a folder for what was executed.
"""

import atexit
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cuda_emulation

from . import build
from .build import no_ptx_reason as no_ptx_reason

# Rounded to the nearest; as low, as high as the manual allows; and by a hash of the operand the one
# or the other.
NEAREST, LOWEST, HIGHEST, MIXED = 0, 1, 2, 3


@functools.cache
def library() -> ctypes.CDLL:
    loaded = cuda_emulation.library()
    loaded.focalops_ptx_use.restype = ctypes.c_char_p
    loaded.focalops_ptx_run.restype = ctypes.c_char_p
    loaded.focalops_ptx_run.argtypes = [
        *[ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
        *[ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64],
    ]
    loaded.focalops_ptx_allow_access.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    loaded.focalops_ptx_set_approximation.argtypes = [ctypes.c_uint64]
    loaded.focalops_ptx_set_approximation(int(os.environ.get("FOCALOPS_PTX_SEED", MIXED)))
    if folder := os.environ.get("FOCALOPS_PTX_COVERAGE"):
        path = Path(folder, build.ARCH, f"{os.getpid()}-{time.time_ns()}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        atexit.register(loaded.focalops_ptx_write_coverage, str(path).encode())
    return loaded


@contextmanager
def compiled_cuda(folder: Path | None = None) -> Iterator[None]:
    """Inside, the ops of focalops take CPU tensors to the PTX of their CUDA kernels, that in `folder` or nvcc's own."""
    with cuda_emulation.emulated_cuda(), executing(folder):
        yield


@contextmanager
def executing(folder: Path | None = None) -> Iterator[None]:
    """Inside, the emulation launches PTX."""
    if said := library().focalops_ptx_use(str(folder or build.folder()).encode()):
        raise RuntimeError(said.decode())
    try:
        yield
    finally:
        library().focalops_ptx_use(None)


@contextmanager
def approximation(seed: int) -> Iterator[None]:
    library().focalops_ptx_set_approximation(seed)
    try:
        yield
    finally:
        library().focalops_ptx_set_approximation(int(os.environ.get("FOCALOPS_PTX_SEED", MIXED)))
