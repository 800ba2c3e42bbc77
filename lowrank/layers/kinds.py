"""The kinds of layers that can be converted, and how a layer of one's own joins them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.exact.expressions import EXPRESSIONS
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry, TransposedConvGeometry


@dataclass(frozen=True)
class Kind:
    """What a class of layers computes: `geometry.forward(prepare(layer, x), weight, bias)`.

    Attributes:
        stock: the class.
        geometry: of a layer.
        weight: of a layer, as its geometry takes it: (O, C/g, ...), (C, O/g, ...) or (O, I); computed from the layer's
            parameters by operations that autograd follows, it passes its gradient on to them.
        dimensions: of an input with its batch dimension; 0: any number from 2.
        prepare: of a layer and its input, what the geometry takes, such as a padded input.
        registered: whether `register_layer` was told all this, and nobody here knows the class.
    """

    stock: type[nn.Module]
    geometry: Callable[[Any], Geometry]
    weight: Callable[[Any], Tensor]
    dimensions: int
    prepare: Callable[[Any, Tensor], Tensor] | None = None
    registered: bool = False

    def fits(self, x: Any) -> bool:
        """Whether this is an input of such a layer at all, which says what is wrong with any other."""
        allowed = (self.dimensions - 1, self.dimensions)
        return isinstance(x, Tensor) and (x.ndim in allowed if self.dimensions else x.ndim > 0)

    def is_single(self, x: Tensor) -> bool:
        """Whether an input or output comes without its batch dimension."""
        return x.ndim < (self.dimensions or 2)


def _linear(_: Any) -> LinearGeometry:
    return LinearGeometry()


def _own(layer: Any) -> Any:
    return layer.weight


KINDS: dict[type[nn.Module], Kind] = {
    **{
        stock: Kind(stock, ConvGeometry.of, _own, dimensions)
        for stock, dimensions in ((nn.Conv1d, 3), (nn.Conv2d, 4), (nn.Conv3d, 5))
    },
    **{
        stock: Kind(stock, TransposedConvGeometry.of, _own, dimensions)
        for stock, dimensions in ((nn.ConvTranspose1d, 3), (nn.ConvTranspose2d, 4), (nn.ConvTranspose3d, 5))
    },
    nn.Linear: Kind(nn.Linear, _linear, _own, 0),
}


def _padded(layer: Any, x: Tensor) -> Tensor:
    """TensorFlow's "same" padding, as much as the input's size asks for."""
    if not getattr(layer, "same_pad", True):
        return x
    pads: list[int] = []
    for size, kernel, stride, dilation in zip(
        x.shape[2:], layer.weight.shape[2:], layer.stride, layer.dilation, strict=True
    ):
        whole = max((ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads = [whole // 2, whole - whole // 2, *pads]
    padded: Tensor = EXPRESSIONS[F.pad](x, pads) if any(pads) else x
    return padded


def _standardised(layer: Any) -> Tensor:
    """A weight whose values have mean 0 and variance 1 per output channel, times a gain if the layer has one."""
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
    flat = layer.weight.reshape(1, layer.out_channels, -1)
    return F.batch_norm(flat, None, None, gain, None, True, 0.0, layer.eps).reshape_as(layer.weight)


def _foreign(stock: type[nn.Module]) -> Kind | None:
    """The kind of a layer of another package, known by name so that nothing has to be imported."""
    place = (stock.__module__, stock.__qualname__)
    if place == ("transformers.pytorch_utils", "Conv1D"):  # GPT-2's linear layer, weight (I, O)
        return Kind(stock, _linear, lambda layer: layer.weight.mT, 0)
    if place == ("timm.layers.conv2d_same", "Conv2dSame"):
        return Kind(stock, ConvGeometry.of, _own, 4, _padded)
    if place in (("timm.layers.std_conv", "StdConv2d"), ("timm.layers.std_conv", "ScaledStdConv2d")):
        return Kind(stock, ConvGeometry.of, _standardised, 4)
    if place in (("timm.layers.std_conv", "StdConv2dSame"), ("timm.layers.std_conv", "ScaledStdConv2dSame")):
        return Kind(stock, ConvGeometry.of, _standardised, 4, _padded)
    return None


def kind_of(stock: type[nn.Module]) -> Kind | None:
    """The kind of a class of layers; None if it cannot be converted."""
    foreign = None if stock in KINDS else _foreign(stock)
    if foreign is not None:
        KINDS[stock] = foreign
    return KINDS.get(stock) or next(
        (kind for kind in list(KINDS.values()) if _computes_the_same(stock, kind.stock)), None
    )


def _computes_the_same(stock: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class of somebody's code adds to a base what has no part in the forward pass, such as a constructor."""
    if not issubclass(stock, base) or stock.__module__.startswith("torch."):
        return False
    added = stock.__mro__[: stock.__mro__.index(base)]
    return all(issubclass(kind, base) and not _COMPUTING & set(vars(kind)) for kind in added)


_COMPUTING = {"forward", "_conv_forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "weight", "bias"}


def register_layer(
    stock: type[nn.Module],
    geometry: Callable[[Any], Geometry] | None = None,
    weight: Callable[[Any], Tensor] | None = None,
) -> None:
    """Make a class of layers one that `convert` takes.

    Such a layer computes what a convolution or a linear layer does, of one input, with a weight and a `bias` that may
    be None. Register it before a converted model is unpickled. At a layer's first training step its output is compared
    with that of its own forward pass: another one is a `SettingError`.

    Args:
        stock: the class itself; its subclasses are not meant.
        geometry: of a layer, what it computes; None: a linear layer's. `ConvGeometry.of` reads it off a layer that has
            the attributes of a convolution.
        weight: of a layer, its weight as (O, I) or (O, C/g, ...), which may be computed from its parameters; None: its
            attribute `weight`.

    Raises:
        SettingError: not a class of modules.

    Example:
        lowrank.register_layer(Scaled, weight=lambda layer: layer.weight * layer.scale[:, None])
    """
    if not (isinstance(stock, type) and issubclass(stock, nn.Module)):
        raise SettingError(f"{stock!r} is no class of modules; register the class of the layer")
    dimensions = 0
    if geometry is not None:
        dimensions = next((kind.dimensions for base, kind in KINDS.items() if issubclass(stock, base)), 4)
    KINDS[stock] = Kind(stock, geometry or _linear, weight or _own, dimensions, registered=True)
