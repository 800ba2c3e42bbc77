"""SVD and HOSVD at a share of the energy, decomposed anew at every step (AMC, NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank.methods.base import Tensors, TuckerMethod, exact_flops, form_tag
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import check_energy, hosvd, svd
from lowrank.tensors.geometry import Geometry
from lowrank.tensors.storage import store


@dataclass(frozen=True, repr=False)
class SVD(TuckerMethod):
    """Truncated SVD of the batch-mode unfolding, anew at every step (AMC, NeurIPS 2024, baseline SVD_eps).

    Args:
        energy: share of the squared singular values that is kept, above 0 and at most 1. More: a closer weight
            gradient and more memory.
        storage: see `ASI`.
        derive: see `ASI`.
    """

    chooses_by_data: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    energy: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"svd{form_tag(self.storage, self.derive)}_{self.energy:g}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return store(x, svd(x, self.energy), self.storage), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = svd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=self.form_bytes(x, ranks),
            # The published baseline rebuilds the input in full, so its weight gradient costs the exact one's.
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, (0,))
            + costs.paper_weight_gradient(geometry, shape, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, (0,))
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )


@dataclass(frozen=True, repr=False)
class HOSVD(TuckerMethod):
    """Truncated higher-order SVD, anew at every step (AMC, NeurIPS 2024).

    Args:
        energy: share of the squared singular values that each mode keeps, above 0 and at most 1. More: a closer
            weight gradient and more memory. The papers use 0.8.
        storage: see `ASI`.
        derive: see `ASI`.
    """

    chooses_by_data: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    energy: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"hosvd{form_tag(self.storage, self.derive)}_{self.energy:g}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return store(x, hosvd(x, self.energy), self.storage), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape, modes = tuple(x.shape), range(x.ndim)
        ranks = hosvd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=self.form_bytes(x, ranks),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, modes)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, modes)
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )
