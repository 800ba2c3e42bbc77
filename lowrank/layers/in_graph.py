"""A method's own work as two operators of a compiled graph.

A compiler asks them for sizes alone, so that it has little to do, and nothing to look into; what they do when the graph
runs is what eager training does, by the same kernels. They have no side effects: what is carried from step to step is
given to them and returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lowrank.errors import LowRankError
from lowrank.methods.base import Method, Tensors
from lowrank.tensors.eager import without_autocast
from lowrank.tensors.geometry import Geometry, Shape

Layout = list[tuple[Shape, torch.dtype, torch.device]]


@dataclass
class Part:
    """What a compiled graph asks of a method for one layer.

    Attributes:
        layouts: of inputs of a shape and a state of some shapes, what `compress` gives, see `_flat`.
    """

    method: Method
    geometry: Geometry
    name: str
    layouts: dict[tuple[Shape, ...], Layout] = field(default_factory=dict)


_PARTS: dict[str, Part] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(method: Method, kind: type[Geometry], settings: tuple[object, ...], name: str) -> str:
    """The part's name in a graph: of all that matters, as graphs that were compiled are kept on disk for others."""
    key = f"{name}: {kind.__name__}{settings} {method!r}"
    while key in _PARTS and _PARTS[key].method is not method:
        key += "'"
    _PARTS.setdefault(key, Part(method, kind(*settings), name))
    return key


def part(method: Method, geometry: Geometry, name: str) -> str:
    """A name for what a graph asks of a method, for the operators here; seen by a compiler as a constant."""
    settings = tuple([getattr(geometry, one.name) for one in fields(geometry) if one.init])
    return _key(method, type(geometry), settings, name)


def compress(key: str, x: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
    """As `Method.compress`, of a part's method."""
    # A graph that takes a number from the CPU is not recorded on a GPU; there is one at most, a count of passes.
    here = [None if one is None or _is_elsewhere(one, x) else one for one in state]
    count, *found = _compressed(x, here, key)
    given = (None, x, *here)
    tensors: list[Tensor | None] = []
    for one in found:
        tensors.append(one if one.numel() else (*given, *tensors)[one.shape[1]])
    return tuple(tensors[: count.shape[1]]), tuple(tensors[count.shape[1] :])


def gradients(key: str, kept: Tensors, grad: Tensor, shape: Shape, weight: Shape, bias: bool) -> list[Tensor]:
    """Weight gradient and, if asked for, bias gradient, as `Method.gradients`, of a part's method."""
    found: list[Tensor] = _gradients(list(kept), grad, list(shape), list(weight), key, bias)
    return found


def _is_elsewhere(tensor: Tensor, x: Tensor) -> bool:
    return not tensor.ndim and tensor.device != x.device


def _flat(kept: Tensors, state: Tensors, x: Tensor, given: Sequence[Tensor | None]) -> list[Tensor]:
    """Tensors alone, none of them twice or one that was given, which is what an operator can return: how many are kept,
    and then all, told by the width of an empty tensor. In the place of one that is there already, or of none, is its
    place in (None, x, *given, *those ahead)."""
    known: list[Tensor | None] = [None, x, *given]
    flat = [x.new_empty(0, len(kept))]
    own = {one.untyped_storage()._cdata for one in (x, *given) if one is not None}
    for tensor in (*kept, *state):
        tensor = None if tensor is None or _is_elsewhere(tensor, x) else tensor
        place = next((at for at, one in enumerate(known) if one is tensor), None)
        known.append(tensor)
        if place is not None or tensor is None:
            flat.append(x.new_empty(0, place or 0))
        else:
            copied = tensor.untyped_storage()._cdata in own
            flat.append(tensor.clone(memory_format=torch.contiguous_format) if copied else tensor.contiguous())
    return flat


def _layout(flat: list[Tensor]) -> Layout:
    return [(tuple(one.shape), one.dtype, one.device) for one in flat]


def _shapes(x: Tensor, state: Sequence[Tensor | None]) -> tuple[Shape, ...]:
    return tuple(() if one is None else tuple(one.shape) for one in (x, *state))


@torch.library.custom_op("lowrank::compress", mutates_args=())
def _compressed(x: Tensor, state: Sequence[Tensor | None], part: str) -> list[Tensor]:
    """What a part's method keeps of `x`, and its state, see `_flat`."""
    flat = _run(x, state, part)
    if _layout(flat) != _PARTS[part].layouts.get(_shapes(x, state)):
        one = _PARTS[part]
        raise LowRankError(
            f"layer {one.name!r}: what {one.method.tag} keeps has other sizes than when it was compiled; where they "
            f"depend on the numbers of an input, set chooses_by_data on the method's class"
        )
    return flat


@_compressed.register_fake
def _(x: Tensor, state: Sequence[Tensor | None], part: str) -> list[Tensor]:
    shapes, known = _shapes(x, state), _PARTS[part].layouts
    if shapes not in known:
        known[shapes] = _layout(_run(x, state, part))
    return [x.new_empty(shape, dtype=dtype, device=device) for shape, dtype, device in known[shapes]]


def _run(x: Tensor, state: Sequence[Tensor | None], part: str) -> list[Tensor]:
    own = _PARTS[part]
    with torch.no_grad(), without_autocast(x.device.type):
        try:
            return _flat(*own.method.compress(x, own.geometry, tuple(state), own.name), x, state)
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
    return [grad.new_empty(weight), grad.new_empty(weight[0])] if bias else [grad.new_empty(weight)]
