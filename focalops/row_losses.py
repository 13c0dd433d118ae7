"""The row losses: those of a class index a row, and perhaps a score, each a row of the table that csrc/math/row_losses.h has too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from focalops import reference
from focalops._arguments import check_are_constant, number
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
    check_class_weight,
    check_non_negative,
    check_normalizer,
    check_row_numbers,
    check_targets,
    check_unit,
    check_unit_or_none,
    num_classes,
    to_dtype,
)
from focalops._ops import NATIVE_DEVICES, call, check, compute_dtype, ops, runs_reference

Check = Callable[[str, str, float], None]  # of the op, and the name and the value of a parameter


class RowLoss(NamedTuple):
    """What Python knows of a member of the row losses, which csrc/math/row_losses.h knows by the same name."""

    reference: Callable[..., Tensor]
    parameters: dict[str, Check | None]  # in C++'s order
    has_scores: bool = True
    knows_dense_targets: bool = False  # of scores, one a logit
    is_softmax: bool = False  # a row has one loss, and no background

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

    def defaults(self) -> dict[str, Any]:
        """Of its parameters."""
        arguments = inspect.signature(self.reference).parameters
        return {name: arguments[name].default for name in self.parameters}


ROW_LOSSES = {
    "sigmoid_focal_loss": RowLoss(
        reference.sigmoid_focal_loss,
        {
            "alpha": check_unit_or_none,
            "gamma": check_non_negative,
            "label_smoothing": check_unit,
        },
        has_scores=False,
    ),
    "soft_focal_loss": RowLoss(
        reference.soft_focal_loss,
        {"alpha": check_unit_or_none, "gamma": check_non_negative},
        knows_dense_targets=True,
    ),
    "quality_focal_loss": RowLoss(
        reference.quality_focal_loss, {"beta": check_non_negative}, knows_dense_targets=True
    ),
    "varifocal_loss": RowLoss(
        reference.varifocal_loss,
        {
            "alpha": check_non_negative,
            "gamma": check_non_negative,
            "iou_weighted": None,
            "detach_weight": None,
        },
        knows_dense_targets=True,
    ),
    "matchability_aware_loss": RowLoss(
        reference.matchability_aware_loss,
        {"gamma": check_non_negative, "alpha": check_non_negative},
    ),
    "ia_bce_loss": RowLoss(
        reference.ia_bce_loss, {"alpha": check_unit, "gamma": check_non_negative}
    ),
    "softmax_focal_loss": RowLoss(
        reference.softmax_focal_loss,
        {"alpha": None, "gamma": check_non_negative},
        has_scores=False,
        is_softmax=True,
    ),
}


def row_loss(
    name: str,  # of ROW_LOSSES
    inputs: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    parameters: dict[str, Any],
    options: LossOptions,  # checked
) -> Tensor:
    """What the public functions of the family return, once they have checked their tensors and options."""
    numbers = [float(number(option, value)) for option, value in parameters.items()]
    dtype = compute_dtype(inputs.dtype)
    scores, options = to_dtype(scores, dtype), options.in_dtype(dtype)
    weights = options.weight, options.class_weight
    has_weight_gradient = options.weight is not None and options.weight.requires_grad
    if options.inplace_backward and has_weight_gradient:
        check_are_constant(weight=options.weight)
    needs_reference = runs_reference(inputs) or (
        has_weight_gradient and ROW_LOSSES[name].is_softmax
    )
    if needs_reference or options.reduction == "none":
        normalizer, _ = options.divisor(dtype)
        _check_row_loss(inputs, labels, scores, name, numbers, *weights, normalizer)
        if inputs.device.type in NATIVE_DEVICES:
            indices = (labels, name, inputs.shape[-1], options.ignore_index)
            labels = call(ops._class_indices, *indices)
        keywords = options._asdict()
        del keywords["inplace_backward"]
        return ROW_LOSSES[name].evaluate(inputs, labels, scores, numbers, **keywords)
    if options.reduction == "mean":
        losses_of_row = 1 if ROW_LOSSES[name].is_softmax else num_classes(inputs)
        losses = (labels != options.ignore_index).sum() * losses_of_row
        options = options._replace(normalizer=losses, min_normalizer=1)
    divisor = options.divisor(dtype)
    compute_grad = inputs.requires_grad and torch.is_grad_enabled()
    if has_weight_gradient:
        _check_row_loss(inputs, labels, scores, name, numbers, *weights, divisor[0])
        indices = (labels, name, inputs.shape[-1], options.ignore_index)
        labels = call(ops._class_indices, *indices)
        # A level of as many positions, whose channels_last they are, has losses a row.
        level = inputs.reshape(1, labels.numel(), 1, inputs.shape[-1]).permute(0, 3, 1, 2)
        scores = None if scores is None else scores.reshape(1, -1)
        of_rows = ([level], labels.reshape(1, -1), scores, name, numbers, None, *weights[1:])
        others = (options.ignore_index, *divisor, compute_grad)
        losses = call(ops.dense_row_losses, *of_rows, *others)[0]
        return (losses.view(labels.shape) * options.weight).sum()
    arguments = (labels, scores, name, numbers, *weights, options.ignore_index, *divisor)
    if options.inplace_backward and compute_grad:

        def loss(x: Tensor) -> Tensor:
            return call(ops._row_loss_sum_, x, *arguments)

        return loss_over_its_logits(loss, {"inputs": inputs}, divisor)
    return call(ops.row_loss_sum, inputs, *arguments, compute_grad)[0]


# ---- fake kernels -------------------------------------------------------------------------------


def row_loss_of(op: str, name: str) -> RowLoss:
    names = ", ".join(map(repr, ROW_LOSSES))
    check(name in ROW_LOSSES, lambda: f"{op}: loss must be one of {names}, got {name!r}")
    return ROW_LOSSES[name]


def check_parameters(op: str, name: str, loss: str, given: Sequence[float]) -> None:
    """``op`` takes the parameters of ``loss``, ``name`` has the sentences about each."""
    known = ROW_LOSSES[loss].parameters
    check(
        len(given) == len(known),
        lambda: (
            f"{op}: parameters must be those of {loss}, ({', '.join(known)}), got {len(given)} numbers"
        ),
    )
    for (parameter, check_number), value in zip(known.items(), given, strict=True):
        if check_number is not None:
            check_number(name, parameter, value)


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
    loss = row_loss_of("row_loss_sum", op)
    check_parameters("row_loss_sum", op, op, parameters)
    check_targets(op, inputs, targets, may_be_dense=False)
    check(
        not loss.is_softmax or inputs.shape[-1] > 0,
        lambda: f"{op}: inputs must have at least one class, got shape {tuple(inputs.shape)}",
    )
    dtype = compute_dtype(inputs.dtype)
    check_row_numbers(op, "scores", scores, "targets", targets, dtype)
    check_row_numbers(op, "weight", weight, "targets", targets, dtype)
    check_class_weight(op, class_weight, inputs, inputs.shape[-1], by_part=not loss.is_softmax)
    check_normalizer(op, "inputs", inputs, normalizer)


@torch.library.register_fake("focalops::_class_indices")
def _(targets: Tensor, loss: str, num_classes: int, ignore_index: int) -> Tensor:
    row_loss_of("_class_indices", loss)
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
    return total, empty_gradient(inputs) if compute_grad else inputs.new_empty(0)


@torch.library.register_fake("focalops::_row_loss_sum_")
def _(inputs: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty((), dtype=compute_dtype(inputs.dtype))


# ---- autograd and vmap --------------------------------------------------------------------------


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, scores, ctx.loss, ctx.parameters, *weights = inputs[:7]
    ctx.ignore_index, normalizer, ctx.min_normalizer, _ = inputs[7:]
    ctx.save_for_backward(logits, targets, scores, *weights, normalizer, output[1])


def _backward_rows(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    inputs, targets, scores, weight, class_weight, normalizer, grad = ctx.saved_tensors
    if not torch.is_grad_enabled() and grad.numel() == inputs.numel():
        return scaled([grad], grad_loss, normalizer, ctx.min_normalizer)

    def formula(x: Tensor) -> Tensor:
        return ROW_LOSSES[ctx.loss].evaluate(
            x,
            targets,
            scores,
            ctx.parameters,
            reduction="sum",
            ignore_index=ctx.ignore_index,
            weight=weight,
            class_weight=class_weight,
        )

    factor = grad_loss / divisor_of(normalizer, ctx.min_normalizer)
    return differentiable(formula, [inputs], factor)


register_gradients("row_loss_sum", _setup_rows, _backward_rows)


@torch.library.register_vmap("focalops::_class_indices")
def _(
    info: Any, in_dims: tuple[Any, ...], targets: Tensor, *options: Any
) -> tuple[Tensor, int | None]:
    return ops._class_indices(targets, *options), in_dims[0]
