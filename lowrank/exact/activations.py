"""Activations and dropout that keep bits where PyTorch keeps whole tensors; exact.

Each function has the arguments, the values and the gradients of the one in `torch.nn.functional` that it is named
after. What they keep for the backward pass:

| function | kept |
|---|---|
| ReLU, ReLU6, Hardtanh, Hardsigmoid, LeakyReLU | one bit per element |
| Dropout | one bit per element |

Smooth activations, whose derivatives take many values, are in `curves`, as is what ReLU and its like do where their
input can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _disable_current_modes

from lowrank.exact.bits import Gate, Slopes, masked, pack, pack_clamped
from lowrank.exact.slots import Slot, note_slot
from lowrank.tensors import gradient_start, head_start
from lowrank.tensors.eager import Node, in_compiled_graph, is_batched, wants_gradient
from lowrank.tensors.owned import is_owned

# PyTorch's slope of Hardsigmoid, a single-precision number in every dtype.
SIXTH = torch.tensor(1 / 6, dtype=torch.float32, device="cpu").item()


_aten = torch.ops.aten
_PLAIN = Slopes()


@dataclass(frozen=True)
class Curve:
    """A function with two slopes, such as ReLU: which of them an element has is one bit.

    Attributes:
        function: of a tensor, and whether to work in place.
        gate: which elements have the inner slope, see `pack`.
        slopes: the gradient by that, see `masked`.
        high: of a function that clamps between the gate's lower limit and this one; None: of another one.
        by_output: PyTorch's operator that writes the gradient, by the output gradient, the output and what follows
            these; None: that does not tell.
        limits: between which the output is; it tells nothing in a dtype that rounds them, since PyTorch compares the
            input with what they were.
    """

    function: Callable[[Tensor, bool], Tensor]
    gate: Gate
    slopes: Slopes = _PLAIN
    by_output: tuple[Any, ...] | None = None
    high: float | None = None
    limits: tuple[float, ...] = ()

    def is_told_by_output(self, dtype: torch.dtype) -> bool:
        """Whether the output, in this dtype, tells which of the slopes an element has."""
        return self.by_output is not None and all(_is_itself(limit, dtype) for limit in self.limits)

    def gradient(self, grad: Tensor, y: Tensor, room: Tensor | None) -> Tensor:
        """By the output, written to the memory of `room`, which is one of the two, where they lie alike."""
        assert self.by_output is not None
        operator, *numbers = self.by_output
        if room is not None and not torch.is_grad_enabled() and not is_batched(grad) and _alike(grad, y):
            found: Tensor = operator.grad_input(grad, y, *numbers, grad_input=room)
        else:
            found = operator.default(grad, y, *numbers)
        return found


@lru_cache(maxsize=256)
def _is_itself(number: float, dtype: torch.dtype) -> bool:
    """Whether a number stays what PyTorch computes with, at least single precision, in a dtype."""
    with _disable_current_modes():
        given = torch.tensor(number, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
        return bool(given == given.to(dtype))


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())


class _TwoSlopes(Node):
    """A curve; keeps one bit per element, or the output, where another node keeps that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve, inplace: bool, notes: list[Any]) -> Tensor:
        joined = None if curve.high is None else pack_clamped(x, curve.gate, curve.high, inplace)
        bits, ctx.place = pack(x, curve.gate) if joined is None else joined[:2]
        ctx.slot, ctx.curve = Slot(bits), curve
        notes += ctx.slot, None if joined is None else joined[3]
        if inplace:
            ctx.mark_dirty(x)
        if joined is None:
            return curve.function(x, inplace)
        if inplace:
            increment_version(x)
        return joined[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own, kept, curve = ctx.slot.own, ctx.slot.tensor(), ctx.curve
        with torch._C.DisableTorchFunctionSubclass():
            owned = is_owned(grad)
            if not own:
                found = curve.gradient(grad, kept, grad if owned else kept if ctx.slot.is_free() else None)
            elif owned and curve.slopes is _PLAIN and gradient_start.mask(ctx, grad, kept, ctx.place):
                found = grad
            else:
                found = _gradient(grad, kept, ctx.place, curve.slopes, owned)
        return found, None, None, None


def _curved(x: Tensor, curve: Curve, inplace: bool) -> Tensor:
    if wants_gradient(x):
        return _two_slopes(x, curve, inplace)
    if torch.is_grad_enabled() and x.requires_grad and in_compiled_graph():
        from lowrank.exact import bits_in_graph

        return bits_in_graph.two_slopes(x, curve, inplace)
    return curve.function(x, inplace)


def _two_slopes(x: Tensor, curve: Curve, inplace: bool) -> Tensor:
    notes: list[Any] = []
    y: Tensor = _TwoSlopes.apply(x, curve, inplace, notes)
    if curve.slopes is _PLAIN:
        gradient_start.announce(y)
    slot, begun = notes
    if curve.is_told_by_output(y.dtype):
        note_slot(y, slot)
    if begun is not None:
        head_start.note(y, begun)
    return y


class _Masked(Node):
    """`masked`, where the gradient is itself differentiated: linear, so its own derivative is the same once more."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, bits: Tensor, place: list[int], slopes: Slopes) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.place, ctx.slopes = place, slopes
        return masked(grad, bits, place, slopes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (bits,) = ctx.saved_tensors
        return _Masked.apply(grad, bits, ctx.place, ctx.slopes), None, None, None


def _gradient(grad: Tensor, bits: Tensor, place: list[int], slopes: Slopes, owned: bool) -> Tensor:
    if torch.is_grad_enabled():
        return _Masked.apply(grad, bits, place, slopes)
    return masked(grad, bits, place, slopes, owned)


_RELU = Curve(F.relu, Gate("above"), by_output=(_aten.threshold_backward, 0), high=inf)


def _clamp(function: Callable[[Tensor, bool], Tensor], low: float, high: float) -> Curve:
    by_output = (_aten.hardtanh_backward, low, high)
    joined = high if low < high else None
    return Curve(function, Gate("between", low, high), _PLAIN, by_output=by_output, high=joined, limits=(low, high))


_RELU6 = _clamp(F.relu6, 0.0, 6.0)
_HARDSIGMOID = Curve(F.hardsigmoid, Gate("within", -3.0, 3.0), Slopes(SIXTH))


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`; keeps one bit per element."""
    return _curved(input, _RELU, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu6`; keeps one bit per element."""
    return _curved(input, _RELU6, inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`; keeps one bit per element."""
    return _curved(input, _clamp(lambda x, i: F.hardtanh(x, min_val, max_val, i), min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardsigmoid`; keeps one bit per element."""
    return _curved(input, _HARDSIGMOID, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`; keeps one bit per element."""
    by_output = (_aten.leaky_relu_backward, negative_slope, False)
    slopes = Slopes(outer=negative_slope)
    function = lambda x, i: F.leaky_relu(x, negative_slope, i)  # noqa: E731
    curve = Curve(function, Gate("strictly above"), slopes, by_output if negative_slope > 0 else None)
    return _curved(input, curve, inplace)


class _Dropout(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> Tensor:
        # The draws of PyTorch's own dropout on each kind of device, so that a seed gives the same network.
        if x.is_cuda and not inplace:
            y, mask = torch.native_dropout(x, p, True)
            ctx.scale = 1 / (1 - p) if p < 1 else 0.0
        else:
            mask = torch.empty_like(x).bernoulli_(1 - p)
            y = x * (mask / (1 - p)) if p < 1 else x * mask
            ctx.scale = _scale(p, x.dtype)
        bits, ctx.place = pack(mask, Gate("not zero"))
        ctx.save_for_backward(bits)
        if not inplace:
            return y
        ctx.mark_dirty(x)
        x.copy_(y)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,), owned = ctx.saved_tensors, is_owned(grad)
        return _gradient(grad, bits, ctx.place, Slopes(ctx.scale, 0.0), owned), None, None


@lru_cache(maxsize=256)
def _scale(p: float, dtype: torch.dtype) -> float:
    """What dropout multiplies by where it is not done in one operator: rounded to the dtype, in both directions."""
    return float(torch.ones((), dtype=dtype, device="cpu").div_(1 - p)) if p < 1 else 0.0


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, with its random numbers; keeps one bit per element."""
    if not (wants_gradient(input) and training and 0 < p <= 1):
        return F.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p, inplace)
