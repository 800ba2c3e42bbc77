"""The classifier of a head keeps its input exactly, in about half the memory.

The papers train `conv_seg` and do not compress its input, which is the output of a ReLU: about half of it is zero. So
its other values and one bit per element say all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from lowrank import LayerCost, Method, Vanilla, converted_layers
from lowrank.conversion.convert import adopt
from lowrank.exact.bits import CHUNK, pack, spread
from lowrank.layers.layer import LowRankLayer, can_be_converted, weight_of


@dataclass(frozen=True)
class Nonzero(Method):
    """Keep the input exactly: one bit per element and the values that are not zero; the input itself if that is less.

    Values and gradients are those of `Vanilla`, up to the order of summation over the batch.
    """

    @property
    def tag(self) -> str:
        return "nonzero"

    def compress(self, x: Tensor, geometry: Any, state: Any, name: str) -> tuple[Any, Any]:
        if torch.compiler.is_compiling():  # how many values there are is not known then
            return (x,), ()
        flat = x.contiguous().view(-1)
        count = int(torch.count_nonzero(flat))
        if flat.numel() // 8 + count * x.element_size() >= x.nbytes:
            return (x,), ()
        bits, _ = pack(flat, lambda ones, piece, out: torch.ne(piece, 0, out=out))
        values, start = flat.new_empty(count), 0
        for piece in flat.split(CHUNK):  # so that the work space stays small
            found = piece[piece != 0]
            values[start : start + len(found)] = found
            start += len(found)
        return (bits, values), ()

    def weight_gradient(self, kept: Any, grad: Tensor, geometry: Any, shape: tuple[int, ...]) -> Tensor:
        if len(kept) == 1:
            gradient: Tensor = geometry.weight_gradient(kept[0], grad)
            return gradient
        bits, values = kept
        pairs = zip(_samples(bits, values, shape), grad, strict=True)
        gradients = (geometry.weight_gradient(x[None], g[None]) for x, g in pairs)
        return reduce(torch.add, gradients)

    def cost(self, x: Tensor, geometry: Any, out_channels: int, input_gradient: bool) -> LayerCost:
        kept, _ = self.compress(x, geometry, (), "")
        exact = Vanilla().cost(x, geometry, out_channels, input_gradient)
        return LayerCost(self.formula_bytes(kept, tuple(x.shape)), exact.flops_paper, exact.flops)


def _samples(bits: Tensor, values: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The input, one sample after the other, so that it never takes its whole memory."""
    start, size = 0, prod(shape[1:])
    for first in range(0, shape[0] * size, size):
        whole = spread(bits[first // 8 : -(-(first + size) // 8)])  # a sample may begin inside of a byte
        mask = whole[first % 8 :][:size].view(shape[1:])
        count = int(mask.sum())
        yield values.new_zeros(shape[1:]).masked_scatter_(mask, values[start : start + count])
        start += count


def keep_nonzero(model: nn.Module) -> None:
    """Make the trained classifier of every head keep its input as `Nonzero`, in place.

    A classifier that a method was chosen for stays with that method. `lowrank.revert` takes it back.
    """
    chosen = set(converted_layers(model))
    for name, head in model.named_modules():
        if isinstance(head, BaseDecodeHead):
            layer = head.conv_seg
            if layer in chosen or not can_be_converted(layer) or not weight_of(layer).requires_grad:
                continue
            if isinstance(layer, LowRankLayer):
                layer._lowrank.method = Nonzero()
            else:
                adopt(layer, Nonzero(), f"{name}.conv_seg" if name else "conv_seg")
