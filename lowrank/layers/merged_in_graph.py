"""A convolution and the normalisation by running statistics behind it, in a graph that is compiled.

What eager training finds out by outputs that are computed when they are read, a compiler sees while it records: of an
output is noted what a normalisation needs to keep nothing of it, and in the graph so far is written whether anything
else was done with it. What nobody reads the compiler leaves out. See `autograd_function` for the mathematics.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers import graph_notes
from lowrank.layers.autograd_function import Settings
from lowrank.layers.scaling import per_output, scaled_smaller
from lowrank.methods.base import Tensors
from lowrank.tensors.eager import without_autocast


def offer(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, kept: Tensors) -> None:
    """Offer an output to the normalisation that may read it.

    Args:
        y: (B, O, H', W').
        x: input of the layer.
        weight, bias: of the layer.
        settings: of the call.
        kept: what the method has kept of `x`; none: the method keeps `x` itself.
    """
    graph_notes.offer(y, (x, weight, bias, settings, kept), (x, weight, bias))


def normalised(module: nn.BatchNorm2d, y: Tensor) -> Tensor | None:
    """What a normalisation makes of a convolution's output, keeping nothing of it; None: it has to keep it, or keeps
    nothing as it is."""
    gamma, beta, mean, variance = module.weight, module.bias, module.running_mean, module.running_var
    if module.training or gamma is None or not gamma.requires_grad or mean is None or variance is None:
        return None
    found = graph_notes.offered(y, (gamma, beta, mean, variance))
    if found is None:
        return None
    x, weight, bias, settings, kept = found
    kept = kept or (x.detach(),)
    own = gamma, beta, mean, variance, module.eps
    with without_autocast(x.device.type):
        z: Tensor = _NormFunction.apply(x, weight, bias, *own, settings, *kept)
    # Whose gradient does not pass through the convolution's output.
    stock = F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, module.eps)
    graph_notes.settle_at_the_end(y, z, stock)
    return z


class _NormFunction(torch.autograd.Function):
    """The convolution and the stock normalisation; its scale's gradient from that of the convolution's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        settings: Settings,
        *kept: Tensor | None,
    ) -> Tensor:
        """The normalised output (B, O, H', W').

        Args:
            x: the convolution's input (B, C, H, W).
            weight, bias: of the convolution.
            gamma, beta, mean, variance, eps: of the normalisation, (O,).
            settings: of the convolution's call.
            kept: what the method has kept of `x`.
        """
        ctx.eps, ctx.settings, ctx.shape = eps, settings, tuple(x.shape)
        ctx.save_for_backward(weight, bias, gamma, mean, variance, *kept)
        y = settings.forward(x, weight, bias)
        return F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, bias, gamma, mean, variance, *kept = ctx.saved_tensors
        deviation = torch.rsqrt(variance + ctx.eps)
        scale = gamma * deviation
        settings, wants = ctx.settings, ctx.needs_input_grad
        of_weight, of_beta = settings.gradients(
            tuple(kept), grad, ctx.shape, tuple(weight.shape), weight=True, bias=True
        )
        products = (weight * of_weight.to(weight.dtype)).flatten(1).sum(1)
        of_gamma = deviation * (products - (mean if bias is None else mean - bias) * of_beta)
        of_input = None
        if wants[0]:
            smaller = scaled_smaller(grad, weight, scale)
            of_input = settings.method.input_gradient(*smaller, settings.geometry, ctx.shape)
        return (
            of_input,
            of_weight * per_output(scale, 4, 0),
            of_beta * scale if wants[2] else None,
            of_gamma,
            of_beta if wants[4] else None,
            *[None] * (4 + len(kept)),
        )
