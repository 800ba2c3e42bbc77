"""What speaks against a conversion: every problem at once, and nothing touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.conversion.attention import closed_projections
from lowrank.conversion.code import only_hands_on
from lowrank.conversion.select import find_layers, weights_of
from lowrank.errors import LowRankError
from lowrank.layers.factored import factorise_layer
from lowrank.layers.kinds import KINDS
from lowrank.layers.layer import can_be_converted
from lowrank.layers.swap import has_own_forward, stock_class
from lowrank.methods.base import Method

Choice = Iterable[str] | Mapping[str, Method]
_CLOSED = (
    "its attention module hands its weight to a function and never calls it; lowrank.open_attention(model) changes "
    "that for plain self-attention"
)


@dataclass(frozen=True)
class Conversion:
    """One layer's conversion, with all that it takes.

    Attributes:
        name: the layer's.
        layer: the module.
        method: as this layer uses it.
        factors: (O, K) and (K, I), of a weight that will be held so; None for others.
    """

    name: str
    layer: nn.Module
    method: Method
    factors: tuple[nn.Parameter, nn.Parameter] | None


def check(model: nn.Module, names: Choice, method: Method | None = None) -> list[str]:
    """Everything that speaks against `convert` with the same arguments; empty if nothing does. Nothing is touched.

    Args:
        model: any module.
        names: names of `nn.Conv2d` and `nn.Linear` layers, or a method for each name.
        method: for all of them, where `names` are names alone.

    Example:
        for problem in lowrank.check(model, names, lowrank.HOSVD(energy=0.8)):
            print(problem)
    """
    return plan_conversion(model, names, method)[0]


def plan_conversion(model: nn.Module, names: Choice, method: Method | None) -> tuple[list[str], list[Conversion]]:
    """The problems, and the conversions of the layers that have none."""
    if isinstance(names, Mapping) and method is not None:
        return ["a method is given beside one for each layer; give either"], []
    problems, layers = find_layers(model, names)
    if not layers:
        return problems, []
    closed = {id(layer) for layer, _ in closed_projections(model)}
    found: dict[int, Conversion] = {}
    for name, layer in layers.items():
        chosen = names[name] if isinstance(names, Mapping) else method
        reason, conversion = _plan_layer(model, name, layer, chosen, closed)
        if conversion is not None:
            found[id(layer)] = conversion
        else:
            problems.append(f"layer {name!r} ({stock_class(layer).__name__}): {reason}")
    return problems, list(found.values())


def _plan_layer(
    model: nn.Module, name: str, layer: nn.Module, method: object, closed: set[int]
) -> tuple[str, Conversion | None]:
    if not isinstance(method, Method):
        return f"method is {method!r}; give an instance of a method, such as lowrank.HOSVD(energy=0.8)", None
    reason = _CLOSED if id(layer) in closed else _reason_against(layer) or _reason_around(model, name)
    if reason is not None:
        return reason, None
    factors = None
    try:
        method = method.for_layer(name)
        reason = _reason_to_stay_whole(model, layer) if method.factors_weight else None
        reason = reason or method.reason_against(layer)
        if reason is None and method.factors_weight:
            factors = factorise_layer(layer, method)
    except LowRankError as error:
        reason = str(error)
    return (reason, None) if reason is not None else ("", Conversion(name, layer, method, factors))


def _reason_against(layer: nn.Module) -> str | None:
    if not can_be_converted(layer):
        supported = ", ".join(f"nn.{kind.__name__}" for kind in KINDS if kind.__module__.startswith("torch.nn."))
        if any(base.__name__ == "FSDPModule" for base in type(layer).__mro__):
            return "it is sharded already; convert the model ahead of fully_shard"
        base = next((kind.__name__ for kind in KINDS if isinstance(layer, kind)), None)
        if base is not None:
            return f"is a subclass of nn.{base} that may compute something else; supported are {supported} themselves"
        return (
            f"this kind of layer is not supported; supported are {supported}, and what lowrank.register_layer is told"
        )
    if has_own_forward(layer):
        return "it has a forward of its own, set on this one module, which a conversion would not reach"
    try:
        weights = weights_of(layer)
    except AttributeError as error:
        return f"it has no weight as register_layer was told ({error})"
    for weight in weights:
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.layout != torch.strided:
            return f"its weight is {getattr(weight, 'dtype', type(weight).__name__)}; supported are real, dense weights"
    return None


def _reason_around(model: nn.Module, name: str) -> str | None:
    owner, _, child = name.rpartition(".")
    if name and only_hands_on(model.get_submodule(owner), child):
        return "its owner's code hands its weight to a function and never calls it, so converting it has no effect"
    return None


def _reason_to_stay_whole(model: nn.Module, layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be taken apart into two factors."""
    if "left" in layer._parameters:
        return None
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (it is computed, as by pruning or weight normalisation)"
    if not weight.numel():
        return "its weight is empty, so there is nothing to find factors of"
    owners = [module for module in model.modules() if any(p is weight for p in module._parameters.values())]
    if len(owners) > 1:
        return "its weight is used by another module as well, so it cannot be held as two factors"
    return None
