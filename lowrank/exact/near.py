"""How tensors come about from what a layer keeps of another one, in whatever form: as near as that is.

These ways go beside the exact ones of `lowrank.exact.origins`, in the same steps, and begin anew at a form: nothing
that needs a tensor as it was is ever given one that is near it, nor keeps more for their sake. Only layers whose method
derives their input go by them, see `lowrank.layers.derived`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.exact.slots import here, in_checkpoint, place_of_saving
from lowrank.exact.sources import NearOrigin, Origin, Root, Source
from lowrank.exact.steps import Rebuild, Step
from lowrank.tensors.again import LAYER, too_much
from lowrank.tensors.notes import Notes

_NEAR: Notes[NearOrigin] = Notes()


def near_of(x: Tensor) -> NearOrigin | None:
    """How a tensor comes about from a form, if that is known and kept to this moment."""
    near = _NEAR.find(x)
    if near is None or near.place != here() or in_checkpoint():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return near if near.holds() else None


def is_near(x: Tensor) -> bool:
    """Whether anything may be known of that; by little."""
    return _NEAR.may_know(x)


def start(x: Tensor, root: Root) -> NearOrigin:
    """The way of the very tensor that a form is of, which is noted."""
    near = NearOrigin(root.step, root, place=place_of_saving())
    _NEAR.note(x, near)
    return near


def beyond(near: NearOrigin) -> Origin:
    """For what follows from a tensor by such a way alone."""
    return Origin(_FAR, (), near=near)


_FAR = Step(None, cost=2 * LAYER)  # more than any exact way takes


def follow(
    function: Rebuild,
    origins: Sequence[Origin],
    cost: int = 0,
    change: Rebuild | None = None,
    fresh: bool = False,
    link: Any = None,
) -> NearOrigin | None:
    """How `function` of what comes about so does, see `lowrank.exact.origins.note`: from one form, and otherwise from
    what is kept in any case. None where that is not so, or takes too much."""
    root, reach = None, 0
    steps: list[Step] = []
    others: dict[Step, Source] = {}
    for origin in origins:
        near = origin.near
        if near is not None and (root is None or near.root is root):
            root, reach = near.root, max(reach, near.reach)
            steps.append(near.step)
            others.update((source.step, source) for source in near.others)
        elif all(source.kept for source in origin.sources):
            steps.append(origin.step)
            others.update((source.step, source) for source in origin.sources)
        else:
            return None
    step = Step(function, steps, cost, change, fresh, link)
    if root is None or too_much(step.depth, step.cost, reach):
        return None
    return NearOrigin(step, root, tuple(others.values()), reach, place_of_saving())


def note_near(y: Tensor, near: NearOrigin | None) -> None:
    """Note how `y` comes about, if it is no smaller than the form's tensor, or ways from the form may reach so far."""
    if near is None:
        return
    with torch._C.DisableTorchFunctionSubclass():
        laid_out = type(y).untyped_storage is Tensor.untyped_storage  # otherwise it has no memory yet
        own = y.untyped_storage().nbytes() if laid_out else y.nbytes
    near.step.widest = max(near.step.widest, own)
    if near.reach or near.root.nbytes <= own:
        _NEAR.note(y, near)


def hand_on(x: Tensor, same: Tensor) -> None:
    """A tensor of the same numbers comes about in the same way."""
    near = _NEAR.find(x)
    if near is not None:
        _NEAR.note(same, near)
