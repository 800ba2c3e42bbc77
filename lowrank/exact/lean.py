"""Activations, pooling and dropout that keep bits or shapes where PyTorch keeps whole tensors; exact.

Each function has the arguments, the values and the gradients of the one in `torch.nn.functional` that it is named
after, and each module is the stock module with another class. What they keep for the backward pass:

| layer | kept |
|---|---|
| ReLU, ReLU6, Hardtanh, Hardsigmoid, LeakyReLU | one bit per element |
| Dropout | one bit per element |
| MaxPool2d | one byte per output element: the place in its window |
| AvgPool2d, AdaptiveAvgPool2d | the shape |

The derivatives of smooth activations take many values. GELU and SiLU compute their input again, see `recompute`;
Hardswish and the like keep it as they do in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.exact.bits import Rule, masked, pack
from lowrank.exact.onednn import is_activated
from lowrank.exact.recompute import RECOMPUTING_FUNCTIONS, RECOMPUTING_MODULES

Size = int | tuple[int, ...] | list[int]
SIXTH = torch.tensor(1 / 6).item()  # PyTorch's slope of Hardsigmoid, a single-precision number in every dtype


def _as_stock(backward: Callable[..., Tensor], *settings: float | bool) -> Rule:
    """A backward operator of PyTorch: so what becomes of infinities and NaN is what becomes of them there."""
    return lambda grad, x, out: backward(grad, x, *settings, grad_input=out)


_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.grad_input
_ABOVE_ZERO = _as_stock(torch.ops.aten.threshold_backward.grad_input, 0)


@dataclass(frozen=True)
class Curve:
    """A function with two slopes, such as ReLU: which of them an element has is one bit.

    Attributes:
        function: of a tensor, and whether to work in place.
        gate: which elements have the inner slope, see `pack`.
        slope: the gradient by that, see `masked`.
    """

    function: Callable[[Tensor, bool], Tensor]
    gate: Rule
    slope: Rule = _ABOVE_ZERO


class _TwoSlopes(torch.autograd.Function):
    """A curve; keeps one bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve, inplace: bool) -> Tensor:
        bits, ctx.place = pack(x, curve.gate)
        ctx.save_for_backward(bits)
        ctx.slope = curve.slope
        if not inplace:
            return curve.function(x, False)
        ctx.mark_dirty(x)
        curve.function(x, True)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return masked(grad, bits, ctx.place, ctx.slope), None, None


def _tracked(x: Tensor) -> bool:
    # A compiler decides itself what to keep and what to compute again.
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`; keeps one bit per element."""
    if not _tracked(input):
        return F.relu(input, inplace)
    return _TwoSlopes.apply(input, Curve(F.relu, _ABOVE_ZERO), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu6`; keeps one bit per element."""
    if not _tracked(input):
        return F.relu6(input, inplace)
    return _TwoSlopes.apply(input, Curve(F.relu6, _as_stock(_hardtanh_backward, 0, 6)), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`; keeps one bit per element."""
    if not _tracked(input):
        return F.hardtanh(input, min_val, max_val, inplace)
    gate = _as_stock(_hardtanh_backward, min_val, max_val)
    return _TwoSlopes.apply(input, Curve(lambda x, i: F.hardtanh(x, min_val, max_val, i), gate), inplace)


def _sixth(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    _ABOVE_ZERO(grad, mask, out)
    out.mul_(SIXTH)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardsigmoid`; keeps one bit per element."""
    if not _tracked(input):
        return F.hardsigmoid(input, inplace)
    return _TwoSlopes.apply(input, Curve(F.hardsigmoid, _as_stock(_hardtanh_backward, -3, 3), _sixth), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`; keeps one bit per element."""
    if not _tracked(input):
        return F.leaky_relu(input, negative_slope, inplace)
    gate, slope = (_as_stock(_leaky_relu_backward, outer, False) for outer in (0.0, negative_slope))
    return _TwoSlopes.apply(input, Curve(lambda x, i: F.leaky_relu(x, negative_slope, i), gate, slope), inplace)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> Tensor:
        # The draws of PyTorch's own dropout on each kind of device, so that a seed gives the same network.
        if x.is_cuda:
            y, mask = torch.native_dropout(x, p, True)
        else:
            mask = torch.empty_like(x).bernoulli_(1 - p)
            y = x * (mask / (1 - p)) if p < 1 else x * mask
        bits, ctx.place = pack(mask, lambda _, piece, out: out.copy_(piece))
        ctx.save_for_backward(bits)
        ctx.scale = 1 / (1 - p) if p < 1 else 0.0
        if not inplace:
            return y
        ctx.mark_dirty(x)
        x.copy_(y)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        rule: Rule = lambda piece, mask, out: torch.mul(piece, mask, out=out).mul_(ctx.scale)  # noqa: E731
        return masked(grad, bits, ctx.place, rule), None, None


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, with its random numbers; keeps one bit per element."""
    if not (_tracked(input) and training and 0 < p <= 1):
        return F.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p, inplace)


