"""Devices are a property of the test run: every test that takes `device` runs on each one present."""

from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import emulated_cuda
from hypothesis import settings

from focalops._library import no_cuda_reason

# The same examples every time, so that a failure is of the change at hand; `pytest --hypothesis-profile=search`
# looks for new ones.
settings.register_profile("same", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same")


def backends() -> list[str]:
    has_cuda = torch.cuda.is_available() and no_cuda_reason is None
    return ["cpu", "cuda-emulated", *(["cuda"] if has_cuda else [])]


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> Iterator[str]:
    """Where to put tensors; the emulated CUDA kernels take those of the CPU."""
    if backend == "cuda-emulated":
        with emulated_cuda():
            yield "cpu"
    else:
        yield backend


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
