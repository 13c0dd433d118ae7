"""Devices are a property of the test run: every test that takes `device` runs on each one present."""

import getpass
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import emulated_cuda
from hypothesis import settings
from ptx import compiled_cuda, no_ptx_reason

from focalops._library import no_cuda_reason

# torch.compile takes code from its cache that it made for wider vectors, and computes wrong numbers with it, where
# ATEN_CPU_CAPABILITY differs from that run's: a cache for each.
_capability = torch.backends.cpu.get_cpu_capability().replace(" ", "")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"focalops-inductor-{getpass.getuser()}-{_capability}"),
)

# The same examples every time, so that a failure is of the change at hand; `pytest --hypothesis-profile=search`
# looks for new ones.
settings.register_profile("same", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same")


def backends() -> list[str]:
    has_cuda = torch.cuda.is_available() and no_cuda_reason is None
    has_ptx = no_ptx_reason() is None
    return ["cpu", "cuda-emulated", *["cuda-ptx"] * has_ptx, *["cuda"] * has_cuda]


def pytest_report_header() -> list[str]:
    reason = no_ptx_reason()
    return [f"no tests of the compiled kernels (cuda-ptx): {reason}"] if reason else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test every eighth case runs what nvcc made, from the first on; all of them with FOCALOPS_PTX=all. Under the
    sanitizers every sixth case runs; all of them with FOCALOPS_SANITIZED=all. `make matrix` asks for every sixteenth case of the
    CPU (FOCALOPS_CPU=some)."""
    every = {"cuda-ptx": 1 if os.environ.get("FOCALOPS_PTX") == "all" else 8}
    if os.environ.get("FOCALOPS_EMULATION") == "sanitized":
        every["cuda-emulated"] = 1 if os.environ.get("FOCALOPS_SANITIZED") == "all" else 6
    if os.environ.get("FOCALOPS_CPU") == "some":
        every |= {"cpu": 16, "None": 16}
    seen: Counter[tuple[str, str]] = Counter()
    chosen, left_out = [], []
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        test = item.nodeid.partition("[")[0], str(backend)
        (left_out if seen[test] % every.get(str(backend), 1) else chosen).append(item)
        seen[test] += 1
    items[:] = chosen
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> Iterator[str]:
    """Where to put tensors; the emulated CUDA kernels take those of the CPU."""
    if backend in ("cuda-emulated", "cuda-ptx"):
        with emulated_cuda() if backend == "cuda-emulated" else compiled_cuda():
            yield "cpu"
    else:
        yield backend


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device for which focalops has no kernels: every public function runs its reference."""
    for name, module in list(sys.modules.items()):  # as attributes some have the name of a function
        if name.startswith("focalops."):
            if hasattr(module, "runs_reference"):
                monkeypatch.setattr(module, "runs_reference", lambda _: True)
            if hasattr(module, "NATIVE_DEVICES"):
                monkeypatch.setattr(module, "NATIVE_DEVICES", ())
