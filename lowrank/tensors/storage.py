"""In which form the numbers of a `Tucker` form are kept, and the bytes that this takes.

Truncation costs a weight gradient 10 to 40 %, eight bits instead of 32 half a percent. So at the same bytes the ranks
can be about three times as high in int8, and the gradient is about twice as close.

In int8 every column of a factor, and every `BLOCK` numbers of the core, have one scale in bfloat16: the largest
magnitude among them / 127. Rounding is symmetric (no zero point), to the nearest multiple of the scale, ties to even,
so a number comes back to within half its scale, and what was rounded once is not changed by rounding it again. A
column or block with NaN or an infinite value comes back as NaN throughout, so that a divergence shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2, prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.errors import SettingError
from lowrank.kernels import rounding
from lowrank.tensors.eager import remembered
from lowrank.tensors.memory_layout import bytes_of
from lowrank.tensors.tucker import Tucker, mode_product

Storage = Literal["input", "float32", "bfloat16", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
BLOCK = 32
SCALE = torch.bfloat16
_SMALLEST = 1e-30  # a scale is never zero
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Stored = tuple[Tensor | None, ...]


def check_storage(storage: str) -> None:
    """Raise `SettingError` unless it is one of `STORAGES`."""
    if storage not in STORAGES:
        raise SettingError(f"storage is {storage!r}; allowed: {', '.join(STORAGES)}")


def stored_dtype(dtype: torch.dtype, storage: Storage) -> torch.dtype:
    """The dtype of core and factors for a tensor of `dtype`; a float is never stored wider than it is."""
    if storage == "int8":
        return torch.int8
    chosen = _FLOATS.get(storage, dtype)
    return chosen if chosen.itemsize < dtype.itemsize else dtype


def stored_bytes(shape: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, storage: Storage = "input") -> int:
    """Bytes of a Tucker form, scales included, at most the tensor's own; a mode at its full rank has no factor.

    Args:
        shape: of the tensor.
        ranks: one a mode; as `shape`, the tensor itself is stored.
        dtype: of the tensor.
        storage: of the form.
    """
    return _stored_bytes(tuple(shape), tuple(ranks), dtype, storage)


@remembered
def _stored_bytes(shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, storage: Storage) -> int:
    core, itemsize = prod(ranks), stored_dtype(dtype, storage).itemsize
    columns = [(size, rank) for size, rank in zip(shape, ranks, strict=True) if rank < size]
    scale = SCALE.itemsize if storage == "int8" else 0
    factors = sum((size * itemsize + scale) * rank for size, rank in columns)
    return min(core * itemsize + -(-core // BLOCK) * scale + factors, prod(shape) * dtype.itemsize)


def kept_ranks(shape: Sequence[int], ranks: Sequence[int], storage: Storage = "input") -> tuple[int, ...]:
    """The ranks at which a form of these is kept: a mode, or all, are left whole where that takes no more bytes.

    A mode of rank r > 1 and r = P, the product of the other ranks, or more would take a core of P r and a factor of n r
    numbers, n being its size; left whole, it takes a core of P n, and is not cut. The batch mode goes ahead of others
    of which that is true, since its samples, and so its basis, change with every step. Of a matrix both modes always
    are such; it is kept with both factors. All modes are whole where the tensor itself takes no more in the same
    storage.
    """
    return _kept_ranks(tuple(shape), tuple(ranks), storage)


@remembered
def _kept_ranks(whole: tuple[int, ...], ranks: tuple[int, ...], storage: Storage) -> tuple[int, ...]:
    for mode, size in enumerate(whole if len(whole) > 2 else ()):
        if ranks[mode] >= max(prod(ranks[:mode]) * prod(ranks[mode + 1 :]), 2):
            ranks = (*ranks[:mode], size, *ranks[mode + 1 :])
            break
    form, tensor = (stored_bytes(whole, each, torch.float32, storage) for each in (ranks, whole))
    return whole if form >= tensor else ranks


def store(x: Tensor, tucker: Tucker, storage: Storage) -> Stored:
    """What to keep of a tensor with this Tucker form.

    Returns:
        The core and, per mode, a factor or None for the identity; in int8 the scale of the core, (ceil(numel / 32),),
        and per mode that of the factor, (r_m,), behind them. What `kept_ranks` leaves whole has no factor. Where the
        form takes no less than the tensor in the same storage, the tensor is the core; `x` itself, where it is not
        rounded. In float16 the core of a form with a factor is divided by the norm of a tensor of ones, to the next
        power of two, so that it is in range wherever the tensor is.
    """
    ranks = kept_ranks(x.shape, tucker.ranks, storage)
    tucker = Tucker(x, (None,) * x.ndim) if ranks == tuple(x.shape) else _left_whole(tucker, ranks)
    dtype = stored_dtype(x.dtype, storage)
    if dtype == torch.int8 and stored_bytes(x.shape, tucker.ranks, x.dtype, storage) == bytes_of(x):
        dtype = x.dtype  # one or two halves
    if dtype != torch.int8:
        tucker = tucker.to(dtype)
        if tucker.core.dtype == dtype:
            return (tucker.core, *tucker.factors)
        factors = [None if factor is None else factor.to(dtype) for factor in tucker.factors]
        return ((tucker.core / _norm_of_ones(x.shape)).to(dtype), *factors)
    core, scale = round_blocks(tucker.core)
    pairs = [(None, None) if factor is None else round_columns(factor) for factor in tucker.factors]
    return (core, *[values for values, _ in pairs], scale, *[scale for _, scale in pairs])


def _norm_of_ones(shape: Sequence[int]) -> int:
    """The norm of a tensor of ones, at most half as much again: a power of two."""
    return 2 ** round(log2(prod(shape)) / 2)


def _left_whole(tucker: Tucker, ranks: Sequence[int]) -> Tucker:
    """The same tensor without the factors of modes whose rank is to be another, which is their size."""
    if tucker.ranks == ranks:
        return tucker
    core, factors = tucker.core, list(tucker.factors)
    for mode, (factor, rank) in enumerate(zip(factors, ranks, strict=True)):
        if factor is not None and factor.shape[1] != rank:
            core, factors[mode] = mode_product(core, factor, mode), None
    return Tucker(core, tuple(factors))


def restore(stored: Stored, dtype: torch.dtype) -> Tucker:
    """The Tucker form in `dtype` that `store` keeps, whatever its storage; in float32 for float16, see `Tucker.to`."""
    core = stored[0]
    assert core is not None
    ndim = core.ndim
    values, scales = stored[: ndim + 1], stored[ndim + 1 : 2 * ndim + 2]
    if core.dtype != torch.int8:
        tucker = Tucker(core, values[1:])
        wide = tucker.to(dtype)
        if core.dtype != torch.float16 or wide.ranks == wide.shape:
            return wide
        return Tucker(tucker.to(torch.float32).core.mul_(_norm_of_ones(wide.shape)).to(wide.core.dtype), wide.factors)
    assert scales[0] is not None
    if dtype == torch.float16 and any(factor is not None for factor in values[1:]):
        dtype = torch.float32
    factors = tuple(columns(*pair, dtype) for pair in zip(values[1:], scales[1:], strict=True))
    return Tucker(blocks(core, scales[0], dtype), factors)


def _scale(largest: Tensor) -> Tensor:
    return (largest / 127).clamp_min(_SMALLEST).to(SCALE)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def round_columns(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (n, r) in int8, and the scale of each column, (r,)."""
    factor = _wide(factor)
    found = rounding.round_columns(factor)
    if found is not None:
        return found
    scale = _scale(factor.abs().amax(0))
    return _rounded(factor, scale.to(factor.dtype)), scale


