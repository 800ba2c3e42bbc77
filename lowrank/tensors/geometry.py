"""The exact arithmetic of a layer: its forward pass, its gradients, and how many multiplications they take.

A geometry is the layer without its parameters: hashable, so that plans can be remembered by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels import passes
from lowrank.tensors import positions
from lowrank.tensors.eager import remembered
from lowrank.tensors.memory_layout import dense_strides, is_channels_last
from lowrank.tensors.tucker import products

Shape = tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_convolution_backward = torch.ops.aten.convolution_backward.default
_PRODUCT_TYPES = (torch.float32, torch.float64)


def _placeholder(like: Tensor, shape: Shape) -> Tensor:
    """A tensor of which only the shape is read: on a CPU in memory that is there, in the order of its dimensions, since
    operators copy what is not laid out as they like; a small one has its own, any other one element of memory."""
    count = prod(shape)
    if like.device.type == "cpu" and like.is_contiguous() and not like.requires_grad and like.numel() >= count:
        return like.as_strided(shape, dense_strides(shape))
    whole = like.device.type == "cpu" and count <= _SMALL
    return like.new_empty(shape) if whole else like.new_empty(1).expand(shape)


_SMALL = 2**16  # numbers
_FEW_POSITIONS = 64
_FAR = 2**22  # numbers beyond the caches


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution of one, two or three dimensions: of two the input is (B, C, H, W), the weight (O, C/g, K_h, K_w)
    and the output (B, O, H', W').

    Attributes:
        padding: what is added ahead and behind in each dimension: (top, bottom, left, right).
        native: whether the convolution itself can do the padding.
    """

    kernel: Shape
    stride: Shape
    dilation: Shape
    groups: int
    padding: Shape
    padding_mode: PaddingMode
    native: bool = field(init=False, compare=False, repr=False)

    channel_axis = 1

    def __post_init__(self) -> None:
        even = all(ahead == behind for ahead, behind in self._pads)
        object.__setattr__(self, "native", self.padding_mode == "zeros" and even)

    @classmethod
    def of(cls, layer: Any) -> ConvGeometry:
        """The geometry of a layer as it stands: its present settings, and the kernel of its present weight.

        `padding="same"` and `"valid"` are resolved as PyTorch resolves them.
        """
        uneven = tuple(layer._reversed_padding_repeated_twice) if layer.padding_mode != "zeros" else None
        sizes = (layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation)
        settings = (*sizes, layer.groups, layer.padding_mode, uneven)
        try:
            return _conv_geometry(*settings)
        except TypeError:  # lists, as somebody may have set
            hashable: Any = (tuple(one) if isinstance(one, list) else one for one in settings)
            return _conv_geometry(*hashable)

    @property
    def _pads(self) -> list[Shape]:
        """Per dimension what is added ahead and behind."""
        return [self.padding[at : at + 2] for at in range(0, len(self.padding), 2)]

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads one input position: a 1x1 kernel and no padding."""
        return prod(self.kernel) == 1 and not any(self.padding)

    def copies(self, x: Tensor) -> bool:
        """Whether PyTorch's own layer computes with a copy of its input, and keeps that."""
        return not self.native

    def _arguments(self) -> tuple[list[int], list[int], list[int]]:
        own = list(self.padding[::2]) if self.native else [0] * len(self.kernel)
        return list(self.stride), own, list(self.dilation)

    def _padded_shape(self, shape: Shape) -> Shape:
        if self.native:
            return shape
        return (*shape[:2], *(size + sum(pads) for size, pads in zip(shape[2:], self._pads, strict=True)))

    def _pad(self, x: Tensor) -> Tensor:
        if self.native:
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, [one for pads in reversed(self._pads) for one in pads], mode=mode)

    def _unpad(self, grad: Tensor, shape: Shape) -> Tensor:
        """The transpose of `_pad`: every padded row and column is added to where it came from."""
        if self.native:
            return grad
        if self.padding_mode == "zeros":
            for axis, (ahead, _) in enumerate(self._pads, 2):
                grad = grad.narrow(axis, ahead, shape[axis])
            return grad.contiguous()
        for axis, pads in enumerate(self._pads, 2):
            source = torch.arange(shape[axis], dtype=torch.float64).view(1, 1, -1)
            source = F.pad(source, pads, mode=self.padding_mode).long().view(-1).to(grad.device)
            target = grad.new_zeros(*grad.shape[:axis], shape[axis], *grad.shape[axis + 1 :])
            grad = target.index_add_(axis, source, grad)
        return grad

    @property
    def is_product(self) -> bool:
        """Whether a layer is a product of matrices for each sample."""
        return self.pointwise and self.groups == 1 and prod(self.stride) == 1

    def _is_product(self, x: Tensor) -> bool:
        """Whether it is one of its input or its output's gradient, `x`, and is computed as one in less time: on a CPU
        1 x 1 convolutions take 1 to 3 times as long as their products, but not on images of one pixel."""
        plain = self.is_product and not torch.compiler.is_compiling()
        own = plain and x.device.type == "cpu" and x.dtype in _PRODUCT_TYPES
        return own and x.is_contiguous() and x.numel() > x.shape[0] * x.shape[1]

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer's output, up to rounding."""
        if torch.is_grad_enabled() or not self._is_product(x):
            return self.forward(x, weight, bias)
        y = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
        products(x.flatten(2), weight.flatten(1), bias, out=y.flatten(2))
        return y

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        stride, padding, dilation = self._arguments()
        return _FORWARD[len(self.kernel)](self._pad(x), weight, bias, stride, padding, dilation, self.groups)

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        """Gradient with respect to an input of shape `shape`, from the gradient `grad` of the output."""
        if self._is_product(grad):
            return products(grad.flatten(2), weight.flatten(1).mT).view(shape)
        stride, padding, dilation = self._arguments()
        padded = self._padded_shape(shape)
        if _transposes_well(grad):  # and needs no input to know the shape of
            spans = [d * (k - 1) + 1 for d, k in zip(dilation, self.kernel, strict=True)]
            sizes = zip(padded[2:], grad.shape[2:], stride, padding, spans, strict=True)
            rest = [n - (m - 1) * s + 2 * pad - span for n, m, s, pad, span in sizes]
            found = torch.convolution(grad, weight, None, stride, padding, dilation, True, rest, self.groups)
            return self._unpad(found, shape)
        x = _placeholder(grad, padded)
        options = (stride, padding, dilation, False, [0] * len(stride), self.groups, [True, False, False])
        return self._unpad(_convolution_backward(grad, x, weight, None, *options)[0], shape)

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int | None = None) -> Tensor:
        """Weight gradient from a dense input; `groups` replaces the layer's own."""
        groups = self.groups if groups is None else groups
        stride, padding, dilation = self._arguments()
        x = self._pad(x)
        if len(self.kernel) == 2 and self.kernel != positions.FAST and groups == x.shape[1] == grad.shape[1] > 1:
            made = passes.depthwise(x, grad, self.kernel, self.stride, tuple(padding), self.dilation)
            if made is not None:
                return made
        if positions.pays(x, self.kernel, groups, grad.shape[1]):
            sizes = (tuple(x.shape[2:]), tuple(grad.shape[2:]), self.kernel)
            pairs = positions.joined_pairs(*sizes, self.stride, tuple(padding), self.dilation)
            return positions.weight_gradient(x, grad, pairs, self.kernel, groups)
        if groups == self.groups and self._is_product(x) and grad.is_contiguous():
            return positions.sum_of_products(x, grad).view(grad.shape[1], x.shape[1], *self.kernel)
        weight = _placeholder(grad, (grad.shape[1], x.shape[1] // groups, *self.kernel))
        options = (stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False])
        return _convolution_backward(grad, x, weight, None, *options)[1]

    @property
    def has_windows(self) -> bool:
        """Whether there is `windows` of it."""
        return True

    def windows(self, factor: Tensor, axis: int) -> Tensor:
        """What each place of the kernel meets, at each output position, of the rows of a factor.

        Args:
            factor: of the input's spatial dimension `axis`, (H, r).
            axis: from 0.

        Returns:
            (K_h r, H'), the places ahead of the columns; zeros where it meets padding of zeros.
        """
        reach, mode = self.dilation[axis] * (self.kernel[axis] - 1), self.padding_mode
        rows = F.pad(factor.mT[None], self._pads[axis], mode="constant" if mode == "zeros" else mode)[0]
        rows = rows.unfold(1, reach + 1, self.stride[axis])[..., :: self.dilation[axis]]  # (r, H', K_h)
        return rows.permute(2, 0, 1).flatten(0, 1)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Bias gradient, shape (O,)."""
        if grad.dtype in _PRODUCT_TYPES and prod(grad.shape[2:]) < _FEW_POSITIONS:
            return grad.sum(0).flatten(1).sum(1)  # in a half to a seventh of the time
        if is_channels_last(grad) and grad.numel() >= _FAR:
            samples = passes.project(grad.movedim(1, -1).flatten(1), grad.new_ones(len(grad), 1))
            if samples is not None:
                return samples.view(-1, grad.shape[1]).sum(0)  # in a half of the time
        return grad.sum((0, *range(2, grad.ndim)))

    def by_output(self, weight: Tensor, groups: int | None = None) -> Tensor:
        """A weight with its outputs ahead, (O, C/g, ...), which it has in any case; and back."""
        return weight

    def applications(self, shape: Shape) -> int:
        """Places at which the kernel is applied to each sample of an input of shape `shape`."""
        return prod(self.output_shape(shape, 1)[2:])

    def output_shape(self, shape: Shape, out_channels: int) -> Shape:
        """Shape of the output for an input of shape `shape`."""
        sizes = [size + sum(pads) for size, pads in zip(shape[2:], self._pads, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        found = [(n - span) // s + 1 for n, span, s in zip(sizes, spans, self.stride, strict=True)]
        return (shape[0], out_channels, *found)

    def macs(self, shape: Shape, out_channels: int) -> int:
        """Multiplications of the forward pass; the input and the weight gradient take as many each."""
        places = shape[0] * self.applications(shape)
        return places * out_channels * (shape[1] // self.groups) * prod(self.kernel)


@dataclass(frozen=True)
class TransposedConvGeometry(ConvGeometry):
    """A transposed convolution: of two dimensions the input is (B, C, H, W), the weight (C, O/g, K_h, K_w).

    Attributes:
        output_padding: rows and columns that the output has more, behind.
    """

    output_padding: Shape = ()

    @classmethod
    def of(cls, layer: Any) -> TransposedConvGeometry:
        """The geometry of a layer as it stands."""
        kernel: Shape = tuple(layer.weight.shape[2:])
        stride, dilation, padding, further = (
            _each(len(kernel), value) for value in (layer.stride, layer.dilation, layer.padding, layer.output_padding)
        )
        both = tuple(one for one in padding for _ in range(2))
        return cls(kernel, stride, dilation, layer.groups, both, "zeros", further)

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads one input position, and all do."""
        return super().pointwise and prod(self.stride) == 1

    @property
    def has_windows(self) -> bool:
        """None: its kernel lies on the output."""
        return False

    def _is_product(self, x: Tensor) -> bool:
        return False

    def _options(self, groups: int | None = None) -> tuple[Any, ...]:
        groups = self.groups if groups is None else groups
        return list(self.stride), list(self.padding[::2]), list(self.dilation), True, list(self.output_padding), groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        return torch.convolution(x, weight, bias, *self._options())

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        """Gradient with respect to an input of shape `shape`, from the gradient `grad` of the output."""
        x = _placeholder(grad, shape)
        return _convolution_backward(grad, x, weight, None, *self._options(), [True, False, False])[0]

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int | None = None) -> Tensor:
        """Weight gradient from a dense input, (C, O/g, ...); `groups` replaces the layer's own."""
        groups = self.groups if groups is None else groups
        weight = _placeholder(grad, (x.shape[1], grad.shape[1] // groups, *self.kernel))
        return _convolution_backward(grad, x, weight, None, *self._options(groups), [False, True, False])[1]

    def by_output(self, weight: Tensor, groups: int | None = None) -> Tensor:
        """A weight (C, O/g, ...) as (O, C/g, ...), and back."""
        groups = self.groups if groups is None else groups
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def applications(self, shape: Shape) -> int:
        """Places at which the kernel is applied to each sample of an input of shape `shape`."""
        return prod(shape[2:])

    def output_shape(self, shape: Shape, out_channels: int) -> Shape:
        """Shape of the output for an input of shape `shape`."""
        settings = zip(
            *(shape[2:], self.kernel, self.stride, self.dilation, self._pads, self.output_padding), strict=True
        )
        found = [(n - 1) * s - sum(pads) + d * (k - 1) + further + 1 for n, k, s, d, pads, further in settings]
        return (shape[0], out_channels, *found)


@dataclass(frozen=True)
class LinearGeometry:
    """A linear layer. Input (B, ..., I), weight (O, I), output (B, ..., O)."""

    channel_axis = -1
    groups = 1
    pointwise = True
    stride = (1, 1)

    def copies(self, x: Tensor) -> bool:
        """Whether PyTorch's own layer computes with a copy of its input, and keeps that."""
        return x.ndim > 2 and not x.is_contiguous()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        """Gradient with respect to an input of shape `shape`, from the gradient `grad` of the output."""
        return grad @ weight

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int | None = None) -> Tensor:
        """Weight gradient from a dense input."""
        return grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])

    def by_output(self, weight: Tensor, groups: int | None = None) -> Tensor:
        """A weight with its outputs ahead, which it has in any case; and back."""
        return weight

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


