"""The Tucker format, and the three tensor products that everything else is made of.

None of them copies an unfolding: a mode-m unfolding of a contiguous tensor is the view (left, n, right), with `left`
the product of the sizes ahead of the mode and `right` the product of those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _sides(shape: Sequence[int], mode: int) -> tuple[int, int, int]:
    left = right = 1
    for size in shape[:mode]:
        left *= size
    for size in shape[mode + 1 :]:
        right *= size
    return left, shape[mode], right


def mode_product(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply every mode-`mode` fibre of `x` by `matrix`.

    Args:
        x: tensor of shape (..., n, ...), with n at position `mode`.
        matrix: shape (m, n).
        mode: position in `x.shape`.

    Returns:
        Tensor of shape (..., m, ...), contiguous.
    """
    left, n, right = _sides(x.shape, mode)
    shape = (*x.shape[:mode], matrix.shape[0], *x.shape[mode + 1 :])
    if left == 1:
        return (matrix @ x.reshape(n, right)).view(shape)
    if right == 1:
        return (x.reshape(left, n) @ matrix.mT).view(shape)
    return torch.bmm(matrix.expand(left, -1, -1), x.reshape(left, n, right)).view(shape)


def mode_correlation(x: Tensor, z: Tensor, mode: int) -> Tensor:
    """Product of two unfoldings, `x_(mode) @ z_(mode).T`.

    Args:
        x: shape (..., n, ...), with n at position `mode`.
        z: shape (..., m, ...): as `x` in every other mode.
        mode: position in both shapes.

    Returns:
        Matrix of shape (n, m).
    """
    left, n, right = _sides(x.shape, mode)
    m = z.shape[mode]
    if left == 1:
        return x.reshape(n, right) @ z.reshape(m, right).mT
    if right == 1:
        return x.reshape(left, n).mT @ z.reshape(left, m)
    a, b = x.reshape(left, n, right), z.reshape(left, m, right).mT
    if m <= right:
        return torch.bmm(a, b).sum(0)  # many small products at once; the stack (left, n, m) is no larger than x
    return torch.addbmm(x.new_zeros(n, m), a, b)  # few large products, summed as they are made


def ascending(keys: Sequence[float]) -> list[int]:
    """Indices of `keys` from the least to the greatest, equal ones in order.

    By single comparisons, which torch.compile can trace where the keys come from sizes that it holds as symbols.
    """
    order: list[int] = []
    for index, key in enumerate(keys):
        place = 0
        while place < len(order) and keys[order[place]] <= key:
            place += 1
        order.insert(place, index)
    return order


def in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x` with its modes from the slowest to the fastest in memory, contiguous, and the place of each mode there.

    No copy, unless `x` does not fill its memory densely.
    """
    strides = x.stride()
    order = ascending([-stride for stride in strides])
    if not x.permute(order).is_contiguous():
        order = list(range(x.ndim))
    return x.permute(order).contiguous(), [order.index(mode) for mode in range(x.ndim)]


@dataclass(frozen=True)
class Tucker:
    """A tensor as a small core and one factor per mode: `x = core x_0 factors[0] x_1 factors[1] ...`.

    Attributes:
        core: shape (r_0, r_1, ...).
        factors: per mode a matrix (n_m, r_m), or None for the identity (then r_m = n_m, and nothing is stored).
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Per mode, the size of the core."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return tuple(
            rank if factor is None else factor.shape[0]
            for rank, factor in zip(self.core.shape, self.factors, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the core and of the factors that are stored."""
        return self.core.nbytes + sum(factor.nbytes for factor in self.factors if factor is not None)

    def dense(self) -> Tensor:
        """The full tensor, shape `self.shape`."""
        x = self.core
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                x = mode_product(x, factor, mode)
        return x

    def to(self, dtype: torch.dtype) -> Tucker:
        """The same tensor with core and factors in another dtype."""
        factors = tuple(None if factor is None else factor.to(dtype) for factor in self.factors)
        return Tucker(self.core.to(dtype), factors)
