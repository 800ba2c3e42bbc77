"""What a backward node keeps, until another node keeps something that serves as well.

Whether the output of an activation is kept in full, or computed again, is known when the layer behind it is called.
Then the activation needs no bits of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor

from lowrank.errors import ChangedError
from lowrank.tensors.eager import known_in_batch, ordinary
from lowrank.tensors.notes import Notes


class _Keep(torch.autograd.Function):
    """A node that is there to save tensors, as any other does, and to be let go of."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Held:
    """A tensor where nobody's hooks take what autograd saves: held as it is, with the version that it has."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    @property
    def saved_tensors(self) -> tuple[Tensor]:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"version {self._tensor._version}; expected {self._version}"
            )
        return (self._tensor,)


@dataclass(frozen=True)
class Way:
    """How a tensor is computed again: `read` of the kept `tensors`; `is_free` as of `Slot`."""

    read: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    is_free: Callable[[], bool]


class Slot:
    """One tensor that autograd saves, or what gives it.

    Attributes:
        own: whether it is what was put first.
        place: where that was, see `here`.
        is_free: whether whoever has just asked for the tensor may write to it, as nobody else will ask.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.own, self.place = True, here()
        self.is_free: Callable[[], bool] = _never
        self._saved: tuple[_Held | Tensor, ...] | None = (_saved(tensor),)
        self._read: Callable[..., Tensor] | None = None

    def replace(self, way: Way | Tensor) -> None:
        """Save what some other node saves as well, in its place."""
        if self._saved is not None:
            tensors = way.tensors if isinstance(way, Way) else (way,)
            self.own, self._saved = False, tuple(map(_saved, tensors))
            if isinstance(way, Way):
                self._read, self.is_free = way.read, way.is_free

    def tensor(self) -> Any:
        """The tensor, in a backward pass; after one that does not retain the graph it is gone."""
        if self._saved is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: saved tensors were freed; specify "
                "retain_graph=True if you need to"
            )
        nodes = [one if isinstance(one, _Held) else cast(Any, one.grad_fn) for one in self._saved]
        known = known_in_batch()
        try:
            tensors = None if known is None else known.get(self)
            if tensors is None:
                tensors = [ordinary(node.saved_tensors[0]) for node in nodes]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error) or self.own:
                raise
            raise ChangedError(
                f"an activation: its output, which a layer behind it keeps and its gradient is computed from, or what "
                f"that is computed from, was changed in place between forward and backward pass "
                f"({' '.join(str(error).split())[:200]}); change a copy of it"
            ) from None
        read = self._read
        if known is not None:
            known[self] = tensors
        elif not torch._C._autograd._get_current_graph_task_keep_graph():
            self._saved = self._read = None
        if read is None:
            return tensors[0]
        with torch.no_grad():  # which elements it has is no matter of its own gradient
            return read(*tensors)


def _never() -> bool:
    return False


def _saved(tensor: Tensor) -> _Held | Tensor:
    """What holds a tensor: where hooks take what autograd saves, an output of the node that saves it, which lives as
    long as it does."""
    kept = tensor.detach()
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None and not kept.is_inference():
        return _Held(kept)
    with torch.enable_grad():
        output: Tensor = _Keep.apply(torch.empty(0, requires_grad=True), kept)
    return output


def place_of_saving() -> int:
    """What becomes of what autograd saves: 0, or a number for whoever takes it instead, such as a checkpoint."""
    return 0 if torch.compiler.is_compiling() else here()


def here() -> int:
    """The same, of who is not compiling."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return 0
    try:
        return _PLACES.setdefault(hooks[0], next(_NUMBERS))
    except TypeError:  # a callable that nothing can refer to weakly
        return -id(hooks[0])


def in_checkpoint() -> bool:
    """Whether PyTorch's checkpoint takes what autograd saves: it drops that, runs the same again, and refuses to go on
    unless the same is saved then."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__


_PLACES: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_NUMBERS = count(1)


_SLOTS: Notes[weakref.ref[Slot]] = Notes()


def note_slot(output: Tensor, slot: Slot) -> None:
    """Note that the node which gave a tensor could do with the tensor itself."""
    _SLOTS.note(output, weakref.ref(slot))


def has_slot(tensor: Tensor) -> bool:
    """Whether a node that gave a tensor may wait to know that it is kept; by little."""
    return _SLOTS.may_know(tensor)


def mark_kept(tensor: Tensor) -> None:
    """A node keeps this tensor in full: so the one that gave it may let go of what it kept of its own. Not where one
    of the two is in a checkpoint alone, which keeps nothing after all, and counts what is saved within."""
    slot = _waiting(tensor)
    if slot is not None:
        slot.replace(tensor)


def mark_computed(tensor: Tensor, way: Callable[[], Way]) -> None:
    """A node computes this tensor again in the backward pass, ahead of the one that gave it, which may read that;
    `way` is called where somebody waits."""
    slot = _waiting(tensor)
    if slot is not None:
        slot.replace(way())


def waits(tensor: Tensor) -> bool:
    """Whether the node that gave a tensor keeps bits, and would not where the tensor is kept or computed again."""
    return has_slot(tensor) and _waiting(tensor) is not None


def _waiting(tensor: Tensor) -> Slot | None:
    found = _SLOTS.find(tensor)
    slot = None if found is None else found()
    return slot if slot is not None and slot.own and slot.place == here() else None
