"""The classes that stand in for stock ones, each made once; those of others are proven at their first step."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConversionError, SettingError
from lowrank.layers.direct import DIRECT
from lowrank.layers.kinds import KINDS, kind_of
from lowrank.layers.layer import LowRankLayer, as_computed, geometry_of, input_of, is_single
from lowrank.layers.lazy import real
from lowrank.layers.swap import is_parametrized_class, own_of
from lowrank.tensors.eager import in_compiled_graph
from lowrank.tensors.geometry import Shape


class LowRankConv2d(LowRankLayer, nn.Conv2d):  # type: ignore[misc]
    """A converted `nn.Conv2d`."""

    stock_class, kind = nn.Conv2d, KINDS[nn.Conv2d]
    _direct = DIRECT[nn.Conv2d]


class LowRankLinear(LowRankLayer, nn.Linear):  # type: ignore[misc]
    """A converted `nn.Linear`."""

    stock_class, kind = nn.Linear, KINDS[nn.Linear]
    _direct = DIRECT[nn.Linear]


class RegisteredLayer(LowRankLayer):
    """A layer of a class that `register_layer` was told of: what it was told is compared with the class's own forward
    pass, once for each layer, at the first training step that has only finite outputs."""

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._lowrank.proven:
            self._prove(real(input))
        return super()._plain(input, weight, bias)

    def _compiled(self, input: Tensor) -> Tensor:
        asked = torch.is_grad_enabled() and in_compiled_graph() and not input.is_meta
        if asked and not self._lowrank.method.keeps_input and not self._lowrank.method.chooses_by_data:
            from lowrank.layers.graph_break import can_be_proven, out_of_graph

            if not can_be_proven(self, tuple(map(operator.index, input.shape)), input.dtype, input.device):
                return out_of_graph(self._read, input)  # which raises what there is to say
        return super()._compiled(input)

    def prove_ahead(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is proven, by numbers of its own: those of a compiler's input are not known yet."""
        if not self._lowrank.proven:
            try:
                self._prove(torch.arange(prod(shape), device=device).sin().view(shape).to(dtype))
            except (SettingError, RuntimeError):
                return False
        return self._lowrank.proven or not prod(shape)

    @torch.no_grad()
    def _prove(self, input: Tensor) -> None:
        moved = self._with_other_numbers()
        with torch.random.fork_rng():
            own = moved.forward(input)
        if not own.numel() or not own.isfinite().all():
            return
        weight, bias = self.kind.weight(moved), moved.bias
        x, dtype, outside = as_computed(input_of(moved, input), weight)
        try:
            with outside:
                x = x.unsqueeze(0) if is_single(self, x) else x
                told = geometry_of(self).forward(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            told = told.squeeze(0) if is_single(self, input) else told
            same = told.shape == own.shape and (told - own).norm() <= torch.finfo(dtype).eps ** 0.5 * own.norm()
        except RuntimeError:  # a weight of other sizes, say
            same = False
        if not same:
            raise SettingError(
                f"layer {self._lowrank.name!r}: {self.stock_class.__name__} does not compute what register_layer was "
                f"told of it; register it again, with the geometry and the weight of its forward, or do not name it"
            )
        self._lowrank.proven = True

    def _with_other_numbers(self) -> Any:
        """A stock layer whose parameters are not zero, as a bias may be that has no part in the output yet; nothing of
        the layer itself is changed by its forward pass."""

        def other(numbers: Tensor | None) -> Tensor | None:
            if numbers is None:
                return None
            some = torch.arange(numbers.numel(), device=numbers.device).cos().view(numbers.shape)
            return numbers.detach() + some.to(numbers.dtype)

        stock = self.stock_class.__new__(self.stock_class)
        parameters = {name: other(one) for name, one in self._parameters.items()}
        buffers = {name: None if one is None else one.clone() for name, one in self._buffers.items()}
        stock.__dict__ = {**self.__dict__, "_parameters": parameters, "_buffers": buffers}
        return stock


def _name_of_input(stock: type[nn.Module]) -> str:
    """What the forward pass of a class calls its input, which a caller may give by that name."""
    try:
        _, *names = inspect.signature(stock.forward).parameters
    except (TypeError, ValueError):  # it does not say
        names = []
    return names[0] if names else "input"


def _taking(name: str) -> Callable[..., Tensor]:
    """The forward pass of a converted layer whose input is called otherwise."""

    def forward(self: LowRankLayer, *given: Any, **options: Any) -> Tensor:
        if not given and name in options:
            given = (options.pop(name),)
        return LowRankLayer.forward(self, *given, **options)

    return forward


_LAYERS: dict[type[nn.Module], type[LowRankLayer]] = {nn.Conv2d: LowRankConv2d, nn.Linear: LowRankLinear}


def layer_class(stock: type[nn.Module]) -> type[LowRankLayer]:
    """The class that stands in for a stock one.

    Raises:
        ConversionError: for one that is not registered.
    """
    if is_parametrized_class(stock):  # of one module, and so is what stands in for it
        (base,) = stock.__bases__
        made: type[LowRankLayer] = type(stock.__name__, (layer_class(base),), {**own_of(stock), "stock_class": stock})
        return made
    kind = kind_of(stock)
    if kind is None:
        raise ConversionError(f"{stock.__name__} is no layer that can be converted; see lowrank.register_layer")
    if stock not in _LAYERS or (kind.registered and _LAYERS[stock].kind is not kind):
        own = {"stock_class": stock, "_place": (__name__, "layer_class"), "__module__": stock.__module__}
        base = RegisteredLayer if kind.registered else LowRankLayer
        if (name := _name_of_input(stock)) != "input":
            own["forward"] = _taking(name)
        _LAYERS[stock] = type(f"LowRank{stock.__name__}", (base, stock), {**own, "kind": kind})
    return _LAYERS[stock]
