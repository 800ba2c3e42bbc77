"""A part of a tensor's fibres, spread over all of it, on which a basis is iterated in the place of all.

Thousands of fibres tell the few leading directions of a mode as well as all of them do, so most of the products of an
iteration can be spared. In every sample of the batch other ones are taken, such that each place of the other modes is
in the part about as often as any other; and so in every pass, so that numbers that lie where one pass takes none are
taken by another, of one in k all in k passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from zlib import crc32

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
_EVEN = 8  # of the planes of a sample, that are many, at most one in so many is not in each turn


def share_of(shape: Sequence[int], mode: int, rank: int) -> int:
    """Which fibres of a mode a basis is iterated on.

    With `left` the product of the sizes ahead of the mode and `right` that of those behind it, as in memory, a fibre
    has a place in `left`, which is a sample b of the batch and a place c of the other modes ahead, and one in `right`.

    Args:
        shape: sizes, from the slowest to the fastest in memory; the first is the batch.
        mode: position in `shape`.
        rank: columns of the basis.

    Returns:
        1: all of them. A greater k: those of (b + turn) % k = c % k. A lesser one, -k: of each b and c the R // k
        places behind ahead + (b + c + turn) % k * (R // k), R being `right`. Turn and ahead: see `turn_of`. One in k of
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
    """Numbers of the fibres that `share_of` names, in the first pass."""
    share = share_of(shape, mode, rank)
    first, rest, right = shape[0], prod(shape[1:mode]), prod(shape[mode + 1 :])
    if share == 1:
        return prod(shape)
    if share > 0:
        return sum(count * len(range(c, rest, share)) for c, count in _samples(first, share)) * shape[mode] * right
    return prod(shape) // right * (right // -share)


def _samples(first: int, share: int, turn: int = 0) -> list[tuple[int, int]]:
    """The first place that is taken in the samples b, b + share, ..., and their number, for each b in turn."""
    return [((b + turn) % share, len(range(b, first, share))) for b in range(min(share, first))]


def is_large(shape: Sequence[int]) -> bool:
    """Whether bases of a tensor, or of what some of its modes leave, may be iterated on a part."""
    return prod(shape) >= _LEAST


def turn_of(passes: int, right: int, share: int) -> tuple[int, int]:
    """Which fibres are in turn.

    In each round of k passes every turn comes once. Rounds begin at drawn ones, so that all come in time also in every
    second or n-th pass, which are those that count where activations are computed again in the backward pass, or bases
    are kept for some steps.

    Args:
        passes: that were made before.
        right: the product of the sizes behind the mode.
        share: as `share_of` returns it; or 0, of none.

    Returns:
        The turn, from 0 to k - 1; and with a negative share the number of places that are left out ahead of all the
        others: none, or, in every second pass or so, as many as k does not divide, which are left out behind otherwise.
    """
    turns = abs(share)
    if turns <= 1:
        return 0, 0
    cycle, at = divmod(passes, turns)
    return (at + _drawn(cycle)) % turns, _drawn(passes) % 2 * (right % turns) if share < 0 else 0


def _drawn(number: int) -> int:
    """A number that looks random, the same for the same one; 0 for the first."""
    return crc32(b"%d" % number) >> 8 if number else 0


def sampled(x: Tensor, mode: int, share: int, turn: int = 0, ahead: int = 0) -> tuple[Tensor, int]:
    """The fibres of a mode that `share_of` names, and the place of the mode among them.

    Args:
        x: contiguous.
        mode: position in `x.shape`.
        share: as `share_of` returns it for `x`.
        turn, ahead: as `turn_of` returns them.
    """
    if share == 1:
        return x, mode
    first, n, right = x.shape[0], x.shape[mode], prod(x.shape[mode + 1 :])
    rest = prod(x.shape[1:mode])
    if share > 1:
        planes = x.view(first, rest, n, right)
        parts = [planes[b::share, c::share] for b, (c, _) in enumerate(_samples(first, share, turn))]
        return _joined(parts), 1
    some = right // -share
    blocks = x.view(first * rest, n, right)[..., ahead : ahead + some * -share].unflatten(2, (-share, some))
    places = torch.arange(first * rest, device=x.device)
    turns = (places // rest + places % rest + turn) % -share
    return blocks.movedim(2, 1)[places, turns], 1


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors (b, c, n, right), of one n and right, one behind the other, (b c + ..., n, right)."""
    if len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts).flatten(0, 1)
    return torch.cat([part.flatten(0, 1) for part in parts])