_FORWARD: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _transposes_well(grad: Tensor) -> bool:
    """Whether oneDNN takes a transposed convolution, which then is that of its backward pass, bit for bit."""
    if torch.compiler.is_compiling():  # asked first: a compiler cannot look into what is asked next
        return False
    own = grad.device.type == "cpu" and grad.dtype is torch.float32 and grad.numel() > 0
    return own and torch.backends.mkldnn.is_available()


def _each(dimensions: int, value: Any) -> Shape:
    """A setting per dimension, given as one number or as several, of which one stands for all."""
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(int(one) for one in (value if len(value) == dimensions else [*value] * dimensions))


@remembered
def _conv_geometry(
    kernel: Shape,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    mode: PaddingMode,
    uneven: Shape | None,
) -> ConvGeometry:
    """Of a layer's settings; where padding is not zeros, `uneven` has (ahead, behind) from the last dimension on."""
    each = partial(_each, len(kernel))
    kernel, stride, dilation = tuple(kernel), each(stride), each(dilation)
    pads: list[tuple[int, ...]]
    if uneven is not None:
        pads = [uneven[at : at + 2] for at in range(0, len(uneven), 2)][::-1]
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in reach]
    else:
        pads = [(one, one) for one in each(0 if isinstance(padding, str) else padding)]
    joined = tuple(int(one) for pair in pads for one in pair)
    return ConvGeometry(kernel, stride, dilation, groups, joined, mode)
