"""Classification losses whose target is the quality of the box: its IoU, or any score in [0, 1].

All take ``targets=(labels, scores)``, both of shape ``inputs.shape[:-1]``: the class index of a row as in
:func:`focalops.sigmoid_focal_loss`, and the score of the true class (read where there is one). With ``reduction="sum"`` and ``"mean"`` the logits are
read once and the gradient is written in the same pass, as there; ``"none"`` is composed of PyTorch's own ops. The options, and what is
refused, are those of :func:`focalops.sigmoid_focal_loss`; scores are taken as they are, also beyond [0, 1]. No loss is differentiated
by the scores. Time O(inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from focalops._arguments import flag
from focalops._loss_options import LossOptions, check_class_weight, num_classes
from focalops._ops import check, check_floating, check_same_device, compute_dtype
from focalops.row_losses import ROW_LOSSES, row_loss


def soft_focal_loss(
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
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
    r"""The focal loss of a label that is partly true (Li et al., "Learning from Noisy Anchors for One-stage Object Detection",
    arXiv 1912.05086): :math:`s \, \mathrm{FL}(p, 1) + (1 - s) \, \mathrm{FL}(p, 0)` for the true class of score s,
    :math:`\mathrm{FL}(p, 0)` for the others.

    It is linear in the score, which the soft targets of :func:`focalops.sigmoid_focal_loss` are not: those change the
    modulating factor too. ``alpha`` and ``gamma`` are as there. Dense targets as in :func:`quality_focal_loss`.
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
    parameters = {"alpha": alpha, "gamma": gamma}
    return _quality_loss("soft_focal_loss", inputs, targets, parameters, options)


def quality_focal_loss(
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
    beta: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""QFL of Generalized Focal Loss (arXiv 2006.04388): :math:`|y - p|^\beta \, \mathrm{BCE}(p, y)`, y the score of the true class, else 0.

    ``targets`` may also be a tensor of scores in [0, 1] of the shape of ``inputs``, one for each logit; ``weight`` then has that
    shape too, and ``ignore_index`` and ``inplace_backward`` are refused. Each logit is a row of its own then, with a class index
    of 4 bytes.

    >>> quality_focal_loss(logits, (labels, ious), reduction="sum", normalizer=num_positives)  # (N, K), (N,), (N,)
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
    parameters = {"beta": beta}
    return _quality_loss("quality_focal_loss", inputs, targets, parameters, options)


def varifocal_loss(
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    inplace_backward: bool = False,
    detach_weight: bool = False,
) -> Tensor:
    r"""VFL of VarifocalNet (arXiv 2008.13367): :math:`q \, \mathrm{BCE}(p, q)` for the true class of a score q > 0,
    :math:`\alpha p^\gamma \, \mathrm{BCE}(p, 0)` for all else.

    ``iou_weighted=False`` leaves the factor q out. With ``detach_weight`` the weight :math:`\alpha p^\gamma` is a constant to the
    gradient, as in RT-DETR, where a true class of score 0 has no loss; here it is a negative, as in VarifocalNet. ``alpha`` must
    be >= 0. Dense targets as in :func:`quality_focal_loss`; a target of 0 is a negative.
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
    parameters = {
        "alpha": alpha,
        "gamma": gamma,
        "iou_weighted": flag("iou_weighted", iou_weighted),
        "detach_weight": flag("detach_weight", detach_weight),
    }
    return _quality_loss("varifocal_loss", inputs, targets, parameters, options)


def matchability_aware_loss(
    inputs: Tensor,
    targets: tuple[Tensor, Tensor],
    gamma: float = 1.5,
    alpha: float = 1.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""MAL of DEIM (arXiv 2412.04234): :math:`\mathrm{BCE}(p, q^\gamma)` for the true class of score q,
    :math:`\alpha p^\gamma \, \mathrm{BCE}(p, 0)` for the others, :math:`p^\gamma` being a constant to the gradient. ``alpha`` must be >= 0.
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
    parameters = {"gamma": gamma, "alpha": alpha}
    return _quality_loss("matchability_aware_loss", inputs, targets, parameters, options)


def ia_bce_loss(
    inputs: Tensor,
    targets: tuple[Tensor, Tensor],
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
    r"""IA-BCE of Align-DETR (arXiv 2304.07527): :math:`\mathrm{BCE}(p, t)` for the true class of score q, with
    :math:`t = \max(p^\alpha q^{1 - \alpha}, 0.01)` a constant to the gradient, and :math:`p^\gamma \, \mathrm{BCE}(p, 0)` for
    the others. ``alpha`` must lie in [0, 1].
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
    parameters = {"alpha": alpha, "gamma": gamma}
    return _quality_loss("ia_bce_loss", inputs, targets, parameters, options)


def _quality_loss(
    name: str,  # of ROW_LOSSES
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
    parameters: dict[str, Any],
    options: LossOptions,
) -> Tensor:
    knows_dense_targets = ROW_LOSSES[name].knows_dense_targets
    if isinstance(targets, Tensor) and knows_dense_targets:
        return _loss_of_dense_targets(name, inputs, targets, parameters, options)
    if not isinstance(targets, (tuple, list)) or len(targets) != 2:
        dense = " or a Tensor of the shape of inputs" if knows_dense_targets else ""
        given = (
            f"{len(targets)} of them"
            if isinstance(targets, (tuple, list))
            else type(targets).__name__
        )
        raise TypeError(f"targets must be (labels, scores){dense}, got {given}")
    labels, scores = targets
    options = options.checked(constant_weight=False, inputs=inputs, labels=labels, scores=scores)
    return row_loss(name, inputs, labels, scores, parameters, options)


def _loss_of_dense_targets(
    name: str,
    inputs: Tensor,
    targets: Tensor,
    parameters: dict[str, Any],
    options: LossOptions,
) -> Tensor:
    """Each logit is a row of its own."""
    options = options.checked(constant_weight=False, inputs=inputs, targets=targets)
    if options.ignore_index != -100 or options.inplace_backward:
        raise ValueError(
            "ignore_index and inplace_backward need targets (labels, scores), got dense targets"
        )
    options = options.in_dtype(compute_dtype(inputs.dtype))
    _check_dense_scores(name, inputs, targets, options)
    weight = options.weight
    if options.class_weight is not None:
        weight = options.class_weight.expand(inputs.shape) * (1 if weight is None else weight)
    losses = row_loss(
        name,
        inputs.reshape(-1, 1),
        torch.zeros_like(targets, dtype=torch.int32).flatten(),
        targets.flatten(),
        parameters,
        options._replace(weight=None if weight is None else weight.flatten(), class_weight=None),
    )
    return losses.view(inputs.shape) if options.reduction == "none" else losses


def _check_dense_scores(op: str, inputs: Tensor, targets: Tensor, options: LossOptions) -> None:
    check_floating(op, "inputs", inputs)
    check_floating(op, "dense targets", targets)
    for name, given in (("dense targets", targets), ("weight", options.weight)):
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
    check_class_weight(op, options.class_weight, inputs, num_classes(inputs), by_part=False)
