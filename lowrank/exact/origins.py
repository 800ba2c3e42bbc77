"""How tensors come about: whoever needs one in the backward pass may keep what it is computed from in its place; exact.

A tensor's *origin* is a few kept tensors, its sources, and the steps from them to it, which are the operations of the
forward pass, bit for bit. A layer normalisation has to keep its input: its output then takes nothing, nor does what
linear layers, activations, products and changes of shape make of it.

A step that several backward nodes read is computed once: who comes first leaves what the others will ask for. On the
way there is one linear layer at most, and convolutions of few products, so that no block is computed again as a whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.exact import near as near_ways
from lowrank.exact import slots
from lowrank.exact.edges import edge_of, placed
from lowrank.exact.near import is_near, near_of, note_near
from lowrank.exact.slots import here, place_of_saving
from lowrank.exact.sources import Origin, Source, version_of
from lowrank.exact.steps import Rebuild, Step
from lowrank.tensors.again import too_much
from lowrank.tensors.eager import in_autocast, nodes_run, wants_gradient
from lowrank.tensors.notes import Notes

_ORIGINS: Notes[Origin] = Notes()
# Of a tensor that a backward node keeps: where, see `place_of_saving`, and until when, see `_until`.
_KEPT: Notes[tuple[int, int]] = Notes()


def itself(x: Tensor, kept: bool = False, stream: bool = False) -> Origin:
    """A tensor as its own origin; keeping a parameter takes nothing, nor what a node is known to keep."""
    step = Step(None)
    kept = kept or is_parameter(x) or is_known_as_kept(x)
    held = weakref.ref(x) if stream and not kept else x
    return Origin(step, (Source(step, held, kept, version_of(x)),), stream=stream and not kept)


def is_parameter(x: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one, whose memory is there in any case."""
    with torch._C.DisableTorchFunctionSubclass():
        return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


def mark_kept(x: Tensor) -> None:
    """A node keeps this tensor in full: whatever else is computed from it takes nothing. A compiler sees for itself."""
    slots.mark_kept(x)
    _KEPT.note(x, (place_of_saving(), _until(x)))


def _until(x: Tensor) -> int:
    """What tells a note of a tensor from one of a step before: a tensor that no graph leads to, such as a batch,
    outlives the node that kept it, and may be given again."""
    if torch.compiler.is_compiling():
        return 0
    with torch._C.DisableTorchFunctionSubclass():
        return -1 if x.grad_fn is not None else nodes_run()


def is_known_as_kept(x: Tensor) -> bool:
    """Whether a node keeps this tensor in full."""
    kept = _KEPT.find(x)
    return kept is not None and kept[0] == here() and kept[1] in (-1, nodes_run())


def find(x: Tensor) -> Origin | None:
    """How a tensor comes about, if that is known and its sources are as they were."""
    origin = _ORIGINS.find(x)
    if origin is None or origin.place != here():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return origin if origin.holds() else None


def known(x: Tensor) -> Origin | None:
    """What is known of how a tensor comes about, by an exact way, or a near one, or both."""
    origin, near = find(x), near_of(x) if is_near(x) else None
    if near is None:
        return origin
    return near_ways.beyond(near) if origin is None else replace(origin, near=near)


def is_noted(x: Tensor) -> bool:
    """Whether anything may be known of how a tensor comes about; by little, and not whether it still holds."""
    return _ORIGINS.may_know(x) or is_near(x)


def origin_of(x: Tensor, stream: bool = False) -> Origin:
    """The way to have a tensor in the backward pass that keeps least: its origin, or the tensor itself.

    `stream`: of two that take as much, the one further ahead, see `Origin`.
    """
    return least_of(x, find(x), stream)


def least_of(x: Tensor, origin: Origin | None, stream: bool = False) -> Origin:
    """The same, where `find` has been asked."""
    return with_near(x, itself(x) if origin is None else _least(x, origin, stream))


def _least(x: Tensor, origin: Origin, stream: bool) -> Origin:
    with torch._C.DisableTorchFunctionSubclass():
        if is_known_as_kept(x):
            return itself(x, kept=True)
        added, own = origin.nbytes, x.untyped_storage().nbytes()
        equal = origin.parts or (stream and origin.stream)
        return origin if added < own or (equal and added <= own) else itself(x)


def with_near(x: Tensor, origin: Origin) -> Origin:
    """An origin of a tensor and, for what follows from it, its way from a form, if there is one."""
    near = near_of(x) if is_near(x) else None
    return origin if near is None else replace(origin, near=near)


def takes_nothing(x: Tensor) -> bool:
    """Whether a tensor can be had from what is kept in any case."""
    origin = find(x)
    return origin is not None and origin.nbytes == 0


