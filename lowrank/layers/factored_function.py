"""The node in autograd's graph of a linear layer whose weight is two factors; nothing of the weight's size is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.tensors.eager import Node, no_view, refuse_double_backward, saved, without_autocast
from lowrank.tensors.geometry import LinearGeometry
from lowrank.tensors.gradients import factor_gradients
from lowrank.tensors.memory_layout import order_of
from lowrank.tensors.storage import restore
from lowrank.tensors.tucker import Tucker


@dataclass(frozen=True)
class FactoredSettings:
    """Of one call of a layer.

    Attributes:
        name: the layer's, for messages.
        dtype: to compute in; autocast may choose another than the factors'.
        keeps_input: whether what is kept is the input itself, and not a Tucker form of it.
        rebuild: computes the input again from what is kept; None: it is kept itself.
    """

    name: str
    dtype: torch.dtype
    keeps_input: bool
    rebuild: Callable[..., Tensor] | None = None

    def kept_input(self, kept: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tucker:
        """The input as it was kept, (B, ..., I)."""
        if not self.keeps_input:
            return restore(kept, dtype)
        x = kept[0] if self.rebuild is None else self.rebuild(*kept)
        assert x is not None
        return Tucker(x, (None,) * x.ndim).to(dtype)


class FactoredFunction(Node):
    """`y = (x R^T) L^T + bias`.

    Gradients: dX = (dY L) R and, with x~ for what was kept of the input, dL = dY^T (x~ R^T) and dR = (dY L)^T x~.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        settings: FactoredSettings,
        *kept: Tensor | None,
    ) -> Tensor:
        """Output of the layer.

        Args:
            x: (B, ..., I), or (I,).
            left, right: L (O, K) and R (K, I).
            bias: (O,), or None.
            settings: of the call.
            kept: of `x`, with a batch dimension in any case; none: the factors want no gradient, or the batch is empty.
        """
        ctx.settings, ctx.count = settings, len(ctx.needs_input_grad)
        ctx.save_for_backward(left, right, *kept)
        ctx.order = None if torch.compiler.is_compiling() else order_of(x, linear=True)
        dtype = settings.dtype
        return no_view(forward_factored(x, left.to(dtype), right.to(dtype), None if bias is None else bias.to(dtype)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        settings: FactoredSettings = ctx.settings
        name = f"layer {settings.name!r}"
        left, right, *kept = saved(ctx, name)
        wants_x, wants_left, wants_right, wants_bias = ctx.needs_input_grad[:4]
        factors = (left.to(grad.dtype), right.to(grad.dtype))
        through = grad @ factors[0] if wants_x else None
        grad_x = None if through is None else through @ factors[1]
        grad_x = grad_x if grad_x is None or ctx.order is None else ctx.order(grad_x)
        grad_left = grad_right = None
        if wants_left or wants_right:
            grad_left, grad_right = _factor_gradients(settings, tuple(kept), grad, *factors, through)
        if torch.is_grad_enabled():
            # Each depends on its own factor in its graph at least, so whoever differentiates it does meet the error.
            grad_left = refuse_double_backward(name, grad_left, left) if wants_left else None
            grad_right = refuse_double_backward(name, grad_right, right) if wants_right else None
        grad_bias = LinearGeometry().bias_gradient(grad) if wants_bias else None
        return grad_x, grad_left, grad_right, grad_bias, *[None] * (ctx.count - 4)


def _factor_gradients(
    settings: FactoredSettings,
    kept: tuple[Tensor | None, ...],
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    through: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not any(tensor is not None for tensor in kept):  # an empty batch
        return torch.zeros_like(left), torch.zeros_like(right)
    if grad.ndim == 1:
        grad, through = grad.unsqueeze(0), None if through is None else through.unsqueeze(0)
    if torch.compiler.is_compiling():
        of_left, of_right = _in_graph(list(kept), grad, left, right, through, settings.keeps_input)
        return of_left, of_right
    with torch.no_grad():
        x = settings.kept_input(kept, grad.dtype)
    return factor_gradients(x, grad, left, right, through)


@torch.library.custom_op("lowrank::factor_gradients", mutates_args=())
def _in_graph(
    kept: Sequence[Tensor | None], grad: Tensor, left: Tensor, right: Tensor, through: Tensor | None, keeps_input: bool
) -> list[Tensor]:
    """As one operator of a compiled graph, see `in_graph`."""
    with torch.no_grad(), without_autocast(grad.device.type):
        x = FactoredSettings("", grad.dtype, keeps_input).kept_input(tuple(kept), grad.dtype)
        return [one.contiguous() for one in factor_gradients(x, grad, left, right, through)]


@_in_graph.register_fake
def _(
    kept: Sequence[Tensor | None], grad: Tensor, left: Tensor, right: Tensor, through: Tensor | None, keeps_input: bool
) -> list[Tensor]:
    return [left.new_empty(left.shape), right.new_empty(right.shape)]


def forward_factored(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Output (B, ..., O) of a linear layer with the weight L R, for an input (B, ..., I); differentiable."""
    return nn.functional.linear(nn.functional.linear(x, right), left, bias)
