"""Devices are a property of the test run: every test that takes `device` runs on each one present."""

import pytest
import torch

from focalops._library import no_cuda_reason


def devices() -> list[str]:
    has_cuda = torch.cuda.is_available() and no_cuda_reason is None
    return ["cpu", "cuda"] if has_cuda else ["cpu"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
