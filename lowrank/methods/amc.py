"""SVD and HOSVD at a share of the energy, decomposed anew at every step (AMC, NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from lowrank.methods.base import Tensors, TuckerMethod, exact_flops, kept_form
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import check_energy, hosvd, svd
from lowrank.tensors.geometry import Geometry, Shape


@dataclass(frozen=True)
class SVD(TuckerMethod):
    """Truncated SVD of the batch-mode unfolding, anew at every step (AMC, NeurIPS 2024, baseline SVD_eps).

    Args:
        energy: share of the squared singular values that is kept, above 0 and at most 1. More: a closer weight
            gradient and more memory.
    """

    energy: float

    def __post_init__(self) -> None:
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"svd_{self.energy:g}"

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """Bytes of the two factors of the batch-mode unfolding."""
        core = kept[0]
        assert core is not None
        return min(core.shape[0] * (shape[0] + prod(shape[1:])), prod(shape)) * core.element_size()

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return kept_form(x, svd(x, self.energy)), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = svd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=min(ranks[0] * (shape[0] + prod(shape[1:])), prod(shape)) * x.element_size(),
            # The published baseline rebuilds the input in full, so its weight gradient costs the exact one's.
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, (0,))
            + costs.paper_weight_gradient(geometry, shape, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, (0,))
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )


@dataclass(frozen=True)
class HOSVD(TuckerMethod):
    """Truncated higher-order SVD, anew at every step (AMC, NeurIPS 2024).

    Args:
        energy: share of the squared singular values that each mode keeps, above 0 and at most 1. More: a closer
            weight gradient and more memory. The papers use 0.8.
    """

    energy: float

    def __post_init__(self) -> None:
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"hosvd_{self.energy:g}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return kept_form(x, hosvd(x, self.energy)), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape, modes = tuple(x.shape), range(x.ndim)
        ranks = hosvd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=costs.kept_numel(shape, ranks) * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, modes)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, modes)
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )
