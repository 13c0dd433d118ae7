"""What every topic file needs around a native op."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

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


class ArgumentError(RuntimeError, ValueError):
    """A wrong argument: the RuntimeError of native checks, and the ValueError that torch and torchvision raise for it."""


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op. Its failures cross the stable ABI as RuntimeError; what users catch is torch's own type or ArgumentError."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        sentence = str(error)
        if "out of memory" in sentence:
            raise torch.OutOfMemoryError(sentence) from None
        if _IS_ABOUT_AN_ARGUMENT.match(sentence):
            raise ArgumentError(sentence) from None
        raise


# What csrc/checks/ says: "sigmoid_focal_loss: gamma must be >= 0, got -1".
_IS_ABOUT_AN_ARGUMENT = re.compile(r"[a-z_]+: .*\b(must|needs)\b")

# These choose: there is nothing to differentiate.
_CHOICES = frozenset(
    f"focalops::{name}"
    for name in (
        *("assign_atss", "assign_fcos", "assign_simota", "assign_task_aligned"),
        *("detect", "match_anchors"),
        *("matrix_nms", "multiclass_nms", "nms", "soft_nms"),
    )
)


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Autograd that is registered from Python knows no forward mode, and would give tangents of 0 without a word."""
    if op._qualified_op_name in _CHOICES:
        return
    if any(isinstance(leaf, Tensor) and _has_tangent(leaf) for leaf in tree_leaves(args)):
        raise NotImplementedError(
            f"{op._qualified_op_name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): "
            "the function of that name in focalops.reference has one"
        )


def _has_tangent(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor) and _is_dual(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return _is_dual(tensor)


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def refuse_scripting(names: Iterable[str], namespace: dict[str, Any]) -> None:
    """For torch.jit.script, which asks what it compiles, or what that calls, how to prepare it."""
    for name in names:
        if callable(namespace[name]):
            namespace[name].__prepare_scriptable__ = partial(say_no_script, name)


def say_no_script(name: str, *_: Any) -> None:
    raise NotImplementedError(
        f"focalops.{name} has no TorchScript: use torch.compile or torch.export instead of torch.jit.script"
    )


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


# ---- sentences that the native checks say too (csrc/checks/) ------------------------------------

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensor(name: str, value: Any) -> None:
    """For the public functions: what is no tensor has none of the attributes that the other checks ask for, and no op of
    focalops takes complex numbers, which torch would compare and convert in words of its own."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype.is_complex:
        raise ArgumentError(f"{name} must be real numbers, got {value.dtype}")
    if value.is_quantized:
        raise ArgumentError(f"{name} must be real numbers, got {value.dtype}: dequantize it")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(condition: bool, sentence: Callable[[], str]) -> None:
    if not condition:
        raise ArgumentError(sentence())


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
