"""What the backward passes of the ops share: how an op gets one, formulas that can be differentiated again, and the gradient that
a forward saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from focalops._ops import call, ops

# ---- an op and its backward ---------------------------------------------------------------------

_library = torch.library.Library("focalops", "FRAGMENT")


def register_gradients(
    name: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[[Any, Tensor], Sequence[Tensor | None]],
    num_inputs: int = 1,
) -> None:
    """The gradients of an op's first output by its first inputs, of which each may be a list. Its other outputs have none.

    `setup(ctx, inputs, output)` keeps what `backward(ctx, grad_output)` needs, which returns one gradient for each tensor.
    torch.library.register_autograd does the same for an op of any form, and takes three times as long for one with lists: it takes
    all arguments and results apart by pytree, more work than the loss of a small head.
    """
    op = getattr(ops, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]
    ends_with_list = str(op._schema.returns[-1].type) == "List[Tensor]"
    num_tensors = len(op._schema.returns) - ends_with_list  # of the results, before a list of them

    def below_autograd(keyset: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *_, keyset, arguments = inputs
        output = below_autograd(keyset, arguments)
        # The dispatcher leaves out what equals a default.
        setup(ctx, (*arguments, *defaults[len(arguments) :]), output)
        ctx.set_materialize_grads(False)
        if isinstance(output, Tensor):
            return output
        flat = (*output[:num_tensors], *(output[-1] if ends_with_list else ()))
        ctx.mark_non_differentiable(*flat[1:])
        return flat

    def gradients(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return *backward(ctx, grad_output), None, None

    node = type(
        name.title().replace("_", ""),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradients)},
    )

    def with_gradients(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        inputs = arguments[:num_inputs]
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(keyset, arguments)
        tensors = [t for x in inputs for t in (x if isinstance(x, (list, tuple)) else [x])]
        output = node.apply(*tensors, keyset, arguments)  # type: ignore[attr-defined]
        if ends_with_list:
            return *output[:num_tensors], list(output[num_tensors:])
        return output

    _library.impl(name, with_gradients, "Autograd", with_keyset=True)


# ---- formulas -----------------------------------------------------------------------------------


def differentiable(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of a formula by its inputs, which autograd can differentiate again."""
    with torch.enable_grad():
        own = [_as_own_input(x) for x in inputs]
        return torch.autograd.grad(formula(*own), own, grad_output, create_graph=True)


def _as_own_input(tensor: Tensor) -> Tensor:
    """The tensor as an input that no other one is computed from, to differentiate a formula by it.

    The gradient by an input must leave out what leads from it to another input, which autograd follows by itself.
    """
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


# ---- functions of two tensors -------------------------------------------------------------------


