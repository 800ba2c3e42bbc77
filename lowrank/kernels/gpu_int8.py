"""Numbers in int8 with a scale in bfloat16 for each column or block, and back, on a GPU; see `lowrank.tensors.storage`.

One kernel each in Triton, and the same numbers as of PyTorch's operators.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32  # numbers of the core that have one scale
_BLOCKS = 64  # that one program takes
_ROWS, _TILE = 2**13, 2**10  # of a column that is taken; numbers of a tile
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even


@triton.jit
def _scale(magnitude):
    """The bits of the scale for a largest magnitude, given as its bits: they are in its order, NaN the largest."""
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), 127.0)
    bits = tl.where(scale < 1e-30, 1e-30, scale).to(tl.int32, bitcast=True)
    return tl.where(scale == scale, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)  # to the nearest, ties to even


@triton.jit
def _rounded(x, scale):
    q = tl.div_rn(x, scale)
    q = tl.where(q == q, tl.minimum(tl.maximum(q, -127.0), 127.0), 0.0)  # NaN: 0, which times its scale is NaN
    return ((q + _WHOLE) - _WHOLE).to(tl.int8)


@triton.jit
def _round(x, values, scales, count, groups, across, along, length, ACROSS: tl.constexpr, ALONG: tl.constexpr):
    """Of `count` numbers those of each scale: `length` of them, `along` apart, and `across` from those of the next."""
    group = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)[:, None]
    one = tl.arange(0, ALONG)[None, :]
    place = group.to(tl.int64) * across + one * along
    there = (group < groups) & (one < length) & (place < count)
    number = tl.load(x + place, mask=there, other=0.0)
    scale = _scale(tl.max(number.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)[:, None])
    wide = (scale << 16).to(tl.float32, bitcast=True)
    tl.store(values + place, _rounded(number, tl.broadcast_to(wide, number.shape)), mask=there)
    tl.store(scales + group, scale.to(tl.int16), mask=group < groups)


@triton.jit
def _restore(values, scales, out, count, across, among, TILE: tl.constexpr):
    """Times the scale of its group: the place over `across`, or what is left of it over `among`."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = place < count
    scale = tl.load(scales + place // across % among, mask=there, other=0.0).to(tl.float32)
    tl.store(out + place, tl.load(values + place, mask=there, other=0).to(tl.float32) * scale, mask=there)


def round_columns(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """See `rounding.round_columns`."""
    n, r = x.shape
    if x.dtype != torch.float32 or not 0 < n <= _ROWS or not r:
        return None
    along = triton.next_power_of_2(n)
    return _rounding(x, r, (1, r, n), max(1, _TILE // along), along)


def round_blocks(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """See `rounding.round_blocks`."""
    groups = triton.cdiv(x.numel(), _BLOCK)
    if x.dtype != torch.float32 or not groups:
        return None
    return _rounding(x, groups, (_BLOCK, 1, _BLOCK), _BLOCKS, _BLOCK)


def _rounding(x: Tensor, groups: int, sizes: tuple[int, int, int], across: int, along: int) -> tuple[Tensor, Tensor]:
    values, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(groups, dtype=torch.bfloat16)
    with torch.cuda.device_of(x):
        programs = (triton.cdiv(groups, across),)
        _round[programs](x, values, scales.view(torch.int16), x.numel(), groups, *sizes, ACROSS=across, ALONG=along)
    return values, scales


def restore_columns(values: Tensor, scales: Tensor) -> Tensor:
    """See `rounding.restore_columns`."""
    return _restored(values, scales, 1)


def restore_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """See `rounding.restore_blocks`."""
    return _restored(values, scales, _BLOCK)


def _restored(values: Tensor, scales: Tensor, across: int) -> Tensor:
    out, count = torch.empty_like(values, dtype=torch.float32), values.numel()
    if count:
        with torch.cuda.device_of(values):
            _restore[(triton.cdiv(count, _TILE),)](values, scales, out, count, across, len(scales), TILE=_TILE)
    return out
