"""What every topic file needs around a native op."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from focalops._library import no_cuda_reason

ops = torch.ops.focalops

NATIVE_DEVICES = ("cpu", "cuda", "meta")


def runs_reference(tensor: Tensor) -> bool:
    """Whether the tensor lives on a device for which focalops has no kernels, such as mps or xpu."""
    device = tensor.device.type
    if device == "cuda" and no_cuda_reason is not None:
        raise RuntimeError(f"focalops cannot run on CUDA tensors: {no_cuda_reason}")
    if device in NATIVE_DEVICES:
        return False
    _say_once(f"focalops has no kernels for {device} tensors: its reference in plain PyTorch runs")
    return True


_said: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _said and not torch.compiler.is_compiling():
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=4)


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op. Its allocation failures cross the stable ABI as RuntimeError; torch's own type is what users catch."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def register_vmap_as_loop(name: str) -> None:
    """A call for each sample, for ops that take lists of batches: torch's own fallback knows no lists."""
    op = getattr(ops, name)

    def sample(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value if dim is None else value.select(dim, i)
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [sample(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value

    def loop(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(sample(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tree_map(lambda *tensors: torch.stack(tensors), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(f"focalops::{name}", loop)


# ---- sentences that the native checks say too (csrc/checks.h) -----------------------------------

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensor(name: str, value: Any) -> None:
    """For the public functions: what is no tensor has none of the attributes that the other checks ask for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(condition: bool, sentence: Callable[[], str]) -> None:
    if not condition:
        raise RuntimeError(sentence())


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.dtype in FLOATING,
        lambda: f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}",
    )


def check_same_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check(
        tensor.device == like.device,
        lambda: f"{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}",
    )
