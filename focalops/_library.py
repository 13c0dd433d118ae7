"""Loads the native libraries on import, and says clearly what is missing or does not fit."""

import sys
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libfocalops.so")
CUDA_LIBRARY = Path(__file__).with_name("libfocalops_cuda.so")

BUILD = "pip install --no-build-isolation ."
BUILD_AGAIN = "pip install --no-build-isolation --no-deps --force-reinstall ."

try:
    from focalops import _C
except ImportError:
    raise ImportError(
        f"focalops is not compiled for this Python ({sys.version.split()[0]}): in its source tree run"
        f" `{BUILD}`, or `make build` to work on it"
    ) from None

build_info = _C.build_info()


def _load_cpu() -> None:
    required = build_info["abi_target"]
    if _release(torch.__version__) < _release(required):
        raise ImportError(
            f"focalops needs torch {required} or newer, and this is {torch.__version__}: run "
            f"`pip install --upgrade 'torch>={required}'`"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"{LIBRARY} does not load on torch {torch.__version__} ({error}): in the source tree of focalops run "
            f"`{BUILD_AGAIN}`"
        ) from None


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; if they cannot be loaded, returns why."""
    built, running = build_info["cuda_version"], torch.version.cuda
    if built is None:
        reason = f"focalops was built without CUDA kernels, because {build_info['no_cuda_reason']}"
        return f"{reason}; `FOCALOPS_CUDA=1 {BUILD_AGAIN}` in its source tree builds them"
    if running is None:
        return f"this torch ({torch.__version__}) has no CUDA: install one that has"
    if built.split(".")[0] != running.split(".")[0]:
        differ = f"focalops was built for CUDA {built}, and this torch is for CUDA {running}"
        return f"{differ}: in its source tree run `{BUILD_AGAIN}`"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"{CUDA_LIBRARY} does not load: {error}"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


_load_cpu()
no_cuda_reason = _load_cuda()
