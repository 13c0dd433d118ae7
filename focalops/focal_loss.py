"""The sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import (
    check_are_constant,
    check_image_size,
    checked_normalizer,
    choice,
    flag,
    number,
    whole,
)
from focalops._ops import (
    NATIVE_DEVICES,
    as_own_input,
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

REDUCTIONS = ("none", "mean", "sum")


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
            class-balanced loss is ``weight_of_class[targets]``. ``"mean"`` does not divide by the weights.
        class_weight: ``(K,)``, multiplies the losses of a class's logits, be they positive or negative, as ``weight`` of
            ``torch.nn.functional.binary_cross_entropy_with_logits`` does; with class indices only.
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
    return _focal_loss(
        inputs,
        targets,
        alpha,
        gamma,
        None,
        reduction,
        ignore_index,
        normalizer,
        min_normalizer,
        inplace_backward,
        weight,
        class_weight,
        label_smoothing,
    )


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
    return _focal_loss(
        inputs,
        targets,
        alpha,
        gamma,
        number("beta", beta),
        reduction,
        ignore_index,
        normalizer,
        min_normalizer,
        inplace_backward,
    )


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
        weight: one a row, multiplies its loss.
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
    return _row_loss(
        "softmax_focal_loss",
        inputs,
        (targets, None),
        {"alpha": alpha, "gamma": gamma},
        reduction,
        ignore_index=ignore_index,
        normalizer=normalizer,
        min_normalizer=min_normalizer,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
    )


def dense_focal_loss(
    cls_logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0,
    inplace_backward: bool = False,
) -> Tensor:
    r"""The focal loss of a head's outputs, read where the head left them: no permute, no concatenation.

    Args:
        cls_logits: 1 to 8 levels ``(B, A * K, H, W)`` of one dtype, contiguous or channels_last, each in its own way; channel
            ``a * K + k`` is class ``k`` of anchor ``a``. What lies otherwise is copied.
        labels: ``(B, N)``, int32 or int64, the class indices of :func:`sigmoid_focal_loss`, one an anchor, in the order
            level, row, column, anchor. N tells A: the number of anchors over the number of positions.
        alpha: as in :func:`sigmoid_focal_loss`.
        gamma: as in :func:`sigmoid_focal_loss`.
        normalizer: a number or 0-d tensor that divides the loss, such as the number of positive anchors; or ``(B,)``, one for
            each image. Read on the device.
        min_normalizer: least value of a divisor.
        ignore_index: label of anchors to leave out.
        weight: ``(B, N)``, one an anchor.
        class_weight: ``(K,)``, as in :func:`sigmoid_focal_loss`.
        label_smoothing: as in :func:`sigmoid_focal_loss`.
        inplace_backward: write the gradients over ``cls_logits``, as in :func:`sigmoid_focal_loss`; each level must be
            contiguous or channels_last and require a gradient.

    Returns:
        A 0-d tensor, float64 for float64 logits, else float32: the sum over the images of their losses, each divided by its
        normalizer.

    One launch reads the logits of all levels once and, where they require a gradient, writes it in the same pass and in the
    same layout. It takes the only extra memory, or none with ``inplace_backward``. Two runs give the same bits. Time O(logits).

    >>> dense_focal_loss(cls_logits, labels, normalizer=(labels < num_classes).sum(1)) / batch_size
    """
    if isinstance(cls_logits, Tensor) or not isinstance(cls_logits, Iterable):
        given = type(cls_logits).__name__
        raise TypeError(f"cls_logits must be a list of Tensors, got {given}")
    cls_logits = list(cls_logits)
    for i, level in enumerate(cls_logits):
        require_tensor(f"cls_logits[{i}]", level)
    alpha, gamma = number("alpha", alpha), number("gamma", gamma)
    label_smoothing = number("label_smoothing", label_smoothing)
    ignore_index = whole("ignore_index", ignore_index)
    inplace_backward = flag("inplace_backward", inplace_backward)
    _require_tensors({"labels": labels}, weight=weight, class_weight=class_weight)
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    if cls_logits and runs_reference(cls_logits[0]):
        dtype = compute_dtype(cls_logits[0].dtype)
        given = normalizer.to(dtype) if isinstance(normalizer, Tensor) else None
        weights = _to(dtype, weight), _to(dtype, class_weight)
        _check_dense(cls_logits, labels, alpha, gamma, label_smoothing, *weights, given)
        return reference.dense_focal_loss(
            cls_logits,
            labels,
            alpha,
            gamma,
            normalizer=normalizer,
            min_normalizer=min_normalizer,
            ignore_index=ignore_index,
            weight=weight,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
        )
    if cls_logits:
        dtype = compute_dtype(cls_logits[0].dtype)
        weight, class_weight = _to(dtype, weight), _to(dtype, class_weight)
    if isinstance(normalizer, Tensor):
        if cls_logits:
            normalizer = normalizer.to(dtype)
    else:
        min_normalizer = 1 if normalizer is None else max(normalizer, min_normalizer)
        normalizer = None
    arguments = (
        labels,
        alpha,
        gamma,
        label_smoothing,
        weight,
        class_weight,
        ignore_index,
        normalizer,
        min_normalizer,
    )
    compute_grad = torch.is_grad_enabled() and any(level.requires_grad for level in cls_logits)
    if inplace_backward and compute_grad:
        for i, level in enumerate(cls_logits):
            _check_may_hold_gradient(f"cls_logits[{i}]", level)
        if len(set(map(id, cls_logits))) < len(cls_logits):
            raise ValueError("inplace_backward needs different tensors for different levels")
        return _DenseInPlace.apply(arguments, *cls_logits)
    loss, _ = call(ops.dense_focal_loss, cls_logits, *arguments, compute_grad)
    return loss


def _require_tensors(required: dict[str, Any], **optional: Any) -> None:
    for name, value in required.items():
        require_tensor(name, value)
        if value.requires_grad and name != "inputs":
            check_are_constant(**{name: value})
    for name, value in optional.items():
        if value is not None:
            require_tensor(name, value)
            check_are_constant(**{name: value})


def _to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    beta: float | None,  # None: FL, else FL*
    reduction: str,
    ignore_index: int,
    normalizer: Tensor | float | None,
    min_normalizer: float,
    inplace_backward: bool,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0,
) -> Tensor:
    _check_reduction(reduction, normalizer, inplace_backward)
    _require_tensors(
        {"inputs": inputs, "targets": targets}, weight=weight, class_weight=class_weight
    )
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    alpha, gamma = number("alpha", alpha), number("gamma", gamma)
    label_smoothing = number("label_smoothing", label_smoothing)
    ignore_index = whole("ignore_index", ignore_index)
    is_dense = targets.dim() == inputs.dim()
    has_extras = weight is not None or class_weight is not None or label_smoothing != 0
    if is_dense and (has_extras or ignore_index != -100):
        raise ValueError(
            "weight, class_weight, label_smoothing and ignore_index need class-index targets: "
            "with dense ones multiply the losses of reduction 'none'"
        )
    if has_extras:
        return _row_loss(
            "sigmoid_focal_loss",
            inputs,
            (targets, None),
            {"alpha": alpha, "gamma": gamma, "label_smoothing": label_smoothing},
            reduction,
            ignore_index=ignore_index,
            normalizer=normalizer,
            min_normalizer=min_normalizer,
            weight=weight,
            class_weight=class_weight,
            inplace_backward=inplace_backward,
        )
    dtype = compute_dtype(inputs.dtype)
    if is_dense and targets.dtype not in (inputs.dtype, dtype):
        targets = targets.to(dtype if targets.is_floating_point() else inputs.dtype)
    if runs_reference(inputs):
        _check(inputs, targets, alpha, gamma, beta)
        if reduction == "sum":
            _check_normalizer(_name(beta), inputs, _divisor_of_sum(inputs, normalizer, 1)[0])
        return _reference(
            inputs,
            targets,
            alpha,
            gamma,
            beta,
            reduction,
            ignore_index=ignore_index,
            normalizer=normalizer,
            min_normalizer=min_normalizer,
        )

    order = _memory_order(inputs, targets) if is_dense and not inplace_backward else None
    if order is not None:
        inputs, targets = inputs.permute(order), targets.permute(order)
    arguments = (inputs, targets, alpha, gamma, beta, ignore_index)
    if reduction == "none":
        losses = call(ops.sigmoid_focal_loss, *arguments)
        return losses if order is None else losses.permute(*map(order.index, range(len(order))))
    if reduction == "mean":
        min_normalizer = 1
        normalizer = inputs.numel()
        if not is_dense:
            normalizer = (targets != ignore_index).sum() * _num_classes(inputs)
    divisor = _divisor_of_sum(inputs, normalizer, min_normalizer)
    return _sum(
        ops.sigmoid_focal_loss_sum,
        ops._sigmoid_focal_loss_sum_,
        (*arguments, *divisor),
        inplace_backward,
    )


def _memory_order(inputs: Tensor, targets: Tensor) -> list[int] | None:
    """The order of dimensions in which both are contiguous, if it is not their own."""
    if inputs.shape != targets.shape or inputs.is_contiguous():
        return None
    order = sorted(range(inputs.dim()), key=inputs.stride, reverse=True)
    if inputs.permute(order).is_contiguous() and targets.permute(order).is_contiguous():
        return order
    return None


def _num_classes(inputs: Tensor) -> int:
    return inputs.shape[-1] if inputs.dim() else 1  # 0-d logits are refused later


def _check_reduction(
    reduction: str, normalizer: Tensor | float | None, inplace_backward: bool
) -> None:
    choice("reduction", reduction, REDUCTIONS)
    if flag("inplace_backward", inplace_backward) and reduction == "none":
        raise ValueError("inplace_backward needs reduction 'sum' or 'mean', got 'none'")
    if normalizer is not None and reduction != "sum":
        raise ValueError(
            f"normalizer must be None unless reduction is 'sum', got reduction {reduction!r}"
        )


def _divisor_of_sum(
    inputs: Tensor, normalizer: Tensor | float | None, min_normalizer: float
) -> tuple[Tensor | None, float]:
    """The normalizer on the device, and its least value."""
    if isinstance(normalizer, Tensor):
        return normalizer.to(compute_dtype(inputs.dtype)), min_normalizer
    return None, 1 if normalizer is None else max(normalizer, min_normalizer)


def _sum(op: Any, inplace_op: Any, arguments: tuple[Any, ...], inplace_backward: bool) -> Tensor:
    inputs = arguments[0]
    compute_grad = inputs.requires_grad and torch.is_grad_enabled()
    if inplace_backward and compute_grad:
        _check_may_hold_gradient("inputs", inputs)
        return _SumInPlace.apply(inplace_op, *arguments)
    loss, _ = call(op, *arguments, compute_grad)
    return loss


class RowLoss(NamedTuple):
    """What Python knows of a member of the row losses, which csrc/math/row_losses.h knows by the same name."""

    reference: Callable[..., Tensor]
    parameters: dict[
        str, Callable[[str, str, float], None] | None
    ]  # in C++'s order: the check of each
    has_scores: bool = True
    knows_dense_targets: bool = False  # of scores, one a logit
    is_softmax: bool = (
        False  # the classes of a row exclude each other: one loss a row, no background
    )

    def evaluate(
        self,
        inputs: Tensor,
        labels: Tensor,
        scores: Tensor | None,
        numbers: Sequence[float],
        **options: Any,
    ) -> Tensor:
        """The reference, of the numbers that its parameters have."""
        parameters = dict(zip(self.parameters, numbers, strict=True))
        targets = (labels, scores) if self.has_scores else labels
        return self.reference(inputs, targets, **parameters, **options)


def _check_non_negative(op: str, name: str, given: float) -> None:
    check(given >= 0, lambda: f"{op}: {name} must be >= 0, got {given:g}")


def _check_unit(op: str, name: str, given: float) -> None:
    check(0 <= given <= 1, lambda: f"{op}: {name} must lie in [0, 1], got {given:g}")


def _check_unit_or_none(op: str, name: str, given: float) -> None:
    check(
        given <= 1,
        lambda: f"{op}: {name} must lie in [0, 1], or be negative for none, got {given:g}",
    )


ROW_LOSSES = {
    "sigmoid_focal_loss": RowLoss(
        reference.sigmoid_focal_loss,
        {
            "alpha": _check_unit_or_none,
            "gamma": _check_non_negative,
            "label_smoothing": _check_unit,
        },
        has_scores=False,
    ),
    "quality_focal_loss": RowLoss(
        reference.quality_focal_loss, {"beta": _check_non_negative}, knows_dense_targets=True
    ),
    "varifocal_loss": RowLoss(
        reference.varifocal_loss,
        {
            "alpha": _check_non_negative,
            "gamma": _check_non_negative,
            "iou_weighted": None,
            "detach_weight": None,
        },
        knows_dense_targets=True,
    ),
    "matchability_aware_loss": RowLoss(
        reference.matchability_aware_loss,
        {"gamma": _check_non_negative, "alpha": _check_non_negative},
    ),
    "ia_bce_loss": RowLoss(
        reference.ia_bce_loss, {"alpha": _check_unit, "gamma": _check_non_negative}
    ),
    "softmax_focal_loss": RowLoss(
        reference.softmax_focal_loss,
        {"alpha": None, "gamma": _check_non_negative},
        has_scores=False,
        is_softmax=True,
    ),
}


def _row_loss(
    name: str,  # of ROW_LOSSES
    inputs: Tensor,
    targets: tuple[Tensor, Tensor | None],  # labels, scores
    parameters: dict[str, Any],
    reduction: str,
    *,
    ignore_index: int,
    normalizer: Tensor | float | None,
    min_normalizer: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    inplace_backward: bool,
) -> Tensor:
    _check_reduction(reduction, normalizer, inplace_backward)
    labels, scores = targets
    required = {"inputs": inputs, "targets": labels}
    _require_tensors(required, scores=scores, weight=weight, class_weight=class_weight)
    normalizer, min_normalizer = checked_normalizer(normalizer, min_normalizer)
    ignore_index = whole("ignore_index", ignore_index)
    numbers = [float(number(option, value)) for option, value in parameters.items()]
    dtype = compute_dtype(inputs.dtype)
    scores, weight, class_weight = (_to(dtype, given) for given in (scores, weight, class_weight))
    if runs_reference(inputs) or reduction == "none":
        divisor, _ = _divisor_of_sum(inputs, normalizer, min_normalizer)
        _check_row_loss(inputs, labels, scores, name, numbers, weight, class_weight, divisor)
        if inputs.device.type in NATIVE_DEVICES:
            num_classes = inputs.shape[-1]
            labels = call(ops._class_indices, labels, name, num_classes, ignore_index)
        return ROW_LOSSES[name].evaluate(
            inputs,
            labels,
            scores,
            numbers,
            reduction=reduction,
            ignore_index=ignore_index,
            normalizer=normalizer,
            min_normalizer=min_normalizer,
            weight=weight,
            class_weight=class_weight,
        )
    if reduction == "mean":
        losses_of_row = 1 if ROW_LOSSES[name].is_softmax else _num_classes(inputs)
        normalizer, min_normalizer = (labels != ignore_index).sum() * losses_of_row, 1
    divisors = _divisor_of_sum(inputs, normalizer, min_normalizer)
    return _sum(
        ops.row_loss_sum,
        ops._row_loss_sum_,
        (
            *(inputs, labels, scores, name, numbers, weight, class_weight),
            *(ignore_index, *divisors),
        ),
        inplace_backward,
    )


def _quality_loss(
    name: str,  # of ROW_LOSSES
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
    parameters: dict[str, Any],
    reduction: str,
    *,
    ignore_index: int,
    weight: Tensor | None,
    class_weight: Tensor | None,
    inplace_backward: bool,
    **divisor: Any,
) -> Tensor:
    """The loss of rows that have a score; or of dense targets, if that loss knows those: each logit is a row of its own then."""
    knows_dense_targets = ROW_LOSSES[name].knows_dense_targets
    if isinstance(targets, Tensor) and knows_dense_targets:
        ignore_index = whole("ignore_index", ignore_index)
        if ignore_index != -100 or flag("inplace_backward", inplace_backward):
            raise ValueError(
                "ignore_index and inplace_backward need targets (labels, scores), got dense targets"
            )
        _require_tensors(
            {"inputs": inputs, "targets": targets}, weight=weight, class_weight=class_weight
        )
        _check_dense_scores(name, inputs, targets, weight, class_weight)
        weight, class_weight = (
            _to(compute_dtype(inputs.dtype), given) for given in (weight, class_weight)
        )
        if class_weight is not None:
            weight = class_weight.expand(inputs.shape) * (1 if weight is None else weight)
        losses = _row_loss(
            name,
            inputs.reshape(-1, 1),
            (torch.zeros_like(targets, dtype=torch.int32).flatten(), targets.flatten()),
            parameters,
            reduction,
            ignore_index=-100,
            weight=None if weight is None else weight.flatten(),
            class_weight=None,
            inplace_backward=False,
            **divisor,
        )
        return losses.view(inputs.shape) if reduction == "none" else losses
    if not isinstance(targets, (tuple, list)) or len(targets) != 2:
        dense = " or a Tensor of the shape of inputs" if knows_dense_targets else ""
        given = (
            f"{len(targets)} of them"
            if isinstance(targets, (tuple, list))
            else type(targets).__name__
        )
        raise TypeError(f"targets must be (labels, scores){dense}, got {given}")
    labels, scores = targets
    require_tensor("labels", labels)
    require_tensor("scores", scores)
    return _row_loss(
        name,
        inputs,
        (labels, scores),
        parameters,
        reduction,
        ignore_index=ignore_index,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
        **divisor,
    )


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
    _check_targets(op, inputs, targets, may_be_dense=True)
    _check_unit_or_none(op, "alpha", alpha)
    check(
        beta is None or gamma > 0,
        lambda: f"{op}: gamma must be > 0, got {gamma:g}",
    )
    _check_non_negative(op, "gamma", gamma)


def _check_targets(op: str, inputs: Tensor, targets: Tensor, may_be_dense: bool) -> None:
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


def _check_normalizer(op: str, inputs: Tensor, normalizer: Tensor | None) -> None:
    if normalizer is None:
        return
    shape, given = tuple(normalizer.shape), normalizer.dtype
    check_same_device(op, "normalizer", normalizer, "inputs", inputs)
    check(
        normalizer.dim() == 0,
        lambda: f"{op}: normalizer must be a number or a 0-d tensor, got a tensor of shape {shape}",
    )
    check(
        given == compute_dtype(inputs.dtype),
        lambda: f"{op}: normalizer must be float32 (float64 for float64 inputs), got {given}",
    )


def _check_row_numbers(
    op: str, name: str, given: Tensor | None, like_name: str, like: Tensor, dtype: torch.dtype
) -> None:
    if given is None:
        return
    check_same_device(op, name, given, like_name, like)
    shape, given_dtype = tuple(given.shape), given.dtype
    check(
        given.shape == like.shape and given_dtype == dtype,
        lambda: (
            f"{op}: {name} must have the shape of {like_name}, {tuple(like.shape)}, "
            f"and be float32 (float64 for float64 logits), got {shape} and {given_dtype}"
        ),
    )


def _check_class_weight(op: str, given: Tensor | None, like: Tensor, num_classes: int) -> None:
    if given is None:
        return
    check_same_device(op, "class_weight", given, "the logits", like)
    shape, dtype = tuple(given.shape), given.dtype
    check(
        shape == (num_classes,) and dtype == compute_dtype(like.dtype),
        lambda: (
            f"{op}: class_weight must have shape ({num_classes},) "
            f"and be float32 (float64 for float64 logits), got {shape} and {dtype}"
        ),
    )


def _row_loss_of(op: str, name: str) -> RowLoss:
    names = ", ".join(map(repr, ROW_LOSSES))
    check(name in ROW_LOSSES, lambda: f"{op}: loss must be one of {names}, got {name!r}")
    return ROW_LOSSES[name]


def _check_row_loss(
    inputs: Tensor,
    targets: Tensor,
    scores: Tensor | None,
    op: str,
    parameters: list[float],
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    loss = _row_loss_of("row_loss_sum", op)
    names = ", ".join(loss.parameters)
    check(
        len(parameters) == len(loss.parameters),
        lambda: (
            f"row_loss_sum: parameters must be those of {op}, ({names}), got {len(parameters)} numbers"
        ),
    )
    _check_targets(op, inputs, targets, may_be_dense=False)
    check(
        not loss.is_softmax or inputs.shape[-1] > 0,
        lambda: f"{op}: inputs must have at least one class, got shape {tuple(inputs.shape)}",
    )
    dtype = compute_dtype(inputs.dtype)
    _check_row_numbers(op, "scores", scores, "targets", targets, dtype)
    _check_row_numbers(op, "weight", weight, "targets", targets, dtype)
    _check_class_weight(op, class_weight, inputs, inputs.shape[-1])
    _check_normalizer(op, inputs, normalizer)
    for (name, check_number), given in zip(loss.parameters.items(), parameters, strict=True):
        if check_number is not None:
            check_number(op, name, given)


def _check_dense_scores(
    op: str, inputs: Tensor, targets: Tensor, weight: Tensor | None, class_weight: Tensor | None
) -> None:
    check_floating(op, "inputs", inputs)
    check_floating(op, "dense targets", targets)
    for name, given in (("dense targets", targets), ("weight", weight)):
        if given is None:
            continue
        check_same_device(op, name, given, "inputs", inputs)
        shape = tuple(given.shape)
        check(
            given.shape == inputs.shape,
            lambda: (
                f"{op}: {name} must have the shape of inputs, {tuple(inputs.shape)}, got {shape}"  # noqa: B023
            ),
        )
    dtype = compute_dtype(inputs.dtype)
    _check_class_weight(op, _to(dtype, class_weight), inputs, _num_classes(inputs))


@torch.library.register_fake("focalops::_class_indices")
def _(targets: Tensor, loss: str, num_classes: int, ignore_index: int) -> Tensor:
    _row_loss_of("_class_indices", loss)
    return torch.empty_like(targets)


@torch.library.register_fake("focalops::row_loss_sum")
def _(
    inputs: Tensor,
    targets: Tensor,
    scores: Tensor | None,
    loss: str,
    parameters: list[float],
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, Tensor]:
    _check_row_loss(inputs, targets, scores, loss, parameters, weight, class_weight, normalizer)
    total = inputs.new_empty((), dtype=compute_dtype(inputs.dtype))
    return total, _contiguous_like(inputs) if compute_grad else inputs.new_empty(0)


@torch.library.register_fake("focalops::_row_loss_sum_")
def _(inputs: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty((), dtype=compute_dtype(inputs.dtype))


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


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
    return _contiguous_like(inputs)


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
    return _contiguous_like(inputs)


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
    _check_normalizer(op, inputs, normalizer)
    loss = inputs.new_empty((), dtype=compute_dtype(inputs.dtype))
    return loss, _contiguous_like(inputs) if compute_grad else inputs.new_empty(0)


@torch.library.register_fake("focalops::dense_focal_loss")
def _(
    cls_logits: list[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    min_normalizer: float,
    compute_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    _check_dense(
        cls_logits, labels, alpha, gamma, label_smoothing, weight, class_weight, normalizer
    )
    dtype = compute_dtype(cls_logits[0].dtype)
    loss = cls_logits[0].new_empty((), dtype=dtype)
    if not compute_grad:
        return loss, []
    return loss, [
        torch.empty_like(level) if _is_channels_last(level) else _contiguous_like(level)
        for level in cls_logits
    ]


def _is_channels_last(level: Tensor) -> bool:
    return level.is_contiguous(memory_format=torch.channels_last)


def _check_dense(
    cls_logits: list[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    label_smoothing: float,
    weight: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    op = "dense_focal_loss"
    check(
        1 <= len(cls_logits) <= 8,
        lambda: f"{op}: cls_logits must be 1 to 8 levels, got {len(cls_logits)}",
    )
    first = cls_logits[0]
    check_floating(op, "cls_logits[0]", first)
    for i, level in enumerate(cls_logits):
        name, shape, dtype = f"cls_logits[{i}]", tuple(level.shape), level.dtype
        check_same_device(op, name, level, "cls_logits[0]", first)
        check(
            dtype == first.dtype,
            lambda: f"{op}: {name} must be {first.dtype} like cls_logits[0], got {dtype}",  # noqa: B023
        )
        check(
            level.dim() == 4 and level.shape[:2] == first.shape[:2],
            lambda: (
                f"{op}: {name} must have shape (B, A * K, H, W), "  # noqa: B023
                f"B and A * K the same in all levels, got {shape}"  # noqa: B023
            ),
        )
        check_image_size(op, name, level, "logits")
    check_same_device(op, "labels", labels, "cls_logits[0]", first)
    check(
        labels.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: labels must be int32 or int64, got {labels.dtype}",
    )
    images, channels = first.shape[:2]
    positions = sum(level.shape[2] * level.shape[3] for level in cls_logits)
    has_rows = labels.dim() == 2 and labels.shape[0] == images
    rows = labels.shape[1] if has_rows else 0
    anchors = rows // positions if positions > 0 else 0
    check(
        has_rows and rows == anchors * positions and (positions == 0 or anchors > 0),
        lambda: (
            f"{op}: labels must have shape ({images}, A * {positions}), "
            f"A anchors at each position of the levels, got {tuple(labels.shape)}"
        ),
    )
    check(
        anchors == 0 or channels % anchors == 0,
        lambda: (
            f"{op}: cls_logits must have A * K channels, A = {anchors} by the shape of labels, "
            f"got {channels}"
        ),
    )
    check(
        anchors == 0 or channels // anchors < 2**30,
        lambda: f"{op}: cls_logits must have fewer than 2^30 classes, got {channels // anchors}",
    )
    _check_unit_or_none(op, "alpha", alpha)
    _check_non_negative(op, "gamma", gamma)
    _check_unit(op, "label_smoothing", label_smoothing)
    _check_row_numbers(op, "weight", weight, "labels", labels, compute_dtype(first.dtype))
    if anchors > 0:
        _check_class_weight(op, class_weight, first, channels // anchors)
    if normalizer is not None:
        check_same_device(op, "normalizer", normalizer, "cls_logits[0]", first)
        given = normalizer.dtype
        size = tuple(normalizer.shape)
        check(
            size in ((), (images,)),
            lambda: (
                f"{op}: normalizer must be a number, a 0-d tensor or a tensor of shape "
                f"({images},), got a tensor of shape {size}"
            ),
        )
        check(
            given == compute_dtype(first.dtype),
            lambda: (
                f"{op}: normalizer must be float32 (float64 for float64 cls_logits), got {given}"
            ),
        )


@torch.library.register_fake("focalops::_sigmoid_focal_loss_sum_")
def _(inputs: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty((), dtype=compute_dtype(inputs.dtype))


@torch.library.register_fake("focalops::_dense_focal_loss_")
def _(cls_logits: list[Tensor], *_: Any) -> Tensor:
    return cls_logits[0].new_empty((), dtype=compute_dtype(cls_logits[0].dtype))


@torch.library.register_fake("focalops::_scale_")
def _(tensor: Tensor, scale: Tensor) -> None:
    pass


# ---- autograd -----------------------------------------------------------------------------------


def _setup_elementwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, *ctx.arguments = inputs
    ctx.save_for_backward(logits, targets)
    ctx.set_materialize_grads(False)


def _backward_elementwise(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = None
    if grad_output is not None:
        inputs, targets = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = _differentiable_backward(grad_output, inputs, targets, ctx.arguments)
        else:
            arguments = (grad_output, inputs, targets, *ctx.arguments)
            grad = call(ops._sigmoid_focal_loss_backward, *arguments)
    return grad, None, None, None, None, None


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.arguments, normalizer, ctx.min_normalizer, _ = inputs
    ctx.save_for_backward(logits, targets, normalizer, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_sum(
    ctx: Any, grad_loss: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad_loss is None:
        return None, *nothing
    inputs, targets, normalizer, grad = ctx.saved_tensors
    has_grad = grad.numel() == inputs.numel()
    if torch.is_grad_enabled() or not has_grad:
        factor = grad_loss / _divisor(normalizer, ctx.min_normalizer)
        return _differentiable_backward(factor, inputs, targets, ctx.arguments, "sum"), *nothing
    return _scaled(grad, _factor(grad, grad_loss, normalizer, ctx.min_normalizer)), *nothing


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, scores, ctx.loss, ctx.parameters, *weights = inputs[:7]
    ctx.ignore_index, normalizer, ctx.min_normalizer, _ = inputs[7:]
    ctx.save_for_backward(logits, targets, scores, *weights, normalizer, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_rows(
    ctx: Any, grad_loss: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if grad_loss is None:
        return None, *nothing
    inputs, targets, scores, weight, class_weight, normalizer, grad = ctx.saved_tensors
    if not torch.is_grad_enabled() and grad.numel() == inputs.numel():
        factor = _factor(grad, grad_loss, normalizer, ctx.min_normalizer)
        return _scaled(grad, factor), *nothing
    with torch.enable_grad():
        x = as_own_input(inputs)
        loss = ROW_LOSSES[ctx.loss].evaluate(
            x,
            targets,
            scores,
            ctx.parameters,
            reduction="sum",
            ignore_index=ctx.ignore_index,
            weight=weight,
            class_weight=class_weight,
        )
        factor = grad_loss / _divisor(normalizer, ctx.min_normalizer)
        (grad,) = torch.autograd.grad(loss, x, factor, create_graph=True)
    return grad, *nothing


def _setup_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    cls_logits, labels, *ctx.parameters, weight, class_weight, ctx.ignore_index = inputs[:8]
    normalizer, ctx.min_normalizer, _ = inputs[8:]
    ctx.save_for_backward(labels, weight, class_weight, normalizer, *cls_logits, *output[1])
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)


def _backward_dense(
    ctx: Any, grad_loss: Tensor | None, _: list[Tensor | None]
) -> tuple[Sequence[Tensor | None] | None, ...]:
    nothing = (None,) * 10
    labels, weight, class_weight, normalizer, *tensors = ctx.saved_tensors
    levels = len(ctx.needs_input_grad[0])
    cls_logits, grads = tensors[:levels], tensors[levels:]
    if grad_loss is None:
        return [None] * levels, *nothing
    if torch.is_grad_enabled() or not grads:
        alpha, gamma, label_smoothing = ctx.parameters
        with torch.enable_grad():
            x = [as_own_input(t) for t in cls_logits]
            loss = reference.dense_focal_loss(
                x,
                labels,
                alpha,
                gamma,
                normalizer=ctx.min_normalizer if normalizer is None else normalizer,
                min_normalizer=ctx.min_normalizer,
                ignore_index=ctx.ignore_index,
                weight=weight,
                class_weight=class_weight,
                label_smoothing=label_smoothing,
            )
            return list(torch.autograd.grad(loss, x, grad_loss, create_graph=True)), *nothing
    factor = _factor(grads[0], grad_loss, normalizer, ctx.min_normalizer)
    return [_scaled(grad, factor) for grad in grads], *nothing


def _factor(
    saved: Tensor, grad_loss: Tensor, normalizer: Tensor | None, min_normalizer: float
) -> Tensor:
    """What the gradient that the forward saved lacks: in float16 it has not been divided by the normalizer."""
    if saved.dtype == torch.float16:
        return grad_loss / _divisor(normalizer, min_normalizer)
    return grad_loss


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """The gradient that the forward saved, times a number or one for each image: in place where that is allowed."""
    if _may_overwrite(saved, factor):
        call(ops._scale_, saved, factor)
        return saved
    if factor.dim() == 0:
        return saved * factor
    return (saved * factor.view(-1, *[1] * (saved.dim() - 1))).to(saved.dtype)


def _may_overwrite(saved: Tensor, factor: Tensor) -> bool:
    """Whether this backward may scale what its forward saved: not if it can run again, nor under a tracer or vmap."""
    if torch.compiler.is_compiling() or type(saved) is not Tensor:
        return False
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(factor) or functorch.is_legacy_batchedtensor(factor):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _divisor(normalizer: Tensor | None, min_normalizer: float) -> Tensor | float:
    return min_normalizer if normalizer is None else normalizer.clamp(min=min_normalizer)


def _differentiable_backward(
    grad_output: Tensor,
    inputs: Tensor,
    targets: Tensor,
    arguments: tuple[Any, ...],  # alpha, gamma, beta, ignore_index
    reduction: str = "none",
) -> Tensor:
    """The gradient through formulas that autograd can differentiate again."""
    alpha, gamma, beta, ignore_index = arguments
    with torch.enable_grad():
        x = as_own_input(inputs)
        loss = _reference(x, targets, alpha, gamma, beta, reduction, ignore_index=ignore_index)
        (grad,) = torch.autograd.grad(loss, x, grad_output, create_graph=True)
    return grad


torch.library.register_autograd(
    "focalops::sigmoid_focal_loss", _backward_elementwise, setup_context=_setup_elementwise
)
torch.library.register_autograd(
    "focalops::sigmoid_focal_loss_sum", _backward_sum, setup_context=_setup_sum
)
torch.library.register_autograd("focalops::row_loss_sum", _backward_rows, setup_context=_setup_rows)
torch.library.register_autograd(
    "focalops::dense_focal_loss", _backward_dense, setup_context=_setup_dense
)


# ---- the gradient over the logits ----------------------------------------------------------------


def _check_may_hold_gradient(name: str, logits: Tensor) -> None:
    """The sentence that says why autograd would give wrong gradients, or none, if these logits were overwritten."""
    reason = None
    if (
        torch.compiler.is_compiling()
        or type(logits) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(logits)
        or torch._C._functorch.is_legacy_batchedtensor(logits)
    ):
        reason = "be a plain tensor in eager mode, and it is traced, transformed or of a subclass"
    elif not logits.requires_grad:
        reason = "require grad"
    elif logits.is_leaf:
        reason = "be computed by an op, and it is a leaf"
    elif logits._is_view():
        reason = "not be a view"
    if reason is not None:
        raise ValueError(f"inplace_backward needs {name} to {reason}")


def _check_graph_is_freed() -> None:
    if torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        raise RuntimeError(
            "inplace_backward has one gradient for one backward: it works with neither "
            "retain_graph nor create_graph"
        )


class _SumInPlace(torch.autograd.Function):
    """A summed loss with the gradient written over the logits, by the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        inputs: Tensor,
        *arguments: Any,  # the last are normalizer and min_normalizer
    ) -> Tensor:
        loss = call(op, inputs, *arguments)
        torch.autograd.graph.increment_version(inputs)
        *others, normalizer, ctx.min_normalizer = arguments
        ctx.num_others = len(others)
        ctx.save_for_backward(inputs, normalizer)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_graph_is_freed()
        nothing = (None,) * (ctx.num_others + 2)
        if grad_loss is None:
            return None, None, *nothing
        inputs, normalizer = ctx.saved_tensors
        factor = _factor(inputs, grad_loss, normalizer, ctx.min_normalizer)
        torch.autograd.graph.increment_version(inputs)
        return None, _scaled(inputs.detach(), factor), *nothing


