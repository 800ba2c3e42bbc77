"""What a converted layer keeps of its input, and what it carries from step to step."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.errors import LowRankError
from lowrank.exact.origins import find, is_known_as_kept, mark_kept, origin_of, reading, takes_nothing
from lowrank.exact.slots import Way, has_slot, mark_computed, place_of_saving, waits
from lowrank.exact.sources import Origin
from lowrank.exact.steps import Rebuild
from lowrank.kernels.iterations import Iteration
from lowrank.layers.derived import derived
from lowrank.layers.shared_inputs import find_kept, note_kept
from lowrank.layers.token_mask import without_padding
from lowrank.methods.base import Method, Tensors, Vanilla
from lowrank.methods.deriving import Derive
from lowrank.tensors import head_start
from lowrank.tensors.geometry import Geometry, Shape
from lowrank.tensors.notes import Changes
from lowrank.tensors.worth import is_worth

Kept = tuple[Method, Tensors]
LITTLE = 32  # a form of so small a part of an input takes hardly anything, and less time than the exact gradient
_MOST_JUDGED = 256  # cases that a layer remembers; sizes of images or texts may never end
_WHOLE = Vanilla()  # of this one object: the method of layers whose own is not worth it


class HandedOut:
    """Tells whether a tensor that was handed out, or one before it, was changed in place; holds none of their memory.

    Args:
        tensor: made anew for who asked for it.
        before: what was handed out before.
    """

    def __init__(self, tensor: Tensor, before: HandedOut | None = None) -> None:
        self._written = before is not None and before.is_written()
        self._changes = Changes(tensor)

    def is_written(self) -> bool:
        """Whether one of them was."""
        return self._written or bool(self._changes)


@dataclass
class LayerState:
    """What a converted layer has beside the stock one.

    Attributes:
        method: how the input is kept.
        name: the layer's name in its model, for messages.
        chosen: whether `convert` was given this layer's name; others are there to keep less than the stock layer.
        lazy: whether the output may be left to who reads it.
        watched: whether the code around it calls activations and the like as functions.
        recompute: whether its output may be computed again in the backward pass.
        smallest: bytes that keeping less has to save for each operator call, see `lowrank.tensors.worth`.
        everywhere: whether the method is used also where the exact input takes no more than what it keeps.
        bases: what the method carries from step to step.
        recorded: of those, the tensors that a CUDA graph of a step reads and writes, which stay in their memory.
        kept_bytes: bytes kept of the input in the latest training forward pass; 0 if another layer keeps them.
        formula_bytes: the same by the method's formula.
        whole: whether it kept its input as it is since keeping less was not worth it.
        exact: whether it kept what its exact input is computed from, where the method would have kept more.
        derived: name of the layer from whose kept form its input is computed, so that it kept nothing.
        judged: of geometries and shapes, whether keeping less is worth it.
        settled: of calls that are the stock layer's, by the same rule, the bytes that are kept.
        handed_out: the weight that a state dict has, where the layer holds two factors in its place.
        reader: the normalisation that has read the latest lazy output by the batch's statistics.
        unstored: the weight's version at a pass in evaluation mode, since which there was none in training mode.
        proven: of a class that was registered, whether it computes what was told of it.
        told: names of the layers of this model that have said so, which one is enough to do; the others share it.
        behind, misled: see `lowrank.tensors.head_start`.
    """

    method: Method
    name: str
    chosen: bool = True
    lazy: bool = False
    watched: bool = False
    recompute: bool = True
    smallest: float = 0
    everywhere: bool = False
    bases: Tensors = field(default=(), repr=False)
    recorded: Tensors = field(default=(), repr=False)
    kept_bytes: int = 0
    formula_bytes: int = 0
    whole: bool = False
    exact: bool = False
    derived: str | None = None
    judged: dict[Any, bool] = field(default_factory=dict, repr=False)
    settled: dict[tuple[Any, ...], int] = field(default_factory=dict, repr=False)
    handed_out: HandedOut | None = field(default=None, repr=False)
    reader: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    unstored: int | None = field(default=None, repr=False)
    proven: bool = False
    told: list[str] = field(default_factory=list, repr=False)
    behind: weakref.ref[LayerState] | None = field(default=None, repr=False)
    misled: int = field(default=0, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        of_this_model = {"reader": None, "handed_out": None, "recorded": (), "behind": None}  # and not of its copies
        return vars(self) | of_this_model

    def carry(self, bases: Tensors) -> None:
        """Take bases over for the next step: as they are, since the backward pass of the step before may still need the
        old ones; or, from where a step is recorded as a CUDA graph on, in the memory that its replays read."""
        if not torch.compiler.is_compiling():
            if not self.recorded and any(basis is not None and basis.is_cuda for basis in self.bases):
                self.recorded = self.bases if torch.cuda.is_current_stream_capturing() else ()
            if self.recorded:
                bases = tuple(_into(*pair) for pair in zip_longest(self.recorded[: len(bases)], bases))
        self.bases, self.unstored = bases, None

    def leave(self, bases: Tensors, weight: Tensor) -> None:
        """Store no bases for the next step, in evaluation mode; and say so where the weight was changed since the last
        such pass: then this is no evaluation. One layer says it for all of the model."""
        if torch.compiler.is_compiling() or not any(basis is not None for basis in bases):
            return
        version = weight._version
        if self.unstored not in (None, version) and not self.told:
            self.told.append(self.name)
            warnings.warn(
                f"layer {self.name!r} is trained in evaluation mode, in which {self.method.tag} stores no bases: each "
                f"step begins anew. Call train() on the converted layers; normalisations and dropout may stay as they "
                f"are",
                stacklevel=2,
            )
        self.unstored = version

    def first_step(self, shape: Shape) -> Iteration | None:
        """What the method will begin with on an input of this shape, as far as it can tell."""
        return self.method.first_step(shape, self.bases)

    def note_reader(self, module: nn.Module) -> None:
        """Note who has read the latest lazy output as it is."""
        self.reader = weakref.ref(module)

    def is_read(self) -> bool:
        """Whether the output is read as it is, as far as can be told: laziness would be for nothing."""
        reader = None if self.reader is None else self.reader()
        return reader is not None and reader.training

    def method_for(self, geometry: Geometry, x: Tensor, out_channels: int) -> Method:
        """How an input (B, ...) is kept: by the method, or, where that is not worth its time, as it is."""
        if not self.smallest:
            return self.method
        if torch.compiler.is_compiling():  # which remembers by itself
            return self.method if self._is_worth(geometry, x, out_channels) else _WHOLE
        case = (geometry, x.shape, x.dtype, out_channels, self.smallest)
        worth = self.judged.get(case)
        if worth is None:
            worth = self._is_worth(geometry, x, out_channels)
            if len(self.judged) < _MOST_JUDGED:
                self.judged = {**self.judged, case: worth}
        return self.method if worth else _WHOLE

    def _is_worth(self, geometry: Geometry, x: Tensor, out_channels: int) -> bool:
        price = self.method.price(x, geometry, out_channels)
        return price is None or is_worth(*price, self.smallest)


def kept_of(layer: Any, geometry: Geometry, weight: Tensor, input: Tensor, x: Tensor) -> Kept:
    """What a layer keeps of its input, and the method that reads it; made once for all that are given the same input.

    Args:
        layer: a converted layer.
        geometry: of the layer.
        weight: of the layer, as its geometry takes it, or another tensor with as many outputs.
        input: what the layer was given.
        x: the same as the layer computes with it.
    """
    state = layer._lowrank
    single = layer.kind.is_single(x)
    batched = Tensor.detach(x).unsqueeze(0) if single else Tensor.detach(x)
    method = state.method
    if state.smallest:
        method = state.method_for(geometry, batched, geometry.by_output(weight).shape[0])
    own = x is input and not single
    if not torch.compiler.is_compiling():
        found = _from_others(state, method, geometry, input) if own else None
        if found is not None:
            return found
        state.derived, state.exact = None, False
        _say_if_planned(state, method, batched)
    kept = find_kept(input, batched, method)
    shared = kept is not None
    if kept is None:
        if own:
            head_start.hand_on(input, batched)
        kept = _form(layer, method, geometry, weight, batched)
        if kept and (kept[0] is not batched or method.derive):
            note_kept(state.name, input, batched, method, kept)
        if kept and kept[0] is batched and x is input:
            mark_kept(input)
    if not torch.compiler.is_compiling():
        state.whole = method is _WHOLE
        state.kept_bytes = 0 if shared else sum(tensor.nbytes for tensor in kept if tensor is not None)
        state.formula_bytes = method.formula_bytes(kept, tuple(batched.shape)) if kept else 0
    return method, kept


def _from_others(state: LayerState, method: Method, geometry: Geometry, x: Tensor) -> Kept | None:
    """How an input is computed again: from another layer's form, or where that takes less than the method's own."""
    if method.leads:  # without its form those behind would keep their inputs, and whole
        return None
    lighter = _lighter_origin(state, method, geometry, x)
    near = derived(x, state.name) if method.derive and (not lighter or lighter[0].nbytes) else None
    if near is not None and takes_nothing(x):
        lighter, near = (origin_of(x), 0), None  # as it was, for as little
    state.derived = None if near is None else near[1]
    state.exact = lighter is not None and near is None and not method.keeps_input
    if near is not None:
        state.kept_bytes = state.formula_bytes = 0
        reader, sources = reading(near[0])
        if method.derive == "slopes" and has_slot(x):
            mark_computed(x, lambda: _read_again(near[0]))
        return Near(reader.one), sources
    if lighter is None:
        return None
    origin, state.formula_bytes = lighter
    state.kept_bytes = origin.nbytes
    reader, sources = reading(origin)
    if has_slot(x):
        mark_computed(x, lambda: _read_again(origin))
    return Rebuilt(reader.one), sources


def _form(layer: Any, method: Method, geometry: Geometry, weight: Tensor, x: Tensor) -> Tensors:
    """What the method keeps of an input that is this layer's to keep."""
    padded = x if method.keeps_input else without_padding(x, geometry)
    kept = _compress(layer._lowrank, method, padded, geometry, None if layer.training else weight)
    kept = tuple(map(_without_the_rest, kept))
    if kept and kept[0] is x and geometry.copies(x) and place_of_saving():
        return (x.clone(), *kept[1:])  # nobody would see it change in place there
    return kept


