"""What methods carry from step to step, such as the bases of ASI: state of the training, as an optimizer's is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import StateError
from lowrank.layers.arguments import require_model
from lowrank.layers.layer import LowRankLayer
from lowrank.methods.base import Tensors

BASES, FACTORS = ".bases.", ("left", "right")


def training_state(model: nn.Module) -> dict[str, Tensor]:
    """What the methods of a converted model carry from step to step; with it a run goes on as if never interrupted.

    It is no part of `model.state_dict()`, which is the stock model's. Of layers whose weight is held as two factors it
    has the factors too, so that they come back bit for bit.

    Returns:
        Contiguous copies, by names such as `layer4.0.conv1.bases.1`; to be saved beside the optimizer's state.

    Raises:
        ConversionError: `model` is no module.

    Example:
        torch.save({"model": model.state_dict(), "lowrank": lowrank.training_state(model)}, path)
    """
    state: dict[str, Tensor] = {}
    for name, layer in _layers(model):
        for index, basis in enumerate(layer._lowrank.bases):
            if basis is not None:
                state[f"{name}{BASES}{index}"] = basis
        for factor in FACTORS:
            own = layer._parameters.get(factor)
            if own is not None:
                state[f"{name}.{factor}"] = own
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}


def is_basis(key: str) -> bool:
    """Whether what `training_state` has under a key is a basis, which each process of several has of its own images.

    The rest is the same in all of them, as parameters are.
    """
    return BASES in key


def load_training_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over what `training_state` gave; layers that it does not name start afresh.

    Args:
        model: converted as the one that the state is of; load its `state_dict()` first.
        state: of that one.

    Raises:
        StateError: it is of another model or of higher ranks, or no such state; nothing is changed.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"the training state is a {type(state).__name__}; allowed is what lowrank.training_state gives"
        )
    layers, factors = dict(_layers(model)), []
    bases: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise StateError(f"training state {key!r} is a {type(tensor).__name__}; allowed is a tensor by a name")
        name, found, index = key.rpartition(BASES)
        if found and name in layers and index.isdecimal() and int(index) < 64:
            bases.setdefault(name, {})[int(index)] = tensor
            continue
        name, _, factor = key.rpartition(".")
        own = layers[name]._parameters.get(factor) if name in layers and factor in FACTORS else None
        if own is None:
            raise StateError(f"training state {key!r} is of no converted layer of this model; it is of another one")
        if own.shape != tensor.shape:
            raise StateError(f"training state {key!r} has shape {[*tensor.shape]}; the model's is {[*own.shape]}")
        factors.append((own, tensor))
    carried = {name: _in_order(bases.get(name, {})) for name in layers}
    for name, layer in layers.items():
        reason = layer._lowrank.method.reason_against_state(carried[name])
        if reason is not None:
            raise StateError(f"the training state of layer {name!r} is of another method: {reason}")
    for own, tensor in factors:
        with torch.no_grad():
            own.copy_(tensor)
    for name, layer in layers.items():
        device = next(layer.parameters()).device
        layer._lowrank.carry(
            tuple(None if basis is None else basis.detach().to(device, copy=True) for basis in carried[name])
        )


def _in_order(bases: Mapping[int, Tensor]) -> Tensors:
    return tuple(bases.get(at) for at in range(max(bases, default=-1) + 1))


def _layers(model: nn.Module) -> Iterator[tuple[str, LowRankLayer]]:
    require_model(model)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLayer))