class _DenseInPlace(torch.autograd.Function):
    """dense_focal_loss with the gradients written over the logits, by the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        arguments: tuple[Any, ...],  # of the op; the last are normalizer and min_normalizer
        *cls_logits: Tensor,
    ) -> Tensor:
        loss = call(ops._dense_focal_loss_, cls_logits, *arguments)
        torch.autograd.graph.increment_version(cls_logits)
        *_, normalizer, ctx.min_normalizer = arguments
        ctx.save_for_backward(normalizer, *cls_logits)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_graph_is_freed()
        normalizer, *cls_logits = ctx.saved_tensors
        if grad_loss is None:
            return None, *(None for _ in cls_logits)
        factor = _factor(cls_logits[0], grad_loss, normalizer, ctx.min_normalizer)
        torch.autograd.graph.increment_version(cls_logits)
        return None, *(_scaled(level.detach(), factor) for level in cls_logits)


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
    divisor = _divisor(normalizer, min_normalizer)
    loss = ops.sigmoid_focal_loss(x32, targets, *options).flatten(1).sum(1) / divisor
    if not compute_grad:
        return (loss, x.new_empty((info.batch_size, 0))), (0, 0)
    grad = ops._sigmoid_focal_loss_backward(torch.ones_like(x32), x32, targets, *options)
    if x.dtype != torch.float16:
        if isinstance(divisor, Tensor):
            divisor = divisor.reshape(-1, *[1] * (grad.dim() - 1))
        grad = grad / divisor
    return (loss, grad.to(x.dtype)), (0, 0)


@torch.library.register_vmap("focalops::_class_indices")
def _(
    info: Any, in_dims: tuple[Any, ...], targets: Tensor, *options: Any
) -> tuple[Tensor, int | None]:
    return ops._class_indices(targets, *options), in_dims[0]


register_vmap_as_loop("dense_focal_loss")