def _say_if_planned(state: LayerState, method: Method, x: Tensor) -> None:
    """Ranks that were chosen for an input that is derived are its whole shape: far more than the plan's bytes."""
    if method.follows is not None and x.numel():
        warnings.warn(
            f"layer {state.name!r} keeps its whole input: its ranks were chosen so that this follows from what layer "
            f"{method.follows!r} keeps, and here it does not. Convert both as the table was measured, with fuse and "
            f"recompute; or choose ranks without derive",
            stacklevel=2,
        )


def _read_again(origin: Origin) -> Way:
    """One more reader of a tensor that is computed again."""
    reader, sources = reading(origin.as_kept())
    return Way(reader.one, sources, origin.step.is_free)


def _lighter_origin(state: LayerState, method: Method, geometry: Geometry, x: Tensor) -> tuple[Origin, int] | None:
    """The origin of an input, where keeping that adds less than what the method keeps, or hardly more; and the bytes of
    the method's own form."""
    if find(x) is None and not is_known_as_kept(x):
        return None
    origin = origin_of(x)
    if method.keeps_input:
        computed = origin.step.function is not None and not _is_less_alone(x, origin.nbytes)
        return (origin, x.nbytes) if computed else None
    own = "price" in vars(type(method)) and not method.factors_weight  # a subclass may keep something else
    price = method.price(x, geometry, 1) if own and not state.everywhere else None
    if price is None:
        return None
    form = x.nbytes - price[0]
    bits = x.numel() // 8 if waits(x) else 0  # of the activation ahead, which reads an exact input in their place
    return (origin, form) if form + bits > origin.nbytes + x.nbytes // LITTLE else None


