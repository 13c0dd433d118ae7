"""What is installed, and what of it can be used here: `python -m focalops.info`."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import torch

from focalops._library import build_info, no_cuda_reason
from focalops._version import __version__


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
