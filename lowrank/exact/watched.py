"""Outputs behind which activations and pooling, called as functions, keep less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.slots import place_of_saving
from lowrank.tensors.eager import ORDINARY


class Watched(Tensor):
    """An ordinary tensor; functions of `torch.nn.functional` called with it give way to those that keep less.

    Their results are watched as well, and sums with it; all other results are tensors as ever.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tell_if_compiled()
        if foreign(types):
            args, kwargs = tree_map_only(Watched, lambda x: x.as_subclass(Tensor), (args, kwargs or {}))
            return func(*args, **kwargs)
        watched = of_class(Watched, args)
        if kwargs:
            watched += of_class(Watched, kwargs.values())
        lean = is_watched_for(func) and _is_from_here(watched)
        with unwatched(watched):
            y = (LEAN_FUNCTIONS.get(func, func) if lean else func)(*args, **(kwargs or {}))
        return watch(y) if lean else y

    def detach(self) -> Tensor:
        """As ever, and of the same class, which whoever makes a parameter of it asks for."""
        y: Tensor = watch(super().detach())
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.as_subclass(Tensor).__deepcopy__(memo)


ORDINARY.add(Watched)
BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_SUMS = {torch.add, Tensor.add, Tensor.add_}


class unwatched:
    """Ordinary tensors in the place of these, for a function in which all others are watched as ever.

    A backward pass may run a model's code again; a compiled part of a model takes ordinary tensors alone.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> None:
        for tensor in self._tensors:
            tensor.__class__ = Tensor

    def __exit__(self, *_: object) -> None:
        for tensor in self._tensors:
            tensor.__class__ = Watched


class LeanFunctions(TorchFunctionMode):
    """Within it, in this thread, functions give way to those that keep less."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return LEAN_FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def tell_if_compiled() -> None:
    """Where the graph of a part that is compiled on its own is about to break."""
    if torch.compiler.is_compiling():
        from lowrank.exact.handed_to_a_part import tell

        tell()


def of_class(kind: type[Tensor], arguments: Iterable[Any]) -> list[Any]:
    """The tensors of a class among the arguments of a function, and in the lists, tuples and dicts among these."""
    found = []
    for argument in arguments:
        if type(argument) is kind:
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            found += of_class(kind, argument)
        elif isinstance(argument, dict):
            found += of_class(kind, argument.values())
    return found


def is_watched_for(func: Any) -> bool:
    """Whether a function has one that keeps less, or is a sum, whose result is watched on."""
    return func in LEAN_FUNCTIONS or func in _SUMS


def foreign(types: Any) -> bool:
    """Whether one of the tensors is of a class that is neither PyTorch's nor this package's, and decides for itself."""
    return not ORDINARY.issuperset(types)


def _is_from_here(watched: Sequence[Tensor]) -> bool:
    """Whether one of these was watched within the same checkpoint: what is given to one may be of any class when it is
    run again."""
    place = place_of_saving()
    for leaf in watched:  # noqa: SIM110 - for every operation, so no generator
        if vars(leaf).get("_lowrank_place", 0) == place:
            return True
    return False


def watch(y: Any) -> Any:
    """The same tensor, watched; anything else as it is."""
    if type(y) is Tensor:
        y.__class__ = Watched
        place = place_of_saving()
        if place:
            y._lowrank_place = place  # type: ignore[attr-defined]
    elif isinstance(y, (tuple, list)):
        for one in y:
            watch(one)
    return y
