"""A frozen convolution and the activation behind it as one operator of oneDNN, which then costs no pass over memory.

oneDNN's activations turn NaN into a number, so the operator is used only where all of its inputs are finite. PyTorch
does not promise this operator: where it is missing, or an input is not of its kind, the activation is done as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.autograd_function import Call
from lowrank.layers.lazy import READERS, unread
from lowrank.tensors.geometry import ConvGeometry
from lowrank.tensors.notes import Notes

_BOUNDED: Notes[bool] = Notes()  # outputs between two finite limits, whose values need no look


def is_activatable(call: Call) -> bool:
    """Whether there is such an operator for this convolution."""
    x, geometry = call.x, call.settings.geometry
    plain = x.device.type == "cpu" and x.dtype == call.weight.dtype == torch.float32 == call.settings.dtype
    native = isinstance(geometry, ConvGeometry) and geometry.native
    return bool(plain and native and _operator() is not None and torch.backends.mkldnn.enabled)


def _operator() -> Callable[..., Tensor] | None:
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def _activated(y: Tensor, curve: str, limits: list[float], inplace: bool) -> Tensor | None:
    call = None if y.requires_grad else unread(y, Call)
    if call is None or not is_activatable(call):
        return None
    call.require_unchanged()
    x, weight, bias, geometry = call.x, call.weight.detach(), call.bias, call.settings.geometry
    if not _finite(weight, bias, None if _BOUNDED.find(x) else x):
        return None
    bias = None if bias is None else bias.detach()
    padding = [geometry.padding[0], geometry.padding[2]]
    sizes = (padding, list(geometry.stride), list(geometry.dilation), geometry.groups)
    operator = _operator()
    assert operator is not None
    z = operator(x, weight, bias, *sizes, curve, limits, "")
    if z.stride() != y.stride():
        return None
    if inplace:
        y.replace(z)  # type: ignore[attr-defined]
    if limits and all(map(math.isfinite, limits)):
        _BOUNDED.note(z, True)
    return z


def _finite(*tensors: Tensor | None) -> bool:
    """Whether the tensors' sums are finite; so are then all values."""
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors if tensor is not None)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _activated(input, "relu", [], inplace)


def _relu6(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _activated(input, "hardtanh", [0.0, 6.0], inplace)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor | None:
    return _activated(input, "hardtanh", [float(min_val), float(max_val)], inplace)


def _relu_(input: Tensor) -> Tensor | None:
    return _relu(input, True)


for function in (F.relu, torch.relu, Tensor.relu):
    READERS[function] = _relu
for function in (F.relu_, torch.relu_, Tensor.relu_):
    READERS[function] = _relu_
READERS |= {F.relu6: _relu6, F.hardtanh: _hardtanh}
