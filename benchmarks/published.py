"""The published algorithms, written plainly from the papers, to compare with.

ASI, sec. 3.2: every mode is iterated on its unfolding of the full tensor. AMC, sec. 3: every mode by a full SVD of its
unfolding. An unfolding is a matrix of its own here, as `reshape` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank import HOSVD, Tucker
from lowrank.methods.base import Tensors
from lowrank.tensors.geometry import Geometry


def unfold(x: Tensor, mode: int) -> Tensor:
    """The mode-`mode` unfolding, (n, numel / n)."""
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)


def core_of(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`x` projected on the columns of one factor (n_m, r_m) per mode."""
    core = x
    for mode, factor in enumerate(factors):
        core = torch.tensordot(factor, core, ([0], [mode])).movedim(0, mode)
    return core


def subspace_iteration(x: Tensor, starts: Sequence[Tensor]) -> Tucker:
    """One iteration per mode on the full tensor, from starts (n_m, r_m)."""
    factors = []
    for mode, start in enumerate(starts):
        matrix = unfold(x, mode)
        factors.append(torch.linalg.qr(matrix @ (matrix.mT @ start))[0])
    return Tucker(core_of(x, factors), tuple(factors))


def hosvd(x: Tensor, energy: float) -> Tucker:
    """Every mode cut at `energy`, each by a full SVD of its unfolding."""
    factors = []
    for mode in range(x.ndim):
        vectors, values, _ = torch.linalg.svd(unfold(x, mode), full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        rank = min(int((shares < energy).sum()) + 1, len(values))
        factors.append(vectors[:, :rank])
    return Tucker(core_of(x, factors), tuple(factors))


@dataclass(frozen=True)
class PublishedHOSVD(HOSVD):
    """HOSVD by full SVDs."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        tucker = hosvd(x, self.energy)
        return (tucker.core, *tucker.factors), ()
