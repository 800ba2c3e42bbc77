"""The two nodes in autograd's graph: a converted layer, and a batch normalisation that is computed with one.

With g the gradient of the normalisation's output, G the weight gradient for g, s = 1 / sqrt(variance + eps) and
scale = gamma s: dy = scale g, dbeta = sum g and, as the normalised output is linear in the weight W and the bias b,
dgamma = s (<W, G> - (mean - b) dbeta). So nothing has to be kept for the normalisation. The layer's own node is handed
scale g unread, and takes dW = scale G and db = scale dbeta, where G is formed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ChangedError
from lowrank.exact.slots import here
from lowrank.exact.sources import Origin
from lowrank.layers.lazy import Lazy, lazy_gradient, real, unread
from lowrank.layers.scaling import per_output, row_products, scaled_rows, scaled_smaller
from lowrank.methods.base import Method, Tensors
from lowrank.tensors.eager import Node, no_view, refuse_double_backward, saved
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry, Shape
from lowrank.tensors.gradient_start import begun_numbers, expected
from lowrank.tensors.memory_layout import dense_strides, laid_out, order_of, suggests_channels_last


@dataclass(frozen=True)
class Settings:
    """Of one call of a layer.

    Attributes:
        name: the layer's, for messages.
        geometry: the layer without its parameters.
        method: how the input is kept.
        dtype: to compute in; autocast may choose another than the weight's.
        single: whether input and output come without the batch dimension.
    """

    name: str
    geometry: Geometry
    method: Method
    dtype: torch.dtype
    single: bool = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Output of the stock layer; `x` has a batch dimension."""
        return self.geometry.forward(x, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def gradients(
        self, kept: Tensors, grad: Tensor, shape: Shape, weight_shape: Shape, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias, those that are wanted, from what was kept; only an empty batch keeps nothing."""
        form = grad, self.geometry, shape
        some = any(tensor is not None for tensor in kept)
        if weight and some and torch.compiler.is_compiling() and not self.method.keeps_input:
            from lowrank.layers import in_graph

            return in_graph.gradients(self.method, self.geometry, self.name, kept, grad, shape, weight_shape, bias)
        if weight and bias and some:
            return self.method.gradients(kept, *form)
        of_weight = None
        if weight:
            of_weight = self.method.weight_gradient(kept, *form) if some else grad.new_zeros(weight_shape)
        return of_weight, self.geometry.bias_gradient(grad) if bias else None


class Call:
    """One call of a convolution whose output nobody has read yet.

    Attributes:
        x, weight, bias: what it was called with, `x` (B, C, H, W).
        keep: the method and what it keeps of `x` for the weight gradient, made when it is asked for.
        ahead, cost: origin of `x`, where what is made of it may be computed again, and what that takes, see `origins`.
        note_reader: told of the module that reads the output as it is; None: nobody wants to know.
    """

    ahead: Origin | None = None
    cost = 0
    note_reader: Callable[[nn.Module], None] | None = None

    def __init__(
        self,
        settings: Settings,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Callable[[], tuple[Method, Tensors]],
    ) -> None:
        self.settings, self.x, self.weight, self.bias, self.keep = settings, x, weight, bias, keep
        self._versions, self._place = self._now(), here()

    def _now(self) -> list[int]:
        tensors = (self.x, self.weight, self.bias)
        return [-1 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]

    def is_from_here(self) -> bool:
        """Whether no checkpoint began or ended since: its input is read ahead of it when it is run again."""
        return self._place == here()

    def output(self) -> Tensor:
        """The convolution's own output."""
        self.require_unchanged()
        return self.settings.forward(self.x, self.weight, self.bias)

    def require_unchanged(self) -> None:
        """Raise where the output can no longer be computed as it was at the call."""
        if self._now() != self._versions:
            raise ChangedError(
                f"layer {self.settings.name!r}: its input or a parameter was changed in place before its output was "
                f"used; use the output first, or convert with fuse=False"
            )


def lazy_output(call: Call, watched: bool) -> Lazy:
    """A convolution's output, to be computed when it is read."""
    x, weight, settings = call.x, call.weight, call.settings
    last = suggests_channels_last(x) or suggests_channels_last(weight)
    last = last and not (x.is_cuda and settings.dtype == torch.float64)  # which cuDNN lays out in order
    shape, strides = _planned(settings.geometry, x.shape, weight.shape[0], last)
    return Lazy(shape, x, settings.dtype, strides, call.output, call, watched)


@lru_cache(maxsize=1024)
def _planned(geometry: Geometry, shape: Shape, out_channels: int, channels_last: bool) -> tuple[Shape, Shape]:
    """Shape and strides of an output."""
    shape = geometry.output_shape(tuple(shape), out_channels)
    return shape, dense_strides(shape, channels_last)


@dataclass
class ScaledGradient:
    """A gradient `grad * scale`, with one scale per output channel, and what was made of `grad` on the way.

    Attributes:
        grad: (B, O, H', W').
        scale: (O,).
        bias_gradient: (O,), the sum of `grad`; None: not made.
        weight_gradient: of the layer for `grad * scale`, (O, C/g, K_h, K_w); None: not made.
        settings: of the call of the layer that it is for; a hook may hand it to another one.
    """

    grad: Tensor
    scale: Tensor
    bias_gradient: Tensor | None
    weight_gradient: Tensor | None
    settings: Settings

    def product(self) -> Tensor:
        """The gradient itself."""
        return self.grad * per_output(self.scale.to(self.grad.dtype), 4)


class LowRankFunction(Node):
    """The layer's own forward pass; gradients from what was kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: Settings,
        call: Call | None,
        watched: bool,
        *kept: Tensor | None,
    ) -> Tensor:
        """Output of the layer.

        Args:
            x: (B, C, H, W) or (B, ..., I), or either without B.
            weight, bias: of the layer.
            settings: of the call.
            call: for a lazy output; None: it is computed at once.
            watched: whether functions called with a lazy output keep less.
            kept: what the method keeps of `x`; none: the weight wants no gradient.
        """
        ctx.settings, ctx.shape, ctx.weight_shape = settings, tuple(x.shape), tuple(weight.shape)
        ctx.anchor = weight
        ctx.order = None if torch.compiler.is_compiling() else order_of(x, type(settings.geometry) is LinearGeometry)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        if not torch.compiler.is_compiling() and not here():  # what hooks hold is theirs to ask for once
            ctx.factor_of = _factor_of_layer
        if call is not None:
            return lazy_output(call, watched)
        y = settings.forward(x.unsqueeze(0) if settings.single else x, weight, bias)
        y = y.squeeze(0) if settings.single else y
        return no_view(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        settings: Settings = ctx.settings
        weight, *kept = saved(ctx, f"layer {settings.name!r}")
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()
        scaled = None if again else unread(grad, ScaledGradient)
        scaled = None if scaled is None or scaled.settings is not settings else scaled
        grad, scale = (real(grad), None) if scaled is None else (scaled.grad, scaled.scale)
        shape = ctx.shape
        if settings.single:
            grad, shape = grad.unsqueeze(0), (1, *shape)
        grad_x = grad_weight = grad_bias = None

        def of_input() -> Tensor:
            grad_x = settings.method.input_gradient(*scaled_smaller(grad, weight, scale), settings.geometry, shape)
            grad_x = grad_x.squeeze(0) if settings.single else grad_x
            grad_x = grad_x if ctx.order is None else ctx.order(grad_x)
            # a view's base has its memory as well
            return grad_x if again or torch.compiler.is_compiling() else no_view(grad_x)

        # Of a product that waits and the weight gradient that it becomes, the smaller one is there beside that of x.
        later = wants_x and begun_numbers(grad) > prod(ctx.weight_shape)
        if wants_x and not later:
            grad_x = of_input()
        with torch.no_grad(), expected(ctx, grad):
            made = (None, None) if scaled is None else (scaled.weight_gradient, scaled.bias_gradient)
            missing = wants_weight and made[0] is None, wants_bias and made[1] is None
            found = settings.gradients(tuple(kept), grad, shape, ctx.weight_shape, *missing)
            if wants_weight:
                grad_weight = found[0] if made[0] is None else made[0]
                grad_weight = grad_weight if scale is None or found[0] is None else scaled_rows(found[0], scale)
            if wants_bias:
                grad_bias = found[1] if made[1] is None else made[1]
                grad_bias = grad_bias if scale is None or grad_bias is None else grad_bias * scale
        if later:
            grad_x = of_input()
        if again:
            refuse = lambda found: refuse_double_backward(f"layer {settings.name!r}", found, grad, ctx.anchor)  # noqa: E731
            grad_weight, grad_bias = refuse(grad_weight), refuse(grad_bias)
        return grad_x, grad_weight, grad_bias, *[None] * (3 + len(kept))


class MergedNormFunction(Node):
    """A convolution and the batch normalisation behind it in one pass, from the convolution's unread output."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        call: Call,
        settings: Settings,
        *kept: Tensor | None,
    ) -> Tensor:
        """The normalised output (B, O, H', W').

        Args:
            y: the convolution's output, which is not read.
            gamma, beta: (O,), weight and bias of the normalisation, if it has any.
            mean, variance: (O,), its running statistics.
            eps: added to the variance.
            call: that `y` would be computed from.
            settings: of the call, with the method that keeps the convolution's input.
            kept: what that method keeps of the convolution's input, for the gradient of `gamma`.
        """
        ctx.settings, ctx.own, ctx.eps, ctx.anchor = settings, call.settings, eps, call.weight
        ctx.shape, ctx.weight_shape = tuple(call.x.shape), tuple(call.weight.shape)
        wants_gamma, ctx.wants_weight = ctx.needs_input_grad[1], call.weight.requires_grad
        own = (call.weight.detach(), _detached(call.bias)) if wants_gamma else (None, None)
        ctx.save_for_backward(gamma, mean, variance, *own, *kept)
        ctx.hands_on = not wants_gamma  # its gradient, unread, to the layer
        if wants_gamma and not torch.compiler.is_compiling() and not here():
            ctx.factor_of = _factor_of_norm
        return merged_output(y, call, *scale_and_shift(call.bias, gamma, beta, mean, variance, eps))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        settings: Settings = ctx.settings
        gamma, mean, variance, weight, bias, *kept = saved(ctx, f"the normalisation behind layer {settings.name!r}")
        wants_y, wants_gamma, wants_beta = ctx.needs_input_grad[:3]
        grad = real(grad)
        again = torch.is_grad_enabled()
        deviation = _deviation(variance, ctx.eps)
        scale = deviation if gamma is None else gamma * deviation
        grad_y = grad_gamma = None
        with torch.no_grad(), expected(ctx, grad):
            sums = wants_gamma or wants_beta
            found = settings.gradients(tuple(kept), grad, ctx.shape, ctx.weight_shape, wants_gamma, sums)
            grad_weight, grad_beta = found
            if grad_weight is not None:
                centre = mean if bias is None else mean - bias
                products, grad_weight = row_products(weight, grad_weight, scale if ctx.wants_weight else None)
                grad_gamma = deviation * (products - centre * grad_beta)
        if again:
            refuse = lambda found: refuse_double_backward(  # noqa: E731
                f"the normalisation behind layer {settings.name!r}", found, grad, ctx.anchor
            )
            grad_y = grad * per_output(scale.to(grad.dtype), 4) if wants_y else None
            grad_gamma, grad_beta = refuse(grad_gamma), refuse(grad_beta)
        elif wants_y:
            scaled = ScaledGradient(grad, scale, grad_beta, grad_weight, ctx.own)
            strides = dense_strides(tuple(grad.shape), suggests_channels_last(grad))
            grad_y = lazy_gradient(grad, strides, scaled.product, scaled)
        return grad_y, grad_gamma, grad_beta if wants_beta else None, *[None] * (5 + len(kept))


def _factor_of_layer(node: Any, grad: Tensor) -> Tensor | None:
    """`Method.first_factor` of a layer whose node is to be given the gradient, if it has one."""
    wants_weight, wants_bias = node.needs_input_grad[1:3]
    return _first_factor(node, 1, grad, wants_bias) if wants_weight and not node.settings.single else None


def _factor_of_norm(node: Any, grad: Tensor) -> Tensor | None:
    """The same of a normalisation."""
    return _first_factor(node, 5, grad, True)


def _first_factor(node: Any, kept_from: int, grad: Tensor, with_bias: bool) -> Tensor | None:
    try:
        kept = node.saved_tensors[kept_from:]
    except RuntimeError:  # freed, or changed in place, which the node itself is to say
        return None
    if not kept or kept[0] is None:
        return None
    found: Tensor | None = node.settings.method.first_factor(kept, grad, node.settings.geometry, with_bias)
    return found


def scale_and_shift(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What a normalisation by running statistics makes of W x + b, as `scale` W x + `shift`, each (O,)."""
    deviation = _deviation(variance, eps)
    scale = deviation if gamma is None else gamma * deviation
    if bias is not None:
        mean = mean - bias
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def _deviation(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps), (O,)."""
    if variance.device.type == "cpu" and variance.dtype == torch.float32:
        return torch.rsqrt(variance + _number(eps))  # a number beside a tensor takes as long as six small operators
    return torch.rsqrt(variance + eps)


@lru_cache(maxsize=64)
def _number(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=torch.float32, device="cpu")


def merged_output(y: Tensor, call: Call, scale: Tensor, shift: Tensor) -> Tensor:
    """What a normalisation makes of a convolution's output `y`, in one pass, in the memory layout that it gives."""
    call.require_unchanged()
    form = (call.settings.geometry, call.settings.dtype, normalised_strides(y))
    return _merged(*form, call.x, call.weight, scale, shift)


def again_merged(y: Tensor, call: Call, eps: float) -> Callable[..., Tensor]:
    """The same as a function of the convolution's input, weight and bias, and gamma, beta, mean and variance."""
    form = (call.settings.geometry, call.settings.dtype, normalised_strides(y))

    def merged(x: Tensor, weight: Tensor, bias: Any, gamma: Any, beta: Any, mean: Tensor, variance: Tensor) -> Tensor:
        return _merged(*form, x, weight, *scale_and_shift(bias, gamma, beta, mean, variance, eps))

    return merged


def _merged(
    geometry: Geometry,
    dtype: torch.dtype,
    strides: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    shape = geometry.output_shape(tuple(x.shape), weight.shape[0])
    if prod(shape) < weight.numel():
        z = geometry.forward(x, weight.to(dtype), None)  # scaling the output takes less than scaling the weight
        z = torch.addcmul(per_output(shift.to(z.dtype), 4), z, per_output(scale.to(z.dtype), 4))
    else:
        assert isinstance(geometry, ConvGeometry)
        z = geometry.affine(x, (weight * per_output(scale, 4, 0)).to(dtype), shift.to(dtype))
    return laid_out(z, strides)


def normalised_strides(y: Tensor) -> tuple[int, ...]:
    """Strides of what PyTorch's batch normalisation makes of `y`."""
    return dense_strides(tuple(y.shape)) if y.is_contiguous() else y.stride()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
