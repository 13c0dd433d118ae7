"""The CUDA kernels, run on the CPU: one more device for the tests. CONTRIBUTING.md says how."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import build

# Ascending; descending; shuffled, threads anew after each barrier.
ORDERS = [(0, 0), (1, 0), (2, 1)]


@functools.cache
def library() -> ctypes.CDLL:
    path = build.library(os.environ.get("FOCALOPS_EMULATION", "watched"))
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Inside, the ops of focalops take CPU tensors to their CUDA kernels; all else stays."""
    library()
    with torch.library._scoped_library("focalops", "IMPL", "CPU") as kernels, _poisoned_outputs():
        for name in ops():
            kernels.impl(name, _in_every_order(name), allow_override=True)
        yield


@contextmanager
def last_blocks(count: int) -> Iterator[Any]:
    """The ops of the emulated kernels, of whose launches only the last blocks run, each with one piece of the work."""
    loaded = library()
    loaded.focalops_emulation_set_extent.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.focalops_emulation_set_order(0, 0)
    loaded.focalops_emulation_set_extent(2**30, count)
    try:
        yield torch.ops.focalops_emulated
    finally:
        loaded.focalops_emulation_set_extent(2, 2**64 - 1)


def ops() -> list[str]:
    """The ops that have a CUDA kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [
        n for n in torch._C._dispatch_get_all_op_names() if n.startswith("focalops_emulated::")
    ]
    return [name.split("::")[1] for name in names if has_kernel(name, "CPU")]


def _in_every_order(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.focalops_emulated, name).default
    mutated = [i for i, arg in enumerate(op._schema.arguments) if arg.is_write]

    @torch.compiler.disable  # what a compiled graph calls is not compiled again
    def run(*args: Any) -> Any:
        results = []
        for order in reversed(ORDERS):
            library().focalops_emulation_set_order(*order)
            these = list(args)
            if order != ORDERS[0]:
                for i in mutated:
                    these[i] = torch.utils._pytree.tree_map(torch.clone, args[i])
            result = op(*these)
            results.append((result, [these[i] for i in mutated]))
        for other in results[:-1]:
            assert _bits(other) == _bits(results[-1]), (
                f"{name} depends on the order of blocks or threads"
            )
        return result

    return run


def _bits(tree: Any) -> list[tuple[Any, bytes]]:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [
        (
            t.shape,
            t.clone(memory_format=torch.contiguous_format)
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes(),
        )
        for t in tensors
    ]


@contextmanager
def _poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def interleave(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls of torch.ops.focalops_emulated, in turns, a block each."""
    loaded = library()
    loaded.focalops_emulation_expect_streams(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(stream: int) -> None:
        loaded.focalops_emulation_begin_stream(stream)
        try:
            results[stream] = calls[stream]()
        except Exception as error:
            results[stream] = error
        finally:
            loaded.focalops_emulation_end_stream(stream)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