def come_about(
    function: Rebuild,
    inputs: Iterable[Origin],
    parts: bool = False,
    cost: int = 0,
    change: Rebuild | None = None,
    fresh: bool = False,
    link: Any = None,
) -> Origin | None:
    """The origin of `function` of these, see `note`; None where that takes too much."""
    origins = list(inputs)
    step = Step(function, [origin.step for origin in origins], cost, change, fresh, link)
    if too_much(step.depth, step.cost):
        return None
    sources: dict[Step, Source] = {}
    stream = False
    for origin in origins:
        parts, stream = parts or origin.parts, stream or origin.stream
        for source in origin.sources:
            if source.kept or source.step not in sources:  # of one that is kept for one input and not for another
                sources[source.step] = source
    return Origin(step, tuple(sources.values()), parts, place_of_saving(), stream)


def note(y: Tensor, function: Rebuild, inputs: Iterable[Origin], parts: bool = False, **options: Any) -> None:
    """Note that `y` is `function` of these, unless that takes too much; and the way from a form, if one has such.

    Args:
        y: any tensor that autograd follows.
        function: the operation; refers to no tensor itself.
        inputs: origins of its arguments.
        parts: see `Origin`.
        options: `cost` of a layer, see `BUDGET` and `LAYER`; `change`, `fresh` and `link`, see `Step`.
    """
    origins = list(inputs)
    note_origin(y, come_about(function, origins, parts, **options))
    for origin in origins:
        if origin.near is not None:
            note_near(y, near_ways.follow(function, origins, **options))
            break


def note_origin(y: Tensor, found: Origin | None) -> None:
    """Note how `y` comes about, unless that takes as much as itself."""
    if found is None:
        return
    for source in found.sources:
        if source.tensor is y:
            return
    with torch._C.DisableTorchFunctionSubclass():
        read = type(y).untyped_storage is Tensor.untyped_storage  # otherwise it has no memory yet
        added, own = found.nbytes, y.untyped_storage().nbytes() if read else y.nbytes
    if added < own or ((found.parts or found.stream) and added <= own):
        _ORIGINS.note(y, found)


def hand_on(x: Tensor, same: Tensor) -> None:
    """A tensor of the same numbers comes about in the same way."""
    origin = _ORIGINS.find(x)
    if origin is not None:
        _ORIGINS.note(same, origin)
    near_ways.hand_on(x, same)


class Reader:
    """What one backward node computes again. Refers to no tensor; the sources are saved by autograd.

    Called with the saved sources, it gives the tensors, of which its `steps` are. `edges`: where these stand in the
    graph; None of a tensor that is saved itself, and where nobody differentiates the backward pass.
    """

    def __init__(self, origins: Sequence[Origin], edges: Sequence[Tensor | None]) -> None:
        self.steps, self.edges = [origin.step for origin in origins], edges
        self._sources = list(dict.fromkeys([source.step for origin in origins for source in origin.sources]))
        self._waiting = True
        for step in self.steps:
            step.need()

    def one(self, *saved: Tensor) -> Tensor:
        """The tensor, of a reader of one."""
        return self(*saved)[0]

    def __call__(self, *saved: Tensor) -> list[Tensor]:
        known = dict(zip(self._sources, saved, strict=True))
        if torch.is_grad_enabled():  # the backward pass is itself differentiated
            return [self._followed(step, edge, known) for step, edge in zip(self.steps, self.edges, strict=True)]
        found = [step.value(known) for step in self.steps]
        self.done()
        return found

    def _followed(self, step: Step, edge: Tensor | None, known: dict[Step, Tensor]) -> Tensor:
        if step.function is None:
            return known[step]
        with torch.no_grad():
            value = step.followed(known)
        return placed(edge, value)

    def done(self) -> None:
        """It has read; once is enough."""
        if self._waiting:
            self._waiting = False
            for step in self.steps:
                step.release()

    def __del__(self) -> None:
        self.done()


def reading(*origins: Origin, of: Sequence[Tensor | None] = ()) -> tuple[Reader, tuple[Tensor, ...]]:
    """A reader of these, and what autograd has to save for it.

    Args:
        origins: of tensors.
        of: the tensors, or what stands in the graph where second derivatives of theirs go on; none where the backward
            pass cannot be differentiated.
    """
    sources: dict[Step, Tensor] = {}
    for origin in origins:
        for source in origin.sources:
            if source.step not in sources:
                sources[source.step] = source.tensor
                if not source.kept:
                    mark_kept(sources[source.step])
    again = [origin.step.function is not None for origin in origins]
    edges = [edge_of(x) if x is not None and anew else None for x, anew in zip(of, again, strict=True)] if of else []
    return Reader(origins, edges or [None] * len(origins)), tuple(sources.values())


def lean_mode(x: Any) -> bool:
    """Whether what autograd keeps for `x` is this package's to decide: in plain eager training without autocast."""
    if not isinstance(x, Tensor) or not wants_gradient(x):
        return False
    return not torch._C._is_any_autocast_enabled() or not in_autocast(x.device.type)
