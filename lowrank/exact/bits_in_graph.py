"""One bit per element of an activation, in a graph that is compiled: by operators that a compiler fuses with others.

It would keep a byte for each, or the input, see `activations`.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.nn import functional as F

from lowrank.exact.bits import Gate, Slopes
from lowrank.tensors.memory_layout import is_channels_last


class _TwoSlopes(torch.autograd.Function):
    """As that of `activations`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Any, gate: Gate, slopes: Slopes) -> Tensor:
        y: Tensor = curve.function(x, False)
        # Of an output that is kept anyway the compiler may make the bits again.
        told = curve.by_output is not None and y.dtype.itemsize >= 4  # half precision may round the limits
        mask = passed(y if told else x, gate)
        ctx.slopes, ctx.last = slopes, is_channels_last(x)
        ctx.save_for_backward(packed(mask.movedim(1, -1) if ctx.last else mask))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slopes: Slopes = ctx.slopes
        (bits,) = ctx.saved_tensors
        grad = grad.movedim(1, -1) if ctx.last else grad
        inner = grad if slopes.inner == 1 else grad * slopes.inner
        outer = torch.zeros_like(grad) if slopes.outer is None else grad * slopes.outer
        found = torch.where(unpacked(bits, grad.shape), inner, outer)
        return found.movedim(-1, 1) if ctx.last else found, None, None, None


def two_slopes(x: Tensor, curve: Any, inplace: bool) -> Tensor:
    """A `Curve` of a tensor; where it is in place, what a compiler leaves out again is copied to it."""
    gate, slopes = curve.gate, curve.slopes
    gate = Gate(gate.rule, _constant(gate.low), _constant(gate.high))
    slopes = Slopes(_constant(slopes.inner), None if slopes.outer is None else _constant(slopes.outer))
    y: Tensor = _TwoSlopes.apply(x, curve, gate, slopes)
    return x.copy_(y) if inplace else y


def _constant(number: float) -> float:
    """A number that the graph is made for, where a compiler takes it for an unknown (`dynamic=True`): that would be one
    of all activations, which PyTorch's compiler finds in the first of them alone."""
    found: float = guard_scalar(number) if isinstance(number, float) else number
    return found


def passed(x: Tensor, gate: Gate) -> Tensor:
    """Which elements a gate lets through, bool; NaN as where PyTorch's own backward operators are compiled."""
    if gate.rule == "above":
        return ~(x <= gate.low)
    if gate.rule == "between":
        return ~((x <= gate.low) | (x >= gate.high))
    return (x > gate.low) & (x < gate.high) if gate.rule == "within" else x > gate.low


def packed(mask: Tensor) -> Tensor:
    """A bool tensor of n elements as bytes (ceil(n / 8),), uint8, each of elements that lie an eighth of them apart: in
    such an order, in words of 32 bits and of dimensions in the order of memory, compilers make vector code of it."""
    flat = mask.flatten()
    eighths = F.pad(flat, (0, -flat.numel() % 8)).view(8, -1)
    return (eighths.to(torch.int32) << _places(mask)).sum(0, dtype=torch.int32).to(torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What was packed, of this shape."""
    eighths = (bits.to(torch.int32) >> _places(bits)) & 1
    return eighths.flatten()[: prod(shape)].view(shape) > 0


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.int32, device=tensor.device)[:, None]
