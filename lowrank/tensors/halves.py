"""Products of matrices in bfloat16: of numbers that are kept in eight bits anyway, in half the time.

bfloat16 keeps eight bits of a number, as int8 does of the largest of a block. Sums are in float32. Some processors
multiply these in half the time that float32 takes; elsewhere, and where products are small, they are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lowrank.kernels import passes
from lowrank.tensors import tucker

HALF = torch.bfloat16
_FEW = 8  # rows, columns or fibres of a product that a compiled kernel makes
_APART, _MANY = 16, 32  # numbers behind a mode that lie apart for BLAS as well, and columns for which a copy pays then
_WORTH = 2**22  # multiplications; of fewer a compiled kernel makes the products
_MOST = 2**21  # numbers of a tensor of which a copy is made


@lru_cache(maxsize=1)
def _processor_multiplies() -> bool:
    """Whether the processor has instructions for it, without which it takes several times as long as float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def are_worth(x: Tensor, mode: int, columns: int) -> bool:
    """Whether the product of the unfolding of `x` in a mode and so many columns is better made in bfloat16."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    numbers, least = x.numel(), min(columns, x.shape[mode])
    if least <= _FEW or numbers > _MOST or numbers * columns <= _WORTH or numbers <= _FEW * x.shape[mode]:
        return False
    if columns < _MANY and prod(x.shape[:mode]) > 1 and prod(x.shape[mode + 1 :]) >= _APART:
        return False
    return _processor_multiplies()


def unfolded(x: Tensor, mode: int) -> Tensor:
    """The unfolding (n, N) of a tensor in bfloat16: its fibres in their order in memory, if it is contiguous."""
    left, n, right = prod(x.shape[:mode]), x.shape[mode], prod(x.shape[mode + 1 :])
    x = x.to(HALF).reshape(left, n, right)
    return x[0] if left == 1 else x[..., 0].mT if right == 1 else passes.swapped(x).view(n, left * right)


def projected(unfolding: Tensor, matrix: Tensor, shape: Sequence[int], mode: int) -> Tensor:
    """`tucker.mode_product` of a matrix (m, n) and a tensor of which the unfolding (n, N) is given.

    Args:
        unfolding: as `unfolded` returns it.
        matrix: in bfloat16.
        shape: of the tensor.
        mode: of the unfolding.

    Returns:
        (..., m, ...), float32, contiguous.
    """
    left, right, m = prod(shape[:mode]), prod(shape[mode + 1 :]), matrix.shape[0]
    whole = (*shape[:mode], m, *shape[mode + 1 :])
    if right == 1:
        return (unfolding.mT @ matrix.mT).to(torch.float32).view(whole)
    return passes.swapped((matrix @ unfolding).to(torch.float32).view(m, left, right)).view(whole)


def mode_product(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """As `tucker.mode_product`; in bfloat16, where that is worth it."""
    if not are_worth(x, mode, matrix.shape[0]):
        return tucker.mode_product(x, matrix, mode)
    return projected(unfolded(x, mode), matrix.to(HALF), x.shape, mode)


def mode_correlation(x: Tensor, z: Tensor, mode: int) -> Tensor:
    """As `tucker.mode_correlation`; in bfloat16, where that is worth it."""
    if not are_worth(x, mode, z.shape[mode]):
        return tucker.mode_correlation(x, z, mode)
    return (unfolded(x, mode) @ unfolded(z, mode).mT).to(torch.float32)
