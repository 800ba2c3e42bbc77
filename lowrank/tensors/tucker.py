"""The Tucker format, and the three tensor products that everything else is made of.

None of them copies an unfolding, but where it lays narrow ones side by side: a mode-m unfolding of a contiguous tensor
is the view (left, n, right), with `left` the product of the sizes ahead of the mode and `right` of those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.kernels import contractions, passes
from lowrank.tensors.eager import remembered
from lowrank.tensors.positions import sum_of_products
from lowrank.tensors.sample import share_of


def _sides(shape: Sequence[int], mode: int) -> tuple[int, int, int]:
    left = right = 1
    for size in shape[:mode]:
        left *= size
    for size in shape[mode + 1 :]:
        right *= size
    return left, shape[mode], right


# Of `iteration_order`: ranks that compiled kernels take at any size, and numbers of the widest vector.
_KERNEL_RANKS, _VECTOR = 8, 16
# Of `products`: multiplications that are worth copies, with one matrix, with several and where one of their sizes is
# small, and matrices that always are; numbers of a large matrix, of a copy, and of one that threads share, each call of
# which takes what they need to meet; how many lie side by side, at least.
_WORTH_ONE, _WORTH_COPIES, _WORTH_THIN, _MANY = 2**16, 2**19, 2**21, 2**12
_LARGE, _COPY, _COPY_TOGETHER, _BESIDE = 2**14, 2**16, 2**19, 16


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
    return products(x.reshape(left, n, right), matrix).view(shape)


def products(x: Tensor, matrix: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The product of a matrix (m, n) and each of x (left, n, right), plus a bias (m,).

    BLAS takes up to ten times as long for matrices of few columns, each by itself, as for many of them side by side,
    and for one as for its transpose.

    Returns:
        (left, m, right), contiguous; `out`, where that is given to be written to.
    """
    (left, n, right), m = x.shape, matrix.shape[0]
    made = contractions.expand(x, matrix) if bias is None and out is None else None
    if made is not None:
        return made
    if not _are_narrow(x, matrix):
        each = matrix.expand(left, -1, -1)
        return torch.bmm(each, x, out=out) if bias is None else torch.baddbmm(bias[:, None], each, x, out=out)
    out = x.new_empty(left, m, right) if out is None else out
    copy = _COPY_TOGETHER if torch.get_num_threads() > 1 else _COPY
    some = max(_BESIDE, copy // (right * max(m, n)))  # so few that their copies do not count
    for at in range(0, left, some):
        _beside(x[at : at + some], matrix, bias, out[at : at + some])
    return out


def _beside(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`products` in one; of a single matrix by its transpose."""
    (left, n, right), m = x.shape, matrix.shape[0]
    if left == 1:
        out[0] = (x[0].mT @ matrix.mT if bias is None else torch.addmm(bias, x[0].mT, matrix.mT)).mT
        return
    x = passes.swapped(x).view(n, left * right)
    found = matrix @ x if bias is None else torch.addmm(bias[:, None], matrix, x)
    passes.swapped(found.view(m, left, right), out)


def _are_narrow(x: Tensor, matrix: Tensor) -> bool:
    """As measured with MKL and AVX-512, which is fast at multiples of 16 columns, and at many."""
    (left, n, right), m = x.shape, matrix.shape[0]
    least = _WORTH_ONE if left == 1 else _WORTH_COPIES if min(m, n) >= 8 else _WORTH_THIN
    if x.device.type != "cpu" or (left < _MANY and left * n * right * m < least):
        return False
    return right < 10 or (right < 40 and right % 16 > 0 and m * n >= _LARGE)


def mode_correlation(x: Tensor, z: Tensor, mode: int) -> Tensor:
    """Product of two unfoldings, `x_(mode) @ z_(mode).T`.

    Args:
        x: shape (..., n, ...), with n at position `mode`.
        z: shape (..., m, ...): as `x` in every other mode.
        mode: position in both shapes.

    Returns:
        Matrix of shape (n, m).
    """
    if z.shape[mode] > x.shape[mode]:
        return mode_correlation(z, x, mode).mT
    left, n, right = _sides(x.shape, mode)
    m = z.shape[mode]
    # With the matrix of fewer rows ahead, BLAS reads the other one about once, not three times.
    if left == 1:
        return (z.reshape(m, right) @ x.reshape(n, right).mT).mT
    first = x.shape[0]
    if right == 1 and 4 * m * first <= left:  # many products, whose sum is small, keep the pieces in the cache
        return torch.bmm(z.reshape(first, -1, m).mT, x.reshape(first, -1, n)).sum(0).mT
    if right == 1:
        return (z.reshape(left, m).mT @ x.reshape(left, n)).mT
    a, b = z.reshape(left, m, right), x.reshape(left, n, right)
    if m <= right:
        return torch.bmm(a, b.mT).sum(0).mT  # many small products at once; the stack (left, m, n) is no larger than x
    return sum_of_products(b, a).mT  # few large products, summed as they are made, or in one


def mode_order(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The order in which to cut a tensor to a rank per mode, one mode after the other, in the least time.

    A mode that shrinks the tensor much goes ahead of one that shrinks it little, and so does one that costs little per
    element. With cost c and shrink s = rank / size, sorting by c / (1 - s) gives the least sum of costs, each times
    the size that the modes ahead of it leave. The cost is counted in reads of the tensor, fitted to what two cores
    take: one for the read, more with the rank, and more where a mode is many products of small matrices.

    Args:
        shape: sizes of the tensor; the order depends on no memory format.
        ranks: one per mode.

    Returns:
        All modes, the first to cut ahead; those that do not shrink come last.
    """
    return list(_mode_order(tuple(shape), tuple(ranks)))


@remembered
def _mode_order(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    return _by_cost(shape, ranks, _projecting)


def _by_cost(
    shape: tuple[int, ...], ranks: tuple[int, ...], cost: Callable[[tuple[int, ...], int, int], float]
) -> tuple[int, ...]:
    pairs = list(zip(ranks, shape, strict=True))
    keys = [
        float("inf") if rank >= n else cost(shape, mode, rank) / (1 - rank / n) for mode, (rank, n) in enumerate(pairs)
    ]
    return tuple(ascending(keys))


def _projecting(shape: tuple[int, ...], mode: int, rank: int) -> float:
    """Cost of projecting a mode, for each number of the tensor."""
    left, n, right = _sides(shape, mode)
    return 1 + rank / 12 + (0.0 if left == 1 else 20 / n if right == 1 else 500 / (n * right))


def iteration_order(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The order in which to iterate the modes of a tensor, each on what the ones ahead of it leave, in the least time.

    As `mode_order`, but fitted to one core with the compiled kernels, whose time is that of multiplying. With higher
    ranks than these take at any size it is `mode_order`.
    """
    return list(_iteration_order(tuple(shape), tuple(ranks)))


@remembered
def _iteration_order(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    few = [rank <= _KERNEL_RANKS or rank >= n for rank, n in zip(ranks, shape, strict=True)]
    return _by_cost(shape, ranks, _iterating if all(few) else _projecting)


def _iterating(shape: tuple[int, ...], mode: int, rank: int) -> float:
    """Cost of iterating a mode with the compiled kernels, for each number of the tensor."""
    left, n, right = _sides(shape, mode)
    row = n if right == 1 else right
    scattered = 1.0 if left == 1 or row >= _VECTOR else 2.5 if row >= _VECTOR // 2 else 5.0
    share = min(abs(share_of(shape, mode, rank)), 8)  # less hardly counts
    products = 1 + 2 / share  # of the three of an iteration
    return scattered * (rank * products / 3 + 0.5) / 12


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
    if x.is_contiguous():
        return x, list(range(x.ndim))
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
        """The same tensor with core and factors in one dtype, in whichever they are; with any factor in float32 where
        that is float16, out of whose range a core may be: its first number is nearly the norm of the whole tensor."""
        if dtype == torch.float16 and any(factor is not None for factor in self.factors):
            dtype = torch.float32
        if self.core.dtype == dtype and all(factor is None or factor.dtype == dtype for factor in self.factors):
            return self
        factors = tuple(None if factor is None else factor.to(dtype) for factor in self.factors)
        return Tucker(self.core.to(dtype), factors)
