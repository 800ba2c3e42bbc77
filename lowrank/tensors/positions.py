"""Weight gradients of convolutions on small images, from pairs of an input and an output position.

A weight's gradient is the sum, over the pairs of positions that are as far apart as its place in the kernel says, of
the inputs times the output gradients there. On the CPU backward convolutions are slow where most of the kernel lies on
the padding, and, with a group for each channel, for all kernels but 3 x 3. There these products take 2 to 40 times
less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lowrank.kernels import passes
from lowrank.tensors.memory_layout import is_channels_last

Sizes = tuple[int, ...]
FAST = (3, 3)  # the kernel for which a depthwise convolution is fast
_MOST_POSITIONS = 8  # of a depthwise layer's input for each weight of a kernel; all pairs are computed
_MANY_WEIGHTS = 8  # for each number of a sample: then the products take less than adding one up for each sample
_TOGETHER = 16  # samples of which copies are made, on a CPU: those of more leave the cache
_AT_ONCE = 2**18  # pairs of positions, over all channels


@dataclass(frozen=True)
class Pairs:
    """The pairs of positions that a kernel joins, in the order of its weights; (n,) each.

    Attributes:
        inputs, outputs: positions in the image, row by row.
        weights: places in the kernel.
    """

    inputs: Tensor
    outputs: Tensor
    weights: Tensor


@lru_cache(maxsize=1024)
def joined_pairs(inputs: Sizes, outputs: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Pairs:
    """Of a convolution, each setting with one number a dimension; `padding` is that ahead of the image."""
    places = torch.zeros(1, 1, dtype=torch.long)  # in the kernel, (P, Q); below zero where a pair is not joined
    for n, m, k, s, pad, d in zip(inputs, outputs, kernel, stride, padding, dilation, strict=True):
        apart = torch.arange(n)[:, None] + pad - s * torch.arange(m)[None]
        joined = (apart >= 0) & (apart < d * k) & (apart % d == 0)
        along = torch.where(joined, apart // d, -prod(kernel))[None, :, None]
        places = (places[:, None, :, None] * k + along).reshape(places.shape[0] * n, places.shape[1] * m)
    p, q = torch.where(places >= 0)
    order = torch.argsort(places[p, q], stable=True)
    return Pairs(p[order], q[order], places[p, q][order])


def pays(x: Tensor, kernel: Sizes, groups: int, out_channels: int) -> bool:
    """Whether pairs take less time than a backward convolution; `x` is the input (B, C, ...). Not in a compiled graph,
    which finding the pairs would break, as their number depends on numbers."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    size, positions = prod(kernel), prod(x.shape[2:])
    if groups == 1:
        return positions < size
    if not groups == x.shape[1] == out_channels:
        return False
    return positions < size if kernel == FAST else positions <= _MOST_POSITIONS * size


def weight_gradient(x: Tensor, grad: Tensor, pairs: Pairs, kernel: Sizes, groups: int) -> Tensor:
    """Weight gradient of a layer without groups, or with one for each channel.

    Args:
        x: input (B, C, ...).
        grad: of the output, (B, O, ...), in the input's dtype.
        pairs: that the layer joins.
        kernel: of the layer.
        groups: 1, or C, which then is O.

    Returns:
        (O, C / groups, ...), the kernel behind; without groups with its channels last in memory, where the input has.
    """
    last = is_channels_last(x)
    x, grad = x.flatten(2), grad.flatten(2)
    found = _dense(x, grad, pairs, prod(kernel), last) if groups == 1 else _depthwise(x, grad, pairs, prod(kernel))
    return found.view(grad.shape[1], -1, *kernel)


def sum_of_products(x: Tensor, grad: Tensor) -> Tensor:
    """Weight gradient of a 1 x 1 convolution, (O, C): per sample a product of the output's gradient, (B, O, ...), and
    the input, (B, C, ...), both contiguous; of few positions several samples in one."""
    x, grad = x.flatten(2), grad.flatten(2)
    channels, outputs = x.shape[1], grad.shape[1]
    halves = x.element_size() < 4  # in which a sum over many samples, made one by one, is far off
    if not halves and channels * outputs < _MANY_WEIGHTS * (channels + outputs) * x.shape[2]:
        return torch.addbmm(grad.new_empty(outputs, channels), grad, x.mT, beta=0)
    if halves or x.shape[0] <= _TOGETHER or x.device.type != "cpu":
        return _side_by_side(grad) @ _side_by_side(x).mT
    total = grad.new_zeros(outputs, channels)
    for some_x, some_grad in zip(x.split(_TOGETHER), grad.split(_TOGETHER), strict=True):
        total.addmm_(_side_by_side(some_grad), _side_by_side(some_x).mT)
    return total


def _side_by_side(x: Tensor) -> Tensor:
    """A copy (C, B P) of all samples of (B, C, P)."""
    return passes.swapped(x).flatten(1)


def _dense(x: Tensor, grad: Tensor, pairs: Pairs, size: int, last: bool) -> Tensor:
    """Per weight of the kernel one matrix product, (O, C, size); last: C is last in memory."""
    x, grad = (tensor.permute(2, 0, 1).contiguous() for tensor in (x, grad))  # a position ahead: (P, B, C), (Q, B, O)
    found = x.new_empty(size, grad.shape[2], x.shape[2])
    counts = torch.bincount(pairs.weights, minlength=size).tolist()
    for at, (p, q) in enumerate(zip(pairs.inputs.split(counts), pairs.outputs.split(counts), strict=True)):
        torch.mm(grad[q].flatten(0, 1).mT, x[p].flatten(0, 1), out=found[at])
    return found.transpose(0, 1).contiguous().mT if last else found.permute(1, 2, 0).contiguous()


def _depthwise(x: Tensor, grad: Tensor, pairs: Pairs, size: int) -> Tensor:
    """All pairs of a channel in one matrix product, a few channels at a time, (C, size)."""
    (_, channels, positions), outputs = x.shape, grad.shape[2]
    found = x.new_zeros(channels, size)
    places = pairs.inputs * outputs + pairs.outputs
    each = max(_AT_ONCE // (positions * outputs), 1)
    for rows, some_x, some_grad in zip(found.split(each), x.split(each, 1), grad.split(each, 1), strict=True):
        products = torch.bmm(some_x.permute(1, 2, 0), some_grad.permute(1, 0, 2)).flatten(1)
        rows.index_add_(1, pairs.weights, products.index_select(1, places))
    return found
