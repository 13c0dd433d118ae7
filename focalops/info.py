"""What is installed, and what of it can be used here: `python -m focalops.info`."""

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from focalops._library import build_info, no_cuda_reason
from focalops._version import __version__

UNKNOWN = "unknown"


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for `archs`, such as "9.0 12.0+PTX", runs on a device of `capability`."""
    for arch, ptx in re.findall(r"([\d.]+)[af]?(\+PTX)?", archs):
        compiled = tuple(int(part) for part in arch.split("."))
        if capability >= compiled and (ptx or capability[0] == compiled[0]):
            return True
    return False


def ops() -> dict[str, list[str]]:
    """The backends that each focalops op has a kernel for."""
    names = torch._C._dispatch_get_all_op_names()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name.removeprefix("focalops::"): [key for key in ("CPU", "CUDA") if has_kernel(name, key)]
        for name in sorted(names)
        if name.startswith("focalops::")
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Where a measurement was made, and with what: the head of a record of the benchmarks or of a study."""
    driver = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = output_of(query).splitlines()[0]  # one for all GPUs
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, {capability}"
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "cuda": torch.version.cuda,
        "focalops": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout that this file is of. Where an installed one lies may be in another repository."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    if output_of([*git, "ls-files", "--error-unmatch", here.name]) == UNKNOWN:
        return UNKNOWN
    return output_of([*git, "describe", "--always", "--dirty"])


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN


@contextlib.contextmanager
def stdout_may_close() -> Iterator[None]:
    """Lets a program end quietly when the reader of its output, such as `head`, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main() -> None:
    rows = [
        ("focalops", __version__),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda}"),
        ("built with", f"torch {build_info['torch_version']}, {build_info['compiler']}"),
        ("runs on", f"torch {build_info['abi_target']} and newer"),
        ("CPU kernels", "loaded"),
    ]
    if no_cuda_reason:
        rows.append(("CUDA kernels", f"not loaded: {no_cuda_reason}"))
    else:
        archs = build_info["cuda_archs"] or ""
        rows.append(("CUDA kernels", f"loaded, CUDA {build_info['cuda_version']}, for {archs}"))
        for i in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(i)
            note = (
                "" if covers(archs, capability) else ": the CUDA kernels were not compiled for it"
            )
            name = torch.cuda.get_device_name(i)
            rows.append((f"GPU {i}", f"{name}, {capability[0]}.{capability[1]}{note}"))
        if not torch.cuda.is_available():
            rows.append(("GPU", "none"))
    rows += [(op, " ".join(backends) or "no kernel") for op, backends in ops().items()]

    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    with stdout_may_close():
        main()
