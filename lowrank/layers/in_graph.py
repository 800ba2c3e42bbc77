"""A method's own work as operators of a compiled graph: `compress` and `gradients`.

A compiler asks them for sizes alone, so that it has little to do, and nothing to look into; what they do when the graph
runs is what eager training does, by the same kernels. They have no side effects: what is carried from step to step is
given to them and returned.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowrank.errors import LowRankError
from lowrank.methods.base import Method, Tensors
from lowrank.tensors.eager import without_autocast
from lowrank.tensors.geometry import Geometry, Shape

Layout = list[tuple[Shape, torch.dtype, torch.device]]
Sizes = tuple[tuple[Shape, torch.dtype] | None, ...]


@dataclass
class Part:
    """What a compiled graph asks of a method for one layer.

    A graph is entered with the very method that it was compiled for, so that a part is of use as long as one of these
    is there. A backward pass may still be to come when its model is gone: see `_let_go`.

    Attributes:
        methods: equal ones, each of layers that were compiled.
        layouts: of an input and a state of some sizes and dtypes, what `compress` gives, see `_flat`.
    """

    geometry: Geometry
    name: str
    methods: list[weakref.ref[Method]] = field(default_factory=list)
    layouts: dict[Sizes, Layout] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """One of them: they give the same."""
        return next(found for one in self.methods if (found := one()) is not None)

    def hold(self, method: Method) -> None:
        """Note one more."""
        if not any(one() is method for one in self.methods):
            self.methods.append(weakref.ref(method))
        _HELD.append(method)


_PARTS: dict[str, Part] = {}
_HELD: list[Method] = []  # all of them, until the next part is asked for
_PROCESS, _NUMBERS = uuid4().hex, itertools.count()


@torch.compiler.assume_constant_result
def _key(method: Method, kind: type[Geometry], settings: tuple[Any, ...], name: str) -> str:
    """The part's name in a graph: of all that matters, as graphs that were compiled are kept on disk for others."""
    _let_go()
    key = f"{name}: {kind.__name__}{settings} {method!r}"
    if type(method).__module__.partition(".")[0] != __package__.partition(".")[0]:
        # What somebody's method keeps may have been rewritten since; and one that is gone may be asked for still.
        key += f" {_PROCESS}"
        same = (other for other, own in _PARTS.items() if other.startswith(key) and _are_equal(own.method, method))
        key = next(same, f"{key} {next(_NUMBERS)}")
    while key in _PARTS and not _are_equal(_PARTS[key].method, method):
        key += "'"
    _PARTS.setdefault(key, Part(kind(*settings), name)).hold(method)
    return key


def _let_go() -> None:
    """Drop the methods that nobody else has any more, and the parts that are of such alone."""
    _HELD.clear()
    for key, own in list(_PARTS.items()):
        own.methods = [one for one in own.methods if one() is not None]
        _HELD.extend(found for one in own.methods if (found := one()) is not None)
        if not own.methods:
            del _PARTS[key]


def _are_equal(one: Method, other: Method) -> bool:
    try:
        return one is other or bool(one == other and vars(one) == vars(other))
    except (RuntimeError, ValueError, TypeError):  # somebody's that holds tensors or arrays, or has slots
        return False


def part(method: Method, geometry: Geometry, name: str) -> str:
    """A name for what a graph asks of a method, for the operators here; seen by a compiler as a constant."""
    settings = tuple([getattr(geometry, one.name) for one in fields(geometry) if one.init])
    return _key(method, type(geometry), settings, name)


