"""The sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002), and that of a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import number
from focalops._gradients import (
    differentiable,
    divisor_of,
    empty_gradient,
    loss_over_its_logits,
    register_gradients,
    scaled,
)
from focalops._loss_options import (
    LossOptions,
    check_non_negative,
    check_normalizer,
    check_targets,
    check_unit_or_none,
    num_classes,
)
from focalops._ops import (
    call,
    check,
    check_same_device,
    compute_dtype,
    ops,
    runs_reference,
)
from focalops.row_losses import row_loss


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0,
    inplace_backward: bool = False,
) -> Tensor:
    r"""The focal loss of logits, :math:`-\alpha_t (1 - p_t)^\gamma \log(p_t)`.

    A drop-in for ``torchvision.ops.sigmoid_focal_loss`` that also takes class indices, which spares the one-hot matrix.

    Args:
        inputs: logits, float16, bfloat16, float32 or float64, of any shape, ``(..., K)`` with class indices.
        targets: either dense, of the shape of ``inputs``, with values in [0, 1]; or class indices, int32 or int64, of
            shape ``inputs.shape[:-1]``: ``0..K-1`` a class, ``K`` background, ``ignore_index`` neither loss nor gradient.
            An index or dense target that is none of these is an error on the CPU; on CUDA, where looking would stop the
            device, the losses of its row, or its own, are NaN. (Dense targets up to 0.01 beyond [0, 1] are taken for roundings.)
        alpha: weight of the positives, ``1 - alpha`` that of the negatives, in [0, 1]; any negative number weights nothing.
        gamma: exponent of the modulating factor, >= 0. Like alpha a number, or a 0-d tensor of the CPU.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. ``"mean"`` divides by the number of elements that are not ignored
            (the mean of none is 0).
        ignore_index: class index of rows to leave out; with class indices only.
        normalizer: with ``"sum"``, a number or 0-d tensor that divides the sum, such as the number of positive anchors;
            as a tensor it is read on the device.
        min_normalizer: least value of the divisor.
        weight: one a row, of shape ``inputs.shape[:-1]``, multiplies its losses; with class indices only. That of a
            class-balanced loss is ``weight_of_class[targets]``. ``"mean"`` does not divide by the weights. It may require grad,
            though not with ``inplace_backward``: its gradient is the loss of the row.
        class_weight: ``(K,)``, multiplies the losses of a class's logits, be they positive or negative, as ``weight`` of
            ``torch.nn.functional.binary_cross_entropy_with_logits`` does; or ``(3, K)``, three of each class: of its positive
            logits, of its negative ones in rows of another class, and of those in background rows. With class indices only.
        label_smoothing: moves the targets of the cross entropy from 1 and 0 to ``1 - label_smoothing / 2`` and
            ``label_smoothing / 2``: each logit is a question of two answers. :math:`\alpha_t` and :math:`(1 - p_t)^\gamma` keep the
            hard target, as in EfficientDet's loss and apex's. With class indices only.
        inplace_backward: with ``"sum"`` and ``"mean"``, write the gradient over ``inputs``: no extra memory. Where a
            gradient is computed, whatever reads ``inputs`` after this call reads the gradient; autograd refuses a backward
            that needs the logits. Eager mode only, one backward, once differentiable; ``inputs`` must be contiguous,
            and neither a leaf nor a view.

    Returns:
        ``"none"``: the losses, in the shape and dtype of ``inputs``, and with dense targets in its memory layout. Otherwise a
        0-d tensor, float64 for float64 inputs, else float32.

    With dense targets ``weight``, ``class_weight``, ``label_smoothing`` and ``ignore_index`` are refused: multiply the losses of
    ``reduction="none"`` instead. The ``pos_weight`` of ``binary_cross_entropy_with_logits`` is ``alpha``: that of w is
    ``alpha = w / (1 + w)``, times ``1 + w``.

    With ``"sum"`` and ``"mean"`` the logits are read once: where they require a gradient, it is written in the same pass,
    and takes the only extra memory, one tensor of the size of ``inputs`` (none with ``inplace_backward``). Computed in float32 (float64 for float64), two
    runs give the same bits. Time O(inputs).

    >>> sigmoid_focal_loss(logits, labels, reduction="sum", normalizer=num_positives)  # (N, K), (N,)
    """
    options = LossOptions(
        reduction,
        ignore_index,
        normalizer,
        min_normalizer,
        weight,
        class_weight,
        inplace_backward,
    )
    return _focal_loss(inputs, targets, alpha, gamma, None, options, label_smoothing)


def sigmoid_focal_loss_star(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    beta: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    inplace_backward: bool = False,
) -> Tensor:
    r"""FL*, the alternate form of the focal loss: :math:`-\alpha_t \log(\sigma(\gamma x_t + \beta)) / \gamma`.

    :math:`x_t` is the logit of the true answer: ``inputs`` for a positive, ``-inputs`` for a negative; a soft target ``t``
    weights it, ``(2 t - 1) * inputs``. ``gamma`` must be > 0 and ``beta`` shifts the loss; everything else is as in
    :func:`sigmoid_focal_loss`. Source: the appendix of the paper; for ``beta=0``, ``fvcore.nn.sigmoid_focal_loss_star``
    (whose defaults are ``alpha=-1, gamma=1``).
    """
    options = LossOptions(
        reduction, ignore_index, normalizer, min_normalizer, inplace_backward=inplace_backward
    )
    return _focal_loss(inputs, targets, alpha, gamma, number("beta", beta), options)


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""The focal loss of one out of K classes, :math:`-\alpha (1 - p)^\gamma \log(p)`, p = softmax(inputs) of the true class.

    Args:
        inputs: logits ``(..., K)``, float16, bfloat16, float32 or float64.
        targets: class indices, int32 or int64, of shape ``inputs.shape[:-1]``: ``0..K-1`` (K >= 1) or ``ignore_index``. Background,
            where there is one, is a class of its own. Another index is an error on the CPU and makes the loss NaN on CUDA.
        alpha: a factor, the same for all classes, of any size; a negative number is none.
        gamma: exponent of the modulating factor, >= 0; at 0 the loss is alpha times the cross entropy.
        reduction: ``"none"``, one loss a row; ``"sum"``; or ``"mean"``, over the rows that are not ignored.
        ignore_index: as in :func:`sigmoid_focal_loss`.
        normalizer: as in :func:`sigmoid_focal_loss`.
        min_normalizer: as in :func:`sigmoid_focal_loss`.
        weight: one a row, multiplies its loss; it may require grad, and the loss then runs in plain PyTorch.
        class_weight: ``(K,)``, multiplies the losses of the rows of a class, as ``weight`` of
            ``torch.nn.functional.cross_entropy`` does; ``"mean"`` does not divide by it.
        inplace_backward: as in :func:`sigmoid_focal_loss`.

    Returns:
        ``"none"``: the losses, ``inputs.shape[:-1]``, in the dtype of ``inputs``, composed of PyTorch's own ops. Otherwise a 0-d
        tensor, float64 for float64 inputs, else float32; the gradient is written by the same kernel.

    Where the true class's logit is -inf the loss is infinite and the gradient that of the cross entropy; a row with +inf, or of
    -inf alone, is NaN, as in ``torch.nn.functional.cross_entropy``.

    Time O(inputs). Source: ``mmcv.ops.softmax_focal_loss(input, target, gamma, alpha, weight, reduction)``, on CUDA alone,
    whose ``weight`` is ``class_weight`` here.

    >>> softmax_focal_loss(logits, labels, reduction="sum", normalizer=num_positives)  # (N, K), (N,)
    """
    options = LossOptions(
        reduction,
        ignore_index,
        normalizer,
        min_normalizer,
        weight,
        class_weight,
        inplace_backward,
    )
    options = options.checked(constant_weight=False, inputs=inputs, targets=targets)
    parameters = {"alpha": alpha, "gamma": gamma}
    return row_loss("softmax_focal_loss", inputs, targets, None, parameters, options)


