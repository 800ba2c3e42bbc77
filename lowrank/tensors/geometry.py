"""The exact arithmetic of a layer: its forward pass, its gradients, and how many multiplications they take.

A geometry is the layer without its parameters: hashable, so that plans can be remembered by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_convolution_backward = torch.ops.aten.convolution_backward.default


def _placeholder(like: Tensor, shape: Shape) -> Tensor:
    """A tensor of which only the shape is read; one element of memory."""
    return like.new_empty(1).expand(shape)


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution. Input (B, C, H, W), weight (O, C/g, K_h, K_w), output (B, O, H', W').

    Attributes:
        padding: rows and columns added at (top, bottom, left, right).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding: tuple[int, int, int, int]
    padding_mode: PaddingMode

    channel_axis = 1

    @classmethod
    def of(cls, layer: nn.Conv2d) -> ConvGeometry:
        """The geometry of a layer as it stands: its present settings, and the kernel of its present weight.

        `padding="same"` and `"valid"` are resolved as PyTorch resolves them.
        """
        uneven = tuple(layer._reversed_padding_repeated_twice) if layer.padding_mode != "zeros" else None
        padding = layer.padding if isinstance(layer.padding, str) else _pair(layer.padding)
        sizes = (layer.weight.shape[2:], _pair(layer.stride), padding, _pair(layer.dilation))
        return _conv_geometry(*sizes, layer.groups, layer.padding_mode, uneven)

    @property
    def native(self) -> bool:
        """Whether the convolution itself can do the padding."""
        top, bottom, left, right = self.padding
        return self.padding_mode == "zeros" and top == bottom and left == right

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads one input position: a 1x1 kernel and no padding."""
        return self.kernel == (1, 1) and not any(self.padding)

    def _arguments(self) -> tuple[list[int], list[int], list[int]]:
        own = [self.padding[0], self.padding[2]] if self.native else [0, 0]
        return list(self.stride), own, list(self.dilation)

    def _padded_shape(self, shape: Shape) -> Shape:
        if self.native:
            return shape
        top, bottom, left, right = self.padding
        return (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)

    def _pad(self, x: Tensor) -> Tensor:
        if self.native:
            return x
        top, bottom, left, right = self.padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (left, right, top, bottom), mode=mode)

    def _unpad(self, grad: Tensor, shape: Shape) -> Tensor:
        """The transpose of `_pad`: every padded row and column is added to where it came from."""
        top, _, left, _ = self.padding
        if self.native:
            return grad
        if self.padding_mode == "zeros":
            return grad[:, :, top : top + shape[2], left : left + shape[3]].contiguous()
        for axis, pads in ((2, self.padding[:2]), (3, self.padding[2:])):
            source = torch.arange(shape[axis], dtype=torch.float64).view(1, 1, -1)
            source = F.pad(source, pads, mode=self.padding_mode).long().view(-1).to(grad.device)
            target = grad.new_zeros(*grad.shape[:axis], shape[axis], *grad.shape[axis + 1 :])
            grad = target.index_add_(axis, source, grad)
        return grad

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        stride, padding, dilation = self._arguments()
        return F.conv2d(self._pad(x), weight, bias, stride, padding, dilation, self.groups)

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        """Gradient with respect to an input of shape `shape`, from the gradient `grad` of the output."""
        stride, padding, dilation = self._arguments()
        x = _placeholder(grad, self._padded_shape(shape))
        options = (stride, padding, dilation, False, [0, 0], self.groups, [True, False, False])
        return self._unpad(_convolution_backward(grad, x, weight, None, *options)[0], shape)

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int | None = None) -> Tensor:
        """Weight gradient from a dense input; `groups` replaces the layer's own."""
        groups = self.groups if groups is None else groups
        stride, padding, dilation = self._arguments()
        weight = _placeholder(grad, (grad.shape[1], x.shape[1] // groups, *self.kernel))
        options = (stride, padding, dilation, False, [0, 0], groups, [False, True, False])
        return _convolution_backward(grad, self._pad(x), weight, None, *options)[1]

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Bias gradient, shape (O,)."""
        return grad.sum((0, 2, 3))

    def output_shape(self, shape: Shape, out_channels: int) -> Shape:
        """Shape of the output for an input of shape `shape`."""
        top, bottom, left, right = self.padding
        sizes = (shape[2] + top + bottom, shape[3] + left + right)
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        rows, columns = ((n - span) // s + 1 for n, span, s in zip(sizes, spans, self.stride, strict=True))
        return (shape[0], out_channels, rows, columns)

    def macs(self, shape: Shape, out_channels: int) -> int:
        """Multiplications of the forward pass; the input and the weight gradient take as many each."""
        outputs = prod(self.output_shape(shape, out_channels))
        return outputs * (shape[1] // self.groups) * prod(self.kernel)


@dataclass(frozen=True)
class LinearGeometry:
    """A linear layer. Input (B, ..., I), weight (O, I), output (B, ..., O)."""

    channel_axis = -1
    groups = 1
    pointwise = True
    stride = (1, 1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        """Gradient with respect to an input of shape `shape`, from the gradient `grad` of the output."""
        return grad @ weight

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int | None = None) -> Tensor:
        """Weight gradient from a dense input."""
        return grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Bias gradient, shape (O,)."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    def output_shape(self, shape: Shape, out_channels: int) -> Shape:
        """Shape of the output for an input of shape `shape`."""
        return (*shape[:-1], out_channels)

    def macs(self, shape: Shape, out_channels: int) -> int:
        """Multiplications of the forward pass; the input and the weight gradient take as many each."""
        return prod(shape) * out_channels


Geometry = ConvGeometry | LinearGeometry


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


@lru_cache(maxsize=1024)
def _conv_geometry(
    kernel: Shape,
    stride: Shape,
    padding: Shape | str,
    dilation: Shape,
    groups: int,
    mode: PaddingMode,
    uneven: Shape | None,
) -> ConvGeometry:
    """Of a layer's settings, `uneven` being (left, right, top, bottom) where padding is not zeros."""
    if uneven is not None:
        left, right, top, bottom = uneven
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in reach)
    else:
        rows, columns = (0, 0) if isinstance(padding, str) else _pair(padding)
        top, bottom, left, right = rows, rows, columns, columns
    return ConvGeometry(_pair(kernel), _pair(stride), _pair(dilation), groups, (top, bottom, left, right), mode)
