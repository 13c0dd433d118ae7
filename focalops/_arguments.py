"""What the public functions ask of their arguments before an op sees them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from focalops._coordinates import check_like
from focalops._ops import check, check_floating, check_same_device, compute_dtype, require_tensor


def require_tensors(name: str, value: Any) -> None:
    """Of an argument that is one tensor or a list of them, such as one for each image or level."""
    if not isinstance(value, (list, tuple)):
        require_tensor(name, value)
        return
    for i, tensor in enumerate(value):
        require_tensor(f"{name}[{i}]", tensor)


def floats(name: str, values: Any, what: str) -> list[float]:
    """A sequence of numbers; how many, the op checks."""
    try:
        return [_as_float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be {what}, got {_in_words(values)}") from None


def as_sizes(name: str, pairs: Any, device: torch.device) -> Tensor:
    """float32 (B, 2) of the sizes of images, given in numbers, without waiting for the device."""
    try:
        sizes = torch.tensor([[_as_float(x) for x in pair] for pair in pairs]).reshape(-1, 2)
        if len(sizes) == len(pairs):
            return on_device(sizes, device)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise TypeError(
        f"{name} must be a Tensor or pairs of numbers, height and width of each image, "
        f"got {_in_words(pairs)}"
    )


def _as_float(value: Any) -> float:
    if isinstance(value, (str, bytes)):  # of which Python makes a number, too
        raise TypeError
    return float(value)


def _in_words(value: Any) -> str:
    """What it is, or where that takes more than a line, its type."""
    words = repr(value)
    return words if "\n" not in words else type(value).__name__


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU, copied without waiting."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def host_sees(tensor: Tensor) -> bool:
    """Whether looking at the tensor's values waits for nothing and leaves no trace in a graph."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, make_fx
        and not isinstance(tensor, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_are_constant(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require grad: the loss is not differentiated by it")


def number(name: str, value: Any) -> float:
    """A number that the host needs, which may come as a 0-d tensor of the host."""
    # Asking an abstract class such as Real costs a microsecond.
    if type(value) is float or (type(value) is int and -_MOST <= value < _MOST):
        return value
    if isinstance(value, Tensor):
        shape, device = tuple(value.shape), value.device
        if shape != () or device.type != "cpu":
            raise ValueError(
                f"{name} must be a number or a 0-d CPU tensor, got shape {shape} on {device}"
            )
        check_are_constant(**{name: value})
        if value.dtype.is_complex:
            raise TypeError(f"{name} must be a number, got {value.dtype}")
        return value.item()
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isinstance(value, Real):
        return value  # type: ignore[return-value]
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number of float64, got one beyond it") from None


def checked_normalizer(normalizer: Any, min_normalizer: Any) -> tuple[Tensor | float | None, float]:
    if isinstance(normalizer, Tensor):
        require_tensor("normalizer", normalizer)
        check_are_constant(normalizer=normalizer)
    elif normalizer is not None:
        normalizer = number("normalizer", normalizer)
    return normalizer, number("min_normalizer", min_normalizer)


_MOST = 2**63  # of int64


def whole(name: str, value: Any) -> int:
    """An integer that a native op takes."""
    if type(value) is int and -_MOST <= value < _MOST:
        return value
    if not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    value = int(value) if isinstance(value, Integral) else value
    if not -_MOST <= value < _MOST:
        raise ValueError(f"{name} must be an integer of int64, got {value}")
    return value  # type: ignore[return-value]


def flag(name: str, value: Any) -> bool:
    """True or False, numpy's too. Whatever else counts as true, a string or a tensor, was meant for another argument."""
    if type(value) is bool:
        return value
    is_numpys = str(getattr(value, "dtype", None)) == "bool" and value.shape == ()
    if is_numpys or isinstance(value, torch.SymBool):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    words = ", ".join(map(repr, choices)) if len(choices) > 2 else " or ".join(map(repr, choices))
    several = "one of " if len(choices) > 2 else ""
    raise ValueError(f"{name} must be {several}{words}, got {_in_words(value)}")


MAX_LEVELS = 8  # kMaxLevels in csrc/head_levels.h


def check_num_levels(op: str, name: str, levels: Sequence[Tensor]) -> None:
    check(
        1 <= len(levels) <= MAX_LEVELS,
        lambda: f"{op}: {name} must be 1 to {MAX_LEVELS} levels, got {len(levels)}",
    )


def check_image_size(op: str, name: str, level: Tensor, what: str) -> None:
    numbers = level.shape[1] * level.shape[2] * level.shape[3]
    check(
        numbers < 2**31,
        lambda: f"{op}: {name} must have fewer than 2^31 {what} an image, got {numbers}",
    )


def check_like_levels(op: str, name: str, tensor: Tensor, levels_name: str, first: Tensor) -> None:
    """What is computed with levels of which ``first`` is the first has the dtype that they are computed in."""
    check_same_device(op, name, tensor, f"{levels_name}[0]", first)
    check(
        tensor.dtype == compute_dtype(first.dtype),
        lambda: (
            f"{op}: {name} must be float32 (float64 for float64 {levels_name}), got {tensor.dtype}"
        ),
    )


def check_levels(
    op: str,
    name: str,
    levels: Sequence[Tensor],
    *,
    channels: str,
    multiple: int,
    same: str,
    what: str,
) -> None:
    """Of one dtype, on one device, with as many images and channels, a multiple of ``multiple``, as the first."""
    check_num_levels(op, name, levels)
    first = levels[0]
    check_floating(op, f"{name}[0]", first)
    for i, level in enumerate(levels):
        shape, level_name = tuple(level.shape), f"{name}[{i}]"
        check_like(op, level_name, level, f"{name}[0]", first)
        check(
            len(shape) == 4 and shape[1] % multiple == 0 and shape[:2] == first.shape[:2],
            lambda: (
                f"{op}: {level_name} must have shape (B, {channels}, H, W), "  # noqa: B023
                f"B and {same} the same in all levels, got {shape}"  # noqa: B023
            ),
        )
        check_image_size(op, level_name, level, what)