def _compress(state: LayerState, method: Method, x: Tensor, geometry: Geometry, evaluated: Tensor | None) -> Tensors:
    """What the method keeps; evaluated: the weight of a layer in evaluation mode."""
    if x.numel() == 0:
        return ()
    try:
        with nullcontext() if method.keeps_input else torch.no_grad():
            if torch.compiler.is_compiling() and not method.keeps_input:
                from lowrank.layers import in_graph

                kept, bases = in_graph.compress(method, geometry, state.name, x, state.bases)
            else:
                kept, bases = method.compress(x, geometry, state.bases, state.name)
    except LowRankError as error:
        raise type(error)(f"layer {state.name!r}: {error}") from None
    if method is not _WHOLE:
        state.carry(bases) if evaluated is None else state.leave(bases, evaluated)
        if not torch.compiler.is_compiling():
            head_start.compressed(state)
    return kept


def _into(recorded: Tensor | None, basis: Tensor | None) -> Tensor | None:
    """A basis in the memory of the recorded one, where there is one of its kind."""
    if recorded is None or basis is None or recorded is basis:
        return basis
    if not basis.ndim and not basis.is_cuda:  # a count, which no graph reads, and other layers share
        return basis
    if (recorded.shape, recorded.dtype, recorded.device) != (basis.shape, basis.dtype, basis.device):
        return basis
    return recorded.copy_(basis)


def _without_the_rest(tensor: Tensor | None) -> Tensor | None:
    """Of an input that is a small part of a larger tensor, such as a class token, a copy, so that the rest is freed."""
    if tensor is None or torch.compiler.is_compiling() or not _is_small_part(tensor):
        return tensor
    return tensor.clone()


def _is_small_part(tensor: Tensor) -> bool:
    return 2 * tensor.nbytes <= tensor.untyped_storage().nbytes()


def _is_less_alone(x: Tensor, others: int) -> bool:
    """Whether a copy of a small part of a tensor takes no more than what it would be computed from."""
    return _is_small_part(x) and x.nbytes <= others


@dataclass(frozen=True)
class Rebuilt(Vanilla):
    """The input as it is, computed again when it is needed."""

    rebuild: Rebuild

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
        return geometry.weight_gradient(self.rebuild(*kept), grad)


Rebuilt.keeps_input = True


class Near(Rebuilt):
    """The input, computed again from what another layer keeps of its own: as near as that."""

    keeps_input: ClassVar[bool] = False
    derive: Derive = True
