"""Several processes, one a device, as torchrun starts them. A single process needs none of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did; yields this process's own device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(part: list[Item]) -> list[Item] | None:
    """The parts of all ranks, one after another, on rank 0; None on the others."""
    if world_size() == 1:
        return part
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(part, parts)
    return None if parts is None else [item for one in parts for item in one]
