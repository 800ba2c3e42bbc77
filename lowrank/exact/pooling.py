"""Pooling that keeps shapes or places where PyTorch keeps whole tensors; exact.

Each function has the arguments, the values and the gradients of the one in `torch.nn.functional` that it is named
after. What they keep for the backward pass:

| function | kept |
|---|---|
| max_pool2d | one byte per output element: the place in its window |
| avg_pool2d, adaptive_avg_pool2d | the shape |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact.origins import itself, known, lean_mode, note, origin_of
from lowrank.tensors.eager import Node, in_batch, wants_gradient

Size = int | tuple[int, ...] | list[int]
Settings = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool]


class _ShapeOnly(Node):
    """A pooling operator whose backward pass reads nothing of the input but its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.shape, ctx.backward_operator = x.shape, backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_operator(grad, grad.new_empty(1).expand(ctx.shape)), None, None


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`; keeps the shape alone."""
    if not wants_gradient(input) or output_size in (1, (1, 1), [1, 1]):  # PyTorch's is a mean, which keeps no more
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
    if not wants_gradient(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, *rest)
    kernel, padding = _pair(kernel_size), _pair(padding)
    settings = (kernel, _pair(stride) if stride else kernel, padding, *rest)
    backward = torch.ops.aten.avg_pool2d_backward.default
    return _ShapeOnly.apply(input, lambda x: F.avg_pool2d(x, *settings), lambda g, x: backward(g, x, *settings))


class _MaxPool2d(Node):
    """Keeps of each output element its place in the window, one byte, where PyTorch keeps eight and the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings, made: list[Tensor]) -> Tensor:
        """`made` is given what is kept."""
        ctx.settings, ctx.shape = settings, x.shape
        first, *others = _parts(x)
        y, indices = torch.ops.aten.max_pool2d_with_indices(x[first], *settings)
        table = _table(y, x.shape[-1], settings)
        places = table.places_of(indices, lookup := table.lookup())
        if others:
            made_first = y, places
            y, places = (_room(one, len(x)) for one in made_first)
            y[first], places[first] = made_first
        for part in others:
            y[part], indices = torch.ops.aten.max_pool2d_with_indices(x[part], *settings)
            places[part] = table.places_of(indices, lookup)
        made.append(places)
        ctx.save_for_backward(*made)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        settings, table = ctx.settings, _table(places, ctx.shape[-1], ctx.settings)
        x = grad.new_empty(1).expand(ctx.shape)
        first, *others = _parts(x)
        if not others:
            return _backward.default(grad, x, *settings, table.indices_of(places)), None, None
        found = grad.new_empty(ctx.shape)
        for part in (first, *others):
            indices = table.indices_of(places[part])
            _backward.grad_input(grad[part], x[part], *settings, indices, grad_input=found[part])
        return found, None, None


_backward = torch.ops.aten.max_pool2d_with_indices_backward
_PARTS = 8  # of a large batch, whose indices, of eight bytes each, are there one after the other
_LARGE = 2**20  # elements of it


def _parts(x: Tensor) -> list[slice]:
    """What is taken at a time of images (B, C, H, W), or channels (C, H, W)."""
    count = len(x)
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta or in_batch())
    step = -(-count // _PARTS) if plain and x.numel() >= _LARGE else max(count, 1)
    return [slice(at, at + step) for at in range(0, max(count, 1), step)]


def _room(part: Tensor, count: int) -> Tensor:
    """For `count` of what this is a part of, laid out as that is."""
    last = not part.is_contiguous() and part.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=form)


class _Table(NamedTuple):
    """Places in windows and indices in images, from one to the other.

    Attributes:
        offsets: (K_h K_w,), how far ahead of a window's corner its places lie.
        corners: (H', W'), the index of each window's first place; in the padding it may be that of another place, or
            negative.
        span: the last of the offsets.
    """

    offsets: Tensor
    corners: Tensor
    span: int

    def lookup(self) -> Tensor:
        """Of each offset, the place in the window, in one byte."""
        found = self.offsets.new_empty(self.span + 1, dtype=torch.uint8)
        found[self.offsets] = torch.arange(self.offsets.numel(), dtype=torch.uint8, device=found.device)
        return found

    def places_of(self, indices: Tensor, lookup: Tensor) -> Tensor:
        """The places of these indices (..., H', W'), whose memory is used."""
        return lookup.take(indices.sub_(self.corners))

    def indices_of(self, places: Tensor) -> Tensor:
        """The indices of these places (..., H', W')."""
        return self.offsets.take(places.long()).add_(self.corners)


def _table(y: Tensor, width: int, settings: Settings) -> _Table:
    """Of outputs such as y (..., H', W') of images `width` wide."""
    kernel, stride, padding, dilation, _ = settings
    rows, columns = (torch.arange(size, device=y.device) for size in kernel)
    offsets = ((rows * (dilation[0] * width))[:, None] + columns * dilation[1]).view(-1)
    rows, columns = (torch.arange(size, device=y.device) for size in y.shape[-2:])
    corners = ((rows * stride[0] - padding[0]) * width)[:, None] + (columns * stride[1] - padding[1])
    return _Table(offsets, corners, (kernel[0] - 1) * dilation[0] * width + (kernel[1] - 1) * dilation[1])


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
    if not wants_gradient(input) or return_indices or kernel[0] * kernel[1] > 256:
        size = (kernel_size, stride, padding, dilation)
        return F.max_pool2d(input, *size, ceil_mode, return_indices)  # type: ignore[call-overload]
    settings = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    made: list[Tensor] = []
    y: Tensor = _MaxPool2d.apply(input, settings, made)
    if lean_mode(y) and known(input) is not None:
        chosen = lambda x, places: _chosen(x, places, settings)  # noqa: E731
        again = chosen if y.is_contiguous() else lambda x, _: F.max_pool2d(x, *settings)
        note(y, again, [origin_of(input, stream=True), itself(made[0], kept=True)])
    return y


def _chosen(x: Tensor, places: Tensor, settings: Settings) -> Tensor:
    """What lies at these places of each image's windows, in a tenth of the time of looking for the greatest."""
    table = _table(places, x.shape[-1], settings)
    first, *others = _parts(x)
    if not others:
        return _gathered(x, table.indices_of(places))
    found = x.new_empty(places.shape)
    for part in (first, *others):
        found[part] = _gathered(x[part], table.indices_of(places[part]))
    return found


def _gathered(x: Tensor, indices: Tensor) -> Tensor:
    return x.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[-1])
