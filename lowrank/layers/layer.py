"""Converted layers: the stock module with another `forward`, around the nodes of `autograd_function`.

A converted layer is the same Python object with the same parameters, hooks and name; its class changes, and it has one
attribute more, `_lowrank`. Its state dict is the stock one. In anything but plain eager training it is the stock layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from lowrank.exact.near import beyond
from lowrank.exact.origins import (
    is_noted,
    itself,
    known,
    mark_kept,
    origin_of,
)
from lowrank.exact.recompute import note_layer
from lowrank.exact.slots import has_slot, in_checkpoint
from lowrank.exact.sources import Origin
from lowrank.exact.watched import Watched, tell_if_compiled, watch
from lowrank.layers.arguments import require_model
from lowrank.layers.autograd_function import Call, LowRankFunction, Settings, lazy_output
from lowrank.layers.derived import near_ahead, within_reach
from lowrank.layers.direct import nothing
from lowrank.layers.held import Held, can_be_held, hold
from lowrank.layers.keeping import Kept, LayerState, kept_of
from lowrank.layers.kinds import Kind, kind_of
from lowrank.layers.lazy import Lazy, real
from lowrank.layers.replaced import is_replaced, tell_replaced
from lowrank.layers.swap import Changed, plain_class
from lowrank.methods.base import Method, Tensors
from lowrank.tensors.again import BUDGET, LAYER, ROOM, SHRINKING
from lowrank.tensors.eager import in_autocast, in_compiled_graph, trains_plainly, without_autocast
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry
from lowrank.tensors.worth import again_is_worth, bits_are_worth, merging_ahead_is_worth, merging_is_worth

_OWN = {Watched, Held, Lazy}
_MOST_SETTLED = 256  # calls that a layer remembers; sizes of images or texts may never end


class LowRankLayer(Changed):
    """What every converted layer has in common; its state is `_lowrank`."""

    kind: ClassVar[Kind]
    _direct: Any = nothing
    weight: nn.Parameter
    bias: nn.Parameter | None
    _lowrank: LayerState

    def forward(self, input: Tensor, *sizes: Any, **options: Any) -> Tensor:
        """Output of the stock layer; keeps what the method keeps. With the size of a transposed convolution's output
        given at the call it is the stock layer."""
        if type(input) is Tensor and (settled := self._lowrank.settled) and not torch.compiler.is_compiling():
            kept = settled.get(_call_of(self, input))  # asked first, and by little: a settled call takes stock's time
            if kept == 0 or (kept and not is_noted(input) and torch.is_grad_enabled()):
                if kept:
                    self._note_whole(input, kept)
                direct = None if sizes or options else self._direct(input)
                return super().forward(input, *sizes, **options) if direct is None else direct
        if sizes or options:
            return self._as_stock(input, *sizes, **options)
        if "parametrizations" not in self._modules:
            return self._forward(input)
        with parametrize.cached():  # a weight is computed once per call: spectral norm takes a step each time
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if "_conv_forward" in self.__dict__:  # somebody's own, set on this one module, such as for a circular padding
            return self._as_stock(input)
        if is_replaced():
            if not torch.compiler.is_compiling():
                tell_replaced(self._lowrank.name)
            return self._as_stock(input)
        if torch.compiler.is_compiling():
            return self._compiled(input)
        if type(input) not in _OWN:
            return self._run(input)
        with torch._C.DisableTorchFunctionSubclass():
            return self._run(input)

    def _compiled(self, input: Tensor) -> Tensor:
        """A compiler decides itself what to keep of a layer that keeps its input; other methods go into its graph, but
        for those that choose by the data: they would break it at each choice. Asked first, by nothing that is of one
        layer, so that this is compiled once for all; where PyTorch's limit is reached after all, it runs by itself."""
        not_for_graphs = type(input) in _OWN  # of a part that was compiled later
        if not_for_graphs:
            tell_if_compiled()
        by_data = self._lowrank.method.chooses_by_data and torch.is_grad_enabled() and in_compiled_graph()
        if by_data or not_for_graphs:
            from lowrank.layers.graph_break import out_of_graph

            return out_of_graph(self._read, input)
        if not torch.compiler.is_compiling():
            return self._read(input)
        weight, bias = self.kind.weight(self), self.bias
        wanted = weight.requires_grad or (input.requires_grad and self._lowrank.method.own_input_gradient)
        tracked = torch.is_grad_enabled() and wanted and in_compiled_graph()
        numbers = weight.numel() and weight.is_floating_point() and not input.is_meta
        if not tracked or not numbers:
            return self._stock(input)
        if self._lowrank.method.keeps_input:
            return self._stock_in_graph(input, weight, bias)
        for size in input.shape:  # a graph for each: what is kept is of sizes, not of symbols
            operator.index(size)
        return _tracked(self, input_of(self, input), weight, bias)

    def _stock_in_graph(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self._stock(input)
        if self._lowrank.lazy and input.ndim == 4:
            from lowrank.layers.merged_in_graph import offer

            x, dtype, _ = as_computed(input, weight)
            offer(y, x, weight, bias, Settings(self._lowrank.name, geometry_of(self), self._lowrank.method, dtype), ())
        return y

    def _read(self, input: Tensor) -> Tensor:
        """In eager training, for a compiled graph behind it."""
        found = real(self._run(input))
        return found.as_subclass(Tensor) if type(found) is Watched else found

    def _run(self, input: Tensor) -> Tensor:
        if not self.kind.fits(input):
            return self._stock(input)
        weight, bias = self.kind.weight(self), self.bias
        if not trains_plainly(input, weight, bias) or not weight.numel():
            return self._stock(input)
        return self._watched(self._plain(input, weight, bias))

    def _watched(self, y: Tensor) -> Tensor:
        """An output as functions are called with it that keep less."""
        return watch(y) if type(y) is Tensor and self._is_to_be_watched(y) else y

    def _is_to_be_watched(self, y: Tensor) -> bool:
        """Whether functions of an output may keep less; where it wants no gradient, they keep nothing as it is."""
        state = self._lowrank
        return state.watched and y.requires_grad and (not state.smallest or bits_are_worth(y, state.smallest))

    def _plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In plain eager training."""
        x = real(input)
        if weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad):
            if self._lowrank.smallest and _is_best_as_stock(self, input, weight):
                return self._kept_whole(x)
            return _tracked(self, input_of(self, x), weight, bias)
        found = _untracked(self, input_of(self, x), weight, bias)
        if found is not None:
            return found
        y = self._stock(x)
        state = self._lowrank
        if not state.lazy or not _merging_is_worth(self, geometry_of(self), x, weight):
            self._settle(x, y, 0)
        return y

    def _stock(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def _as_stock(self, input: Tensor, *sizes: Any, **options: Any) -> Tensor:
        """The stock layer, where its own forward pass computes what nobody here knows."""
        x, state = real(input), self._lowrank
        if torch.is_grad_enabled() and type(x) is Tensor and not torch.compiler.is_compiling():
            trained = any(one.requires_grad and one.ndim > 1 for one in self.parameters())
            state.kept_bytes = state.formula_bytes = x.nbytes if trained else 0
            state.whole, state.exact, state.derived = trained and not state.method.keeps_input, False, None
        y: Tensor = super().forward(x, *sizes, **options)
        return y

    def _kept_whole(self, input: Tensor) -> Tensor:
        """The stock layer, which keeps its input."""
        self._note_whole(input, input.nbytes)
        y = self._stock(input)
        self._settle(input, y, input.nbytes)
        return y

    def _note_whole(self, input: Tensor, nbytes: int) -> None:
        """It keeps its input; of which a note, which takes as long as all the rest, is made where somebody waits."""
        state = self._lowrank
        state.kept_bytes = state.formula_bytes = nbytes
        state.whole, state.exact, state.derived = not state.method.keeps_input, False, None
        if has_slot(input):
            mark_kept(input)

    def _settle(self, input: Tensor, y: Tensor, kept: int) -> None:
        """Remember that calls like this one are the stock layer's, if the rule of `smallest` says so."""
        state = self._lowrank
        known = "weight" in self._parameters and not self._is_to_be_watched(y)
        if known and state.smallest and len(state.settled) < _MOST_SETTLED:
            state.settled = {**state.settled, _call_of(self, input): kept}

    def extra_repr(self) -> str:
        """The stock description and the method."""
        return f"{super().extra_repr()}, method={self._lowrank.method}"


def can_be_converted(layer: nn.Module) -> bool:
    """Whether a layer, converted or not, is of a kind that can be."""
    return kind_of(plain_class(layer)) is not None


def _kind(layer: nn.Module) -> Kind:
    kind = layer.kind if isinstance(layer, LowRankLayer) else kind_of(plain_class(layer))
    assert kind is not None, "checked by who asks"
    return kind


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a convolution or linear layer as it stands, of its weight's own kernel."""
    return _kind(layer).geometry(layer)


def weight_of(layer: nn.Module) -> Any:
    """A layer's weight as its geometry takes it."""
    return _kind(layer).weight(layer)


def input_of(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as its geometry takes it."""
    prepare = _kind(layer).prepare
    return x if prepare is None else prepare(layer, x)


def computed_input(layer: nn.Module, x: Tensor) -> Tensor:
    """The same in the dtype in which the layer computes with it and keeps it, such as autocast's."""
    return as_computed(input_of(layer, x), next(layer.parameters()))[0]


def is_single(layer: nn.Module, x: Tensor) -> bool:
    """Whether an input or output comes without its batch dimension."""
    return _kind(layer).is_single(x)


def _tracked(layer: LowRankLayer, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    state = layer._lowrank
    if not torch.compiler.is_compiling():
        state.kept_bytes, state.formula_bytes, state.whole, state.exact, state.derived = 0, 0, False, False, None
    x, dtype, outside = as_computed(input, weight)
    single = is_single(layer, x)
    with outside:
        geometry = geometry_of(layer)
        keep: Callable[[], Kept] = partial(kept_of, layer, geometry, weight, input, x)
        method: Method = state.method
        kept: Tensors = ()
        if weight.requires_grad:
            method, kept = found = keep()
            keep = lambda: found  # noqa: E731
        settings = Settings(state.name, geometry, method, dtype, single)
        call = None
        if _may_be_lazy(layer, settings, input, x):
            call = Call(settings, Tensor.detach(x), weight, bias, keep)
            call.note_reader = state.note_reader
        y = LowRankFunction.apply(x, weight, bias, settings, call, state.watched, *kept)
        if state.lazy and kept and x.ndim == 4 and torch.compiler.is_compiling():
            from lowrank.layers.merged_in_graph import offer

            offer(y, x, weight, bias, settings, kept)
    if x is input and not single and state.recompute and not torch.compiler.is_compiling():
        products = weight.shape[-1] if isinstance(geometry, LinearGeometry) else weight.numel() // y.shape[1]
        if not state.smallest or again_is_worth(y.numel(), products, y.itemsize, state.smallest):
            _note_way(settings, call, (input, weight, bias), y, bool(kept) and method.keeps_input)
    if type(y) is Lazy and x is input:
        hold(x, y)
    return y


def _note_way(
    settings: Settings, call: Call | None, given: tuple[Tensor, Tensor, Tensor | None], y: Tensor, keeps_x: bool
) -> None:
    """Note how a layer's output comes about, and have the normalisation do so that it is computed with."""
    x, weight, bias = given
    linear = isinstance(settings.geometry, LinearGeometry)
    cost = LAYER if linear else weight.numel() // y.shape[1]
    found = origin_of(x).as_kept() if keeps_x else origin_of(x)
    near = near_ahead(x, found.near, bool(settings.method.derive))
    dear = not linear and cost > (BUDGET if y.numel() >= x.numel() else SHRINKING)
    near = None if near is None else within_reach(near, x, y, cost, dear)
    spent = found.step.cost % LAYER
    if not linear and spent + min(spent, ROOM) + cost > BUDGET and 2 * x.nbytes <= y.nbytes:
        found = itself(x)  # a little more is kept here, and all that is behind follows from that
    ahead: Origin | None = found
    if dear:
        ahead = None
    elif not linear and 2 * found.nbytes > y.nbytes:  # a large input that nothing keeps is not held for this
        stream = call is None and weight.shape[1] == 1 and found.step.function is None
        ahead = itself(x, stream=True) if stream else None
    if near is not None:
        ahead = beyond(near) if ahead is None else replace(ahead, near=near)
    elif ahead is None:
        return
    if call is not None:
        call.ahead, call.cost = ahead, cost
    note_layer(ahead, y, settings.geometry.forward, (weight, bias), cost)


def _is_best_as_stock(layer: LowRankLayer, input: Tensor, weight: Tensor) -> bool:
    """Whether a layer keeps its input whatever is done, and neither computing it with a normalisation is worth its time
    nor computing its output again."""
    state, geometry = layer._lowrank, geometry_of(layer)
    linear = type(geometry) is LinearGeometry
    unlike = not (linear or type(geometry) is ConvGeometry) or layer.kind.prepare is not None
    if unlike or not weight.requires_grad or is_single(layer, input) or known(input) is not None:
        return False
    if not state.method.keeps_input and not state.method_for(geometry, input, weight.shape[0]).keeps_input:
        return False
    if linear:
        outputs = input.numel() // input.shape[-1] * weight.shape[0]
        return not (state.recompute and again_is_worth(outputs, weight.shape[1], input.itemsize, state.smallest))
    return not (state.lazy and _merging_is_worth(layer, geometry, input, weight))


def _merging_is_worth(layer: LowRankLayer, geometry: Geometry, input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is worth computing with the normalisation behind it, by the rule of `smallest`."""
    smallest = layer._lowrank.smallest
    if not smallest or type(geometry) is not ConvGeometry or input.ndim != 4:
        return True
    shape, outputs = tuple(input.shape), weight.shape[0]
    if not weight.requires_grad and not input.requires_grad:
        return merging_ahead_is_worth(input.itemsize * prod(geometry.output_shape(shape, outputs)))
    return merging_is_worth(geometry, shape, outputs, input.itemsize, smallest)


def _call_of(layer: nn.Module, input: Tensor) -> tuple[Any, ...]:
    """What tells calls of a layer apart that are judged apart."""
    own = layer._parameters
    weight, bias = own.get("weight"), own.get("bias")  # of a weight that is computed this is not known ahead
    trained = weight is not None and weight.requires_grad, bias is not None and bias.requires_grad
    return input.shape, input.dtype, input.requires_grad, trained


def _untracked(layer: LowRankLayer, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a layer ahead of everything that is trained, if it may be lazy."""
    state = layer._lowrank
    if not state.lazy:
        return None
    x, dtype, outside = as_computed(input, weight)
    with outside:
        geometry = geometry_of(layer)
        settings = Settings(state.name, geometry, state.method, dtype)
        if not _may_be_lazy(layer, settings, input, x):
            return None
        call = Call(settings, x, weight, bias, partial(kept_of, layer, geometry, weight, input, x))
        y = lazy_output(call, watched=False)
    if x is input:
        hold(x, y)
    return y


def _may_be_lazy(layer: LowRankLayer, settings: Settings, input: Tensor, x: Tensor) -> bool:
    """Whether an output may be left to who reads it: nothing can fail then that fails here."""
    geometry, weight, bias = settings.geometry, layer.weight, layer.bias
    if not layer._lowrank.lazy or torch.compiler.is_compiling():
        return False
    if layer._lowrank.is_read() and not in_checkpoint():  # which has to keep the same when it runs this again
        return False
    if type(geometry) is not ConvGeometry or geometry.padding_mode != "zeros":  # others may lay out a copy anew
        return False
    assert isinstance(weight, Tensor)
    if not _merging_is_worth(layer, geometry, x, weight):
        return False
    hooked = layer._forward_hooks or torch_module._global_forward_hooks
    if hooked or not can_be_held(input) or x.ndim != 4 or x.numel() == 0 or x.dtype != settings.dtype:
        return False
    fits = x.shape[1] == weight.shape[1] * geometry.groups and x.device == weight.device
    fits = fits and (bias is None or (isinstance(bias, Tensor) and bias.shape == weight.shape[:1]))
    return fits and weight.shape[0] % geometry.groups == 0 and _gives_output(geometry, x.shape)


@lru_cache(maxsize=1024)
def _gives_output(geometry: ConvGeometry, shape: torch.Size) -> bool:
    return min(geometry.output_shape(tuple(shape), 1)) > 0


def as_computed(input: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype, AbstractContextManager[Any]]:
    """The input as the layer computes with it, the dtype to compute in, and a context without autocast."""
    x, dtype, device = input, weight.dtype, input.device.type
    outside = without_autocast(device)
    if in_autocast(device):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        x = x.to(dtype)
    return x, dtype, outside


def converted_layers(model: nn.Module) -> Iterator[LowRankLayer]:
    """Every layer that was converted by name, in the model's order."""
    require_model(model)
    return (module for module in model.modules() if isinstance(module, LowRankLayer) and module._lowrank.chosen)
