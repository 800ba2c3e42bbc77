"""Memory of the trained weights beside their activations: the weights, their gradients, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.conversion.select import named_layers
from lowrank.layers.factored import FactoredLinear
from lowrank.layers.preserve import LossFunction, loss_of, preserved, tensors_in


@dataclass(frozen=True)
class WeightMemory:
    """Bytes that the weights of some layers take in training, without their biases.

    Attributes:
        weight: the weights as they are held, dense or as two factors.
        gradient: what holds their gradients from the backward pass to the step, as measured.
        optimizer: what the optimizer keeps of them from step to step, as measured.
        emulated: by formula, weight, gradient and optimizer of an emulation that trains the dense weight and derives
            the factors from it at every step, as the public code of WASI does: both factors, and per dense weight one
            of its size for itself, for its gradient, and for each state that the optimizer has. Zero without factors.
    """

    weight: int
    gradient: int
    optimizer: int
    emulated: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer as measured."""
        return self.weight + self.gradient + self.optimizer


def weight_memory(
    model: nn.Module, names: Iterable[str], loss_fn: LossFunction, batch: Any, optimizer: torch.optim.Optimizer
) -> WeightMemory:
    """Measure what the weights of the named layers take, over one backward pass; the model is left as it was.

    Args:
        model: any module, converted or not, in the mode in which it trains.
        names: of its layers.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
        optimizer: the one that trains the model, after at least one step.

    Raises:
        ConversionError: a name that is no layer of the model.
    """
    layers = named_layers(model, names).values()
    weights = [p for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "bias"]
    states = [tensor for p in weights for tensor in tensors_in(optimizer.state.get(p, {}))]
    with preserved(model):
        with torch.enable_grad():
            loss_of(loss_fn, model, batch).backward()
        gradients = [p.grad for p in weights if p.grad is not None]
        held = sum({part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in gradients}.values())
    return WeightMemory(
        weight=sum(p.nbytes for p in weights),
        gradient=held,
        optimizer=sum(tensor.nbytes for tensor in states),
        emulated=sum(_emulated(layer, optimizer) for layer in layers if isinstance(layer, FactoredLinear)),
    )


def _emulated(layer: FactoredLinear, optimizer: torch.optim.Optimizer) -> int:
    left, right = layer.left, layer.right
    dense = left.shape[0] * right.shape[1] * left.element_size()
    states = sum(
        any(p is left for p in group["params"]) and group.get("momentum", 0) != 0 for group in optimizer.param_groups
    )
    return left.nbytes + right.nbytes + dense * (2 + states)
