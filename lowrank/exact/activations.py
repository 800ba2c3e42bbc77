"""Activations and dropout that keep bits where PyTorch keeps whole tensors; exact.

Each function has the arguments, the values and the gradients of the one in `torch.nn.functional` that it is named
after. What they keep for the backward pass:

| function | kept |
|---|---|
| ReLU, ReLU6, Hardtanh, Hardsigmoid, LeakyReLU | one bit per element |
| Dropout | one bit per element |

The derivatives of smooth activations take many values. GELU and SiLU compute their input again, see `recompute`;
Hardswish and the like keep it as they do in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact.bits import Rule, masked, pack
from lowrank.exact.slots import Slot, note_slot
from lowrank.tensors.eager import Node, wants_gradient

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
        by_output: whether the gate can be told from the output as well.
    """

    function: Callable[[Tensor, bool], Tensor]
    gate: Rule
    slope: Rule = _ABOVE_ZERO
    by_output: bool = True


class _TwoSlopes(Node):
    """A curve; keeps one bit per element, or the output, where another node keeps that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve, inplace: bool, slots: list[Slot]) -> Tensor:
        bits, ctx.place = pack(x, curve.gate)
        ctx.slot, ctx.curve = Slot(bits), curve
        slots.append(ctx.slot)
        if not inplace:
            return curve.function(x, False)
        ctx.mark_dirty(x)
        curve.function(x, True)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own, kept = ctx.slot.own, ctx.slot.tensor()
        bits, place = (kept, ctx.place) if own else pack(kept, ctx.curve.gate)
        return _gradient(grad, bits, place, ctx.curve.slope), None, None, None


def _two_slopes(x: Tensor, curve: Curve, inplace: bool) -> Tensor:
    slots: list[Slot] = []
    y: Tensor = _TwoSlopes.apply(x, curve, inplace, slots)
    if curve.by_output:
        note_slot(y, slots[0])
    return y


class _Masked(Node):
    """`masked`, where the gradient is itself differentiated: linear, so its own derivative is the same once more."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, bits: Tensor, place: list[int], rule: Rule) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.place, ctx.rule = place, rule
        return masked(grad, bits, place, rule)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (bits,) = ctx.saved_tensors
        return _Masked.apply(grad, bits, ctx.place, ctx.rule), None, None, None


def _gradient(grad: Tensor, bits: Tensor, place: list[int], rule: Rule) -> Tensor:
    return (_Masked.apply if torch.is_grad_enabled() else masked)(grad, bits, place, rule)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`; keeps one bit per element."""
    if not wants_gradient(input):
        return F.relu(input, inplace)
    return _two_slopes(input, Curve(F.relu, _ABOVE_ZERO), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu6`; keeps one bit per element."""
    if not wants_gradient(input):
        return F.relu6(input, inplace)
    return _two_slopes(input, Curve(F.relu6, _as_stock(_hardtanh_backward, 0, 6)), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`; keeps one bit per element."""
    if not wants_gradient(input):
        return F.hardtanh(input, min_val, max_val, inplace)
    gate = _as_stock(_hardtanh_backward, min_val, max_val)
    return _two_slopes(input, Curve(lambda x, i: F.hardtanh(x, min_val, max_val, i), gate), inplace)


def _sixth(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    _ABOVE_ZERO(grad, mask, out)
    out.mul_(SIXTH)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardsigmoid`; keeps one bit per element."""
    if not wants_gradient(input):
        return F.hardsigmoid(input, inplace)
    return _two_slopes(input, Curve(F.hardsigmoid, _as_stock(_hardtanh_backward, -3, 3), _sixth, False), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`; keeps one bit per element."""
    if not wants_gradient(input):
        return F.leaky_relu(input, negative_slope, inplace)
    gate, slope = (_as_stock(_leaky_relu_backward, outer, False) for outer in (0.0, negative_slope))
    return _two_slopes(
        input, Curve(lambda x, i: F.leaky_relu(x, negative_slope, i), gate, slope, negative_slope > 0), inplace
    )


class _Dropout(Node):
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        rule: Rule = lambda piece, mask, out: torch.mul(piece, mask, out=out).mul_(ctx.scale)  # noqa: E731
        return _gradient(grad, bits, ctx.place, rule), None, None


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, with its random numbers; keeps one bit per element."""
    if not (wants_gradient(input) and training and 0 < p <= 1):
        return F.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p, inplace)
