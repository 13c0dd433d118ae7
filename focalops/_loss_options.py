"""The options that the classification losses share, and the checks of what they share, in the sentences of csrc/checks/."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from focalops._arguments import (
    check_are_constant,
    checked_normalizer,
    choice,
    flag,
    whole,
)
from focalops._ops import (
    check,
    check_floating,
    check_same_device,
    compute_dtype,
    require_tensor,
)

REDUCTIONS = ("none", "mean", "sum")


class LossOptions(NamedTuple):
    """Options as :func:`focalops.sigmoid_focal_loss` has them."""

    reduction: str = "sum"
    ignore_index: int = -100
    normalizer: Tensor | float | None = None
    min_normalizer: float = 1
    weight: Tensor | None = None
    class_weight: Tensor | None = None
    inplace_backward: bool = False

    def checked(self, *, constant_weight: bool = True, **tensors: Any) -> LossOptions:
        """The options in the types that ops take. ``tensors`` are what else the loss reads, by the names of its arguments:
        all but ``inputs`` are constants."""
        choice("reduction", self.reduction, REDUCTIONS)
        inplace_backward = flag("inplace_backward", self.inplace_backward)
        if inplace_backward and self.reduction == "none":
            raise ValueError("inplace_backward needs reduction 'sum' or 'mean', got 'none'")
        check_normalizes_a_sum(self.normalizer, self.reduction)
        for name, given in tensors.items():
            require_tensor(name, given)
            if name != "inputs" and given.requires_grad:
                check_are_constant(**{name: given})
        if self.weight is not None:
            require_tensor("weight", self.weight)
            if constant_weight:
                check_are_constant(weight=self.weight)
        if self.class_weight is not None:
            require_tensor("class_weight", self.class_weight)
            check_are_constant(class_weight=self.class_weight)
        return LossOptions(
            self.reduction,
            whole("ignore_index", self.ignore_index),
            *checked_normalizer(self.normalizer, self.min_normalizer),
            self.weight,
            self.class_weight,
            inplace_backward,
        )

    def in_dtype(self, dtype: torch.dtype) -> LossOptions:
        """With the weights in the dtype that the loss computes in."""
        if self.weight is None and self.class_weight is None:
            return self
        return self._replace(
            weight=to_dtype(self.weight, dtype), class_weight=to_dtype(self.class_weight, dtype)
        )

    def divisor(self, dtype: torch.dtype) -> tuple[Tensor | None, float]:
        """The normalizer on the device, and the least divisor."""
        return divisor(self.normalizer, self.min_normalizer, dtype)


def check_normalizes_a_sum(normalizer: Tensor | float | None, reduction: str) -> None:
    if normalizer is not None and reduction != "sum":
        raise ValueError(
            f"normalizer must be None unless reduction is 'sum', got reduction {reduction!r}"
        )


def divisor(
    normalizer: Tensor | float | None, min_normalizer: float, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    if isinstance(normalizer, Tensor):
        return normalizer.to(dtype), min_normalizer
    return None, 1 if normalizer is None else max(normalizer, min_normalizer)


def to_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def num_classes(inputs: Tensor) -> int:
    return inputs.shape[-1] if inputs.dim() else 1  # the checks of the op refuse 0-d logits


# ---- checks -------------------------------------------------------------------------------------


def check_non_negative(op: str, name: str, given: float) -> None:
    check(given >= 0, lambda: f"{op}: {name} must be >= 0, got {given:g}")


def check_unit(op: str, name: str, given: float) -> None:
    check(0 <= given <= 1, lambda: f"{op}: {name} must lie in [0, 1], got {given:g}")


def check_unit_or_none(op: str, name: str, given: float) -> None:
    check(
        given <= 1,
        lambda: f"{op}: {name} must lie in [0, 1], or be negative for none, got {given:g}",
    )


def check_targets(op: str, inputs: Tensor, targets: Tensor, may_be_dense: bool) -> None:
    check_floating(op, "inputs", inputs)
    check_same_device(op, "targets", targets, "inputs", inputs)
    check(
        may_be_dense or inputs.dim() > 0, lambda: f"{op}: inputs must have shape (..., K), got ()"
    )
    is_dense = may_be_dense and targets.dim() == inputs.dim()
    has_shape = targets.shape == inputs.shape[: targets.dim()]
    check(
        has_shape and (is_dense or targets.dim() == inputs.dim() - 1),
        lambda: (
            f"{op}: targets must have the shape of inputs, {tuple(inputs.shape)}, "
            f"or that shape without its last dimension, got {tuple(targets.shape)}"
            if may_be_dense
            else f"{op}: class-index targets must have the shape of inputs, "
            f"{tuple(inputs.shape)}, without its last dimension, got {tuple(targets.shape)}"
        ),
    )
    check(
        not is_dense or targets.dtype in (inputs.dtype, compute_dtype(inputs.dtype)),
        lambda: (
            f"{op}: dense targets must have the dtype of inputs, {inputs.dtype}, or float32, "
            f"got {targets.dtype}"
        ),
    )
    check(
        is_dense or targets.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: class-index targets must be int32 or int64, got {targets.dtype}",
    )
    check(
        is_dense or inputs.shape[-1] < 2**30,
        lambda: f"{op}: inputs must have fewer than 2^30 classes, got {inputs.shape[-1]}",
    )


def check_normalizer(
    op: str, like_name: str, like: Tensor, normalizer: Tensor | None, images: int | None = None
) -> None:
    """``images``: of a loss whose normalizer may also have one number for each image."""
    if normalizer is None:
        return
    size, dtype = tuple(normalizer.shape), normalizer.dtype
    check_same_device(op, "normalizer", normalizer, like_name, like)
    may_be = "a number or a 0-d tensor"
    if images is not None:
        may_be = f"a number, a 0-d tensor or a tensor of shape ({images},)"
    check(
        size in ((), (images,)),
        lambda: f"{op}: normalizer must be {may_be}, got a tensor of shape {size}",
    )
    check(
        dtype == compute_dtype(like.dtype),
        lambda: (
            f"{op}: normalizer must be float32 (float64 for float64 {like_name.split('[')[0]}), got {dtype}"
        ),
    )


def check_row_numbers(
    op: str,
    name: str,
    given: Tensor | None,
    like_name: str,
    like: Tensor,
    dtype: torch.dtype,
    inputs: str = "logits",
) -> None:
    if given is None:
        return
    check_same_device(op, name, given, like_name, like)
    shape, given_dtype = tuple(given.shape), given.dtype
    check(
        given.shape == like.shape and given_dtype == dtype,
        lambda: (
            f"{op}: {name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"and be float32 (float64 for float64 {inputs}), got {shape} and {given_dtype}"
        ),
    )


def check_class_weight(
    op: str, given: Tensor | None, like: Tensor, num_classes: int, by_part: bool = True
) -> None:
    """``by_part``: there may also be three of each class, by the part that a logit has in its row."""
    if given is None:
        return
    check_same_device(op, "class_weight", given, "the logits", like)
    shape, dtype = tuple(given.shape), given.dtype
    shapes = [(num_classes,), (3, num_classes)] if by_part else [(num_classes,)]
    check(
        shape in shapes and dtype == compute_dtype(like.dtype),
        lambda: (
            f"{op}: class_weight must have shape {' or '.join(map(str, shapes))} "
            f"and be float32 (float64 for float64 logits), got {shape} and {dtype}"
        ),
    )
