"""In which order a tensor lies in memory, and what PyTorch makes of it."""

from __future__ import annotations

from torch import Tensor


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
