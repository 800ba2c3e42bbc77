"""The one way to give a module another class and to take that back; the module stays the same object."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


class Changed(nn.Module):
    """Mixed into every class that stands in for a stock class; `stock_class` is the base that it stands in for.

    Such a class goes by the module of its stock class, so that whoever asks where a layer comes from, as `torch.fx`
    does to see what it may not look into, gets the same answer. Unpickling finds it by its own place.
    """

    stock_class: type[nn.Module]
    _place: tuple[str, str]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Whoever makes a module of the class of one that is there, as LoRA does, gets a stock one: nobody converted
        it."""
        restore(self)
        self.__init__(*arguments, **options)  # type: ignore[misc]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        stock = cls.__dict__.get("stock_class")
        if stock is not None and "_place" not in cls.__dict__:
            cls._place = (cls.__module__, cls.__qualname__)
            cls.__module__ = stock.__module__

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return (_new, (type(self)._place, self.stock_class), *made[2:])


def _new(place: tuple[str, str], stock: type[nn.Module]) -> nn.Module:
    """An empty instance of the class at this place, or of the one that it makes for a stock class."""
    found = getattr(importlib.import_module(place[0]), place[1])
    kind: type[nn.Module] = found if isinstance(found, type) else found(stock)
    return kind.__new__(kind)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, of a converted one the class that it had before."""
    return module.stock_class if isinstance(module, Changed) else type(module)


def is_parametrized_class(kind: type[nn.Module]) -> bool:
    """Whether `torch.nn.utils.parametrize` made a class, for one module, of its base."""
    return kind.__module__ == parametrize.__name__ and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}"


def plain_class(module: nn.Module) -> type[nn.Module]:
    """`stock_class` without what parametrisations made of it."""
    kind = stock_class(module)
    return kind.__bases__[0] if is_parametrized_class(kind) else kind


def own_of(kind: type) -> dict[str, Any]:
    """What a class has of its own, to make another one of."""
    return {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    module.__class__ = kind


def restore(module: nn.Module) -> None:
    """Give a converted module the class that it had before, in place; one that a subclass was made of since, a subclass
    of that, as `torch.nn.utils.parametrize` makes."""
    kind, stock = type(module), stock_class(module)
    if isinstance(module, Changed) and "stock_class" not in vars(kind):
        stock = type(kind.__name__, (stock,), own_of(kind))
    module.__class__ = stock


def has_own_forward(module: nn.Module) -> bool:
    """Whether this one module has a forward pass of its own, or a part of one, so that its class says nothing of it."""
    return not _OWN_FORWARD.isdisjoint(vars(module))


_OWN_FORWARD = {"forward", "__call__", "_conv_forward"}
