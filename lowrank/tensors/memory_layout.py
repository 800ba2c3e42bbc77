"""In which order a tensor lies in memory, and what PyTorch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor's numbers, from its shape: a compiler has `nbytes` of fixed sizes alone, even of a tensor whose
    sizes it was asked for, and a tracer would take `numel` for a result of the model."""
    return prod(x.shape) * x.itemsize


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers with these strides; the tensor itself where it has them."""
    return value if value.stride() == strides else value.new_empty_strided(value.shape, strides).copy_(value)


def dense_strides(shape: tuple[int, ...], channels_last: bool = False) -> tuple[int, ...]:
    """Strides of a tensor that fills its memory, channels last or in the order of its dimensions."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for place in reversed(order):
        strides[place] = step
        step *= max(shape[place], 1)
    return tuple(strides)


def plainly_last(x: Tensor) -> Tensor:
    """A tensor (B, C, H, W) or (B, C, D, H, W) with its channels last, such as tokens of one image put in order again,
    with the strides that a dimension of size 1 has in such a layout; any other as it is.

    Where they are other ones, PyTorch's batch normalisation takes its input or its gradient for a contiguous one.
    """
    if not is_channels_last(x):
        return x
    strides = dense_strides(tuple(x.shape), True)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor (B, C, H, W) or (B, C, D, H, W) has its channels last in memory, and in no other way."""
    last = _LAST.get(x.ndim)
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)


def channels_last(x: Tensor) -> Tensor:
    """A tensor (B, C, H, W) or (B, C, D, H, W) with its channels last in memory; any other as it is."""
    last = _LAST.get(x.ndim)
    return x if last is None else x.contiguous(memory_format=last)


def order_of(x: Tensor, linear: bool) -> Callable[[Tensor], Tensor] | None:
    """What gives the gradient of a layer's input `x` the order in memory that PyTorch gives it, where operators behind
    may tell: of a linear layer (..., I) for an input that lies as (I, ...), of a convolution for one image with its
    channels last, see `plainly_last`. None: it has it as it is made."""
    if x.is_contiguous():
        return None
    if linear:
        return _turned if x.movedim(-1, 0).is_contiguous() else None
    last = _LAST.get(x.ndim)
    if last is None or x.shape[0] != 1 or x.stride() != dense_strides(tuple(x.shape), True):
        return None
    return partial(Tensor.contiguous, memory_format=last)


def _turned(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def suggests_channels_last(x: Tensor) -> bool:
    """Whether operators take a tensor (B, C, H, W) for one with its channels last, by the rule that PyTorch has."""
    sizes, strides, least = x.shape, x.stride(), 0
    if x.ndim != 4 or strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * (sizes[dim] if sizes[dim] > 1 else 1)
    return True
