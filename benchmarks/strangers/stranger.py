"""One model of somebody else's: how to build it, what it is given, and how it is converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank import Method

# Ranks of ASI per kind of layer and number of modes of its input.
RANKS = {
    "conv1d": (2, 8, 8),
    "conv2d": (2, 8, 4, 4),
    "conv3d": (2, 8, 2, 4, 4),
    "linear": {2: (8, 32), 3: (8, 16, 32), 4: (2, 4, 4, 8), 5: (2, 2, 4, 4, 8)},
}
SEED = 233


@dataclass(frozen=True)
class Stranger:
    """A model, and a batch for it.

    Attributes:
        name: unique in the table.
        family: the package it comes from.
        make: builds it, in training mode, with random weights.
        batch: of a number of samples, a batch; drawn from the global random state.
        call: the output that a loss is taken of, a floating-point tensor.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    call: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch)

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, the same at every call, with stored statistics that are not the initial ones."""
        torch.manual_seed(SEED)
        model = self.make().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                assert module.running_mean is not None
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return model

    def given(self, samples: int, dtype: torch.dtype = torch.float32) -> Any:
        """A batch, the same at every call."""
        torch.manual_seed(SEED + 1)
        batch = self.batch(samples)
        return batch.to(dtype) if batch.is_floating_point() else batch

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """One tensor of what the model gives."""
        return _first(self.call(model, batch))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Its mean square."""
        return self.output(model, batch).square().mean()


def _first(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    for name in ("logits", "last_hidden_state", "out"):
        value = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
        if value is not None:
            return _first(value)
    return _first(next(iter(found.values())) if isinstance(found, dict) else found[0])


def all_layers(model: nn.Module) -> list[str]:
    """Names of every layer that can be converted."""
    names = [name for name, module in model.named_modules() if name and next(module.children(), None) is None]
    refused = {name for name in names if lowrank.check(model, [name], lowrank.Vanilla())}
    return [name for name in names if name not in refused]


def asi(stranger: Stranger, model: nn.Module, names: list[str], full: bool = False) -> dict[str, Method]:
    """ASI for every named layer that is called, at the table's ranks or at full ones."""
    modes: dict[str, int] = {}
    layers = {name: model.get_submodule(name) for name in names}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        modes[name] = inputs[0].ndim

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    training = model.training
    try:
        with torch.no_grad():
            stranger.call(model.eval(), stranger.given(2, next(model.parameters()).dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: lowrank.ASI(ranks=10**6 if full else _ranks(layers[name], modes[name])) for name in modes}


def _ranks(layer: nn.Module, modes: int) -> tuple[int, ...]:
    kinds = {3: RANKS["conv1d"], 4: RANKS["conv2d"], 5: RANKS["conv3d"]}
    return kinds[modes] if isinstance(layer, nn.modules.conv._ConvNd) else RANKS["linear"][modes]