def setup_pair(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps two tensors and the settings behind them."""
    first, second, *ctx.settings = inputs
    ctx.save_for_backward(first, second)


def pair_gradients(
    ctx: Any, first: Tensor | None, second: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What a backward returns after setup_pair."""
    needs_first, needs_second = ctx.needs_input_grad[:2]
    return first if needs_first else None, second if needs_second else None


def differentiable_pair(
    formula: Callable[..., Tensor], ctx: Any, grad_output: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The same, through formulas that autograd can differentiate again."""

    def of_tensors(first: Tensor, second: Tensor) -> Tensor:
        return formula(first, second, *ctx.settings)

    return pair_gradients(ctx, *differentiable(of_tensors, ctx.saved_tensors, grad_output))


# ---- the gradient that a forward saved ----------------------------------------------------------


def empty_gradient(tensor: Tensor) -> Tensor:
    """Where the forward writes the gradient of a tensor, for the fake kernels."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_gradients(levels: Sequence[Tensor]) -> list[Tensor]:
    """The same of a head's levels, each in its own layout."""
    return [
        torch.empty_like(level)
        if level.is_contiguous(memory_format=torch.channels_last)
        else empty_gradient(level)
        for level in levels
    ]


def divisor_of(normalizer: Tensor | None, min_normalizer: float) -> Tensor | float:
    return min_normalizer if normalizer is None else normalizer.clamp(min=min_normalizer)


def scaled(
    saved: Sequence[Tensor], grad_loss: Tensor, normalizer: Tensor | None, min_normalizer: float
) -> list[Tensor]:
    """The gradients that the forward of a sum saved, times that of the loss: in place where that is allowed."""
    if saved[0].dtype == torch.float16:  # the forward left the division to the backward
        grad_loss = grad_loss / divisor_of(normalizer, min_normalizer)
    return [_scaled(grad, grad_loss) for grad in saved]


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a number or one for each image."""
    if _may_overwrite(saved, factor):
        call(ops._scale_, saved, factor)
        return saved
    if factor.dim() == 0:
        return saved * factor
    return (saved * factor.view(-1, *[1] * (saved.dim() - 1))).to(saved.dtype)


def scaled_rows(
    saved: Sequence[Tensor],
    grad_losses: Tensor,
    normalizer: Tensor | None = None,
    min_normalizer: float = 1,
) -> list[Tensor]:
    """The same of losses an anchor: of a head's levels, and of gradients (B, N)."""
    if grad_losses.numel() > 0 and not any(grad_losses.stride()):  # of a sum: one number
        number = grad_losses[0, 0]
        if normalizer is None or normalizer.dim() == 0 or saved[0].dtype != torch.float16:
            return scaled(saved, number, normalizer, min_normalizer)
    if saved[0].dtype == torch.float16:
        divisor = divisor_of(normalizer, min_normalizer)
        if isinstance(divisor, Tensor) and divisor.dim() == 1:
            divisor = divisor.unsqueeze(1)
        grad_losses = grad_losses / divisor
    positions = sum(level.shape[2] * level.shape[3] for level in saved)
    anchors = grad_losses.shape[1] // max(positions, 1)
    result, first_row = [], 0
    for level in saved:
        result.append(_scaled_rows(level, grad_losses, anchors, first_row))
        first_row += anchors * level.shape[2] * level.shape[3]
    return result


def _scaled_rows(saved: Tensor, grad_losses: Tensor, anchors: int, first_row: int) -> Tensor:
    if saved.numel() == 0:
        return saved
    if _may_overwrite(saved, grad_losses):
        call(ops._scale_rows_, saved, grad_losses, anchors, first_row)
        return saved
    images, channels, height, width = saved.shape
    factors = grad_losses[:, first_row : first_row + anchors * height * width]
    factors = factors.reshape(images, height, width, anchors).permute(0, 3, 1, 2).unsqueeze(2)
    by_anchor = saved.view(images, anchors, channels // anchors, height, width)
    return (by_anchor * factors).to(saved.dtype).view(saved.shape)


def _may_overwrite(saved: Tensor, factor: Tensor) -> bool:
    """Whether this backward may scale what its forward saved: not if it can run again, nor under a tracer or vmap."""
    if torch.compiler.is_compiling() or type(saved) is not Tensor:
        return False
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(factor) or functorch.is_legacy_batchedtensor(factor):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


@torch.library.register_fake("focalops::_scale_")
def _(tensor: Tensor, scale: Tensor) -> None:
    pass


@torch.library.register_fake("focalops::_scale_rows_")
def _(tensor: Tensor, scale: Tensor, anchors: int, first_row: int) -> None:
    pass


# ---- the gradient over the logits ---------------------------------------------------------------


def loss_over_its_logits(
    loss: Callable[..., Tensor], logits: dict[str, Tensor], divisor: tuple[Tensor | None, float]
) -> Tensor:
    """A summed loss of logits, given by their names, that writes their gradient over them."""
    for name, tensor in logits.items():
        _check_may_hold_gradient(name, tensor)
    return _OverItsLogits.apply(loss, *divisor, *logits.values())


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


class _OverItsLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[..., Tensor],
        normalizer: Tensor | None,
        min_normalizer: float,
        *logits: Tensor,
    ) -> Tensor:
        value = loss(*logits)
        torch.autograd.graph.increment_version(logits)
        ctx.min_normalizer = min_normalizer
        ctx.save_for_backward(normalizer, *logits)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError(
                "inplace_backward has one gradient for one backward: it works with neither "
                "retain_graph nor create_graph"
            )
        normalizer, *logits = ctx.saved_tensors
        nothing = (None, None, None)
        if grad_loss is None:
            return *nothing, *(None for _ in logits)
        torch.autograd.graph.increment_version(logits)
        saved = [tensor.detach() for tensor in logits]
        return *nothing, *scaled(saved, grad_loss, normalizer, ctx.min_normalizer)
