"""What is installed, and what of it can be used here: `python -m focalops.info`."""

import re

import torch

from focalops._library import build_info, no_cuda_reason
from focalops._version import __version__


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for `archs` ("8.0 9.0 12.0+PTX") runs on a device of this compute capability."""
    for arch in archs.split():
        major, minor = (int(part) for part in re.match(r"(\d+)\.(\d+)", arch).groups())
        same_major = capability[0] == major and capability[1] >= minor
        if arch.endswith("+PTX") and capability >= (major, minor) or same_major:
            return True
    return False


def ops() -> dict[str, list[str]]:
    """The backends each focalops op has a kernel for."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("focalops::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: [key for key in ("CPU", "CUDA") if has_kernel(name, key)] for name in names}


def main() -> None:
    def line(name: str, value: object) -> None:
        print(f"{name:<16}{value}")

    line("focalops", __version__)
    line("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    line("built with", f"torch {build_info['torch_version']}, {build_info['compiler']}")
    line("runs on", f"torch {build_info['abi_target']} and newer")
    line("CPU kernels", "loaded")
    if no_cuda_reason:
        line("CUDA kernels", f"not loaded: {no_cuda_reason}")
    else:
        line("CUDA kernels", f"loaded, CUDA {build_info['cuda_version']}, {build_info['cuda_archs']}")
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            fits = "" if covers(build_info["cuda_archs"], capability) else ", NOT compiled for it"
            name = torch.cuda.get_device_name(index)
            line(f"device {index}", f"{name}, {capability[0]}.{capability[1]}{fits}")
        if not torch.cuda.is_available():
            line("device", "no GPU")
    for name, backends in ops().items():
        line("op", f"{name.removeprefix('focalops::')}: {', '.join(backends) or 'no kernel'}")


if __name__ == "__main__":
    main()
