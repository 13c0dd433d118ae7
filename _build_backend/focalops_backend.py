"""PEP 517 backend: setuptools, which also asks for nvcc wheels where torch has CUDA and no toolkit fits.

`python _build_backend/focalops_backend.py` prints those wheels, for builds without isolation.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def find_nvcc(cuda: str) -> tuple[str, str] | None:
    """The path and version of an nvcc of the same major version as `cuda`, system toolkits first."""
    major = cuda.split(".")[0]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [
        *(Path(home, "bin/nvcc") for home in homes if home),
        shutil.which("nvcc"),
        *sorted(Path("/usr/local").glob("cuda*/bin/nvcc")),
        *(Path(path, f"nvidia/cu{major}/bin/nvcc") for path in sys.path),
    ]
    for nvcc in filter(None, candidates):
        try:
            banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError:
            continue
        release = re.search(r"release (\d+)\.(\d+)", banner)
        if release and release[1] == major:
            return str(nvcc), f"{release[1]}.{release[2]}"
    return None


def nvcc_wheels(cuda: str | None) -> list[str]:
    """The requirements that bring nvcc for `cuda`; none where they do not exist (before CUDA 13)."""
    if cuda is None or int(cuda.split(".")[0]) < 13:
        return []
    return [f"cuda-toolkit[nvcc,cccl]=={cuda}.*"]


def missing_nvcc_wheels() -> list[str]:
    import torch

    cuda = torch.version.cuda
    if os.environ.get("FOCALOPS_CUDA") == "0" or cuda is None or find_nvcc(cuda):
        return []
    return nvcc_wheels(cuda)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + missing_nvcc_wheels()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + missing_nvcc_wheels()


if __name__ == "__main__":
    print(*missing_nvcc_wheels())
