"""Batch normalisation that does not keep its input while it uses its running statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.recompute import note_layer, stock_batch_norm
from lowrank.layers.activated import is_activatable
from lowrank.layers.autograd_function import (
    Call,
    MergedNormFunction,
    again_merged,
    merged_output,
    normalised_strides,
    scale_and_shift,
)
from lowrank.layers.held import hold
from lowrank.layers.lazy import READERS, Lazy, real, unread
from lowrank.layers.scaling import per_output
from lowrank.methods.base import Tensors
from lowrank.tensors.eager import trains_plainly, without_autocast


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, which with running statistics need not keep its input.

    Of a convolution's unread output it computes both at once, and keeps nothing. Of another input it keeps one number
    per channel, if its scale is frozen. In all other cases it is the stock function.
    """
    y = None
    stored = running_mean is not None and running_var is not None and running_mean.shape == input.shape[1:2]
    if stored and not training and trains_plainly(input, weight, bias):
        assert running_mean is not None
        assert running_var is not None
        with without_autocast(input.device.type):
            y = _with_less(input, weight, bias, running_mean, running_var, eps)
    if y is not None:
        return y
    return stock_batch_norm(real(input), running_mean, running_var, weight, bias, training, momentum, eps)


LEAN_FUNCTIONS[F.batch_norm] = READERS[F.batch_norm] = batch_norm


def _with_less(
    input: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor | None:
    call = unread(input, Call)
    if call is not None and call.is_from_here():
        assert isinstance(input, Lazy)
        return _merged(input, call, gamma, beta, mean, variance, eps)
    if input.requires_grad and input.ndim == 4 and (gamma is None or not gamma.requires_grad):
        return _scaled(real(input), gamma, beta, mean, variance, eps)
    return None


def _merged(
    y: Lazy, call: Call, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor | None:
    """Convolution and normalisation in one; None where keeping the convolution's output takes less."""
    if not any(tensor is not None and tensor.requires_grad for tensor in (y, gamma, beta)):
        return _frozen(y, call, *scale_and_shift(call.bias, gamma, beta, mean, variance, eps))
    settings = call.settings
    kept: Tensors = ()
    if gamma is not None and gamma.requires_grad:
        y_bytes = y.numel() * settings.dtype.itemsize
        stays = y_bytes < call.x.nbytes or call.x.is_inference()  # which no node may keep
        if not call.weight.requires_grad and settings.method.keeps_input and stays:
            return None
        method, kept = call.keep()
        settings = replace(settings, method=method)
    z: Tensor = MergedNormFunction.apply(y, gamma, beta, mean, variance, eps, call, settings, *kept)
    if call.ahead is not None:
        note_layer(
            call.ahead, z, again_merged(y, call, eps), (call.weight, call.bias, gamma, beta, mean, variance), call.cost
        )
    return z


def _frozen(y: Lazy, call: Call, scale: Tensor, shift: Tensor) -> Tensor:
    """A convolution with other parameters; unread, where the activation behind can be computed with it as well."""
    if not is_activatable(call, y):
        return merged_output(y, call, scale, shift)
    call.require_unchanged()
    merged = Call(call.settings, call.x, call.weight * per_output(scale, 4, 0), shift, call.keep)
    z = Lazy(tuple(y.shape), call.x, y.dtype, normalised_strides(y), merged.output, merged, y._watched)
    hold(call.x, z)
    return z


def _scaled(
    input: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Keeps the scale alone, since only the input and the shift want a gradient."""
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return torch.addcmul(per_output(shift, 4), input, per_output(scale, 4)).to(input.dtype)
