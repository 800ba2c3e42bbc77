"""The input as it is, in fewer bits: for one that is small and hardly to be cut, such as a classifier's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lowrank.methods.base import Tensors, TuckerMethod, Vanilla, form_tag
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.geometry import Geometry
from lowrank.tensors.memory_layout import bytes_of
from lowrank.tensors.storage import Storage, store
from lowrank.tensors.tucker import Tucker
from lowrank.tensors.worth import MOVED_A_CALL

_CALLS, _READS = 30, 8  # of rounding an input and restoring it, as measured on 1 x 1 convolutions of four sizes


@dataclass(frozen=True, repr=False)
class Rounded(TuckerMethod):
    """Every number of the input, rounded: approximate, to half a percent in int8, whose bytes are about a quarter.

    Where a few convolutions are trained at a fiftieth of their memory, the classifier's exact input is what takes most.

    Args:
        storage: see `ASI`.
        derive: see `ASI`.

    Example:
        lowrank.convert(model, {**dict.fromkeys(names, lowrank.ASI(plan)), "classifier": lowrank.Rounded()})
    """

    carries: ClassVar[bool] = False
    storage: Storage = field(default="int8", kw_only=True)

    @property
    def tag(self) -> str:
        return f"rounded{form_tag(self.storage, self.derive)}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return store(x, Tucker(x, (None,) * x.ndim), self.storage), ()

    def price(self, x: Tensor, geometry: Geometry, out_channels: int) -> tuple[int, float]:
        nbytes = bytes_of(x)
        return nbytes - self.form_bytes(x, tuple(x.shape)), _CALLS + _READS * nbytes / MOVED_A_CALL

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        exact = Vanilla().cost(x, geometry, out_channels, input_gradient)
        return LayerCost(self.form_bytes(x, tuple(x.shape)), exact.flops_paper, exact.flops)
