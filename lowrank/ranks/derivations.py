"""Which layers' inputs follow from what one layer ahead keeps of its own, and how; see `derive` of `ASI`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.conversion.convert import convert
from lowrank.layers.derived import Derivation, derivations_noted
from lowrank.layers.preserve import LossFunction, loss_of, preserved
from lowrank.methods.base import Tensors
from lowrank.methods.deriving import Derive
from lowrank.methods.rounded import Rounded
from lowrank.tensors.geometry import Geometry


def find_derivations(
    model: nn.Module, names: Iterable[str], loss_fn: LossFunction, batch: Any, derive: Derive = True
) -> dict[str, Derivation]:
    """Per name of a layer whose input need not be kept, how it follows from another one's; from one forward pass.

    The model is left as it was. Arguments as of `measure_perplexity`.
    """
    with preserved(model), _converted(model, names, derive), torch.enable_grad(), derivations_noted() as found:
        loss_of(loss_fn, model, batch)
    return found


@contextmanager
def _converted(model: nn.Module, names: Iterable[str], derive: Derive) -> Iterator[None]:
    """Within it the named layers keep a form each, by which it shows what follows from which."""
    before = [(module, type(module), _own(module)) for module in model.modules()]
    try:
        convert(model, names, _Probe(derive=derive), everywhere=True)
        yield
    finally:
        for module, kind, own in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(own)


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, and what it has registered."""
    return {name: dict(own) if name in _REGISTERED else own for name, own in vars(module).items()}


_REGISTERED = ("_parameters", "_modules")


class _Probe(Rounded):
    """A form that is the input itself, and is told from it."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return (x.view_as(x), *[None] * x.ndim), ()
