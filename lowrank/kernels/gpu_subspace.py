"""Subspace iterations on a GPU in Triton: fewer and shorter kernels than PyTorch's operators start.

PyTorch multiplies; its QR decomposition takes ten times as long as the one here, which one program makes in registers.
No number is asked for, so that nothing waits for the GPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 2**14  # numbers of a basis that one program holds
_ROWS, _FIBRES = 32, 64  # of a tile that is copied
_A_WARP, _MOST_WARPS = 512, 16  # numbers


@triton.jit
def _take(
    x, out, fibres, right, rest, size, share, turn, ahead,
    PLANES: tl.constexpr, ROWS: tl.constexpr, FIBRES: tl.constexpr,
):  # fmt: skip
    """The fibres of a share, see `lowrank.tensors.sample.share_of`; zeros for planes that a sample has one less of."""
    at = tl.program_id(0).to(tl.int64) * FIBRES + tl.arange(0, FIBRES)[None, :]
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if PLANES:
        most = tl.cdiv(rest, share)
        behind, before = at % right, at // right
        sample = before // most
        place = (sample + turn) % share + share * (before % most)
    else:
        some = right // share
        before = at // some
        sample, place = before // rest, before % rest
        behind = ahead + (sample + place + turn) % share * some + at % some
    begin = (sample * rest + place) * size * right + behind
    there = (at < fibres) & (row < size)
    number = tl.load(x + begin + row * right, mask=there & (place < rest), other=0.0)
    tl.store(out + row * fibres + at, number, mask=there)


@triton.jit
def _orthonormal(image, start, some, out, n, r, PART: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """Q of the QR decomposition of an image (n, r), by Householder's reflections, with LAPACK's signs.

    A column of zeros is drawn anew: from unit vectors, where `x` may hold nothing, an iteration would not come away. Of
    a part of all there is, of zeros alone (not `some`), the start stays.
    """
    row, column = tl.arange(0, N), tl.arange(0, R)
    there = (row[:, None] < n) & (column[None, :] < r)
    place = row[:, None] * r + column[None, :]
    a = tl.load(image + place, mask=there, other=0.0)
    a = tl.where(tl.abs(a) < float("inf"), a, 0.0)
    held = tl.max(tl.abs(a), 0)
    other = tl.where(there, tl.rand(233, place) - 0.5, 0.0)
    if PART:
        old = tl.load(start + place, mask=there, other=0.0)
        other = tl.where(tl.load(some) != 0, other, tl.where(tl.abs(old) < float("inf"), old, other))
    a = tl.where(held[None, :] > 0, a, other)
    taus = tl.zeros((R,), tl.float32)
    for k in range(r):
        this = (column[None, :] == k) & (row[:, None] >= k)
        v = tl.sum(tl.where(this, a, 0.0), 1)
        largest = tl.max(tl.abs(v), 0)
        v = v / tl.where(largest > 0, largest, 1.0)  # of which the squares are in range
        alpha = tl.sum(tl.where(row == k, v, 0.0), 0)
        squares = tl.sum(tl.where(row > k, v * v, 0.0), 0)
        norm = tl.sqrt(alpha * alpha + squares)
        beta = tl.where(alpha < 0, norm, -norm)
        tau = tl.where(squares > 0, (beta - alpha) / beta, 0.0)
        w = tl.where(row > k, v / tl.where(squares > 0, alpha - beta, 1.0), tl.where(row == k, 1.0, 0.0))
        along = tau * tl.sum(a * w[:, None], 0)
        a -= tl.where(column[None, :] > k, w[:, None] * along[None, :], 0.0)
        a = tl.where(this, w[:, None], a)
        taus = tl.where(column == k, tau, taus)
    q = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    for back in range(r):
        k = r - 1 - back
        w = tl.sum(tl.where((column[None, :] == k) & (row[:, None] >= k), a, 0.0), 1)
        tau = tl.sum(tl.where(column == k, taus, 0.0), 0)
        q -= w[:, None] * (tau * tl.sum(q * w[:, None], 0))[None, :]
    tl.store(out + place, q, mask=there)


def iterate(x: Tensor, mode: int, start: Tensor, share: int, turn: int = 0, ahead: int = 0) -> Tensor | None:
    """See `iterations.iterate`."""
    if x.dtype != torch.float32 or start.dtype != torch.float32 or not _fits(*start.shape):
        return None
    unfolding = _unfolding(x, mode, share, turn, ahead)
    some = None if share == 1 else unfolding.any().view(torch.uint8)
    return orthonormal(unfolding @ (start.mT @ unfolding).mT, start, some)


def _unfolding(x: Tensor, mode: int, share: int, turn: int, ahead: int) -> Tensor:
    """The fibres of a share, (n, fibres); a view, where that is one."""
    first, n, rest, right = x.shape[0], x.shape[mode], prod(x.shape[1:mode]), prod(x.shape[mode + 1 :])
    if share == 1 and mode == 0:
        return x.view(n, right)
    if share == 1 and right == 1:
        return x.view(-1, n).mT
    fibres = first * triton.cdiv(rest, share) * right if share > 0 else first * rest * (right // -share)
    found = x.new_empty(n, fibres)
    if found.numel():
        programs = triton.cdiv(fibres, _FIBRES), triton.cdiv(n, _ROWS)
        sizes = fibres, right, rest, n, abs(share), turn, ahead
        with torch.cuda.device_of(x):
            _take[programs](x, found, *sizes, PLANES=share > 0, ROWS=_ROWS, FIBRES=_FIBRES)
    return found


def orthonormal(image: Tensor, start: Tensor, some: Tensor | None) -> Tensor:
    """An orthonormal basis of the columns of an image (n, r), r at most n; NaN and infinite numbers count as zero.

    Args:
        image: of a start, (n, r).
        start: in whose place the image stands, see the kernel.
        some: of a part of all fibres, whether there is anything but zeros, a byte.
    """
    n, r = image.shape
    image, basis = image.contiguous(), image.new_empty(n, r)
    high, wide = triton.next_power_of_2(n), triton.next_power_of_2(r)
    warps = max(1, min(high * wide // _A_WARP, _MOST_WARPS))
    with torch.cuda.device_of(image):
        _orthonormal[(1,)](image, start, some, basis, n, r, PART=some is not None, N=high, R=wide, num_warps=warps)
    return basis


def _fits(n: int, r: int) -> bool:
    return r > 0 and triton.next_power_of_2(n) * triton.next_power_of_2(r) <= _MOST
