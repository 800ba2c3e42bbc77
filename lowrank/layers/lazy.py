"""Outputs that are computed when something reads them: who that is decides what is computed.

A convolution hands out a lazy tensor. A batch normalisation that receives it unread computes both at once, from the
convolution's input. Anything else, a hook, a second branch, an operation in place, `numpy`, gets the convolution's own
output: a lazy tensor has the shape, dtype, device and autograd node of the stock one, and every operation on it is done
on its value. In the backward pass the normalisation hands its convolution a lazy gradient in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank.errors import ChangedError
from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.origins import hand_on
from lowrank.exact.watched import BACKWARD, foreign, is_watched_for, of_class, tell_if_compiled, watch
from lowrank.tensors.eager import ORDINARY, as_when_called
from lowrank.tensors.memory_layout import laid_out
from lowrank.tensors.notes import hand_on_all


class Lazy(Tensor):
    """A tensor that is computed when it is read.

    Attributes:
        origin: what it is computed from, for who can do more with that than read the value; None once it is read.
        written: whether a function that keeps less has changed it in place, of which something may be noted.
        when_read: called once it is computed, by whoever holds something for that.
    """

    origin: Any
    written: bool
    when_read: Callable[[], None] | None
    _make: Callable[[], Tensor] | None
    _value: Tensor | None
    _watched: bool

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        dtype: torch.dtype,
        strides: tuple[int, ...],
        make: Callable[[], Tensor],
        origin: Any,
        watched: bool = False,
    ) -> Lazy:
        options: Any = {"dtype": dtype, "device": like.device, "strides": strides}
        self: Lazy = Tensor._make_wrapper_subclass(cls, shape, **options)
        torch._C._set_throw_on_mutable_data_ptr(self)  # an error, no crash, where code in C++ goes by no operator
        self._make, self._value, self.origin, self._watched = make, None, origin, watched
        self.written, self.when_read = False, None
        return self

    def value(self) -> Tensor:
        """The numbers, without a graph; operations in place on the lazy tensor change it."""
        if self._value is None:
            assert self._make is not None
            with as_when_called(self.device.type):
                self._value = laid_out(self._make(), self.stride())
            self._make = self.origin = None
            if self.when_read is not None:
                self.when_read()
                self.when_read = None
        return self._value

    def replace(self, data: Tensor) -> None:
        """What `y.data = data` does: other numbers in the place of these."""
        if data.shape != self.shape or data.dtype != self.dtype:
            raise ChangedError("the data of an unread output may be replaced by data of the same shape and dtype alone")
        self._value, self._make, self.origin = data.detach(), None, None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tell_if_compiled()
        if foreign(types):
            return func(*_mapped(real, args), **_mapped(real, kwargs or {}))
        if func == _SET_DATA and type(args[0]) is Lazy:
            return args[0].replace(args[1])
        if func in BACKWARD:
            args = (_mapped(real, args[0]), *args[1:])
            if not of_class(Lazy, (args, kwargs)):
                return func(*args, **(kwargs or {}))
        watched = any(isinstance(leaf, Lazy) and leaf._watched for leaf in args)
        y = read(func, args, kwargs or {})
        return watch(y) if watched and is_watched_for(func) else y

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_mapped(Lazy.value, args), **_mapped(Lazy.value, kwargs or {}))

    # What PyTorch answers without an operator.

    def detach(self) -> Tensor:
        """As ever, and of the same class, which whoever makes a parameter of it asks for."""
        value = self.value()
        with as_when_called(self.device.type):
            value = value.detach()
            found = Lazy(tuple(self.shape), value, self.dtype, self.stride(), self.value, None)
        found._value = value
        return found

    def as_subclass(self, cls: type[Any]) -> Any:
        return real(self).as_subclass(cls)

    def numpy(self, *, force: bool = False) -> Any:
        return real(self).numpy(force=force)

    def tolist(self) -> Any:
        return self.value().tolist()

    def data_ptr(self) -> int:
        return self.value().data_ptr()

    def untyped_storage(self) -> Any:
        return self.value().untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return real(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return real(self).__deepcopy__(memo)

    def __dlpack__(self, **options: Any) -> Any:
        return real(self).__dlpack__(**options)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return real(self).__repr__(**options)


def _mapped(function: Callable[[Lazy], Tensor], argument: Any) -> Any:
    """An argument of an operator with a function of each lazy tensor in its place; as PyTorch's `tree_map_only`, which
    takes ten times as long for what operators are given as a rule."""
    kind = type(argument)
    if kind is Lazy:
        return function(argument)
    if kind in _LEAVES:
        return argument
    if kind is tuple or kind is list:
        return kind([_mapped(function, one) for one in argument])
    if kind is dict:
        return {name: _mapped(function, one) for name, one in argument.items()}
    return tree_map_only(Lazy, function, argument)


_LEAVES = {Tensor, nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device}
# What can do more with a lazy tensor than read it, given as its first argument; None: it cannot with this one.
READERS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {}

ORDINARY.add(Lazy)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def real(x: Tensor) -> Tensor:
    """A tensor with its value: of a lazy one a view of it, of all others the tensor itself."""
    if type(x) is not Lazy:
        return x
    first = x._value is None  # what others have read, they may have changed
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        found = torch.ops.aten.alias.default(x)  # where `view_as` gives one image other strides, by which PyTorch errs
    if first:
        hand_on(x, found)
    elif x.written:
        hand_on_all(x, found)
    return found


def read(func: Any, args: Any, kwargs: Any = MappingProxyType({})) -> Any:
    """What a function makes of arguments among which there are lazy tensors."""
    tell_if_compiled()
    with torch._C.DisableTorchFunctionSubclass():
        if func in READERS and args and type(args[0]) is Lazy:
            y = READERS[func](*args, **kwargs)
            if y is not None:
                return y
        if func not in LEAN_FUNCTIONS:
            return func(*args, **kwargs)
        first = args[0] if args else None
        args, kwargs = _mapped(real, args), _mapped(real, dict(kwargs))
        y = LEAN_FUNCTIONS[func](*args, **kwargs)
        if not args or y is not args[0] or type(first) is not Lazy:
            return y
        first.written = True
        hand_on_all(y, first)
        return first  # as any function in place gives what it was given


def lazy_gradient(grad: Tensor, strides: tuple[int, ...], make: Callable[[], Tensor], origin: Any) -> Lazy:
    """A gradient of the shape and dtype of `grad`, which a backward pass hands on unread.

    Who keeps it has its value at the end of the pass: what that is made of may change from then on.
    """
    found = Lazy(tuple(grad.shape), grad, grad.dtype, strides, make, origin)
    _ENGINE.queue_callback(partial(_settle, weakref.ref(found)))
    return found


_ENGINE: Any = torch.autograd.Variable._execution_engine


def _settle(reference: weakref.ref[Lazy]) -> None:
    lazy = reference()
    if lazy is not None:
        lazy.value()


def unread(x: Tensor, kind: type[Any]) -> Any:
    """The origin of a lazy tensor that nobody has read, if it is of this kind; None otherwise."""
    origin = x.origin if type(x) is Lazy else None
    return origin if isinstance(origin, kind) else None
