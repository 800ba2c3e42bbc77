"""WSI and WASI: linear layers whose weight is two factors, in training as in inference (WASI, ICLR 2026).

WSI keeps the input as it is, WASI keeps of it what `ASI` keeps. How the weight is held is the layer's matter
(`layers.factored`), how it moves the optimizer's (`lowrank.SGD`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.methods.asi import ASI
from lowrank.methods.base import Vanilla
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import check_energy
from lowrank.tensors.eager import ORDINARY
from lowrank.tensors.geometry import LinearGeometry, Shape
from lowrank.tensors.gradients import factor_gradient_macs

Update = Literal["subspace", "svd"]
UPDATES: tuple[Update, ...] = ("subspace", "svd")


@dataclass(frozen=True)
class WSI(Vanilla):
    """Weight Subspace Iteration: the weight as two factors, the activation as it is (WASI, ICLR 2026, ablation).

    Args:
        energy: share of the squared singular values of the weight that its factors keep at the start, above 0 and at
            most 1; the rank stays as it is then. Less: smaller factors, and a weight that can follow fewer directions.
        update: "subspace", one subspace iteration a step; "svd", a truncated SVD of the moved weight a step, for
            comparison. Both are steps of `lowrank.SGD`; other optimizers train the factors as they train any parameter.
    """

    energy: float = 0.9
    update: Update = "subspace"
    factors_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tag(self) -> str:
        return f"wsi_{_suffix(self)}"

    def reason_against(self, layer: nn.Module) -> str | None:
        return _reason_against(layer)

    def factored_cost(self, x: Tensor, outputs: int, rank: int, input_gradient: bool) -> LayerCost:
        """Cost of one training step for an input (B, ..., I) and a weight (O, I) of this rank, without its bytes."""
        shape = tuple(x.shape)
        return _factored_cost(
            self,
            shape,
            shape,
            (outputs, rank),
            input_gradient,
            LayerCost(
                activation_bytes=x.numel() * x.element_size(),
                flops_paper=costs.paper_weight_gradient(LinearGeometry(), shape, outputs),
            ),
        )


@dataclass(frozen=True, repr=False)
class WASI(ASI):
    """Weight-Activation Subspace Iteration: the weight as two factors, the activation as in `ASI` (ICLR 2026).

    Args:
        ranks: of the activation, see `ASI`; so are algorithm, warm_start, seed, refresh, storage and derive.
        energy: share of the squared singular values of the weight that its factors keep at the start, above 0 and at
            most 1; the rank stays as it is then. The paper uses 0.4 to 0.9.
        update: "subspace", one subspace iteration a step; "svd", a truncated SVD of the moved weight a step. Both are
            steps of `lowrank.SGD`; other optimizers train the factors as they train any parameter.
    """

    energy: float = 0.9
    update: Update = "subspace"
    factors_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    @property
    def tag(self) -> str:
        return f"wasi_{_suffix(self)}{super().tag.removeprefix('asi')}"

    def reason_against(self, layer: nn.Module) -> str | None:
        return _reason_against(layer) or super().reason_against(layer)

    def factored_cost(self, x: Tensor, outputs: int, rank: int, input_gradient: bool) -> LayerCost:
        """Cost of one training step for an input (B, ..., I) and a weight (O, I) of this rank, without its bytes."""
        shape = tuple(x.shape)
        ranks = self.ranks_for(shape)
        kept = self.kept_ranks(shape, ranks)
        iterations = [costs.paper_iteration(size, prod(shape) // size, r) for size, r in zip(shape, ranks, strict=True)]
        return _factored_cost(
            self,
            shape,
            kept,
            (outputs, rank),
            input_gradient,
            LayerCost(
                activation_bytes=self.form_bytes(x, ranks),
                flops_paper=sum(iterations) + costs.paper_tucker_gradient(LinearGeometry(), shape, ranks, outputs),
                flops=self.subspace_flops(shape, ranks),
            ),
        )


def _check(method: WSI | WASI) -> None:
    check_energy(method.energy)
    if method.update not in UPDATES:
        raise SettingError(f"the update of the weight is {method.update!r}; allowed: {', '.join(UPDATES)}")


def _suffix(method: WSI | WASI) -> str:
    return f"{method.energy:g}" + ("" if method.update == "subspace" else f"_{method.update}")


def _reason_against(layer: nn.Module) -> str | None:
    if not isinstance(layer, nn.Linear):
        return "WSI and WASI hold the weights of linear layers as factors, not those of convolutions"
    weight = layer.weight
    if type(weight) not in ORDINARY:
        return f"its weight is a {type(weight).__name__}, of which no factors are found; convert it while it is plain"
    if weight.is_meta:
        return "its weight is on the meta device, without numbers to find factors of; convert it once it has them"
    return None


def _factored_cost(
    method: WSI | WASI,
    shape: Shape,
    ranks: Shape,
    weight: tuple[int, int],
    input_gradient: bool,
    activation: LayerCost,
) -> LayerCost:
    """What WSI and WASI have in common: the passes through the factors, their gradients, and the update.

    Args:
        shape: of the input.
        ranks: at which it is kept; where they are its shape, it is kept as it is.
        weight: O, and its rank.
        input_gradient: whether the input needs one.
        activation: cost of keeping the input, and of the weight gradient in the paper's convention.
    """
    (outputs, rank), inputs, tokens = weight, shape[-1], prod(shape[:-1])
    svd = method.update == "svd"
    update = costs.paper_weight_svd(outputs, inputs) if svd else costs.paper_iteration(outputs, inputs, rank)
    a_pass = 2 * tokens * rank * (inputs + outputs)
    return activation + LayerCost(
        flops_paper=update + costs.paper_factored_pass(tokens, inputs, outputs, rank),
        flops=a_pass * (2 if input_gradient else 1)
        + 2 * factor_gradient_macs(shape, ranks, outputs, rank, through_known=input_gradient)
        + costs.factored_update_flops(outputs, inputs, rank, svd),
    )
