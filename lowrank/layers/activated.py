"""A frozen convolution and the ReLU6 or Hardtanh behind it as one operator of oneDNN, which saves a pass over memory.

What comes out is bounded, so the next such operator need not look for NaN in it. (Behind a ReLU it would have to, which
takes what the operator saves.) oneDNN's activations turn NaN into a number, so the operator is used only where all of
its inputs are finite. PyTorch does not promise this operator: where it is missing, or an input is not of its kind, the
activation is done as ever.
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

LEAST = 2**19  # elements of an output, below which it stays in the cache, where an activation costs next to nothing
_BOUNDED: Notes[bool] = Notes()  # outputs between two finite limits, whose values need no look


def is_activatable(call: Call, y: Tensor) -> bool:
    """Whether there is such an operator for this convolution, and it pays for its output `y`."""
    if y.numel() < LEAST:
        return False
    x, geometry = call.x, call.settings.geometry
    plain = x.device.type == "cpu" and x.dtype == call.weight.dtype == torch.float32 == call.settings.dtype
    native = isinstance(geometry, ConvGeometry) and geometry.native
    return bool(plain and native and _operator() is not None and torch.backends.mkldnn.enabled)


def _operator() -> Callable[..., Tensor] | None:
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def _activated(y: Tensor, low: float, high: float, inplace: bool) -> Tensor | None:
    call = None if y.requires_grad else unread(y, Call)
    if call is None or not is_activatable(call, y):
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
    z = operator(x, weight, bias, *sizes, "hardtanh", [low, high], "")
    if z.stride() != y.stride():
        return None
    if inplace:
        y.replace(z)  # type: ignore[attr-defined]
    if math.isfinite(low) and math.isfinite(high):
        _BOUNDED.note(z, True)
    return z


def _finite(*tensors: Tensor | None) -> bool:
    """Whether the tensors' sums are finite; so are then all values."""
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors if tensor is not None)


def _relu6(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _activated(input, 0.0, 6.0, inplace)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor | None:
    return _activated(input, float(min_val), float(max_val), inplace)


READERS |= {F.relu6: _relu6, F.hardtanh: _hardtanh}
