"""The node of a BiFPN (Tan et al., "EfficientDet: Scalable and Efficient Object Detection", arXiv 1911.09070)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import choice, number, require_tensors
from focalops._gradients import differentiable, register_gradients
from focalops._ops import (
    call,
    check,
    check_floating,
    check_same_device,
    compute_dtype,
    ops,
    register_vmap_as_loop,
    require_tensor,
    runs_reference,
)

MODES = ("fast", "softmax", "sum", "unbounded")
ACTIVATIONS = (None, "silu", "relu6")
PADDINGS = ("same", "symmetric")


def fuse_features(
    features: Sequence[Tensor],
    weights: Tensor | None = None,
    mode: str = "fast",
    *,
    eps: float = 1e-4,
    activation: str | None = None,
    padding: str = "same",
) -> Tensor:
    r"""Maps of neighbouring levels, brought to the size of the first, weighted and added: a node of a BiFPN.

    Args:
        features: 1 to 8 maps ``(B, C, H, W)`` of one dtype, float16, bfloat16, float32 or float64. The first has the size of the
            output: put the node's own level first, as every node of a BiFPN does. A smaller map is upsampled to its nearest
            pixels, row ``floor(i * h / H)``, as ``torch.nn.functional.interpolate`` does; one of twice the size (2 n or 2 n - 1)
            is max-pooled by windows of 3 x 3 with a stride of 2.
        weights: ``(n,)``, one a map, read on the device; a gradient of theirs comes from the same backward.
        mode: how the weights e become factors: ``"fast"``, :math:`\mathrm{relu}(e_i) / (\sum_j \mathrm{relu}(e_j) + \mathrm{eps})`;
            ``"softmax"``; ``"unbounded"``, e itself; ``"sum"``, all 1, without ``weights``.
        eps: of ``"fast"``.
        activation: of the sum: None, ``"silu"`` or ``"relu6"``.
        padding: of the pooling. ``"same"`` is TensorFlow's: a window begins at the first of two pixels where the size is even, and a
            pixel before where it is odd. ``"symmetric"`` begins a pixel before in either case.

    Returns:
        ``(B, C, H, W)`` in the dtype of the maps, in the layout of the first: channels_last where that is so, else contiguous.

    Contiguous and channels_last maps are read where they lie if they lie as the first does; others are copied. Computed in float32
    (float64 for float64): with ``"fast"`` each map times its factor, divided, then added in the order given, which are the bits of
    effdet's. On CUDA, maps of half precision are multiplied by the quotient instead, before the sum is rounded to their dtype. A
    NaN stays through the pooling; of equal maxima the first gets the gradient. Nothing is kept for the backward but the maps and
    the weights; it needs the size of the output for the gradient of the sum, and a byte for each pooled number. Two runs give the
    same bits. Time O(maps).

    Source: effdet's ``FpnCombine`` with its ``ResampleFeatureMap`` behind the lateral convolution.

    >>> fuse_features([p4, p5], weights, activation="silu")  # (B, C, 32, 32), (B, C, 16, 16), (2,)
    """
    require_tensors("features", features)
    features = list(features)
    if weights is not None:
        require_tensor("weights", weights)
    choice("mode", mode, MODES)
    choice("padding", padding, PADDINGS)
    if activation is not None:
        choice("activation", activation, ACTIVATIONS[1:])  # type: ignore[arg-type]
    eps = number("eps", eps)
    _check_num_maps(features)
    if weights is not None and weights.is_floating_point():
        weights = weights.to(compute_dtype(features[0].dtype))
    arguments = (MODES.index(mode), eps, ACTIVATIONS.index(activation), padding == "symmetric")
    if runs_reference(features[0]):
        _check(features, weights, arguments[0], arguments[2])
        return _reference(features, weights, *arguments)
    return call(ops.fuse_features, features, weights, *arguments)


def _reference(
    features: Sequence[Tensor],
    weights: Tensor | None,
    mode: int,
    eps: float,
    activation: int,
    symmetric: bool,
) -> Tensor:
    return reference.fuse_features(
        features,
        weights,
        MODES[mode],
        eps=eps,
        activation=ACTIVATIONS[activation],
        padding=PADDINGS[symmetric],
    )


# ---- fake kernels -------------------------------------------------------------------------------


def _like_output(features: Sequence[Tensor], tensor: Tensor) -> Tensor:
    """Uninitialised, of the shape of the tensor, in the layout of the output."""
    rows = features[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if rows else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=layout)


@torch.library.register_fake("focalops::fuse_features")
def _(
    features: list[Tensor],
    weights: Tensor | None,
    mode: int,
    eps: float,
    activation: int,
    symmetric: bool,
) -> Tensor:
    _check(features, weights, mode, activation)
    return _like_output(features, features[0])


@torch.library.register_fake("focalops::_fuse_features_backward")
def _(
    grad_output: Tensor,
    features: list[Tensor],
    weights: Tensor | None,
    mode: int,
    eps: float,
    activation: int,
    symmetric: bool,
) -> tuple[list[Tensor], Tensor]:
    _check(features, weights, mode, activation)
    dtype = compute_dtype(features[0].dtype)
    grad_weights = features[0].new_empty(0 if weights is None else len(features), dtype=dtype)
    return [_like_output(features, feature) for feature in features], grad_weights


def _check_num_maps(features: Sequence[Tensor]) -> None:
    """Asked before the op, too: a list of none has no device to dispatch to."""
    check(
        1 <= len(features) <= 8,
        lambda: f"fuse_features: features must be 1 to 8 maps, got {len(features)}",
    )


def _check(features: Sequence[Tensor], weights: Tensor | None, mode: int, activation: int) -> None:
    op = "fuse_features"
    _check_num_maps(features)
    first = features[0]
    check_floating(op, "features[0]", first)
    for i, feature in enumerate(features):
        _check_feature(op, f"features[{i}]", feature, first)
    check(0 <= mode <= 3, lambda: f"{op}: mode must lie in [0, 3], got {mode}")
    check(0 <= activation <= 2, lambda: f"{op}: activation must lie in [0, 2], got {activation}")
    if MODES[mode] == "sum":
        check(weights is None, lambda: f"{op}: weights must be None with mode='sum'")
        return
    check(
        weights is not None,
        lambda: f"{op}: weights must be one number for each map unless mode='sum'",
    )
    assert weights is not None
    check_same_device(op, "weights", weights, "features[0]", first)
    count, shape, dtype = len(features), tuple(weights.shape), weights.dtype
    check(
        shape == (count,),
        lambda: f"{op}: weights must have shape ({count},), one for each map, got {shape}",
    )
    check(
        dtype == compute_dtype(first.dtype),
        lambda: f"{op}: weights must be float32 (float64 for float64 maps), got {dtype}",
    )


def _check_feature(op: str, name: str, feature: Tensor, first: Tensor) -> None:
    check_same_device(op, name, feature, "features[0]", first)
    check(
        feature.dtype == first.dtype,
        lambda: f"{op}: {name} must be {first.dtype} like features[0], got {feature.dtype}",
    )
    check(
        feature.dim() == 4 and feature.shape[:2] == first.shape[:2],
        lambda: (
            f"{op}: {name} must have shape (B, C, H, W), B and C the same in all maps, "
            f"got {tuple(feature.shape)}"
        ),
    )
    (height, width), (rows, columns) = first.shape[2:], feature.shape[2:]
    is_same = rows == height and columns == width
    goes_up = rows <= height and columns <= width and min(rows, columns) > 0
    is_pooled = (rows + 1) // 2 == height and (columns + 1) // 2 == width
    check(
        is_same or goes_up or is_pooled,
        lambda: (
            f"{op}: {name} must have the height and width of features[0], {height} x {width}, "
            f"twice as much or less, got {rows} x {columns}"
        ),
    )


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weights, *ctx.arguments = inputs
    ctx.save_for_backward(weights, *features)


def _backward(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    weights, *features = ctx.saved_tensors
    if torch.is_grad_enabled():

        def formula(*x: Tensor) -> Tensor:
            return _reference(
                x[: len(features)], None if weights is None else x[-1], *ctx.arguments
            )

        inputs = features if weights is None else [*features, weights]
        grads = list(differentiable(formula, inputs, grad_output))
        return grads if weights is not None else [*grads, None]
    grads, grad_weights = call(
        ops._fuse_features_backward, grad_output, features, weights, *ctx.arguments
    )
    return *grads, None if weights is None else grad_weights


register_gradients("fuse_features", _setup, _backward, num_inputs=2)
register_vmap_as_loop("fuse_features")
register_vmap_as_loop("_fuse_features_backward")
