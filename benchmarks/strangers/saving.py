"""What a converted model keeps between forward and backward pass, against the stock one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import lowrank
from benchmarks.strangers.exactness import vanilla
from benchmarks.strangers.stranger import Stranger, all_layers, asi

BATCH = 8


@dataclass(frozen=True)
class Saving:
    """Bytes kept for one batch.

    Attributes:
        statistics: of batch normalisation, "stored" or "batch"; dropout and the like are off, or on, with it.
        stock: by the stock model.
        exact: with every layer converted by `Vanilla()`.
        asi: with every layer converted by ASI at the table's ranks, from its second step on.
    """

    statistics: str
    stock: int
    exact: int
    asi: int


def savings(stranger: Stranger, samples: int = BATCH, with_asi: bool = True) -> Iterator[Saving]:
    """Measured with stored statistics, and with those of the batch."""
    model, batch = stranger.build(), stranger.given(samples)
    for statistics, training in (("stored", False), ("batch", True)):
        model.train(training)
        found = [kept(stranger, change(copy.deepcopy(model)), batch) for change in changes(stranger, with_asi)]
        yield Saving(statistics, *found, *(() if with_asi else found[-1:]))


def changes(stranger: Stranger, with_asi: bool) -> list[Callable[[nn.Module], nn.Module]]:
    """What is done to the model ahead of each measurement."""

    def by_asi(model: nn.Module) -> nn.Module:
        return lowrank.convert(model, asi(stranger, model, all_layers(model)))

    return [lambda model: model, vanilla, *([by_asi] if with_asi else [])]


def kept(stranger: Stranger, model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes kept for a batch; with one seed, so that stochastic depth leaves out the same blocks."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return stranger.loss(model, batch)

    return lowrank.saved_bytes(model, loss, batch)