def _focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,  # None: FL, else FL*
    options: LossOptions,
    label_smoothing: float = 0,
) -> Tensor:
    options = options.checked(constant_weight=False, inputs=inputs, targets=targets)
    alpha, gamma = number("alpha", alpha), number("gamma", gamma)
    label_smoothing = number("label_smoothing", label_smoothing)
    is_dense = targets.dim() == inputs.dim()
    has_weights = options.weight is not None or options.class_weight is not None
    is_of_rows = has_weights or label_smoothing != 0
    if is_dense and (is_of_rows or options.ignore_index != -100):
        raise ValueError(
            "weight, class_weight, label_smoothing and ignore_index need class-index targets: "
            "with dense ones multiply the losses of reduction 'none'"
        )
    if is_of_rows:
        parameters = {"alpha": alpha, "gamma": gamma, "label_smoothing": label_smoothing}
        return row_loss("sigmoid_focal_loss", inputs, targets, None, parameters, options)
    dtype = compute_dtype(inputs.dtype)
    if is_dense and targets.dtype not in (inputs.dtype, dtype):
        targets = targets.to(dtype if targets.is_floating_point() else inputs.dtype)
    if runs_reference(inputs):
        _check(inputs, targets, alpha, gamma, beta)
        check_normalizer(_name(beta), "inputs", inputs, options.divisor(dtype)[0])
        return _reference(
            inputs,
            targets,
            alpha,
            gamma,
            beta,
            options.reduction,
            ignore_index=options.ignore_index,
            normalizer=options.normalizer,
            min_normalizer=options.min_normalizer,
        )

    order = _memory_order(inputs, targets) if is_dense and not options.inplace_backward else None
    if order is not None:
        inputs, targets = inputs.permute(order), targets.permute(order)
    arguments = (targets, alpha, gamma, beta, options.ignore_index)
    if options.reduction == "none":
        losses = call(ops.sigmoid_focal_loss, inputs, *arguments)
        return losses if order is None else losses.permute(*map(order.index, range(len(order))))
    if options.reduction == "mean":
        elements: Tensor | int = inputs.numel()
        if not is_dense:
            elements = (targets != options.ignore_index).sum() * num_classes(inputs)
        options = options._replace(normalizer=elements, min_normalizer=1)
    divisor = options.divisor(dtype)
    compute_grad = inputs.requires_grad and torch.is_grad_enabled()
    if options.inplace_backward and compute_grad:

        def loss(x: Tensor) -> Tensor:
            return call(ops._sigmoid_focal_loss_sum_, x, *arguments, *divisor)

        return loss_over_its_logits(loss, {"inputs": inputs}, divisor)
    return call(ops.sigmoid_focal_loss_sum, inputs, *arguments, *divisor, compute_grad)[0]