def round_blocks(core: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor in int8, and the scale of each `BLOCK` of its numbers in their order; the last block may have less."""
    core = _wide(core)
    found = rounding.round_blocks(core)
    if found is not None:
        return found
    flat = core.reshape(-1)
    padded = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = _scale(padded.abs().amax(1))
    values = _rounded(padded, scale.to(padded.dtype)[:, None]).view(-1)
    # Without the padding, which would stay in memory with the rest.
    return (values if values.numel() == flat.numel() else values[: flat.numel()].clone()).view(core.shape), scale


def columns(values: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The matrix that a stored factor stands for; floats have no scale."""
    if values is None or scale is None:
        return None if values is None else values.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = rounding.restore_columns(values, scale) if wide == torch.float32 else None
    return (values.to(wide) * scale.to(wide) if found is None else found).to(dtype)


def blocks(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that a stored core stands for."""
    wide = torch.promote_types(dtype, torch.float32)
    found = rounding.restore_blocks(values, scale) if wide == torch.float32 else None
    if found is not None:
        return found.to(dtype)
    flat, whole = values.reshape(-1).to(wide), values.numel() // BLOCK * BLOCK
    flat[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK].to(wide)[:, None])
    if whole < flat.numel():
        flat[whole:].mul_(scale[-1].to(wide))
    return flat.view(values.shape).to(dtype)
