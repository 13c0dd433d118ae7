"""Several processes, one a device, as torchrun starts them. A single process needs none of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .data.errors import DataError

Item = TypeVar("Item")


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did; yields this process's own device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        check_device(device)
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def check_device(device: str) -> None:
    """Raises a ValueError where tensors cannot be put there."""
    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):  # torch compiled without it
        usable = False
    if not usable:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ", ".join(["cpu", *(["cuda"] if cuda else []), *cuda])
        raise ValueError(
            f"--device must be one that torch can use here, such as {here}, got {device!r}"
        )


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


def from_first(make: Callable[[], Item]) -> Item:
    """What rank 0 gets from `make`, on every rank; or the error that it gets."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except (DataError, ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    made: Item = outcome[0]
    return made


def share_buffers(module: nn.Module) -> None:
    """Gives the module on every rank what rank 0 has in its buffers: batch norms saw other images on each."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