def _memory_order(inputs: Tensor, targets: Tensor) -> list[int] | None:
    """The order of dimensions in which both are contiguous, if it is not their own."""
    if inputs.shape != targets.shape or inputs.is_contiguous():
        return None
    order = sorted(range(inputs.dim()), key=inputs.stride, reverse=True)
    if inputs.permute(order).is_contiguous() and targets.permute(order).is_contiguous():
        return order
    return None


def _reference(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,
    reduction: str,
    **options: Any,
) -> Tensor:
    if beta is None:
        return reference.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction, **options)
    return reference.sigmoid_focal_loss_star(
        inputs, targets, alpha, gamma, reduction, beta=beta, **options
    )


# ---- fake kernels -------------------------------------------------------------------------------


def _name(beta: float | None) -> str:
    return "sigmoid_focal_loss" if beta is None else "sigmoid_focal_loss_star"


def _check(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, beta: float | None) -> None:
    op = _name(beta)
    check_targets(op, inputs, targets, may_be_dense=True)
    check_unit_or_none(op, "alpha", alpha)
    check(
        beta is None or gamma > 0,
        lambda: f"{op}: gamma must be > 0, got {gamma:g}",
    )
    check_non_negative(op, "gamma", gamma)


@torch.library.register_fake("focalops::sigmoid_focal_loss")
def _(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,
    ignore_index: int,
) -> Tensor:
    _check(inputs, targets, alpha, gamma, beta)
    return empty_gradient(inputs)


@torch.library.register_fake("focalops::_sigmoid_focal_loss_backward")
def _(
    grad_output: Tensor,
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,
    ignore_index: int,
) -> Tensor:
    op = _name(beta)
    _check(inputs, targets, alpha, gamma, beta)
    check_same_device(op, "grad_output", grad_output, "inputs", inputs)
    check(
        grad_output.shape == inputs.shape and grad_output.dtype == inputs.dtype,
        lambda: (
            f"{op}: grad_output must have the shape and dtype of inputs, "
            f"{tuple(inputs.shape)} and {inputs.dtype}, "
            f"got {tuple(grad_output.shape)} and {grad_output.dtype}"
        ),
    )
    return empty_gradient(inputs)


