"""The first step of a compression, made in the pass that makes the tensor.

An activation writes a large tensor, and the layer behind it reads it again to compress it. Which layer that is, and
what it begins with, is mostly as it was in the pass before. So the activation makes that layer's first step while each
piece of the tensor is in the cache, and notes it; the layer takes it where it is its own step, and makes its own where
it is not. The two are the same to the last bit, so nothing but time depends on the guess.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank.kernels.clamped import clamp_and_begin
from lowrank.kernels.iterations import Iteration
from lowrank.kernels.passes import Gate
from lowrank.tensors.geometry import Shape
from lowrank.tensors.notes import Notes

_LEAST = 2**20  # numbers of a tensor that does not stay in the cache
_GUESSES = 3  # wrong ones in a row, after which there is no other


class Compressing(Protocol):
    """A layer that compresses its inputs.

    Attributes:
        behind: the one that did so next in the latest pass; None: not known.
        misled: how many guesses by it were wrong, since the latest right one.
    """

    behind: weakref.ref[Any] | None
    misled: int

    def first_step(self, shape: Shape) -> Iteration | None:
        """What it will begin with on a tensor of this shape, as far as it can tell."""


@dataclass(eq=False)
class Begun:
    """A step that was made, and what it left of the tensor, and its basis; None: that was taken, or given up."""

    step: Iteration
    found: tuple[Tensor, Tensor] | None


class _Thread(threading.local):
    last: weakref.ref[Any] | None = None  # the layer that compressed last
    begun: weakref.ref[Begun] | None = None  # since then


_THREAD = _Thread()
_BEGUN: Notes[Begun] = Notes()


def clamp(x: Tensor, gate: Gate, low: float, high: float, bits: Tensor) -> Begun | None:
    """`passes.clamp` of a large contiguous tensor in its place, with the first step of the layer that is likely to be
    behind it.

    Returns:
        What to `note` of the tensor; None: nothing is done.
    """
    if x.numel() < _LEAST:
        return None
    last = _last()
    behind = None if last is None or last.behind is None or last.misled >= _GUESSES else last.behind()
    step = None if behind is None else behind.first_step(tuple(x.shape))
    found = None if step is None else clamp_and_begin(x, gate, low, high, bits, step)
    return None if step is None or found is None else Begun(step, found)


def note(x: Tensor, begun: Begun) -> None:
    """Note what `clamp` returned, of the tensor as it then is."""
    _give_up()
    _THREAD.begun = weakref.ref(begun)
    _BEGUN.note(x, begun)


def hand_on(x: Tensor, same: Tensor) -> None:
    """Note the same of another tensor on the same memory, by which its layer knows it."""
    begun = _BEGUN.find(x) if _BEGUN.may_know(x) else None
    if begun is not None:
        _BEGUN.note(same, begun)


def begun_of(x: Tensor, step: Iteration) -> Begun | None:
    """What is noted of a tensor, if it is this step's."""
    begun = _BEGUN.find(x) if _BEGUN.may_know(x) else None
    if begun is None or begun.found is None or begun.step._replace(start=step.start) != step:
        return None
    same = begun.step.start is step.start or torch.equal(begun.step.start, step.start)
    return begun if same else None


def take(begun: Begun) -> None:
    """Note that a step has served its layer, which has what is left of it."""
    begun.found = None
    last = _last()
    if last is not None and _THREAD.begun is not None and _THREAD.begun() is begun:
        _THREAD.begun, last.misled = None, 0


def compressed(layer: Compressing) -> None:
    """Note that a layer has compressed its input."""
    last = _last()
    _give_up()
    if last is not None:
        last.behind = weakref.ref(layer)
    _THREAD.last = weakref.ref(layer)


def _last() -> Compressing | None:
    return None if _THREAD.last is None else _THREAD.last()


def _give_up() -> None:
    """Let go of a step that was made and has served nobody."""
    if _THREAD.begun is None:
        return
    begun, last = _THREAD.begun(), _last()
    _THREAD.begun = None
    if begun is not None:
        begun.found = None
    if last is not None:
        last.misled += 1
