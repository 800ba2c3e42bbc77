"""One bit per element: boolean masks, packed and unpacked with whole-word arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lowrank.tucker import in_memory_order

# A word holds eight bytes that are 0 or 1. The product moves the lowest bit of byte i to bit 56 + i; no two terms meet,
# so nothing carries.
GATHER = 0x0102040810204080
CHUNK = 2**20  # elements that are handled at once, so that the work space stays small


def pack(x: Tensor, condition: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[int]]:
    """Which elements fulfil a condition, one bit each.

    Args:
        x: any tensor.
        condition: elementwise, from a flat piece of `x` to a boolean tensor of the same size.

    Returns:
        Bytes of shape (ceil(n / 8),), uint8, for n elements in the order in which they lie in memory; and the place of
        each dimension in that order.
    """
    ordered, place = in_memory_order(x)
    flat = ordered.view(-1)
    if len(flat) <= CHUNK:
        return _pack(condition(flat)), place
    return torch.cat([_pack(condition(piece)) for piece in flat.split(CHUNK)]), place


def unpack(bits: Tensor, shape: Sequence[int], place: Sequence[int]) -> Tensor:
    """The mask that `pack` was given: boolean, of shape `shape`, in the memory order of the tensor it was made from."""
    ordered = [shape[place.index(position)] for position in range(len(shape))]
    pieces = [_unpack(piece) for piece in bits.split(CHUNK // 8)] if len(bits) > CHUNK // 8 else [_unpack(bits)]
    mask = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return mask[: prod(shape)].view(ordered).permute(list(place))


def _pack(mask: Tensor) -> Tensor:
    missing = -len(mask) % 8
    if missing:
        mask = torch.cat([mask, mask.new_zeros(missing)])
    return ((mask.view(torch.int64) * GATHER) >> 56).to(torch.uint8)


def _unpack(bits: Tensor) -> Tensor:
    return _words(bits.device).index_select(0, bits.int()).view(torch.bool)


@lru_cache(maxsize=8)
def _words(device: torch.device) -> Tensor:
    """For every byte, the word of eight booleans that it stands for: shape (256,), int64."""
    every = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (every & 1).to(torch.uint8).view(torch.int64)[:, 0]