@torch.library.register_fake("focalops::sigmoid_focal_loss_sum")
def _(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, Tensor]:
    op = _name(beta)
    _check(inputs, targets, alpha, gamma, beta)
    check_normalizer(op, "inputs", inputs, normalizer)
    loss = inputs.new_empty((), dtype=compute_dtype(inputs.dtype))
    return loss, empty_gradient(inputs) if compute_grad else inputs.new_empty(0)


@torch.library.register_fake("focalops::_sigmoid_focal_loss_sum_")
def _(inputs: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty((), dtype=compute_dtype(inputs.dtype))


# ---- autograd -----------------------------------------------------------------------------------


def _setup_elementwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, *ctx.arguments = inputs
    ctx.save_for_backward(logits, targets)


def _backward_elementwise(ctx: Any, grad_output: Tensor) -> Sequence[Tensor]:
    inputs, targets = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_backward(grad_output, inputs, targets, ctx.arguments, "none")
    arguments = (grad_output, inputs, targets, *ctx.arguments)
    return [call(ops._sigmoid_focal_loss_backward, *arguments)]


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.arguments, normalizer, ctx.min_normalizer, _ = inputs
    ctx.save_for_backward(logits, targets, normalizer, output[1])


def _backward_sum(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    inputs, targets, normalizer, grad = ctx.saved_tensors
    if torch.is_grad_enabled() or grad.numel() != inputs.numel():
        factor = grad_loss / divisor_of(normalizer, ctx.min_normalizer)
        return _differentiable_backward(factor, inputs, targets, ctx.arguments, "sum")
    return scaled([grad], grad_loss, normalizer, ctx.min_normalizer)


def _differentiable_backward(
    grad_output: Tensor,
    inputs: Tensor,
    targets: Tensor,
    arguments: tuple[Any, ...],  # alpha, gamma, beta, ignore_index
    reduction: str,
) -> Sequence[Tensor]:
    alpha, gamma, beta, ignore_index = arguments

    def formula(x: Tensor) -> Tensor:
        return _reference(x, targets, alpha, gamma, beta, reduction, ignore_index=ignore_index)

    return differentiable(formula, [inputs], grad_output)


register_gradients("sigmoid_focal_loss", _setup_elementwise, _backward_elementwise)
register_gradients("sigmoid_focal_loss_sum", _setup_sum, _backward_sum)


# ---- vmap ---------------------------------------------------------------------------------------


def _batched(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    """The batch dimension first."""
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


@torch.library.register_vmap("focalops::sigmoid_focal_loss")
def _(
    info: Any, in_dims: tuple[Any, ...], inputs: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, int]:
    inputs, targets = _batched(info, inputs, in_dims[0]), _batched(info, targets, in_dims[1])
    return ops.sigmoid_focal_loss(inputs, targets, *options), 0


@torch.library.register_vmap("focalops::_sigmoid_focal_loss_backward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    tensors = (_batched(info, arguments[i], in_dims[i]) for i in range(3))
    return ops._sigmoid_focal_loss_backward(*tensors, *arguments[3:]), 0


@torch.library.register_vmap("focalops::sigmoid_focal_loss_sum")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """A sum for each sample, which the fused kernel does not know: from the losses of the elements."""
    x, targets = _batched(info, inputs, in_dims[0]), _batched(info, targets, in_dims[1])
    x32 = x.to(compute_dtype(x.dtype))
    options = (alpha, gamma, beta, ignore_index)
    if normalizer is not None:
        normalizer = _batched(info, normalizer, in_dims[6])
    divisor = divisor_of(normalizer, min_normalizer)
    loss = ops.sigmoid_focal_loss(x32, targets, *options).flatten(1).sum(1) / divisor
    if not compute_grad:
        return (loss, x.new_empty((info.batch_size, 0))), (0, 0)
    grad = ops._sigmoid_focal_loss_backward(torch.ones_like(x32), x32, targets, *options)
    if x.dtype != torch.float16:
        if isinstance(divisor, Tensor):
            divisor = divisor.reshape(-1, *[1] * (grad.dim() - 1))
        grad = grad / divisor
    return (loss, grad.to(x.dtype)), (0, 0)
