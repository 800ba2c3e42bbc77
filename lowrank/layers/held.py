"""Inputs that unread outputs have still to be computed from: a change of them in place comes after that."""

from __future__ import annotations

import sys
import threading
import weakref
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._pytree import tree_iter

from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.watched import BACKWARD, Watched, foreign, is_watched_for, of_class, tell_if_compiled, watch
from lowrank.layers.lazy import Lazy
from lowrank.tensors.eager import ORDINARY


class Held(Watched):
    """An ordinary tensor that lazy ones have still to be computed from; ahead of a change in place they are.

    It is the same object with another class for as long as one of them is alive and unread.
    """

    _lowrank_held: tuple[type[Tensor], list[weakref.ref[Lazy]]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tell_if_compiled()
        kwargs = kwargs or {}
        if _changes(func, args, kwargs) or foreign(types) or func in BACKWARD:
            for leaf in tree_iter((args, kwargs)):
                let_go(leaf)
            return func(*args, **kwargs)
        held = of_class(Held, args) + of_class(Held, kwargs.values())
        watched = is_watched_for(func) and any(_stock_class(leaf) is Watched for leaf in held)
        with torch._C.DisableTorchFunctionSubclass():
            y = (LEAN_FUNCTIONS.get(func, func) if watched else func)(*args, **kwargs)
        for leaf in held:
            if _shares_memory(y, leaf):
                let_go(leaf)  # a change of a view is not seen here
        return watch(y) if watched else y

    def detach(self) -> Tensor:
        if sys._getframe(1).f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            # A checkpoint that runs again what it ran takes what autograd saves so, and changes nothing of it: all has
            # to be as it was then.
            with torch._C.DisableTorchFunctionSubclass():
                return Tensor.detach(self)
        let_go(self)
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        let_go(self)
        return self.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        let_go(self)
        return self.__deepcopy__(memo)


ORDINARY.add(Held)
_LOCK = threading.RLock()


def _changes(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function may change one of its arguments in place."""
    name = getattr(func, "__name__", "")
    in_place = name in _CHANGING or name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
    options = kwargs.get("out") is not None or kwargs.get("inplace") or any(argument is True for argument in args)
    return bool(in_place or options)


# By name: what changes a tensor, or hands out its memory as something else than a tensor.
_CHANGING = {"__setitem__", "__set__", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "data_ptr"}


def _shares_memory(y: Any, x: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        own = x.untyped_storage()._cdata
        views = (leaf for leaf in tree_iter(y) if isinstance(leaf, Tensor) and leaf is not x and type(leaf) is not Lazy)
        return any(view.untyped_storage()._cdata == own for view in views)


def can_be_held(x: Tensor) -> bool:
    """Whether a change of the tensor in place can be noticed ahead of it."""
    return type(x) in (Tensor, Watched, Held)


def _stock_class(x: Tensor) -> type[Tensor]:
    return vars(x).get("_lowrank_held", (Tensor, []))[0]


def hold(x: Tensor, lazy: Lazy) -> None:
    """Have a lazy tensor computed ahead of any change of `x` in place."""
    with _LOCK:  # several threads may be given the same tensor
        stock = Watched if type(x) is Watched else Tensor
        _, references = vars(x).setdefault("_lowrank_held", (stock, []))
        ended = partial(_ended, weakref.ref(x))
        references.append(weakref.ref(lazy, ended))
        lazy.when_read = partial(ended, references[-1])
        x.__class__ = Held


def let_go(x: Any) -> None:
    """Compute what is still to be computed from a held tensor, which then has its own class again."""
    if type(x) is not Held:
        return
    with _LOCK:
        stock, references = vars(x).pop("_lowrank_held", (Tensor, []))
        x.__class__ = stock
    for reference in references:
        lazy = reference()
        if lazy is not None:
            lazy.value()


def _ended(source: weakref.ref[Tensor], reference: weakref.ref[Lazy]) -> None:
    """A lazy tensor is gone or read: so is, with the last one, the hold on what it would be computed from."""
    x = source()
    if x is None:
        return
    with _LOCK:
        stock, references = vars(x).get("_lowrank_held", (None, []))
        references[:] = [other for other in references if other is not reference and other() is not None]
        if stock is not None and not references:
            vars(x).pop("_lowrank_held", None)
            x.__class__ = stock
