"""Bytes and operations of a model's layers by formula, for the model as it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.conversion.select import named_layers
from lowrank.errors import ConversionError
from lowrank.layers.arguments import input_among
from lowrank.layers.factored import FactoredLinear
from lowrank.layers.layer import LowRankLayer, can_be_converted, computed_input, geometry_of, is_single, weight_of
from lowrank.layers.lazy import real
from lowrank.layers.preserve import preserved, without_graphs
from lowrank.layers.shared_inputs import forms_held
from lowrank.layers.swap import stock_class
from lowrank.layers.token_mask import without_padding
from lowrank.methods.base import Method, Vanilla
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.eager import without_autocast
from lowrank.tensors.geometry import Geometry


class Account(Mapping[str, LayerCost]):
    """Cost per layer name; `total` is their sum. An input that several layers are given counts for each of them, as in
    the papers' tables; `lowrank.saved_bytes` measures what is kept of it, once.

    Attributes:
        whole: names of the layers that keep their input as it is, since keeping less of one so small is not worth its
            time; see `smallest` of `convert`.
        derived: per name of a layer that keeps nothing, since its input follows from what another one keeps, that one's
            name; see `derive` of `lowrank.ASI`. Their operations are those of exact training, without computing the
            input again.
    """

    def __init__(
        self, layers: dict[str, LayerCost], whole: Iterable[str] = (), derived: Mapping[str, str] | None = None
    ) -> None:
        self._layers, self.whole, self.derived = layers, tuple(whole), dict(derived or {})

    def __getitem__(self, name: str) -> LayerCost:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def total(self) -> LayerCost:
        """Sum over the layers."""
        return sum(self._layers.values(), LayerCost())


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor as it is, a mapping by keyword, of a tuple or list the first entry."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def account(
    model: nn.Module,
    names: Iterable[str],
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] = run_model,
) -> Account:
    """Bytes kept and operations done by the named layers in one training step, by formula.

    Vanilla layers are counted before `convert`, the method's own cost after it. A layer whose weight is frozen keeps
    nothing. Only SVD and HOSVD, whose ranks depend on the data, read the batch's values; for everything else model and
    batch may be on the `meta` device.

    Args:
        model: any module; left as it was.
        names: layers that can be converted.
        batch: a tensor (B, ...), a tuple or list that starts with one, or a mapping of keyword arguments.
        forward: `forward(model, batch)`, where the model is called in another way.

    Raises:
        ConversionError: a layer that is unknown, not supported, or not called.
    """
    layers = named_layers(model, names)
    for name, layer in layers.items():
        if not can_be_converted(layer):
            raise ConversionError(f"layer {name!r} ({stock_class(layer).__name__}) cannot be accounted for")
    calls: dict[str, list[LayerCost]] = {name: [] for name in layers}
    ahead: dict[str, list[str | None]] = {name: [] for name in layers}
    in_full: dict[str, LayerCost] = {}
    whole: set[str] = set()

    def close(name: str) -> None:
        """Of a layer's latest call, if there was one, whether it kept anything, is known when it is over."""
        if len(ahead[name]) < len(calls[name]):
            ahead[name].append(_ahead(layers[name]))
            if ahead[name][-1] is not None:
                calls[name][-1] = replace(in_full[name], activation_bytes=0)

    def hook(name: str, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        close(name)
        # Of an unread input it is known how it comes about when it is read first.
        given, named = tuple(map(real, given)), {key: real(one) for key, one in named.items()}
        input = input_among(given, named)
        if not isinstance(input, Tensor):  # of which the layer itself says what is wrong
            return given, named
        x = computed_input(layer, input.detach())
        with without_autocast(x.device.type):
            cost, as_it_is = _layer_cost(layer, input, x)
            if isinstance(layer, LowRankLayer) and layer._lowrank.method.derive:
                layer._lowrank.derived = None  # as a call may leave it that keeps nothing anyway
                in_full[name] = _layer_cost(layer, input, x, Vanilla())[0]
        calls[name].append(cost)
        if as_it_is:
            whole.add(name)
        return given, named

    # Forward in grad mode tells which inputs need a gradient; what autograd would keep for a backward pass is dropped.
    dropped = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.new_empty(0), lambda empty: empty)
    with preserved(model), without_graphs(), torch.enable_grad(), dropped, forms_held():
        register = {name: layer.register_forward_pre_hook for name, layer in layers.items()}
        handles = [each(partial(hook, name), with_kwargs=True) for name, each in register.items()]
        try:
            forward(model, batch)
            for name in layers:
                close(name)
        finally:
            for handle in handles:
                handle.remove()
    missing = [name for name in layers if not calls[name]]
    if missing:
        raise ConversionError(f"the forward pass does not call {', '.join(map(repr, missing))}")
    derived = {name: others[0] for name, others in ahead.items() if all(others) and others[0] is not None}
    costs_of = {name: sum(each, LayerCost()) for name, each in calls.items()}
    return Account(costs_of, [name for name in layers if name in whole], derived)


def _ahead(layer: nn.Module) -> str | None:
    """The layer from whose input that of another one followed, in the forward pass just made."""
    return layer._lowrank.derived if isinstance(layer, LowRankLayer) else None


@torch.no_grad()
def _layer_cost(layer: nn.Module, given: Tensor, x: Tensor, by: Method | None = None) -> tuple[LayerCost, bool]:
    """What a layer costs for an input, `x` as it computes with it, by its own method or another, and whether it keeps
    that as it is by the rule of `smallest`."""
    geometry: Geometry = geometry_of(layer)
    needs_input_gradient = given.requires_grad
    x = without_padding(x.unsqueeze(0) if is_single(layer, x) else x, geometry)
    if isinstance(layer, FactoredLinear):
        return layer.cost(x, needs_input_gradient), False
    with torch.enable_grad():  # of a weight that is computed, by which it is known whether it is trained
        weight = weight_of(layer)
    assert isinstance(weight, Tensor)
    out_channels = geometry.by_output(weight).shape[0]
    if weight.requires_grad:
        method: Method = by or Vanilla()
        whole = False
        if by is None and isinstance(layer, LowRankLayer):
            method = layer._lowrank.method_for(geometry, x, out_channels)
            whole = method is not layer._lowrank.method
        cost = method.cost(x, geometry, out_channels, needs_input_gradient)
        return replace(cost, weight_bytes=weight.nbytes), whole
    shape = tuple(x.shape)
    cost = LayerCost(
        flops_paper=costs.paper_forward(geometry, shape, out_channels),
        flops=2 * geometry.macs(shape, out_channels) * (2 if needs_input_gradient else 1),
        weight_bytes=weight.nbytes,
    )
    return cost, False
