"""Weights and their gradients with one scale for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.kernels import passes
from lowrank.tensors.memory_layout import is_channels_last

_PIECE = 2**14  # numbers that are multiplied at once, at least


def per_output(vector: Tensor, ndim: int, axis: int = 1) -> Tensor:
    """A vector with one entry per output channel, shaped to multiply a tensor that has these along `axis`."""
    return vector.view([-1 if dim == axis else 1 for dim in range(ndim)])


def scaled_smaller(grad: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output gradient and weight, the smaller of them scaled, in the gradient's dtype."""
    if scale is None:
        return grad, weight.to(grad.dtype)
    if grad.numel() < weight.numel():
        return grad * per_output(scale.to(grad.dtype), 4), weight.to(grad.dtype)
    return grad, (weight * per_output(scale, 4, 0)).to(grad.dtype)


def scaled_rows(grad_weight: Tensor, scale: Tensor) -> Tensor:
    """The weight gradient times the scale, in place, unless its precision is less than the scale's."""
    rows = per_output(scale, 4, 0)
    return grad_weight.mul_(rows) if grad_weight.dtype == scale.dtype else grad_weight * rows


def row_products(weight: Tensor, grad_weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Per output channel the inner product of weight and gradient, (O,), and the gradient times the scale, if there is
    one; in one pass, where there is a kernel for these."""
    last = is_channels_last(weight)  # in which order a row's numbers are multiplied is all the same
    a, b = (one.movedim(1, -1) if last else one for one in (weight, grad_weight.to(weight.dtype)))
    shape, a, b = b.shape, a.flatten(1), b.flatten(1)
    found = passes.row_products(a, b, scale)
    if found is not None:
        b = b.view(shape)
        return found, None if scale is None else b.movedim(-1, 1) if last else b
    if weight.is_cuda:
        found = torch.bmm(a[:, None], b[:, :, None]).view(-1)
    else:
        piece = max(_PIECE, a.numel() // 32)  # whose products are there at once
        rows = max(1, piece // a.shape[1])  # a batch of single products takes several times as long on a CPU
        found = torch.cat([(x * y).sum(1) for x, y in zip(a.split(rows), b.split(rows), strict=True)])
    return found, None if scale is None else scaled_rows(grad_weight, scale)
