"""What layers note of a tensor for the layers that it reaches: version, lifetime and compiling in one place."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Fact = TypeVar("Fact")


class Notes(Generic[Fact]):
    """Facts of one kind about tensors.

    A fact ends with its tensor, or when the tensor is changed in place. None is noted while compiling, nor of a tensor
    of inference mode, which does not count its changes.
    """

    def __init__(self) -> None:
        self._facts: dict[int, tuple[weakref.ref[Tensor], int, Fact]] = {}
        _ALL.append(self)

    def note(self, tensor: Tensor, fact: Fact) -> None:
        """Note a fact in the place of an earlier one."""
        if type(tensor) is Tensor:  # a context takes as long as all the rest
            self._note(tensor, fact)
            return
        with torch._C.DisableTorchFunctionSubclass():
            self._note(tensor, fact)

    def _note(self, tensor: Tensor, fact: Fact) -> None:
        if not torch.compiler.is_compiling() and not tensor.is_inference():
            key = id(tensor)  # by address, since a look-up comes with every operation
            self._facts[key] = (weakref.ref(tensor, partial(self._ended, key)), tensor._version, fact)

    def find(self, tensor: Tensor) -> Fact | None:
        """The fact, if the tensor is still as it was."""
        if torch.compiler.is_compiling():
            return None
        found = self._facts.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        if type(tensor) is Tensor:
            return found[2] if found[1] == tensor._version else None
        with torch._C.DisableTorchFunctionSubclass():
            return found[2] if found[1] == tensor._version else None

    def may_know(self, tensor: Tensor) -> bool:
        """Whether there is a fact, of this tensor or of an earlier one in its place."""
        return not torch.compiler.is_compiling() and id(tensor) in self._facts

    def _ended(self, key: int, reference: weakref.ref[Tensor]) -> None:
        found = self._facts.get(key)
        if found is not None and found[0] is reference:
            del self._facts[key]

    def __len__(self) -> int:
        return len(self._facts)


_ALL: list[Notes[Any]] = []


def hand_on_all(x: Tensor, same: Tensor) -> None:
    """Note all that is known of a tensor of another one that is the same: on its memory, with its version."""
    for notes in _ALL:
        fact = notes.find(x) if notes.may_know(x) else None
        if fact is not None:
            notes.note(same, fact)


class Changes:
    """Tells whether a tensor is changed in place from here on; holds none of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._like: Tensor | None = None
        if not tensor.is_inference() and not tensor.is_meta:
            self._like = tensor.detach()  # it counts the same changes
            self._like.data = tensor.new_empty(0)
            self._version = self._like._version

    def __bool__(self) -> bool:
        return self._like is not None and self._like._version != self._version


class Glimpse:
    """A tensor without a graph for as long as its memory lives, and is as it was; does not keep that alive.

    Whoever saves the tensor for the backward pass may have saved another object on the same memory.

    Args:
        tensor: that somebody keeps.
        known: whether others know its memory, and may change it.
    """

    def __init__(self, tensor: Tensor, known: bool = False) -> None:
        self._changes = Changes(tensor) if known else None
        self._storage = weakref.ref(tensor.untyped_storage())
        self._like = (tensor.dtype, tensor.device)
        self._place = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def is_there(self) -> bool:
        """Whether its memory is there, as it was."""
        return self._storage() is not None and not self._changes

    def tensor(self) -> Tensor | None:
        """The tensor; None if its memory is gone, or changed."""
        storage: Any = self._storage()
        if storage is None or self._changes:
            return None
        dtype, device = self._like
        return torch.empty(0, dtype=dtype, device=device).set_(storage, *self._place)
