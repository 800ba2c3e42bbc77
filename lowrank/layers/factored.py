"""WSI and WASI: linear layers that hold their weight as two factors, in training as in inference.

A converted layer has the parameters `lowrank_left` L (O, K) and `lowrank_right` R (K, I) in place of `weight`, and no
tensor of the weight's size exists from then on. Autograd gives L and R their own gradients, dW R^T and L^T dW. Beside
them the layer holds the weight gradient itself, as the small factors that it comes in, until `lowrank.SGD` moves the
weight by one subspace iteration. Source: WASI (ICLR 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.exact.recompute import known_origin, note_linear
from lowrank.layers.factored_weight import FactoredFunction, FactoredWeight, Update, forward_factored
from lowrank.layers.layer import LEFT, RIGHT, LowRankLinear
from lowrank.methods.asi import ASI
from lowrank.methods.base import Vanilla
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import check_energy
from lowrank.tensors.factors import factorise
from lowrank.tensors.geometry import LinearGeometry, Shape
from lowrank.tensors.gradients import plan_gradient

UPDATES: tuple[Update, ...] = ("subspace", "svd")


class FactoredLinear(LowRankLinear):
    """A linear layer (I inputs, O outputs) whose weight is held as two factors."""

    lowrank_left: nn.Parameter
    lowrank_right: nn.Parameter
    factored: FactoredWeight
    method: WSI | WASI

    def take_over(self) -> None:
        """Put two factors in the place of the weight."""
        weight = self._parameters["weight"]
        assert weight is not None
        found = factorise(weight.detach(), self.method.energy)
        left, right = (nn.Parameter(part.contiguous(), weight.requires_grad) for part in found)
        self._replace({"weight": {LEFT: left, RIGHT: right}})
        self.factored = FactoredWeight(left, right, self.method, self.layer_name)

    def give_back(self) -> None:
        """Put the dense weight in the place of the two factors."""
        weight = nn.Parameter(self.factored.factors().dense(), self.lowrank_left.requires_grad)
        self._replace({LEFT: {"weight": weight}, RIGHT: {}})
        del self.factored

    def _replace(self, changes: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        """Parameters by name, in the place of those that they replace."""
        parameters = dict(self._parameters)
        self._parameters.clear()
        for name, parameter in parameters.items():
            self._parameters.update(changes.get(name, {name: parameter}))

    @property
    def trains_weight(self) -> bool:
        """Whether the weight is not frozen."""
        return self.lowrank_left.requires_grad

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """Output of the layer; keeps of the input what the method keeps."""
        tracked = input.requires_grad or any(p.requires_grad for p in self.parameters(recurse=False))
        if not (torch.is_grad_enabled() and tracked):
            return forward_factored(input, self.lowrank_left, self.lowrank_right, self.bias)
        self.factored.require_own_optimizer()
        x, dtype, outside = self._begin(input)
        with outside:
            batched = self.batched(x)
            kept = self._keep(input, batched.detach()) if self.trains_weight else ()
            origin = known_origin(input) if kept and self.method.keeps_input and batched is input else None
            rebuild, kept = (None, kept) if origin is None else (origin.rebuild, origin.sources)
            parameters = (self.lowrank_left, self.lowrank_right, self.bias)
            y = FactoredFunction.apply(batched, *parameters, dtype, self.factored, rebuild, *kept)
        if batched is input:
            note_linear(input, y, forward_factored, parameters, bool(kept) and self.method.keeps_input)
        return y if batched is x else y.squeeze(0)

    def cost(self, x: Tensor, input_gradient: bool) -> LayerCost:
        """Cost of one training step for an input (B, ..., I); see `costs.LayerCost`."""
        return self.method.factored_cost(x, self.factored, input_gradient)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        """Load factors at whatever rank they have; of a dense weight, those at the method's energy."""
        state_dict = dict(state_dict)
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None:
            found = factorise(dense, self.method.energy)
            state_dict[prefix + LEFT], state_dict[prefix + RIGHT] = found
        for name, shape in ((LEFT, self.lowrank_left), (RIGHT, self.lowrank_right)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != shape.shape and self._fits(state_dict, prefix):
                shape.data = shape.data.new_empty(saved.shape)
        self.factored.forget_gradient()
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def _fits(self, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the factors in a state dict are of a weight of this layer's size."""
        left, right = state_dict.get(prefix + LEFT), state_dict.get(prefix + RIGHT)
        if left is None or right is None or left.shape[1:] != right.shape[:1]:
            return False
        return (left.shape[0], right.shape[1]) == (self.out_features, self.in_features)


def _check(method: WSI | WASI) -> None:
    check_energy(method.energy)
    if method.update not in UPDATES:
        raise SettingError(f"the update of the weight is {method.update!r}; allowed: {', '.join(UPDATES)}")


def _reason_against(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Linear):
        return None
    return "WSI and WASI hold the weights of linear layers as factors, not those of convolutions"


def _suffix(method: WSI | WASI) -> str:
    return f"{method.energy:g}" + ("" if method.update == "subspace" else f"_{method.update}")


def _factored_cost(
    x: Tensor, weight: FactoredWeight, activation_bytes: int, flops_paper: int, flops: int, gradient_rank: int
) -> LayerCost:
    """What WSI and WASI have in common: the passes through the factors, the update, and the factors' bytes."""
    shape: Shape = tuple(x.shape)
    outputs, inputs, rank = weight.left.shape[0], weight.right.shape[1], weight.rank
    tokens = prod(shape[:-1])
    svd = weight.method.update == "svd"
    update = costs.paper_weight_svd(outputs, inputs) if svd else costs.paper_iteration(outputs, inputs, rank)
    return LayerCost(
        activation_bytes=activation_bytes,
        flops_paper=flops_paper + update + costs.paper_factored_pass(tokens, inputs, outputs, rank),
        flops=flops
        + 2 * tokens * rank * (inputs + outputs)
        + costs.factored_update_flops(outputs, inputs, rank, gradient_rank, svd),
        weight_bytes=weight.left.nbytes + weight.right.nbytes,
    )


@dataclass(frozen=True)
class WSI(Vanilla):
    """Weight Subspace Iteration: the weight as two factors, the activation as it is (WASI, ICLR 2026, ablation).

    Args:
        energy: share of the squared singular values of the weight that its factors keep at the start, above 0 and at
            most 1; the rank stays as it is then. Less: smaller factors, and a weight that can follow fewer directions.
        update: "subspace", one subspace iteration a step; "svd", a truncated SVD of the moved weight a step, for
            comparison (it forms the weight gradient densely).
    """

    energy: float = 0.9
    update: Update = "subspace"
    layer_family: ClassVar[type[nn.Module]] = FactoredLinear

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tag(self) -> str:
        return f"wsi_{_suffix(self)}"

    def reason_against(self, layer: nn.Module) -> str | None:
        return _reason_against(layer)

    def factored_cost(self, x: Tensor, weight: FactoredWeight, input_gradient: bool) -> LayerCost:
        """Cost of one training step of a layer with this weight."""
        shape = tuple(x.shape)
        tokens, inputs, outputs = prod(shape[:-1]), shape[-1], weight.left.shape[0]
        held = min(tokens, 3 * weight.rank) if self.update == "subspace" else min(tokens, inputs)
        through = 2 * tokens * weight.rank * (inputs + outputs)
        exact = 2 * tokens * inputs * outputs
        spanned = 0 if held == tokens else (exact if self.update == "svd" else 6 * through)
        return _factored_cost(
            x,
            weight,
            activation_bytes=x.numel() * x.element_size(),
            flops_paper=costs.paper_weight_gradient(LinearGeometry(), shape, outputs),
            flops=spanned + (through if input_gradient else 0),
            gradient_rank=held,
        )


@dataclass(frozen=True)
class WASI(ASI):
    """Weight-Activation Subspace Iteration: the weight as two factors, the activation as in `ASI` (ICLR 2026).

    Args:
        ranks, algorithm, warm_start, seed, refresh: of the activation, see `ASI`.
        energy: share of the squared singular values of the weight that its factors keep at the start, above 0 and at
            most 1; the rank stays as it is then. The paper uses 0.4 to 0.9.
        update: "subspace", one subspace iteration a step; "svd", a truncated SVD of the moved weight a step.
    """

    energy: float = 0.9
    update: Update = "subspace"
    layer_family: ClassVar[type[nn.Module]] = FactoredLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    @property
    def tag(self) -> str:
        return f"wasi_{_suffix(self)}{super().tag.removeprefix('asi')}"

    def reason_against(self, layer: nn.Module) -> str | None:
        return _reason_against(layer)

    def factored_cost(self, x: Tensor, weight: FactoredWeight, input_gradient: bool) -> LayerCost:
        """Cost of one training step of a layer with this weight."""
        shape, geometry = tuple(x.shape), LinearGeometry()
        ranks, outputs = self.ranks_for(shape), weight.left.shape[0]
        factored = tuple(rank < size for rank, size in zip(ranks, shape, strict=True))
        against_core = plan_gradient(geometry, (*shape[:-1], ranks[-1]), ranks, (*factored[:-1], False), outputs)
        through = 2 * prod(shape[:-1]) * weight.rank * (shape[-1] + outputs)
        return _factored_cost(
            x,
            weight,
            activation_bytes=costs.tucker_numel(shape, ranks) * x.element_size(),
            flops_paper=sum(
                costs.paper_iteration(size, prod(shape) // size, rank) for size, rank in zip(shape, ranks, strict=True)
            )
            + costs.paper_tucker_gradient(geometry, shape, ranks, outputs),
            flops=self.subspace_flops(shape, ranks) + 2 * against_core.macs + (through if input_gradient else 0),
            gradient_rank=ranks[-1],
        )


def shared_weights(model: nn.Module, layer: nn.Module) -> bool:
    """Whether something else in the model uses the layer's weight, so that it cannot be taken apart."""
    weight = layer._parameters.get("weight")
    owners = [module for module in model.modules() if any(p is weight for p in module._parameters.values())]
    return weight is not None and len(owners) > 1
