"""Stock modules' own operators, called with less Python ahead of them than the stock forward pass has.

What is left whole takes the stock module's time, plus that of finding out that it is to be left whole; this takes off
more than that adds. Each function calls the operator that the stock forward pass comes to, with the same arguments, or
gives None, where that may come to another one or where somebody sees the functions on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BATCH_NORM, _RELU = F.batch_norm, F.relu
_ABSENT = object()  # of a parameter that is computed, which is an attribute or a property then


def _convolution(m: Any, input: Tensor) -> Tensor | None:
    own = m._parameters
    weight, bias = own.get("weight"), own.get("bias", _ABSENT)
    if weight is None or bias is _ABSENT or m.padding_mode != "zeros" or _is_seen():
        return None
    if "_conv_forward" in m.__dict__ or F.conv2d is not torch.conv2d:  # somebody's own
        return None
    return torch.conv2d(input, weight, bias, m.stride, m.padding, m.dilation, m.groups)


def _linear(m: Any, input: Tensor) -> Tensor | None:
    own = m._parameters
    weight, bias = own.get("weight"), own.get("bias", _ABSENT)
    return None if weight is None or bias is _ABSENT or _is_seen() else F.linear(input, weight, bias)


def _normalisation(m: Any, input: Tensor) -> Tensor | None:
    if m.training or input.ndim != 4 or F.batch_norm is not _BATCH_NORM or _is_seen():
        return None
    own, buffers = m._parameters, m._buffers
    weight, bias = own.get("weight"), own.get("bias")
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter:
        return None
    if type(mean) is not Tensor or type(variance) is not Tensor:
        return None
    momentum = 0.0 if m.momentum is None else m.momentum
    return torch.batch_norm(input, weight, bias, mean, variance, False, momentum, m.eps, torch._C._get_cudnn_enabled())


def _hardtanh(m: Any, input: Tensor) -> Tensor | None:
    if not m.inplace or m.min_val > m.max_val or _is_seen():
        return None
    return F.hardtanh_(input, m.min_val, m.max_val)


def _relu(m: Any, input: Tensor) -> Tensor | None:
    if F.relu is not _RELU or _is_seen():
        return None
    return torch.relu_(input) if m.inplace else torch.relu(input)


def _is_seen() -> bool:
    """Whether a mode sees the functions of `torch.nn.functional`, or a compiler or tracer how parameters are read."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_function_stack() > 0


def nothing(m: Any, input: Tensor) -> Tensor | None:
    """Of a module of another kind."""
    return None


DIRECT: dict[type[nn.Module], Callable[[Any, Tensor], Tensor | None]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _normalisation,
    nn.ReLU: _relu,
    nn.ReLU6: _hardtanh,
    nn.Hardtanh: _hardtanh,
}