def compress(method: Method, geometry: Geometry, name: str, x: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
    """As `Method.compress`."""
    # A graph that takes a number from the CPU is not recorded on a GPU; there is one at most, a count of passes.
    here = [None if one is None or _is_elsewhere(one, x.device) else one for one in state]
    count, *found = _compressed(x, here, part(method, geometry, name))
    tensors: list[Tensor | None] = [None, x]
    for one in found:
        if one.numel():
            tensors.append(one)
        else:
            tensors.append(one[0] if one.shape[0] else tensors[one.shape[1]])
    behind = 2 + count.shape[1]
    return tuple(tensors[2:behind]), tuple(tensors[behind:])


def gradients(
    method: Method,
    geometry: Geometry,
    name: str,
    kept: Tensors,
    grad: Tensor,
    shape: Shape,
    weight_shape: Shape,
    bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weight gradient and, if asked for, bias gradient, as `Method.gradients`."""
    of_weight, *rest = _gradients(list(kept), grad, shape, weight_shape, part(method, geometry, name), bias)
    return of_weight, rest[0] if bias else None


def _is_elsewhere(tensor: Tensor, device: torch.device) -> bool:
    return not tensor.ndim and not tensor.is_meta and tensor.device != device


def _flat(
    kept: Tensors, state: Tensors, x: Tensor, given: Sequence[Tensor | None], device: torch.device
) -> list[Tensor]:
    """Tensors alone and new, which is what an operator can return: an empty one as wide as there are kept ones,
    and then all. For none, for `x` itself and for one that is there twice stands one of no rows, as wide as its place
    in (None, x, *those ahead); one that is itself empty has a dimension of size 1 more."""
    flat, known = [x.new_empty(0, len(kept))], [None, x]
    own = {one.untyped_storage()._cdata for one in (x, *given) if one is not None}
    for tensor in (*kept, *state):
        tensor = None if tensor is None or _is_elsewhere(tensor, device) else tensor
        place = next((at for at, one in enumerate(known) if one is tensor), None)
        known.append(tensor)
        if place is not None or tensor is None:
            flat.append(x.new_empty(0, place or 0))
            continue
        if not tensor.numel():
            tensor = tensor.new_empty(1, *tensor.shape)
        if not tensor.ndim or tensor.untyped_storage()._cdata in own:  # a number may be one that others have as well
            flat.append(tensor.clone(memory_format=torch.contiguous_format))
        else:
            flat.append(tensor.contiguous())
        own.add(flat[-1].untyped_storage()._cdata)
    return flat


def _layout(flat: list[Tensor], x: Tensor) -> Layout:
    return [(tuple(one.shape), one.dtype, x.device if one.is_meta else one.device) for one in flat]


def _sizes(x: Tensor, state: Sequence[Tensor | None]) -> Sizes:
    return tuple(None if one is None else (tuple(map(int, one.shape)), one.dtype) for one in (x, *state))


def _told_ahead(x: Tensor, state: Sequence[Tensor | None], part: str) -> Layout:
    """What comes of tensors of these sizes, by the method itself on tensors that have nothing else."""
    sizes, own = _sizes(x, state), _PARTS[part]
    if sizes not in own.layouts:
        try:
            with unset_fake_temporarily():  # a method may have tensors of its own, which are not a compiler's
                without = [None if one is None else _without_numbers(one) for one in state]
                own.layouts[sizes] = _layout(_run(_without_numbers(x), without, part, x.device), x)
        except LowRankError:
            raise
        except Exception as error:
            raise LowRankError(
                f"layer {own.name!r}: a compiler cannot tell from sizes alone what {own.method.tag} keeps "
                f"({' '.join(str(error).split())[:200]}); set chooses_by_data on the method's class, or do without "
                f"numbers where x.is_meta"
            ) from error
    return own.layouts[sizes]


def _without_numbers(x: Tensor) -> Tensor:
    """A tensor on the meta device, of the same dtype and of sizes that are known, where a compiler has symbols."""
    return torch.empty(tuple(map(int, x.shape)), dtype=x.dtype, device="meta")


@torch.library.custom_op("lowrank::compress", mutates_args=())
def _compressed(x: Tensor, state: Sequence[Tensor | None], part: str) -> list[Tensor]:
    """What a part's method keeps of `x`, and its state, see `_flat`."""
    flat, own = _run(x, state, part, x.device), _PARTS[part]
    if _layout(flat, x) != own.layouts.get(_sizes(x, state), _layout(flat, x)):
        raise LowRankError(
            f"layer {own.name!r}: what {own.method.tag} keeps has other sizes than when it was compiled; where they "
            f"depend on the numbers of an input, set chooses_by_data on the method's class"
        )
    return flat


@_compressed.register_fake
def _(x: Tensor, state: Sequence[Tensor | None], part: str) -> list[Tensor]:
    return [x.new_empty(shape, dtype=dtype, device=device) for shape, dtype, device in _told_ahead(x, state, part)]


def _run(x: Tensor, state: Sequence[Tensor | None], part: str, device: torch.device) -> list[Tensor]:
    own = _PARTS[part]
    with torch.no_grad(), without_autocast(x.device.type):
        try:
            return _flat(*own.method.compress(x, own.geometry, tuple(state), own.name), x, state, device)
        except LowRankError as error:
            raise type(error)(f"layer {own.name!r}: {error}") from None


@torch.library.custom_op("lowrank::gradients", mutates_args=())
def _gradients(
    kept: Sequence[Tensor | None], grad: Tensor, shape: Sequence[int], weight: Sequence[int], part: str, bias: bool
) -> list[Tensor]:
    """Gradients from what a part's method has kept of an input of a shape: of a weight, and of a bias if asked for."""
    own = _PARTS[part]
    given = tuple(kept), grad, own.geometry, tuple(shape)
    with torch.no_grad(), without_autocast(grad.device.type):
        found = own.method.gradients(*given) if bias else (own.method.weight_gradient(*given),)
    return [one.to(grad.dtype).contiguous() for one in found]


@_gradients.register_fake
def _(
    kept: Sequence[Tensor | None], grad: Tensor, shape: Sequence[int], weight: Sequence[int], part: str, bias: bool
) -> list[Tensor]:
    outputs = grad.shape[_PARTS[part].geometry.channel_axis]
    return [grad.new_empty(weight), *([grad.new_empty(outputs)] if bias else [])]
