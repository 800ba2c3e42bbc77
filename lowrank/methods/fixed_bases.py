"""Bases that are found once and fixed for good (LANCE, arXiv 2509.21617): a step keeps a core, and iterates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowrank.methods.asi import in_places, restored_basis
from lowrank.methods.base import Tensors, exact_flops
from lowrank.methods.ranked import RankedMethod
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import allowed_ranks, leading, project, spectra
from lowrank.tensors.geometry import Geometry, Shape
from lowrank.tensors.storage import store
from lowrank.tensors.tucker import Tucker


@dataclass(frozen=True, repr=False)
class FixedBases(RankedMethod):
    """The bases of the HOSVD of the first batch, fixed for good; a step keeps the core alone (LANCE, arXiv 2509.21617).

    The batch mode is left whole, since its samples change with every step. The factors are the same tensors at every
    step; they count as kept, since training needs them. Inputs of other sizes find bases anew. Cheapest of all steps,
    and a coarser gradient the further the activations drift from those of the first batch.

    Args:
        ranks: see `ASI`; that of the batch mode is not read.
        storage: see `ASI`.
        derive: see `ASI`.
    """

    @property
    def tag(self) -> str:
        rank = f"_rank{self.ranks}" if isinstance(self.ranks, int) else ""
        return f"fixed_bases{self._form_tag()}{rank}"

    def ranks_for(self, shape: Sequence[int]) -> Shape:
        """The ranks for an input of this shape, the batch mode whole."""
        return allowed_ranks(shape, [shape[0], *self.given_ranks(shape)[1:]])

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        shape = tuple(x.shape)
        ranks = self.kept_ranks(shape, self.ranks_for(shape))
        if ranks == shape:
            return store(x, Tucker(x, (None,) * x.ndim), self.storage), state
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        state = in_places(state, (*[2] * x.ndim, *[1] * x.ndim))
        state = tuple(None if tensor is None else tensor.to(x.device) for tensor in state)
        fixed = self._fixed(state, shape, ranks)
        anew = fixed is None
        if fixed is None:
            modes = spectra(wide)
            fixed = [leading(mode, rank) for mode, rank in zip(modes, ranks, strict=True)]
        tucker = project(wide, [None if basis is None else basis.to(wide.dtype) for basis in fixed])
        core, *found = store(x, tucker.to(x.dtype), self.storage)
        scale = found[x.ndim : x.ndim + 1]  # of the core
        factors = (*found[: x.ndim], *found[x.ndim + 1 :])
        factors = factors if anew else state[: len(factors)]  # rounded once, they are not rounded again
        return (core, *factors[: x.ndim], *scale, *factors[x.ndim :]), factors

    def _fixed(self, state: Tensors, shape: Shape, ranks: Shape) -> list[Tensor | None] | None:
        """The bases of the state, if they are for inputs of this shape."""
        count = len(shape)
        bases = [restored_basis(*pair) for pair in zip(state[:count], state[count:], strict=True)]
        wanted = [None if rank == size else (size, rank) for size, rank in zip(shape, ranks, strict=True)]
        return bases if [None if basis is None else tuple(basis.shape) for basis in bases] == wanted else None

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = self.kept_ranks(shape, self.ranks_for(shape))
        projecting = 0 if ranks == shape else costs.subspace_flops(shape, ranks, True, held=range(len(shape)))
        return LayerCost(
            activation_bytes=self.form_bytes(x, ranks),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + sum(prod(shape) * rank for rank in ranks[1:])
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + projecting
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )
