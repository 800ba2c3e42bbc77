"""The one node in autograd's graph that every converted layer is: with the normalisation behind it, if it has one."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank.methods.base import Method
from lowrank.tensors.geometry import Geometry, Shape


def per_output(vector: Tensor, ndim: int, axis: int = 1) -> Tensor:
    """A vector with one entry per output channel, shaped to multiply a tensor that has these along `axis`."""
    return vector.view([-1 if dim == axis else 1 for dim in range(ndim)])


class LowRankFunction(torch.autograd.Function):
    """The layer's own forward pass, with the normalisation behind it if there is one; gradients from what was kept.

    With g the gradient of the output, G the weight gradient for g, s = 1 / sqrt(variance + eps) and scale = gamma s:
    dW = scale G, dbeta = sum g, dbias = scale dbeta and, as the normalised output is linear in W and the bias,
    dgamma = s (<W, G> - (mean - bias) dbeta). So nothing has to be kept for the normalisation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        geometry: Geometry,
        method: Method,
        *kept: Tensor | None,
    ) -> Tensor:
        ctx.geometry, ctx.method, ctx.eps = geometry, method, eps
        ctx.shape, ctx.weight_shape = tuple(x.shape), tuple(weight.shape)
        wants_weight_itself = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        own = (weight if wants_weight_itself else None, None if mean is None else bias)
        ctx.save_for_backward(*own, gamma, mean, variance, *kept)
        if mean is None or variance is None:
            return geometry.forward(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        scale, shift = scale_and_shift(bias, gamma, beta, mean, variance, eps)
        if scales_output(weight, geometry, ctx.shape):
            return forward_scaled(x, weight.to(dtype), scale, shift, geometry)
        return geometry.forward(x, (weight * per_output(scale, 4, 0)).to(dtype), shift.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, bias, gamma, mean, variance, *kept = ctx.saved_tensors
        geometry, method, shape = ctx.geometry, ctx.method, ctx.shape
        wants_x, wants_weight, wants_bias, wants_gamma, wants_beta = ctx.needs_input_grad[:5]
        deviation = None if variance is None else torch.rsqrt(variance + ctx.eps)
        scale = deviation if deviation is None or gamma is None else gamma * deviation
        grad_x = grad_weight = grad_bias = grad_gamma = grad_beta = None
        if wants_x:
            grad_x = method.input_gradient(*_scaled_smaller(grad, weight, scale), geometry, shape)
        if wants_weight or wants_gamma:
            # Only an empty batch keeps nothing.
            kept_something = any(tensor is not None for tensor in kept)
            grad_weight = (
                method.weight_gradient(tuple(kept), grad, geometry, shape)
                if kept_something
                else grad.new_zeros(ctx.weight_shape)
            )
        if wants_bias or wants_beta or wants_gamma:
            grad_bias = grad_beta = geometry.bias_gradient(grad)
        if scale is not None and deviation is not None:
            if wants_gamma and grad_weight is not None:
                centre = mean if bias is None else mean - bias
                grad_gamma = deviation * (_row_products(weight, grad_weight) - centre * grad_beta)
            grad_weight = _scaled_rows(grad_weight, scale) if wants_weight and grad_weight is not None else None
            grad_bias = grad_bias * scale if wants_bias else None  # type: ignore[operator]
        gradients = (grad_x, grad_weight, grad_bias if wants_bias else None, grad_gamma)
        return (*gradients, grad_beta if wants_beta else None, *[None] * (6 + len(kept)))


def _scaled_smaller(grad: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output gradient and weight, the smaller of them scaled, in the gradient's dtype."""
    if scale is None:
        return grad, weight.to(grad.dtype)
    if grad.numel() < weight.numel():
        return grad * per_output(scale.to(grad.dtype), 4), weight.to(grad.dtype)
    return grad, (weight * per_output(scale, 4, 0)).to(grad.dtype)


def _scaled_rows(grad_weight: Tensor, scale: Tensor) -> Tensor:
    """The weight gradient times the scale, in place, unless its precision is less than the scale's."""
    rows = per_output(scale, 4, 0)
    return grad_weight.mul_(rows) if grad_weight.dtype == scale.dtype else grad_weight * rows


def _row_products(weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Per output channel the inner product of weight and gradient, (O,); without a copy where both are contiguous."""
    rows, columns = weight.flatten(1)[:, None], grad_weight.to(weight.dtype).flatten(1)[:, :, None]
    return torch.bmm(rows, columns).view(-1)


def scale_and_shift(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What the normalisation makes of a convolution's output without its bias: `scale * y + shift`, each (O,).

    Args:
        bias: (O,), of the convolution.
        gamma, beta: (O,), of the normalisation, if it has any.
        mean, variance: (O,), stored.
        eps: added to the variance.
    """
    deviation = torch.rsqrt(variance + eps)
    scale = deviation if gamma is None else gamma * deviation
    shift = (-mean if bias is None else bias - mean) * scale
    return scale, shift if beta is None else shift + beta


def scales_output(weight: Tensor, geometry: Geometry, shape: Shape) -> bool:
    """Whether the output for an input of shape `shape` is smaller than the weight, so that scaling it takes less."""
    return len(shape) == 4 and prod(geometry.output_shape(shape, weight.shape[0])) < weight.numel()


def forward_scaled(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry) -> Tensor:
    """Output of convolution and normalisation, without a copy of the weight."""
    y = geometry.forward(x, weight, None)
    return y.mul_(per_output(scale.to(y.dtype), 4)).add_(per_output(shift.to(y.dtype), 4))
