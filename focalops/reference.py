"""Every op of focalops in plain PyTorch: the specification, the oracle of the tests, the baseline of the benchmarks.

Same names and signatures as the package. Nothing here is fast, everything is differentiable by autograd where the op is,
and the formulas are the ones of the papers in the form that stays finite. Arguments are taken as valid: the package's own
functions check them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every other dtype is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sigmoid_focal_loss(
    inputs: Tensor,  # [...]  or [..., K] with class-index targets
    targets: Tensor,  # [...] in [0, 1], or integer [...] = inputs.shape[:-1]
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,  # [...] = inputs.shape[:-1]
    class_weight: Tensor | None = None,  # [K] or [3, K]
    label_smoothing: float = 0,
    inplace_backward: bool = False,  # a matter of memory: not here
) -> Tensor:
    x = inputs.to(compute_dtype(inputs.dtype))
    if targets.shape == inputs.shape:
        loss = _focal_dense(x, targets.to(x.dtype), alpha, gamma)
    else:
        loss = _focal_hard(x, one_hot(targets, inputs.shape[-1]), alpha, gamma, label_smoothing)
    loss = _weigh(loss, weight, class_weight, targets)
    return _reduce(loss, inputs, targets, reduction, ignore_index, normalizer, min_normalizer)


def sigmoid_focal_loss_star(
    inputs: Tensor,  # [...]  or [..., K] with class-index targets
    targets: Tensor,  # [...] in [0, 1], or integer [...] = inputs.shape[:-1]
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    beta: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    inplace_backward: bool = False,  # a matter of memory: not here
) -> Tensor:
    x = inputs.to(compute_dtype(inputs.dtype))
    is_dense = targets.shape == inputs.shape
    t = targets.to(x.dtype) if is_dense else one_hot(targets, inputs.shape[-1]).to(x.dtype)
    sign = 2 * t - 1
    x_t = torch.where(sign == 0, 0, sign * torch.where(sign == 0, 0, x))
    x_t = torch.where(_is_dense_target(t), x_t, math.nan)
    alpha_t = _alpha_of(t, alpha)

    def loss_of(s: Tensor) -> Tensor:
        return alpha_t * -F.logsigmoid(beta - gamma * s) / gamma

    loss = _with_limits(-x_t, loss_of, alpha_t, 0)
    return _reduce(loss, inputs, targets, reduction, ignore_index, normalizer, min_normalizer)


def dense_focal_loss(
    cls_logits: Sequence[Tensor],  # L of [B, A * K, H, W]
    labels: Tensor,  # [B, N], N = sum of H * W * A
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "sum",
    *,
    normalizer: Tensor | float | None = None,  # a number, 0-d or [B]
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,  # [B, N]
    class_weight: Tensor | None = None,  # [K] or [3, K]
    label_smoothing: float = 0,
    inplace_backward: bool = False,  # a matter of memory: not here
) -> Tensor:
    losses = sigmoid_focal_loss(
        _dense_rows(cls_logits, labels),
        labels,
        alpha,
        gamma,
        ignore_index=ignore_index,
        weight=weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
    )
    return _reduce_anchors(losses, reduction, normalizer, min_normalizer)


def dense_quality_loss(
    cls_logits: Sequence[Tensor],  # L of [B, A * K, H, W]
    labels: Tensor,  # [B, N], N = sum of H * W * A
    scores: Tensor,  # [B, N]
    loss: str = "quality_focal_loss",
    reduction: str = "sum",
    *,
    normalizer: Tensor | float | None = None,  # a number, 0-d or [B]
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,  # [B, N]
    class_weight: Tensor | None = None,  # [K] or [3, K]
    **parameters: float,
) -> Tensor:
    losses = globals()[loss](
        _dense_rows(cls_logits, labels),
        (labels, scores),
        ignore_index=ignore_index,
        weight=weight,
        class_weight=class_weight,
        **parameters,
    )
    return _reduce_anchors(losses, reduction, normalizer, min_normalizer)


def dense_equalized_focal_loss(
    cls_logits: Sequence[Tensor],  # L of [B, A * K, H, W]
    labels: Tensor,  # [B, N], N = sum of H * W * A
    gamma: Tensor,  # [K]
    alpha: float = 0.25,
    *,
    normalizer: Tensor | float | None = None,  # a number, 0-d or [B]
    min_normalizer: float = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,  # [B, N]
    class_weight: Tensor | None = None,  # [K] or [3, K]
) -> tuple[Tensor, Tensor]:
    x = _dense_rows(cls_logits, labels)[
        ..., : len(gamma)
    ]  # where there are no rows nothing tells K

    def losses_of(x: Tensor) -> Tensor:
        losses = _focal_hard(x, one_hot(labels, x.shape[-1]), alpha, gamma.to(x.dtype))
        losses = _weigh(losses, weight, class_weight, labels)
        return _reduce(losses, x, labels, "none", ignore_index, None, 1)

    with torch.enable_grad():
        own = x.detach().requires_grad_()
        (grads,) = torch.autograd.grad(losses_of(own).sum(), own)
    # Of the anchors that have the class the gradient is negative, of all others positive.
    by_sign = torch.stack(((-grads).clamp(min=0), grads.clamp(min=0)))
    return _reduce_anchors(losses_of(x), "sum", normalizer, min_normalizer), by_sign.double().sum(
        dim=(1, 2)
    )


def _dense_rows(cls_logits: Sequence[Tensor], labels: Tensor) -> Tensor:  # [B, N, K]
    positions = sum(level.shape[2] * level.shape[3] for level in cls_logits)
    anchors = labels.shape[1] // max(positions, 1)
    num_classes = cls_logits[0].shape[1] // max(anchors, 1)
    x = torch.cat([head_rows(level, num_classes) for level in cls_logits], dim=1)
    return x.to(compute_dtype(x.dtype))


def _reduce_anchors(
    losses: Tensor,  # [B, N, K]
    reduction: str,
    normalizer: Tensor | float | None,
    min_normalizer: float,
) -> Tensor:
    losses = losses.sum(dim=2)
    if reduction == "none" or normalizer is None:
        return losses if reduction == "none" else losses.sum()
    divisor = torch.as_tensor(normalizer, dtype=losses.dtype, device=losses.device)
    return (losses.sum(dim=1) / divisor.clamp(min=min_normalizer)).sum()


def soft_focal_loss(
    inputs: Tensor,  # [..., K]
    targets: tuple[Tensor, Tensor] | Tensor,  # labels and scores, [...] = inputs.shape[:-1]; dense
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    positive, score = _positives_and_scores(inputs, targets)
    score = torch.where(positive, score, 0)
    x = inputs.to(score.dtype)
    as_positive = _focal_hard(x, torch.ones_like(positive), alpha, gamma)
    as_negative = _focal_hard(x, torch.zeros_like(positive), alpha, gamma)
    # A loss that does not count may be infinite.
    loss = torch.where(score == 0, 0, score * as_positive) + torch.where(
        score == 1, 0, (1 - score) * as_negative
    )
    return _reduce_rows(loss, inputs, targets, reduction, **options)


def quality_focal_loss(
    inputs: Tensor,  # [..., K]
    targets: tuple[Tensor, Tensor] | Tensor,  # labels and scores, [...] = inputs.shape[:-1]; dense
    beta: float = 2.0,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    positive, score = _positives_and_scores(inputs, targets)
    y = torch.where(positive, score, 0)

    def loss_of(x: Tensor) -> Tensor:
        difference = torch.where(positive, (y - torch.sigmoid(x)).abs(), 0.5)
        negative = torch.exp(beta * F.logsigmoid(x)) * _cross_entropy(x, 0)
        return torch.where(positive, difference.pow(beta) * _cross_entropy(x, y), negative)

    slopes = (1 - y).pow(beta + 1), y.pow(beta + 1)
    loss = _with_limits(inputs.to(score.dtype), loss_of, *slopes)
    return _reduce_rows(loss, inputs, targets, reduction, **options)


def varifocal_loss(
    inputs: Tensor,  # [..., K]
    targets: tuple[Tensor, Tensor] | Tensor,  # labels and scores, [...] = inputs.shape[:-1]; dense
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
    reduction: str = "none",
    *,
    detach_weight: bool = False,
    **options: Any,
) -> Tensor:
    positive, score = _positives_and_scores(inputs, targets)
    positive = positive & (score > 0)
    score = torch.where(positive, score, 0)
    weight = score if iou_weighted else torch.ones_like(score)

    def loss_of(x: Tensor) -> Tensor:
        modulation = torch.exp(gamma * F.logsigmoid(x.detach() if detach_weight else x))
        negative = alpha * modulation * _cross_entropy(x, 0)
        return torch.where(positive, weight * _cross_entropy(x, score), negative)

    slopes = torch.where(positive, weight * (1 - score), alpha), weight * score
    loss = _with_limits(inputs.to(score.dtype), loss_of, *slopes)
    return _reduce_rows(loss, inputs, targets, reduction, **options)


def softmax_focal_loss(
    inputs: Tensor,  # [..., K]
    targets: Tensor,  # [...] = inputs.shape[:-1]
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,  # [...]
    class_weight: Tensor | None = None,  # [K]
    inplace_backward: bool = False,  # a matter of memory: not here
) -> Tensor:
    ignored = targets == ignore_index
    is_class = (targets >= 0) & (targets < inputs.shape[-1]) & ~ignored
    label = torch.where(is_class, targets, 0).long()
    x = inputs.to(compute_dtype(inputs.dtype)).masked_fill(ignored.unsqueeze(-1), 0)
    log_p = F.log_softmax(x, dim=-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    # Where p rounds to 1, q = 1 - p must not be 0, of which a power has no gradient.
    log_p = log_p.clamp(max=-torch.finfo(x.dtype).tiny)
    # Where p = 0 the loss is -log(p), and the gradient of q^gamma log(p) would be 0 * inf.
    is_lost = log_p == -math.inf
    finite = torch.where(is_lost, -1, log_p)
    loss = -torch.exp(gamma * torch.log(-torch.expm1(finite))) * finite
    loss = torch.where(is_lost, -log_p, loss)
    loss = loss if alpha < 0 else alpha * loss
    loss = loss if weight is None else loss * weight.to(loss.dtype)
    loss = loss if class_weight is None else loss * class_weight.to(loss.dtype)[label]
    loss = loss.masked_fill(~is_class, math.nan).masked_fill(ignored, 0)
    if reduction == "none":
        return loss.to(inputs.dtype)
    if reduction == "mean":
        return loss.sum() / (~ignored).sum().clamp(min=1)
    if normalizer is None:
        return loss.sum()
    divisor = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return loss.sum() / divisor.clamp(min=min_normalizer)


def matchability_aware_loss(
    inputs: Tensor,  # [..., K]
    targets: tuple[Tensor, Tensor],  # labels and scores, both [...] = inputs.shape[:-1]
    gamma: float = 1.5,
    alpha: float = 1.0,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    positive, score = _positives_and_scores(inputs, targets)
    t = torch.where(positive, score.pow(gamma), 0)

    def loss_of(x: Tensor) -> Tensor:
        negative = alpha * torch.exp(gamma * F.logsigmoid(x.detach())) * _cross_entropy(x, 0)
        return torch.where(positive, _cross_entropy(x, t), negative)

    slopes = torch.where(positive, 1 - t, alpha), t
    loss = _with_limits(inputs.to(score.dtype), loss_of, *slopes)
    return _reduce_rows(loss, inputs, targets, reduction, **options)


def ia_bce_loss(
    inputs: Tensor,  # [..., K]
    targets: tuple[Tensor, Tensor],  # labels and scores, both [...] = inputs.shape[:-1]
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **options: Any,
) -> Tensor:
    positive, score = _positives_and_scores(inputs, targets)
    x = inputs.to(score.dtype)
    quality = torch.sigmoid(x.detach()).pow(alpha) * score.pow(1 - alpha)
    t = torch.where(positive, quality.clamp(min=0.01), 0)

    def loss_of(x: Tensor) -> Tensor:
        negative = torch.exp(gamma * F.logsigmoid(x)) * _cross_entropy(x, 0)
        return torch.where(positive, _cross_entropy(x, t), negative)

    loss = _with_limits(x, loss_of, 1 - t, t)
    return _reduce_rows(loss, inputs, targets, reduction, **options)


def _positives_and_scores(
    inputs: Tensor, targets: tuple[Tensor, Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(inputs.dtype)
    if isinstance(targets, Tensor):
        return torch.ones_like(targets, dtype=torch.bool), targets.to(dtype)
    labels, scores = targets
    return one_hot(labels, inputs.shape[-1]), scores.to(dtype).unsqueeze(-1)


def _with_limits(
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    slope: Tensor | float,
    slope_below: Tensor | float,
) -> Tensor:
    """The loss, and its limit at infinite logits, where it grows by a slope >= 0 times |x|: 0, or infinite with that gradient."""
    infinite = x.isinf()
    loss = loss_of(torch.where(infinite, 0, x))
    slope, slope_below = (
        torch.as_tensor(a, dtype=x.dtype, device=x.device) for a in (slope, slope_below)
    )
    slope = torch.where(x > 0, slope, slope_below)  # of two numbers it would be float32
    limit = torch.where(infinite & (slope > 0), slope * x.abs(), 0)
    return torch.where(infinite, limit, loss)


def _cross_entropy(x: Tensor, t: Tensor | float) -> Tensor:
    return -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x))


def _weigh(
    loss: Tensor,  # [..., K]
    weight: Tensor | None,  # [...]
    class_weight: Tensor | None,  # [K] or [3, K]: of positives, negatives, negatives of background
    labels: Tensor,  # [...]
) -> Tensor:
    if weight is not None:
        loss = loss * weight.to(loss.dtype).unsqueeze(-1)
    if class_weight is None:
        return loss
    class_weight = class_weight.to(loss.dtype)
    if class_weight.dim() == 2:
        positive = one_hot(labels, loss.shape[-1])
        is_foreground = positive.any(dim=-1, keepdim=True)
        of_positive, of_foreground, of_background = class_weight
        of_negative = torch.where(is_foreground, of_foreground, of_background)
        class_weight = torch.where(positive, of_positive, of_negative)
    return loss * class_weight


def _reduce_rows(
    loss: Tensor,
    inputs: Tensor,
    targets: tuple[Tensor, Tensor] | Tensor,
    reduction: str,
    *,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
    weight: Tensor | None = None,  # [...] = inputs.shape[:-1], or of dense targets inputs.shape
    class_weight: Tensor | None = None,  # [K] or [3, K]
    inplace_backward: bool = False,  # a matter of memory: not here
) -> Tensor:
    if isinstance(targets, Tensor):
        labels = targets
        loss = loss if weight is None else loss * weight.to(loss.dtype)
        loss = _weigh(loss, None, class_weight, labels)
    else:
        labels, _ = targets
        loss = _weigh(loss, weight, class_weight, labels)
    return _reduce(loss, inputs, labels, reduction, ignore_index, normalizer, min_normalizer)


def one_hot(targets: Tensor, num_classes: int) -> Tensor:  # [...] -> bool [..., K]
    return targets.unsqueeze(-1) == torch.arange(num_classes, device=targets.device)


# Beyond it sigmoid(x) is 1 in float64 too, and has no gradient that an infinite loss could be multiplied by.
SATURATED = 100.0


def _focal_hard(
    x: Tensor, positive: Tensor, alpha: float, gamma: Tensor | float, smoothing: float = 0
) -> Tensor:
    """alpha_t (1 - p_t)^gamma times the cross entropy, smoothed or not. At an infinite logit it is the limit of the product:
    where alpha_t is 0 that is 0, as at every finite logit."""
    s = torch.where(positive, -x, x)
    half = smoothing / 2
    alpha_t = _alpha_of(positive.to(x.dtype), alpha)

    def loss_of(s: Tensor) -> Tensor:
        cross_entropy = -F.logsigmoid(-s)
        if smoothing:
            cross_entropy = cross_entropy * (1 - half) - F.logsigmoid(s) * half
        modulation: Tensor | float = 1
        if isinstance(gamma, Tensor) or gamma:  # of classes it may be 0, times -inf
            log_q = F.logsigmoid(s.clamp(max=SATURATED)).clamp(min=torch.finfo(s.dtype).min)
            modulation = torch.exp(gamma * log_q)
        return alpha_t * modulation * cross_entropy

    if not smoothing and alpha not in (0, 1):
        return loss_of(s)  # has its limits
    # The modulating factor is 1 on one side, and on the other 0 unless gamma is.
    return _with_limits(s, loss_of, alpha_t * (1 - half), alpha_t * half * (gamma == 0))


def _alpha_of(t: Tensor, alpha: float) -> Tensor:
    return torch.ones_like(t) if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)


def _is_dense_target(t: Tensor) -> Tensor:
    """A rounding of half precision beyond [0, 1] is one, a NaN is not."""
    return (t >= -0.01) & (t <= 1.01)


def _focal_dense(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    x = torch.where(_is_dense_target(t), x, math.nan)
    hard = _focal_hard(x, t == 1, alpha, gamma)
    alpha_t = _alpha_of(t, alpha)
    # Where t is 0 or 1 the other branch is not taken; 0.5 keeps the gradient of its power finite there.
    is_soft = (t != 0) & (t != 1)
    t = torch.where(is_soft, t, 0.5)
    inner = x.clamp(-SATURATED, SATURATED)
    q = t * torch.sigmoid(-inner) + (1 - t) * torch.sigmoid(inner)  # 1 - p_t
    modulation = q.clamp(min=torch.finfo(q.dtype).tiny).pow(gamma)
    return torch.where(is_soft, alpha_t * modulation * _cross_entropy(x, t), hard)


def _reduce(
    loss: Tensor,
    inputs: Tensor,
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    normalizer: Tensor | float | None,
    min_normalizer: float,
) -> Tensor:
    count = torch.tensor(loss.numel(), device=loss.device)
    if targets.shape != inputs.shape:
        num_classes = inputs.shape[-1]
        ignored = targets == ignore_index
        valid = (targets >= 0) & (targets <= num_classes)
        loss = loss.masked_fill(ignored.unsqueeze(-1), 0)
        loss = loss.masked_fill((~valid & ~ignored).unsqueeze(-1), math.nan)
        count = (~ignored).sum() * num_classes
    if reduction == "none":
        return loss.to(inputs.dtype)
    if reduction == "mean":
        return loss.sum() / count.clamp(min=1)
    if normalizer is None:
        return loss.sum()
    divisor = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return loss.sum() / divisor.clamp(min=min_normalizer)


def box_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(
    boxes1: Tensor,  # [..., N, 4]
    boxes2: Tensor,  # [..., M, 4]
    fmt: str = "xyxy",
    *,
    mode: str = "iou",
) -> Tensor:
    return _iou_matrix(mode, _corners(boxes1, fmt), _corners(boxes2, fmt), 0)


def _corners(boxes: Tensor, fmt: str) -> Tensor:
    place, size = boxes[..., :2], boxes[..., 2:]
    if fmt == "xyxy":
        return boxes
    corner = place if fmt == "xywh" else place - 0.5 * size
    return torch.cat((corner, corner + size), dim=-1)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return _iou_matrix("giou", boxes1, boxes2, 0)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    return _iou_matrix("diou", boxes1, boxes2, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    return _iou_matrix("ciou", boxes1, boxes2, eps)


def box_iou_loss(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    reduction: str = "none",
    eps: float = 1e-7,
) -> Tensor:
    return _iou_loss("iou", boxes1, boxes2, reduction, eps)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    return _iou_loss("giou", boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    return _iou_loss("diou", boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    return _iou_loss("ciou", boxes1, boxes2, reduction, eps)


def _iou_matrix(kind: str, boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(torch.promote_types(boxes1.dtype, boxes2.dtype))
    a = boxes1.to(dtype).unsqueeze(-2)  # [..., N, 1, 4]
    b = boxes2.to(dtype).unsqueeze(-3)  # [..., 1, M, 4]
    return _iou(kind, a, b, 0, eps)


def _iou_loss(kind: str, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    dtype = compute_dtype(torch.promote_types(boxes1.dtype, boxes2.dtype))
    loss = 1 - _iou(kind, boxes1.to(dtype), boxes2.to(dtype), eps, eps)
    if reduction == "none":
        return loss
    return loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)


def _iou(kind: str, a: Tensor, b: Tensor, union_eps: float, eps: float) -> Tensor:
    width_height = F.relu(torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2]))
    intersection = width_height[..., 0] * width_height[..., 1]
    if kind == "iof":
        return _divide(intersection, box_area(a))
    union = box_area(a) + box_area(b) - intersection
    overlap = _divide(intersection, union + union_eps)
    if kind == "iou":
        return overlap
    # Of the smallest box that encloses both.
    outer = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    w, h = outer.unbind(-1)
    if kind == "giou":
        return overlap - _divide(w * h - union, w * h + eps)
    x, y = (0.5 * (a[..., :2] + a[..., 2:]) - 0.5 * (b[..., :2] + b[..., 2:])).unbind(-1)
    distance_iou = overlap - _divide(x * x + y * y, w * w + h * h + eps)
    if kind == "diou":
        return distance_iou
    v = 4 / math.pi**2 * (_diagonal_angle(a) - _diagonal_angle(b)) ** 2
    weight = _divide(v, 1 - overlap + v + eps).detach()
    return distance_iou - weight * v


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """0 where b is 0: there a is too."""
    is_zero = b == 0
    return torch.where(is_zero, 0, a / torch.where(is_zero, 1, b))


def _diagonal_angle(boxes: Tensor) -> Tensor:
    """atan(w / h), 0 for a point; as atan2 its gradient is finite where h is 0."""
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    is_point = (w == 0) & (h == 0)
    sign = torch.where(h < 0, -1, 1)
    return torch.atan2(torch.where(is_point, 0, sign * w), torch.where(is_point, 1, sign * h))


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    dtype = compute_dtype(torch.promote_types(boxes.dtype, anchors.dtype))
    (x, y, w, h), (ax, ay, aw, ah) = _center_size(boxes.to(dtype)), _center_size(anchors.to(dtype))
    wx, wy, ww, wh = weights
    return torch.stack(
        (wx * (x - ax) / aw, wy * (y - ay) / ah, ww * torch.log(w / aw), wh * torch.log(h / ah)),
        dim=-1,
    )


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1, 1, 1, 1),
    clip: float = math.log(1000 / 16),
    image_size: Sequence[float] | Tensor | None = None,  # [2], or [B, 2] of [B, ..., 4]
    *,
    ctr_clamp: float | None = None,
) -> Tensor:
    dtype = compute_dtype(torch.promote_types(deltas.dtype, anchors.dtype))
    ax, ay, aw, ah = _center_size(anchors.to(dtype))
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.to(dtype).unbind(-1)
    shift_x, shift_y = dx / wx * aw, dy / wy * ah
    if ctr_clamp is not None:
        shift_x = shift_x.clamp(-ctr_clamp, ctr_clamp)
        shift_y = shift_y.clamp(-ctr_clamp, ctr_clamp)
    x, y = shift_x + ax, shift_y + ay
    half_w = 0.5 * (torch.exp((dw / ww).clamp(max=clip)) * aw)
    half_h = 0.5 * (torch.exp((dh / wh).clamp(max=clip)) * ah)
    x1, y1, x2, y2 = x - half_w, y - half_h, x + half_w, y + half_h
    if image_size is not None:
        sizes = torch.as_tensor(image_size, dtype=dtype, device=x.device)
        height, width = sizes.reshape(*sizes.shape[:-1], *(1,) * (x.dim() - 1), 2).unbind(-1)
        x1, x2 = _clip(x1, width), _clip(x2, width)
        y1, y2 = _clip(y1, height), _clip(y2, height)
    return torch.stack((x1, y1, x2, y2), dim=-1)


def _clip(x: Tensor, limit: Tensor) -> Tensor:
    """To [0, limit]. As torch.clamp with numbers, and unlike it with tensors, without a gradient at a bound."""
    is_inside = (x > 0) & (x < limit)
    return torch.where(is_inside, x, x.detach().clamp(torch.zeros_like(limit), limit))


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def dense_box_loss(
    deltas: Sequence[Tensor],  # L of [B, A * 4, H, W]
    anchors: Tensor,  # [N, 4], N = sum of H * W * A
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4]
    matches: Tensor,  # [B, N]
    *,
    loss: str = "l1",
    weights: Sequence[float] = (1, 1, 1, 1),
    clip: float = math.log(1000 / 16),
    beta: float = 1.0,
    eps: float = 1e-7,
    reduction: str = "sum",
    normalizer: Tensor | float | None = None,  # a number, 0-d or [B]
    min_normalizer: float = 1,
    weight: Tensor | None = None,  # [B, N]
    return_iou: bool = False,
    coding: str = "deltas",
    strides: Sequence[float] = (),
    bins: int = 1,
    dfl_weight: float = 0.0,
) -> Any:  # a loss, or with return_iou a loss and [B, N]
    these, of, truth = _foreground(deltas, anchors, gt_boxes, matches, 4 * bins)
    if coding == "distance":
        these = these.unflatten(-1, (4, bins))
        stride = torch.cat(
            [of.new_full(x.shape[2:], s).flatten() for x, s in zip(deltas, strides, strict=True)]
        )[torch.where(matches >= 0)[1], None]
        boxes = _distance_boxes(these, of, stride)
        values = _iou_loss(loss, boxes, truth, "none", eps)
        if dfl_weight > 0:
            targets = encode_distances(of, truth) / stride
            values = values + dfl_weight * distribution_focal_loss(these, targets).mean(-1)
    elif loss in ("l1", "smooth_l1"):
        target = encode_boxes(truth, of, weights)
        beta_or_0 = beta if loss == "smooth_l1" else 0
        values = F.smooth_l1_loss(these, target, reduction="none", beta=beta_or_0).sum(-1)
    else:
        values = _iou_loss(loss, decode_boxes(these, of, weights, clip), truth, "none", eps)
    losses = _in_their_places(values, matches)
    if weight is not None:
        losses = losses * weight.to(losses.dtype).masked_fill(matches < 0, 0)
    result = losses if reduction == "none" else losses.sum(1)  # [B]
    if reduction == "sum" and normalizer is not None:
        divisor = torch.as_tensor(normalizer, dtype=result.dtype, device=result.device)
        result = result / divisor.clamp(min=min_normalizer)
    if reduction == "sum":
        result = result.sum()
    if not return_iou:
        return result
    if coding == "deltas":
        boxes = decode_boxes(these, of, weights, clip)
    return result, _in_their_places(_iou("iou", boxes, truth, 0, 0), matches).detach()


def matched_iou(
    deltas: Sequence[Tensor],  # L of [B, A * 4, H, W]
    anchors: Tensor,  # [N, 4], N = sum of H * W * A
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4]
    matches: Tensor,  # [B, N]
    *,
    weights: Sequence[float] = (1, 1, 1, 1),
    clip: float = math.log(1000 / 16),
) -> Tensor:  # [B, N]
    these, of, truth = _foreground(deltas, anchors, gt_boxes, matches)
    iou = _iou("iou", decode_boxes(these, of, weights, clip), truth, 0, 0)
    return _in_their_places(iou, matches).detach()


def _foreground(
    deltas: Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matches: Tensor,
    columns: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:  # deltas, [P, columns], anchors and boxes
    x = torch.cat([head_rows(level, columns) for level in deltas], dim=1)  # [B, N, columns]
    x = x.to(compute_dtype(x.dtype))
    image, row = torch.where(matches >= 0)
    truth = [boxes[match[match >= 0]] for boxes, match in zip(gt_boxes, matches, strict=True)]
    return (
        x[image, row],
        anchors[row].to(x.dtype),
        torch.cat([anchors.new_zeros(0, 4), *truth]).to(x.dtype),
    )


def _in_their_places(values: Tensor, matches: Tensor) -> Tensor:  # [P] -> [B, N]
    return values.new_zeros(matches.shape).index_put((matches >= 0,), values)


def decode_distances(
    levels: Sequence[Tensor],  # L of [B, 4 * bins, H, W]
    points: Tensor,  # [N, 2], N = sum of H * W
    strides: Sequence[float],
    *,
    bins: int = 1,
    image_sizes: Tensor | Sequence[Sequence[float]] | None = None,  # [B, 2]
) -> Tensor:
    dtype = compute_dtype(levels[0].dtype)
    points = points.to(dtype)
    of_levels = points.split([level.shape[2] * level.shape[3] for level in levels])
    boxes = torch.cat(
        [
            _distance_boxes(
                head_rows(level, 4 * bins).to(dtype).unflatten(-1, (4, bins)), of_level, stride
            )
            for level, of_level, stride in zip(levels, of_levels, strides, strict=True)
        ],
        dim=1,
    )
    if image_sizes is None:
        return boxes
    sizes = torch.as_tensor(image_sizes, dtype=dtype, device=boxes.device).reshape(-1, 1, 2)
    return _clip(boxes, sizes.flip(-1).repeat(1, 1, 2))


def _distance_boxes(
    x: Tensor,  # [..., 4, bins]
    points: Tensor,  # [..., 2]
    stride: Tensor | float,
) -> Tensor:  # [..., 4]
    if x.shape[-1] > 1:
        x = x.softmax(-1) @ torch.arange(x.shape[-1], dtype=x.dtype, device=x.device).unsqueeze(-1)
    before, after = (stride * x.squeeze(-1)).chunk(2, dim=-1)
    return torch.cat((points - before, points + after), dim=-1)


def encode_distances(
    points: Tensor,  # [..., 2]
    boxes: Tensor,  # [..., 4]
    *,
    max_distance: float | None = None,
) -> Tensor:
    first, last = boxes.chunk(2, dim=-1)
    distances = torch.cat((points - first, last - points), dim=-1)
    return distances if max_distance is None else distances.clamp(0, max_distance)


def distribution_focal_loss(
    inputs: Tensor,  # [..., bins]
    targets: Tensor,  # [...]
    weight: Tensor | None = None,  # [...]
    *,
    reduction: str = "none",
    normalizer: Tensor | float | None = None,
    min_normalizer: float = 1,
) -> Tensor:
    x, bins = inputs.to(compute_dtype(inputs.dtype)), inputs.shape[-1]
    t = targets.to(x.dtype).clamp(0, bins - 1)
    left = t.nan_to_num().long().clamp(max=bins - 2)
    share = t - left
    losses = -x.log_softmax(-1)

    def part(share: Tensor, bin: Tensor) -> Tensor:
        of_bin = losses.gather(-1, bin.unsqueeze(-1)).squeeze(-1)
        return share * torch.where(share == 0, 0, of_bin)

    loss = part(1 - share, left) + part(share, left + 1)
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    if normalizer is None:
        return loss.sum()
    divisor = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return loss.sum() / divisor.clamp(min=min_normalizer)


def fuse_features(
    features: Sequence[Tensor],  # n of [B, C, h, w], of the size of the first, about half or twice
    weights: Tensor | None = None,  # [n]
    mode: str = "fast",
    *,
    eps: float = 1e-4,
    activation: str | None = None,
    padding: str = "same",
) -> Tensor:  # [B, C, H, W], of the size of the first
    dtype = compute_dtype(features[0].dtype)
    size = features[0].shape[2:]
    maps = [_resample(feature.to(dtype), size, padding) for feature in features]
    if mode == "sum" or weights is None:
        terms = maps
    else:
        e = weights.to(dtype)
        factors = {"fast": F.relu, "softmax": lambda e: e.softmax(0)}.get(mode, lambda e: e)(e)
        terms = [x * factor for x, factor in zip(maps, factors.unbind(), strict=True)]
        if mode == "fast":
            divisor = sum(factors.unbind()) + eps
            terms = [term / divisor for term in terms]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    result = {None: lambda x: x, "silu": F.silu, "relu6": F.relu6}[activation](total)
    return result.to(features[0].dtype)


def _resample(x: Tensor, size: Sequence[int], padding: str) -> Tensor:
    (height, width), (rows, columns) = size, x.shape[2:]
    if (rows, columns) == (height, width):
        return x
    if rows <= height and columns <= width:
        from_row = torch.arange(height, device=x.device) * rows // height
        from_column = torch.arange(width, device=x.device) * columns // width
        return x[:, :, from_row][:, :, :, from_column]
    if x.shape[1] == 0:  # which max_pool2d refuses
        return x[:, :, :height, :width]
    # Of three pixels with a stride of 2, TensorFlow's "same" begins at the first where the size is even.
    before = [1 if padding == "symmetric" else n % 2 for n in (rows, columns)]
    after = (0, 1 - before[1], 0, 1 - before[0])
    padded = F.pad(x, after, value=-math.inf)
    return F.max_pool2d(padded, 3, 2, padding=before)


def match_anchors(
    anchors: Tensor,  # [A, 4]
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    counts: Tensor | None = None,  # [B]
    rule: str = "torchvision",
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
    crowd: Sequence[Tensor] | Tensor | None = None,  # bool, B of [M_i], or [B, M]
    crowd_threshold: float = 0.5,
    ignore_wrt_candidates: bool = True,
    image_sizes: Sequence[Sequence[float]] | Tensor | None = None,  # B of height and width
) -> Tensor:
    matches = []
    for i, boxes in enumerate(gt_boxes):
        count = len(boxes) if counts is None else int(counts[i])
        boxes = boxes[:count]
        is_crowd = torch.zeros(count, dtype=torch.bool, device=boxes.device)
        if crowd is not None:
            is_crowd = crowd[i][:count]
        degenerate = _is_degenerate(boxes, None if image_sizes is None else image_sizes[i])
        # Of these all IoUs are 0 anyway, but for those outside.
        if crowd is None and image_sizes is None:
            degenerate = torch.zeros_like(degenerate)
        objects = torch.where(~(is_crowd | degenerate))[0]
        match = _match_one_image(
            anchors,
            boxes[objects],
            _inside(anchors, boxes[is_crowd & ~degenerate], crowd_threshold, ignore_wrt_candidates),
            (fg_iou_threshold, bg_iou_threshold),
            allow_low_quality_matches,
            rule,
            (min_pos_iou, gt_max_assign_all),
        )
        if len(objects):
            match = torch.where(match < 0, match, objects[match.clamp(min=0)])
        matches.append(match)
    if not matches:
        return torch.empty((0, len(anchors)), dtype=torch.int64, device=anchors.device)
    return torch.stack(matches)


def count_degenerate_boxes(
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    image_sizes: Sequence[Sequence[float]] | Tensor | None = None,  # B of height and width
    *,
    counts: Tensor | None = None,  # [B]
) -> Tensor:
    numbers = []
    for i, boxes in enumerate(gt_boxes):
        boxes = boxes[: len(boxes) if counts is None else int(counts[i])]
        size = None if image_sizes is None else image_sizes[i]
        numbers.append(_is_degenerate(boxes, size).sum())
    return torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.int64)


def _is_degenerate(boxes: Tensor, image_size: Sequence[float] | Tensor | None) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    has_area = (x2 > x1) & (y2 > y1)
    if image_size is None:
        return ~has_area
    height, width = image_size
    return ~(has_area & (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0))


def _match_one_image(
    anchors: Tensor,
    gt_boxes: Tensor,
    ignored: Tensor,  # [A], which take no part
    thresholds: tuple[float, float],
    allow_low_quality: bool,
    rule: str,
    of_mmdet: tuple[float, bool],
) -> Tensor:
    iou = box_iou(gt_boxes, anchors).nan_to_num(0)  # [M, A]; what is not a number overlaps nothing
    iou[:, ignored] = 0
    min_pos_iou, all_of_equal = of_mmdet
    matches = match_iou_matrix(
        iou,
        *thresholds,
        allow_low_quality,
        rule=rule,
        min_pos_iou=min_pos_iou,
        gt_max_assign_all=all_of_equal,
    )
    matches[ignored] = -2
    return matches


def match_iou_matrix(
    iou: Tensor,  # [M, A]
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    rule: str = "torchvision",
    min_pos_iou: float = 0.0,
    gt_max_assign_all: bool = True,
) -> Tensor:
    iou = iou.to(compute_dtype(iou.dtype)).nan_to_num(0).clamp(min=0)
    matches = torch.full((iou.shape[1],), -1, dtype=torch.int64, device=iou.device)
    if iou.numel():
        best_iou, best_box = iou.max(dim=0)  # the first of equal boxes, as the tie rule asks
        matches = best_box.clone()
        matches[best_iou < fg_iou_threshold] = -2
        matches[best_iou < bg_iou_threshold] = -1
        best_anchor_iou, best_anchor = iou.max(dim=1, keepdim=True)
        # A box that overlaps no anchor has a best IoU of 0, which every other anchor shares: it matches none of them.
        is_best = (iou == best_anchor_iou) & (best_anchor_iou > 0)
        if allow_low_quality_matches and rule in ("torchvision", "detectron2"):
            matches = torch.where(is_best.any(dim=0), best_box, matches)
        elif allow_low_quality_matches:
            is_best &= best_anchor_iou >= min_pos_iou
            if not gt_max_assign_all or rule == "efficientdet":
                is_first = torch.zeros_like(is_best).scatter_(1, best_anchor, True)
                is_best &= is_first
            boxes = range(len(is_best))  # where several claim an anchor the last one here has it
            for j in reversed(boxes) if rule == "efficientdet" else boxes:
                matches[is_best[j]] = j
    return matches


def _inside(anchors: Tensor, crowds: Tensor, threshold: float, of_anchors: bool) -> Tensor:  # [A]
    share = (
        box_iou(anchors, crowds, mode="iof")
        if of_anchors
        else box_iou(crowds, anchors, mode="iof").transpose(0, 1)
    )
    return (share.nan_to_num(0) > threshold).any(dim=1)


def class_index_targets(
    matches: Tensor,  # [B, A]
    gt_labels: Sequence[Tensor] | Tensor,  # B of [M_i], or [B, M]
    num_classes: int,
    ignore_index: int = -100,
) -> Tensor:
    no_class = num_classes + (2 if ignore_index == num_classes + 1 else 1)
    rows = []
    for row, labels in zip(matches, gt_labels, strict=True):
        labels, count = labels.to(torch.int64), len(labels)
        labels = torch.where((labels >= 0) & (labels < num_classes), labels, no_class)
        target = torch.cat((labels, labels.new_full((1,), no_class)))[row.clamp(0, count)]
        target = torch.where(row == -1, num_classes, torch.where(row < -2, no_class, target))
        rows.append(torch.where(row == -2, ignore_index, target))
    return torch.stack(rows) if rows else torch.empty_like(matches, dtype=torch.int64)


def assign_fcos(
    points: Tensor,  # [N, 2]
    strides: Sequence[float],  # L
    level_sizes: Sequence[int],  # L, of the sum N
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    *,
    counts: Tensor | None = None,  # [B]
    rule: str = "torchvision",
    center_radius: float | None = 1.5,
    ranges: Sequence[Sequence[float]] | None = None,  # L of the least and the most
    crowd: Sequence[Tensor] | Tensor | None = None,  # bool, B of [M_i], or [B, M]
) -> Tensor:
    if ranges is None:
        ends = [4 * stride for stride in strides[1:]], [8 * stride for stride in strides[:-1]]
        ranges = list(zip([0, *ends[0]], [*ends[1], math.inf], strict=True))

    def of_points(values: Sequence[float]) -> Tensor:  # [N, 1], of one number a level
        repeats = torch.tensor(level_sizes, device=x.device)
        return torch.tensor(values, dtype=x.dtype, device=x.device).repeat_interleave(repeats)[
            :, None
        ]

    def of_image(boxes: Tensor) -> Tensor:  # [N]
        x1, y1, x2, y2 = boxes.unbind(-1)
        sides = _sides(points, boxes)  # [N, M, 4]
        distance, area = sides.amax(-1), (x2 - x1) * (y2 - y1)
        center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
        if rule == "torchvision":
            is_near = torch.maximum((x - center_x).abs(), (y - center_y).abs()) < reach
            fits = (distance > least) & (distance < most)
            worth = 1e8 - area
            worth = worth.where(worth >= 1e-5, -math.inf)
        else:
            is_near = (x > center_x - reach) & (x < center_x + reach)
            is_near &= (y > center_y - reach) & (y < center_y + reach)
            fits = (distance >= least) & (distance <= most)
            worth = torch.where(area < 1e8, -area, -math.inf)
        worth = worth.where((sides.amin(-1) > 0) & is_near & fits, -math.inf)
        best, match = worth.max(dim=1)  # of equal boxes the first
        return match.where(best > -math.inf, -1)

    is_double = torch.float64 in {points.dtype, *(boxes.dtype for boxes in gt_boxes)}
    points = points.to(torch.float64 if is_double else torch.float32)
    x, y = points.unsqueeze(1).unbind(-1)  # [N, 1]
    reach = of_points(strides) * (math.inf if center_radius is None else center_radius)
    least, most = (of_points(bounds) for bounds in zip(*ranges, strict=True))
    return _assigned_by_image(of_image, points, gt_boxes, counts, crowd)


def assign_task_aligned(
    pred_scores: Tensor,  # [B, N, K]
    pred_boxes: Tensor,  # [B, N, 4]
    points: Tensor,  # [N, 2]
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    gt_labels: Sequence[Tensor] | Tensor,  # B of [M_i], or [B, M]
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    *,
    counts: Tensor | None = None,  # [B]
    rule: str = "ultralytics",
    overlap: str | None = None,
    min_side: float | None = None,
    final_topk: int | None = None,
    eps: float | None = None,
    crowd: Sequence[Tensor] | Tensor | None = None,  # bool, B of [M_i], or [B, M]
) -> tuple[Tensor, Tensor]:  # int64 [B, N], float32 [B, N]
    margin, of_rule, eps_of_rule = {
        "ultralytics": (1e-9, "ciou", 1e-9),
        "mmyolo": (1e-9, "iou", 1e-7),
        "tood": (0.01, "iou", 1e-7),
    }[rule]
    kind, eps = overlap or of_rule, eps_of_rule if eps is None else eps
    points, pred_boxes = points.float(), pred_boxes.float()
    matches, scores = [], []
    for i, (boxes, labels) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
        count = len(boxes) if counts is None else int(counts[i])
        boxes, labels = boxes[:count].float(), labels[:count].to(torch.int64)
        is_crowd = torch.zeros(count, dtype=torch.bool, device=boxes.device)
        if crowd is not None:
            is_crowd = crowd[i][:count]
        in_crowd = (_sides(points, boxes[is_crowd]).amin(-1) > 0).any(1)
        has_class = (labels >= 0) & (labels < pred_scores.shape[2])
        objects = torch.where(~is_crowd & has_class)[0]
        match = torch.full_like(in_crowd, -1, dtype=torch.int64)
        score = torch.zeros_like(in_crowd, dtype=torch.float32)
        if len(objects) and len(points):
            boxes, labels = boxes[objects], labels[objects]
            region = boxes
            if rule == "ultralytics":
                center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
                least = 16.0 if min_side is None else min_side
                half = torch.where(side < least, least, side) / 2
                region = torch.cat((center - half, center + half), dim=1)
            holds = _sides(points, region).amin(-1) > margin  # [N, M]
            of_class = pred_scores[i].float()[:, labels]
            u = _iou(kind, pred_boxes[i].unsqueeze(1), boxes, 1e-7 if kind == "ciou" else 0, 1e-7)
            u = torch.where(u > 0, u, 0.0)  # a NaN is 0
            metric = _power(of_class, alpha) * _power(u, beta)
            metric = torch.where(metric > 0, metric, 0.0)
            may_match = ~in_crowd.unsqueeze(1) & (holds | (rule == "tood"))
            best = (metric * may_match).sort(dim=0, descending=True, stable=True)
            claims = torch.zeros_like(holds).scatter(0, best.indices[:topk], best.values[:topk] > 0)
            claims &= holds
            # Where several boxes claim an anchor, it goes to the one that it overlaps most.
            rivals = {"ultralytics": holds, "mmyolo": torch.ones_like(holds), "tood": claims}[rule]
            most = u.masked_fill(~rivals, -1).max(dim=1).indices
            number = claims.sum(1)
            match = torch.where(number > 1, most, claims.byte().argmax(1)).where(number > 0, -1)
            if final_topk is not None:
                own = match.unsqueeze(1) == torch.arange(len(objects), device=match.device)
                best = metric.masked_fill(~own, -1).sort(dim=0, descending=True, stable=True)
                kept = torch.zeros_like(own).scatter(0, best.indices[:final_topk], True)
                match = match.where((own & kept).any(1), -1)
            n = torch.where(match >= 0)[0]
            box, zeros = match[n], torch.zeros(len(objects), device=match.device)
            m, u = metric[n, box], u[n, box]
            greatest_m = zeros.scatter_reduce(0, box, m, "amax")[box]
            greatest_u = zeros.scatter_reduce(0, box, u, "amax")[box]
            if rule == "tood":
                score[n] = m / (greatest_m + eps) * greatest_u
            else:
                score[n] = m * greatest_u / (greatest_m + eps)
            match[n] = objects[box]
        matches.append(match.masked_fill(in_crowd, -2))
        scores.append(score)
    if not matches:
        empty = points.new_empty((0, len(points)))
        return empty.to(torch.int64), empty
    return torch.stack(matches), torch.stack(scores)


def assign_simota(
    cls_logits: Tensor,  # [B, N, K]
    pred_boxes: Tensor,  # [B, N, 4]
    points: Tensor,  # [N, 2]
    strides: Tensor,  # [N]
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    gt_labels: Sequence[Tensor] | Tensor,  # B of [M_i], or [B, M]
    *,
    objectness: Tensor | None = None,  # [B, N]
    counts: Tensor | None = None,  # [B]
    rule: str = "simota",
    center_radius: float | None = None,
    candidates: int | None = None,
    crowd: Sequence[Tensor] | Tensor | None = None,  # bool, B of [M_i], or [B, M]
) -> tuple[Tensor, Tensor]:  # int64 [B, N], float32 [B, N]
    of_rule: tuple[float, int, float, float] = {
        "simota": (2.5, 10, 1e-7, 1e5),
        "yolox": (1.5, 10, 1e-8, 1e6),
        "rtmdet": (3.0, 13, 1e-7, 0.0),
    }[rule]
    radius, most, eps, penalty = of_rule
    radius = radius if center_radius is None else center_radius
    most = most if candidates is None else candidates
    points, pred_boxes, strides = points.float(), pred_boxes.float(), strides.float()
    matches, ious = [], []
    for i, (boxes, labels) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
        count = len(boxes) if counts is None else int(counts[i])
        boxes, labels = boxes[:count].float(), labels[:count].to(torch.int64)
        is_crowd = torch.zeros(count, dtype=torch.bool, device=boxes.device)
        if crowd is not None:
            is_crowd = crowd[i][:count]
        in_crowd = (_sides(points, boxes[is_crowd]).amin(-1) > 0).any(1)
        has_class = (labels >= 0) & (labels < cls_logits.shape[2])
        objects = torch.where(~is_crowd & has_class)[0]
        boxes, labels = boxes[objects], labels[objects]
        inside = _sides(points, boxes).amin(-1) > 0  # [N, M]
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        reach = radius * strides[:, None, None]
        above, below = points[:, None] - (center - reach), (center + reach) - points[:, None]
        near = torch.cat((above, below), dim=-1).amin(-1) > 0
        may_match = {"simota": inside | near, "yolox": near, "rtmdet": inside}[rule]
        valid = torch.where(may_match.any(1) & ~in_crowd)[0]
        match = torch.full_like(in_crowd, -1, dtype=torch.int64)
        iou = torch.zeros_like(in_crowd, dtype=torch.float32)
        if len(valid):
            predicted = pred_boxes[i, valid, None]
            high = torch.min(predicted[..., 2:], boxes[:, 2:])
            both = F.relu(high - torch.max(predicted[..., :2], boxes[:, :2])).prod(-1)
            u = both / (box_area(predicted) + box_area(boxes) - both).clamp(min=1e-6)  # [V, M]
            # Logarithms in float64, so that equal pairs cost the same wherever they stand.
            x = cls_logits[i, valid, None].float()  # [V, 1, K]
            is_class = F.one_hot(labels, cls_logits.shape[2]).bool()  # [M, K]
            if rule == "rtmdet":
                target = torch.where(is_class, u[..., None].double(), 0)
                x = x.double().expand_as(target)
                bce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
                by_class = bce * (target - x.sigmoid()) ** 2
                distance = (points[valid, None] - center).pow(2).sum(-1).sqrt()
                place = 10 ** (distance / strides[valid, None] - radius)
            else:
                p = x.sigmoid()
                if objectness is not None:
                    p = (p * objectness[i, valid, None, None].float().sigmoid()).sqrt()
                negative = (-torch.log1p(-p.double())).clamp(max=100)
                by_class = torch.where(is_class, (-p.double().log()).clamp(max=100), negative)
                own = near if rule == "yolox" else inside & near
                place = penalty * ~own[valid]
            of_overlap = 3 * -(u + eps).double().log().float()
            cost = by_class.sum(-1).float() + of_overlap + place
            greatest = torch.where(u > 0, u, 0).sort(dim=0, descending=True).values[:most]
            total = greatest[0]
            for overlap in greatest[1:]:  # in this order
                total = total + overlap
            number = total.int().clamp(min=1, max=most)
            # A NaN is sorted last, and of equal costs the first stays so.
            order = cost.sort(dim=0, stable=True)
            is_taken = torch.arange(len(valid), device=cost.device)[:, None] < number
            claims = torch.zeros_like(is_taken).scatter(0, order.indices, is_taken)
            claims &= ~cost.isnan()
            cheapest = cost.sort(dim=1, stable=True).indices[:, 0]
            claimants = claims.sum(1)
            box = torch.where(claimants > 1, cheapest, claims.byte().argmax(1))
            taken = torch.where(claimants > 0)[0]
            match[valid[taken]] = objects[box[taken]]
            iou[valid[taken]] = u[taken, box[taken]]
        matches.append(match.masked_fill(in_crowd, -2))
        ious.append(iou)
    if not matches:
        empty = points.new_empty((0, len(points)))
        return empty.to(torch.int64), empty
    return torch.stack(matches), torch.stack(ious)


def _power(x: Tensor, exponent: float) -> Tensor:
    """As the kernels have it: by the root, or by products of squares."""
    if exponent == 0.5:
        return x.sqrt()
    if exponent != int(exponent) or exponent > 15:
        return x**exponent
    power, square = torch.ones_like(x), x
    for bit in range(4):
        if int(exponent) >> bit & 1:
            power = power * square
        square = square * square
    return power


def _assigned_by_image(
    of_image: Callable[[Tensor], Tensor],  # [M, 4] -> [N]
    points: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    counts: Tensor | None,
    crowd: Sequence[Tensor] | Tensor | None,
) -> Tensor:  # [B, N]
    """What an assigner gives of the objects; points inside a crowd take no part."""
    matches = []
    for i, boxes in enumerate(gt_boxes):
        boxes = boxes[: len(boxes) if counts is None else int(counts[i])]
        is_crowd = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        if crowd is not None:
            is_crowd = crowd[i][: len(boxes)]
        objects = torch.where(~is_crowd)[0]
        match = points.new_full((len(points),), -1, dtype=torch.int64)
        if len(objects):
            match = of_image(boxes[objects].to(points.dtype))
            match = torch.where(match < 0, match, objects[match.clamp(min=0)])
        inside = _sides(points, boxes[is_crowd]).amin(-1) > 0
        matches.append(match.masked_fill(inside.any(1), -2))
    if not matches:
        return torch.empty((0, len(points)), dtype=torch.int64, device=points.device)
    return torch.stack(matches)


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    """How far each point is from each side of each box, positive inside: [N, 2], [M, 4] -> [N, M, 4]."""
    x, y = points.unsqueeze(1).unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x - x1, y - y1, x2 - x, y2 - y), dim=-1)


def assign_atss(
    anchors: Tensor,  # [N, 4]
    level_sizes: Sequence[int],  # L, of the sum N
    gt_boxes: Sequence[Tensor] | Tensor,  # B of [M_i, 4], or [B, M, 4] with counts
    topk: int = 9,
    *,
    counts: Tensor | None = None,  # [B]
    rule: str = "atss",
    crowd: Sequence[Tensor] | Tensor | None = None,  # bool, B of [M_i], or [B, M]
    at_least_one: bool = False,
) -> Tensor:
    is_double = torch.float64 in {anchors.dtype, *(boxes.dtype for boxes in gt_boxes)}
    anchors = anchors.to(torch.float64 if is_double else torch.float32)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    levels = torch.arange(len(anchors), device=anchors.device).split(list(level_sizes))

    def candidates(box: Tensor, in_crowd: Tensor) -> list[Tensor]:  # of each level, the nearest
        distance = (centers - (box[:2] + box[2:]) / 2).square().sum(-1).sqrt()
        distance = distance.masked_fill(in_crowd, math.nan)
        nearest = [level[distance[level].sort(stable=True).indices[:topk]] for level in levels]
        return [level[~distance[level].isnan()] for level in nearest]

    def positives(box: Tensor, iou: Tensor, nearest: list[Tensor]) -> Tensor:
        index = torch.cat(nearest)
        of_levels = [iou[level].double() for level in nearest]
        mean = _sum_of_lanes(of_levels) / len(index)
        variance = _sum_of_lanes([(x - mean).square() for x in of_levels]) / (len(index) - 1)
        threshold = mean.to(iou.dtype) + variance.sqrt().to(iou.dtype)
        margin = _sides(centers[index], box[None]).amin(-1)[:, 0]
        if rule == "atss":
            return index[(iou[index] >= threshold) & (margin > 0.01)]
        return index[(iou[index] > threshold) & (margin > 1e-9)]

    def of_image(boxes: Tensor, in_crowd: Tensor) -> Tensor:  # [N]
        nearest = [candidates(box, in_crowd) for box in boxes]
        iou = _atss_iou(boxes, anchors)  # [M, N]
        is_claimed = torch.zeros_like(iou, dtype=torch.bool)
        for j, box in enumerate(boxes):
            is_claimed[j, positives(box, iou[j], nearest[j])] = True
        claims = is_claimed.sum(0)
        if rule == "atss":
            worth = iou.where(is_claimed, -1)
        else:  # of the boxes that did not claim it, too
            worth = iou.nan_to_num(-1).where(is_claimed | (claims > 1), -1)
        match = worth.argmax(0).where(claims > 0, -1)  # of equal boxes the first
        for j in range(len(boxes)) if at_least_one else ():
            index = torch.cat(nearest[j])
            owned = (match[:, None] == torch.arange(len(boxes), device=match.device)).sum(0)
            is_free = (match[index] < 0) | (owned[match[index]] > 1)
            index = index[is_free & (iou[j, index] > 0)]
            if owned[j] == 0 and len(index):
                match[index[iou[j, index].argmax()]] = j
        return match

    matches = []
    for i, boxes in enumerate(gt_boxes):
        boxes = boxes[: len(boxes) if counts is None else int(counts[i])].to(anchors.dtype)
        is_crowd = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        if crowd is not None:
            is_crowd = crowd[i][: len(boxes)]
        objects = torch.where(~is_crowd)[0]
        in_crowd = (_sides(centers, boxes[is_crowd]).amin(-1) > 0).any(1)
        match = anchors.new_full((len(anchors),), -1, dtype=torch.int64)
        if len(objects) and len(anchors):
            match = of_image(boxes[objects], in_crowd)
            match = torch.where(match < 0, match, objects[match.clamp(min=0)])
        matches.append(match.masked_fill(in_crowd, -2))
    if not matches:
        return torch.empty((0, len(anchors)), dtype=torch.int64, device=anchors.device)
    return torch.stack(matches)


def _atss_iou(boxes: Tensor, anchors: Tensor) -> Tensor:  # [M, 4], [N, 4] -> [M, N]
    low = torch.maximum(boxes[:, None, :2], anchors[:, :2])
    high = torch.minimum(boxes[:, None, 2:], anchors[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    of_boxes, of_anchors = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (boxes, anchors))
    return both / (of_boxes[:, None] + of_anchors - both).clamp(min=1e-6)


def _sum_of_lanes(of_levels: list[Tensor]) -> Tensor:
    """The sum in the order of the kernels: the ranks of a level go to 32 lanes in turn, whose sums are added in halves."""
    lanes = of_levels[0].new_zeros(32)
    for level in of_levels:
        for ranks in level.split(32):
            lanes[: len(ranks)] += ranks
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, overlap: str = "iou") -> Tensor:
    idxs = torch.zeros_like(scores, dtype=torch.int64)
    return batched_nms(boxes, scores, idxs, iou_threshold, overlap=overlap)


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, overlap: str = "iou"
) -> Tensor:
    overlap_of: Any = {"iou": box_iou, "diou": distance_box_iou}[overlap]
    boxes = boxes.to(compute_dtype(boxes.dtype))
    scores = scores.to(compute_dtype(scores.dtype))
    order = torch.sort(scores, descending=True, stable=True).indices
    finite = ~(torch.isnan(boxes).any(dim=1) | torch.isnan(scores))
    order = order[finite[order]]
    keep = []
    while len(order):
        first, order = order[0], order[1:]
        keep.append(first)
        overlaps = overlap_of(boxes[first].unsqueeze(0), boxes[order])[0]
        is_suppressed = (overlaps.double() > iou_threshold) & (idxs[order] == idxs[first])
        order = order[~is_suppressed]
    return torch.stack(keep) if keep else torch.empty(0, dtype=torch.int64, device=boxes.device)


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    group = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    is_box = ~(boxes.isnan().any(dim=1) | scores.isnan())
    for kept in nms(boxes, scores, iou_threshold):  # the best score first
        overlaps = box_iou(boxes[kept].unsqueeze(0), boxes)[0].double() > iou_threshold
        group = torch.where((group == -1) & is_box & overlaps, kept, group)
        group[kept] = kept
    return group


def multiclass_nms(
    boxes: Tensor,  # [B, N, 4]
    scores: Tensor,  # [B, N]
    labels: Tensor | None,  # [B, N]
    iou_threshold: float,
    max_detections: int = 100,
    *,
    counts: Tensor | None = None,  # [B]
    overlap: str = "iou",
) -> tuple[Tensor, Tensor]:
    indices = boxes.new_full((len(boxes), max_detections), -1, dtype=torch.int64)
    num_kept = boxes.new_zeros(len(boxes), dtype=torch.int64)
    if labels is None:
        labels = torch.zeros_like(scores, dtype=torch.int64)
    for i in range(len(boxes)):
        n = boxes.shape[1] if counts is None else max(int(counts[i]), 0)
        keep = batched_nms(
            boxes[i, :n], scores[i, :n], labels[i, :n], iou_threshold, overlap=overlap
        )
        keep = keep[:max_detections]
        indices[i, : len(keep)] = keep
        num_kept[i] = len(keep)
    return indices, num_kept


def soft_nms(
    boxes: Tensor,  # [B, N, 4]
    scores: Tensor,  # [B, N]
    labels: Tensor | None = None,  # [B, N]
    iou_threshold: float = 0.3,
    max_detections: int = 100,
    *,
    method: str = "linear",
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(torch.promote_types(boxes.dtype, scores.dtype))
    boxes, scores = boxes.to(dtype), scores.to(dtype).clone()
    indices = boxes.new_full((len(boxes), max_detections), -1, dtype=torch.int64)
    kept_scores = boxes.new_zeros((len(boxes), max_detections))
    num_kept = boxes.new_zeros(len(boxes), dtype=torch.int64)
    for i in range(len(boxes)):
        left = scores[i].masked_fill(boxes[i].isnan().any(dim=1) | scores[i].isnan(), -math.inf)
        for count in range(max_detections if len(left) else 0):
            best = left.argmax()
            if not left[best] > score_threshold:
                break
            indices[i, count], kept_scores[i, count] = best, left[best]
            num_kept[i] += 1
            left[best] = -math.inf
            iou = box_iou(boxes[i, best].unsqueeze(0), boxes[i])[0].nan_to_num(0)
            if labels is not None:
                iou = torch.where(labels[i] == labels[i, best], iou, 0)
            if method == "gaussian":
                decay = torch.exp(-(iou * iou) / sigma)
            else:
                decay = torch.where(iou.double() > iou_threshold, 1 - iou, 1)
            left = torch.where(left == -math.inf, left, left * decay)
            left = left.masked_fill(left.isnan(), -math.inf)  # an infinite score, times 0
    return indices, kept_scores, num_kept


def matrix_nms(
    boxes: Tensor,  # [B, N, 4]
    scores: Tensor,  # [B, N]
    labels: Tensor | None = None,  # [B, N]
    max_detections: int = 100,
    *,
    method: str = "gaussian",
    sigma: float = 2.0,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(torch.promote_types(boxes.dtype, scores.dtype))
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    indices = boxes.new_full((len(boxes), max_detections), -1, dtype=torch.int64)
    kept_scores = boxes.new_zeros((len(boxes), max_detections))
    num_kept = boxes.new_zeros(len(boxes), dtype=torch.int64)
    for i in range(len(boxes)):
        valid = ~(boxes[i].isnan().any(dim=1) | scores[i].isnan())
        order = scores[i].sort(descending=True, stable=True).indices
        order = order[valid[order]]
        if not len(order):
            continue
        iou = box_iou(boxes[i, order], boxes[i, order]).nan_to_num(0).clamp(min=0).triu(1)
        if labels is not None:
            of_class = labels[i, order]
            iou = torch.where(of_class[:, None] == of_class, iou, 0)
        beneath = iou.amax(dim=0)[:, None]  # a row for each better box
        if method == "gaussian":
            left = torch.exp(sigma * (beneath * beneath - iou * iou))
        else:
            left = torch.where(beneath < 1, (1 - iou) / (1 - beneath), 1).clamp(min=0)
        decayed = torch.full_like(scores[i], math.nan)
        decayed[order] = scores[i, order] * left.amin(dim=0).clamp(max=1)
        best = decayed.nan_to_num(-math.inf, math.inf).sort(descending=True, stable=True).indices
        best = best[decayed[best] > score_threshold][:max_detections]
        indices[i, : len(best)], kept_scores[i, : len(best)] = best, decayed[best]
        num_kept[i] = len(best)
    return indices, kept_scores, num_kept


def detect(
    cls_logits: Sequence[Tensor],  # L of [B, A * K, H, W]
    box_deltas: Sequence[Tensor],  # L of [B, A * 4, H, W]
    anchors: Tensor,  # [N, 4], N = sum of H * W * A
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    image_sizes: Tensor | Sequence[Sequence[float]] | None = None,  # [B, 2], height and width
    class_agnostic: bool = False,
    overlap: str = "iou",
    weights: Sequence[float] = (1, 1, 1, 1),
    clip: float = math.log(1000 / 16),
    method: str = "hard",
    sigma: float = 0.5,
    topk: int | None = None,
    coding: str = "deltas",
    strides: Sequence[float]
    | None = None,  # L, of distances: box_deltas [B, 4 * bins, H, W], anchors [N, 2]
    bins: int = 1,
    score_factors: Sequence[Tensor] | None = None,  # L of [B, A, H, W]
    combine: str = "product",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, device = cls_logits[0].shape[0], cls_logits[0].device
    boxes = torch.zeros((batch, max_detections, 4), device=device)
    scores = torch.zeros((batch, max_detections), device=device)
    labels = torch.full((batch, max_detections), -1, dtype=torch.int64, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    num_anchors = 1 if coding == "distance" else box_deltas[0].shape[1] // 4
    num_classes = cls_logits[0].shape[1] // num_anchors
    level_strides = [1.0] * len(cls_logits) if strides is None else strides
    scores_levels = [
        torch.sigmoid(head_rows(level, num_classes).double()).float() for level in cls_logits
    ]
    if score_factors is not None:
        factors_levels = [
            torch.sigmoid(head_rows(level, 1).double()).float() for level in score_factors
        ]
        products = [s * f for s, f in zip(scores_levels, factors_levels, strict=True)]
        if combine == "sqrt":  # rounded once: equal products have equal roots
            products = [p.double().sqrt().float() for p in products]
        scores_levels = products
    deltas_levels = [head_rows(level, level.shape[1] // num_anchors) for level in box_deltas]
    anchors_levels = anchors.float().split([level.shape[1] for level in deltas_levels])
    for i in range(batch):
        size = None if image_sizes is None else [float(extent) for extent in image_sizes[i]]
        image_boxes, image_scores, image_labels = [], [], []
        for rows, deltas, level_anchors, stride in zip(
            scores_levels, deltas_levels, anchors_levels, level_strides, strict=True
        ):
            level_scores = rows[i].flatten()
            candidates = torch.where(level_scores > score_threshold)[0]
            best = level_scores[candidates].sort(descending=True, stable=True).indices
            candidates = candidates[best[:topk_per_level]]
            row = candidates // num_classes
            if coding == "deltas":
                boxes_of_rows = decode_boxes(
                    deltas[i][row].float(), level_anchors[row], weights, clip, size
                )
            else:
                distances = deltas[i][row].float().unflatten(-1, (4, bins))
                boxes_of_rows = _distance_boxes(distances, level_anchors[row], stride)
                if size is not None:
                    limit = boxes_of_rows.new_tensor([size[1], size[0]] * 2)
                    boxes_of_rows = _clip(boxes_of_rows, limit)
            image_boxes.append(boxes_of_rows)
            image_scores.append(level_scores[candidates])
            image_labels.append(candidates % num_classes)
        b, s, k = torch.cat(image_boxes), torch.cat(image_scores), torch.cat(image_labels)
        best = s.sort(descending=True, stable=True).indices[:topk]
        b, s, k = b[best], s[best], k[best]
        idxs = torch.zeros_like(k) if class_agnostic else k
        if method == "hard":
            keep = batched_nms(b, s, idxs, iou_threshold, overlap=overlap)[:max_detections]
            s = s[keep]
        else:
            kept, decayed, num_kept = soft_nms(
                b[None],
                s[None],
                idxs[None],
                iou_threshold,
                max_detections,
                method=method,
                sigma=sigma,
                score_threshold=score_threshold,
            )
            keep, s = kept[0, : num_kept[0]], decayed[0, : num_kept[0]]
        count = len(keep)
        boxes[i, :count], scores[i, :count], labels[i, :count] = b[keep], s, k[keep]
        counts[i] = count
    return boxes, scores, labels, counts


def head_rows(
    level: Tensor, columns: int
) -> Tensor:  # [B, A * columns, H, W] -> [B, H * W * A, ...]
    batch, channels, height, width = level.shape
    by_anchor = level.reshape(batch, channels // columns, columns, height, width)
    return by_anchor.permute(0, 3, 4, 1, 2).flatten(1, 3)
