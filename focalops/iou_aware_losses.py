"""Classification losses whose target is the quality of the box: its IoU, or any score in [0, 1].

All take ``targets=(labels, scores)``, both of shape ``inputs.shape[:-1]``: the class index of a row as in
:func:`focalops.sigmoid_focal_loss`, and the score of the true class (read where there is one). With ``reduction="sum"`` and ``"mean"`` the logits are
read once and the gradient is written in the same pass, as there; ``"none"`` is composed of PyTorch's own ops. The options, and what is
refused, are those of :func:`focalops.sigmoid_focal_loss`; scores are taken as they are, also beyond [0, 1]. No loss is differentiated
by the scores. Time O(inputs).
"""

from __future__ import annotations

from torch import Tensor

from focalops._arguments import flag
from focalops.focal_loss import _quality_loss


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
    return _quality_loss(
        "quality_focal_loss",
        inputs,
        targets,
        {"beta": beta},
        reduction,
        ignore_index=ignore_index,
        normalizer=normalizer,
        min_normalizer=min_normalizer,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
    )


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
    return _quality_loss(
        "varifocal_loss",
        inputs,
        targets,
        {
            "alpha": alpha,
            "gamma": gamma,
            "iou_weighted": flag("iou_weighted", iou_weighted),
            "detach_weight": flag("detach_weight", detach_weight),
        },
        reduction,
        ignore_index=ignore_index,
        normalizer=normalizer,
        min_normalizer=min_normalizer,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
    )


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
    return _quality_loss(
        "matchability_aware_loss",
        inputs,
        targets,
        {"gamma": gamma, "alpha": alpha},
        reduction,
        ignore_index=ignore_index,
        normalizer=normalizer,
        min_normalizer=min_normalizer,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
    )


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
    return _quality_loss(
        "ia_bce_loss",
        inputs,
        targets,
        {"alpha": alpha, "gamma": gamma},
        reduction,
        ignore_index=ignore_index,
        normalizer=normalizer,
        min_normalizer=min_normalizer,
        weight=weight,
        class_weight=class_weight,
        inplace_backward=inplace_backward,
    )
