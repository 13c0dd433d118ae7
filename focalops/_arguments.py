"""What the public functions ask of their arguments before an op sees them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from focalops._ops import check, require_tensor


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
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {what}, got {values!r}") from None


def as_sizes(name: str, pairs: Any, device: torch.device) -> Tensor:
    """float32 (B, 2) of the sizes of images, given in numbers, without waiting for the device."""
    try:
        sizes = torch.tensor([[float(x) for x in pair] for pair in pairs]).reshape(-1, 2)
        if len(sizes) == len(pairs):
            return on_device(sizes, device)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(
        f"{name} must be a Tensor or pairs of numbers, height and width of each image, got {pairs!r}"
    )


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
    if type(value) in (float, int):
        return value
    if isinstance(value, Tensor):
        shape, device = tuple(value.shape), value.device
        if shape != () or device.type != "cpu":
            raise ValueError(
                f"{name} must be a number or a 0-d CPU tensor, got shape {shape} on {device}"
            )
        check_are_constant(**{name: value})
        return value.item()
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value) if isinstance(value, Real) else value  # type: ignore[return-value]


def whole(name: str, value: Any) -> int:
    if not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return int(value) if isinstance(value, Integral) else value  # type: ignore[return-value]


def check_image_size(op: str, name: str, level: Tensor, what: str) -> None:
    numbers = level.shape[1] * level.shape[2] * level.shape[3]
    check(
        numbers < 2**31,
        lambda: f"{op}: {name} must have fewer than 2^31 {what} an image, got {numbers}",
    )
