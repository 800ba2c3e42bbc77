"""A convolution and the activation behind it as one operator of oneDNN, where nothing has to be kept for a gradient.

The activation then costs no pass over memory of its own. The operator's result is marked, and the activation's module
hands a tensor with its mark on as it is. A tensor that comes another way is activated as ever. oneDNN's activations
turn NaN into a number, so the operator is used only where its input is finite.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank.tensors.geometry import ConvGeometry, Geometry

_MARK = "_lowrank_activated_by"
_BOUNDED = "_lowrank_bounded"  # version of an output between two finite limits, whose values need no look


class Activating(Protocol):
    """A layer that may do the work of the activation behind it.

    Attributes:
        activation: the one.
        activated: whether its latest output is activated and has not reached the activation's module.
    """

    activation: nn.Module | None
    activated: bool


def forward_activated(
    layer: Activating, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The activated output of a convolution, marked; None where there is no such operator for this input."""
    operator = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.ndim == 4 and x.numel() > 0
    if operator is None or not plain or torch.compiler.is_compiling():
        return None
    if not isinstance(geometry, ConvGeometry) or not geometry.native:
        return None
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return None
    if not _finite(weight, bias, None if _is_bounded(x) else x):
        return None
    (top, _, left, _), curve, limits = geometry.padding, "relu", []
    if isinstance(layer.activation, nn.Hardtanh):  # ReLU6 is one as well
        curve, limits = "hardtanh", [float(layer.activation.min_val), float(layer.activation.max_val)]
    sizes = ([top, left], list(geometry.stride), list(geometry.dilation), geometry.groups)
    y: Tensor = operator(x, weight, bias, *sizes, curve, limits, "")
    setattr(y, _MARK, layer)
    if limits and all(map(math.isfinite, limits)) and not y.is_inference():
        setattr(y, _BOUNDED, y._version)
    layer.activated = True
    return y


def _is_bounded(x: Tensor) -> bool:
    """Whether `x` came from an activation with two finite limits, and was not changed in place since."""
    return not x.is_inference() and getattr(x, _BOUNDED, None) == x._version


def _finite(*tensors: Tensor | None) -> bool:
    """Whether the tensors' sums are finite; so are then all values."""
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors if tensor is not None)


def is_activated(x: Any, activation: nn.Module) -> bool:
    """Whether `x` is the marked output of a layer that does this module's work; takes the mark away."""
    layer = getattr(x, _MARK, None)
    if layer is None or layer.activation is not activation:
        return False
    delattr(x, _MARK)
    layer.activated = False
    return True
