"""A part of a tensor's fibres, spread over all of it, on which a basis is iterated in the place of all.

Thousands of fibres tell the few leading directions of a mode as well as all of them do, so most of the products of an
iteration can be spared. In every sample of the batch other ones are taken, such that each place of the other modes is
in the part as often as any other, but the last planes where the share does not divide their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lowrank.tensors.eager import remembered

_SHARES = (16, 12, 8, 4, 3, 2)  # one in so many fibres
_OF_PLANES, _OF_FEW = (16, 8, 4, 2), (4, 2)  # of planes; of few samples
_OF_IMAGES = (16, 12, 3)  # of the places of whole images alone, of which a vector is taken
_LEAST = 2**18  # numbers of a tensor that is worth it
_FIBRES = 128  # that are taken, for each column of the basis
_COLUMNS, _VECTOR = 8, 16  # next to each other, at least
_MANY = 32  # samples; less are few
_EVEN = 8  # at most one plane in so many is never taken, of many planes


def share_of(shape: Sequence[int], mode: int, rank: int) -> int:
    """Which fibres of a mode a basis is iterated on.

    With `left` the product of the sizes ahead of the mode and `right` that of those behind it, as in memory, a fibre
    has a place in `left`, which is a sample b of the batch and a place c of the other modes ahead, and one in `right`.

    Args:
        shape: sizes, from the slowest to the fastest in memory; the first is the batch.
        mode: position in `shape`.
        rank: columns of the basis.

    Returns:
        1: all of them. A greater k: those of c = b % k, b % k + k, b % k + 2 k, ..., C // k of the C in each sample.
        A lesser one, -k: of each b and c the R // k places behind (b + c) % k * (R // k), R being `right`. One in k of
        the fibres is taken, with k 2 or 4 or, from 32 samples on, 8 or 16 or, of images, 3 or 12: the greatest that
        leaves 128 of them for each column of the basis.
    """
    return _share_of(tuple(shape), mode, rank)


@remembered
def _share_of(shape: tuple[int, ...], mode: int, rank: int) -> int:
    if mode == 0 or prod(shape) < _LEAST:
        return 1
    first, rest, right = shape[0], prod(shape[1:mode]), prod(shape[mode + 1 :])
    for share in _SHARES:
        if first * rest * right < share * _FIBRES * rank or (first < _MANY and share not in _OF_FEW):
            continue
        even = share < _SHARES[0] or _EVEN * (rest % share) <= rest
        if share in _OF_PLANES and first >= 2 * share and rest >= share and even:
            return share
        if share in _OF_IMAGES and (rest > 1 or right < share * _VECTOR):
            continue
        if right >= share * _COLUMNS and first * rest >= share:  # or some of the columns would never be taken
            return -share
    return 1


def taken(shape: Sequence[int], mode: int, rank: int) -> int:
    """Numbers of the fibres that `share_of` names."""
    share = share_of(shape, mode, rank)
    if share > 0:
        return prod(shape) // prod(shape[1:mode]) * (prod(shape[1:mode]) // share)
    right = prod(shape[mode + 1 :])
    return prod(shape) // right * (right // -share)


def sampled(x: Tensor, mode: int, share: int) -> tuple[Tensor, int]:
    """The fibres of a mode that `share_of` names, and the place of the mode among them.

    Args:
        x: contiguous.
        mode: position in `x.shape`.
        share: as `share_of` returns it for `x`.
    """
    if share == 1:
        return x, mode
    first, n, right = x.shape[0], x.shape[mode], prod(x.shape[mode + 1 :])
    rest = prod(x.shape[1:mode])
    if share > 1:
        planes = x.view(first, rest, n, right)[:, : rest // share * share].unflatten(1, (-1, share))
        return torch.cat([planes[b::share, :, b] for b in range(share)]), 2
    some = right // -share
    blocks = x.view(first * rest, n, right)[..., : some * -share].unflatten(2, (-share, some))
    places = torch.arange(first * rest, device=x.device)
    turn = (places // rest + places % rest) % -share
    return blocks.movedim(2, 1)[places, turn], 1