class _ShapeOnly(torch.autograd.Function):
    """A pooling operator whose backward pass reads nothing of the input but its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.shape, ctx.backward_operator = x.shape, backward
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_operator(grad, grad.new_empty(1).expand(ctx.shape)), None, None


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`; keeps the shape alone."""
    if not _tracked(input):
        return F.adaptive_avg_pool2d(input, output_size)
    backward = torch.ops.aten._adaptive_avg_pool2d_backward.default
    return _ShapeOnly.apply(input, lambda x: F.adaptive_avg_pool2d(x, output_size), backward)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`; keeps the shape alone."""
    rest = (ceil_mode, count_include_pad, divisor_override)
    if not _tracked(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, *rest)
    kernel, padding = _pair(kernel_size), _pair(padding)
    settings = (kernel, _pair(stride) if stride else kernel, padding, *rest)
    backward = torch.ops.aten.avg_pool2d_backward.default
    return _ShapeOnly.apply(input, lambda x: F.avg_pool2d(x, *settings), lambda g, x: backward(g, x, *settings))


class _MaxPool2d(torch.autograd.Function):
    """Keeps of each output element its place in the window, one byte, where PyTorch keeps eight and the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
        ctx.settings = (kernel, stride, padding, dilation, ceil_mode)
        ctx.shape = x.shape
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.settings)
        top, left = _window_corners(y, stride, padding)
        row = (indices.div(x.shape[-1], rounding_mode="floor") - top).div_(dilation[0], rounding_mode="floor")
        column = (indices.remainder_(x.shape[-1]) - left).div_(dilation[1], rounding_mode="floor")
        ctx.save_for_backward(row.mul_(kernel[1]).add_(column).to(torch.uint8))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.saved_tensors[0].long()
        kernel, stride, padding, dilation, _ = ctx.settings
        top, left = _window_corners(grad, stride, padding)
        row = places.div(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(top)
        column = places.remainder_(kernel[1]).mul_(dilation[1]).add_(left)
        indices = row.mul_(ctx.shape[-1]).add_(column)
        backward = torch.ops.aten.max_pool2d_with_indices_backward.default
        x = grad.new_empty(1).expand(ctx.shape)
        return backward(grad, x, *ctx.settings, indices), None, None, None, None, None


def _window_corners(y: Tensor, stride: Any, padding: Any) -> tuple[Tensor, Tensor]:
    """First row (H', 1) and first column (W',) of each output element's window; negative in the padding."""
    rows, columns = (torch.arange(size, device=y.device) for size in y.shape[-2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`torch.nn.functional.max_pool2d`; keeps one byte per output element, for windows of at most 256."""
    kernel = _pair(kernel_size)
    if not _tracked(input) or return_indices or kernel[0] * kernel[1] > 256:
        size = (kernel_size, stride, padding, dilation)
        return F.max_pool2d(input, *size, ceil_mode, return_indices)  # type: ignore[call-overload]
    settings = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    return _MaxPool2d.apply(input, *settings)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[-1])


class LeanReLU(nn.ReLU):
    """`nn.ReLU` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return input if is_activated(input, self) else relu(input, self.inplace)


class LeanReLU6(nn.ReLU6):
    """`nn.ReLU6` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return input if is_activated(input, self) else relu6(input, self.inplace)


class LeanHardtanh(nn.Hardtanh):
    """`nn.Hardtanh` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return input if is_activated(input, self) else hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeanHardsigmoid(nn.Hardsigmoid):
    """`nn.Hardsigmoid` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace)


class LeanLeakyReLU(nn.LeakyReLU):
    """`nn.LeakyReLU` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class LeanDropout(nn.Dropout):
    """`nn.Dropout` that keeps bits."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class LeanMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` that keeps one byte per output element."""

    def forward(self, input: Tensor) -> Any:
        size = (self.kernel_size, self.stride, self.padding, self.dilation)
        return max_pool2d(input, *size, self.ceil_mode, self.return_indices)


class LeanAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d` that keeps the shape alone."""

    def forward(self, input: Tensor) -> Tensor:
        size = (self.kernel_size, self.stride, self.padding)
        return avg_pool2d(input, *size, self.ceil_mode, self.count_include_pad, self.divisor_override)


class LeanAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` that keeps the shape alone."""

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool2d(input, self.output_size)


LEAN_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    lean.__mro__[1]: lean
    for lean in (
        *(LeanReLU, LeanReLU6, LeanHardtanh, LeanHardsigmoid, LeanLeakyReLU),
        *(LeanDropout, LeanMaxPool2d, LeanAvgPool2d, LeanAdaptiveAvgPool2d),
    )
} | RECOMPUTING_MODULES

# What plain functional code calls, and what stands in for it.
LEAN_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.relu_: lambda input: relu(input, inplace=True),
    torch.relu_: lambda input: relu(input, inplace=True),
    Tensor.relu_: lambda input: relu(input, inplace=True),
    F.relu6: relu6,
    F.hardtanh: hardtanh,
    F.hardsigmoid: hardsigmoid,
    F.leaky_relu: leaky_relu,
    F.dropout: dropout,
    F.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    **RECOMPUTING_FUNCTIONS,
}
