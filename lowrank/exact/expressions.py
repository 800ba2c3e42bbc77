"""Operations that keep nothing of their own, and products: how their results come about; exact.

A change of shape, of dtype or of sign, a sum and a concatenation are stock, and are noted: whoever needs the result in
the backward pass may have it from what is kept ahead of it. A product keeps the origins of its factors: of SiLU(x) * y,
as in the gates of language models, x and y, and of the normalised input of an RMSNorm the input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowrank.exact import chains
from lowrank.exact.near import is_near
from lowrank.exact.origins import (
    Reader,
    find,
    itself,
    known,
    lean_mode,
    least_of,
    mark_kept,
    note,
    origin_of,
    reading,
    with_near,
)
from lowrank.exact.sources import Origin
from lowrank.tensors.again import LAYER
from lowrank.tensors.eager import ORDINARY, Node, saved

_ADDED = {torch.add, Tensor.add}
_SUMS = {*_ADDED, torch.sub, Tensor.sub}
_PARTS = (torch.cat, torch.concat, torch.concatenate)
_PLAIN = {*ORDINARY, int, float, bool, type(None), torch.dtype}  # what holds no further arguments
_FIXED = (int, float, str, Number, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)


def noted(stock: Callable[..., Any], lean: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The same function, or a lean one of its values, whose result is noted to come about by it."""

    @wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Any:
        y = (stock if lean is None else lean)(*args, **kwargs)
        first = y[0] if isinstance(y, (tuple, list)) and y else y
        if lean_mode(first) and not kwargs.get("out"):
            _note_call(stock, args, kwargs, y)
        return y

    return function


def is_fixed(argument: Any) -> bool:
    """Whether an argument is the same when a function is called with it again; not so an array of NumPy."""
    if isinstance(argument, _FIXED):
        return True
    if isinstance(argument, slice):
        return all(map(is_fixed, (argument.start, argument.stop, argument.step)))
    return isinstance(argument, tuple) and all(map(is_fixed, argument))


def _note_call(stock: Callable[..., Any], args: Any, kwargs: Any, y: Any) -> None:
    leaves, layout = args, None
    if not _is_flat(args, kwargs):
        leaves, layout = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, Tensor) or is_fixed(leaf) for leaf in leaves):
            return
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[at] for at in places]
    parts = stock in _PARTS
    ways = [find(tensor) for tensor in tensors]
    if not parts and ways.count(None) == len(ways) and not any(map(is_near, tensors)):
        return  # of nothing that is kept
    others = [None if at in places else leaf for at, leaf in enumerate(leaves)]

    def again(*values: Tensor) -> Any:
        filled = list(others)
        for at, value in zip(places, values, strict=True):
            filled[at] = value
        own, options = (filled, kwargs) if layout is None else tree_unflatten(filled, layout)
        return stock(*own, **options)

    origins = [least_of(tensor, origin, stream=True) for tensor, origin in zip(tensors, ways, strict=True)]
    if stock in _SUMS and _starts_anew(y, tensors, origins):
        return
    if isinstance(y, (tuple, list)):
        for at, one in enumerate(y):
            if isinstance(one, Tensor):
                note(one, lambda *values, at=at: again(*values)[at], origins)
    elif y is not tensors[0]:
        chained = stock in _ADDED and len(leaves) == len(tensors) == 2 and layout is None and not kwargs
        note(y, again, origins, parts=parts, fresh=chained, link=chains.SUM if chained else None)


def _is_flat(args: Any, kwargs: Any) -> bool:
    """Whether tensors stand among the arguments themselves alone, and all others are fixed."""
    if not _PLAIN.issuperset(map(type, args)):
        for argument in args:
            if not isinstance(argument, Tensor) and not is_fixed(argument):
                return False
    return not kwargs or all(map(is_fixed, kwargs.values()))


def _starts_anew(y: Tensor, tensors: list[Tensor], origins: list[Origin]) -> bool:
    """Whether a sum is that of a residual block, of a linear layer and what is kept ahead of it. It is kept itself, so
    that the next block can be computed from it."""
    costly = [origin.step.cost >= LAYER for origin in origins]
    streams = [not isinstance(tensor, nn.Parameter) and tensor.shape == y.shape for tensor in tensors]
    return any(costly) and any(stream and not far for stream, far in zip(streams, costly, strict=True))


def _noted_in_place(stock: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    """A sum in place, noted as `again` of what was there before."""

    @wraps(stock)
    def function(input: Any, other: Any, **options: Any) -> Any:
        both = isinstance(other, Tensor) and (lean_mode(input) or lean_mode(other))
        both = both and torch.result_type(input, other) is input.dtype  # otherwise `again` gives another dtype
        noted = both and (known(input) or known(other))
        ahead = [origin_of(input), origin_of(other)] if noted else None
        y = stock(input, other, **options)
        if ahead is not None and lean_mode(y) and not _starts_anew(y, [input, other], ahead):
            change = lambda a, b: stock(a, b, **options)  # noqa: E731
            link = chains.SUM if again is torch.add and not options else None
            note(y, lambda a, b: again(a, b, **options), ahead, change=change, fresh=True, link=link)
        return y

    return function


class _Product(Node):
    """A product of two tensors of which at least one is computed again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, reader: Reader, sources: tuple[Tensor, ...]) -> Tensor:
        ctx.reader, ctx.shapes, ctx.dtypes = reader, (a.shape, b.shape), (a.dtype, b.dtype)
        ctx.save_for_backward(*sources)
        return torch.mul(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        found = iter(ctx.reader(*saved(ctx, "product")))
        others = [next(found) if want else None for want in wanted]  # the other factor
        grads: list[Tensor | None] = []
        for other, shape, dtype in zip(others, ctx.shapes, ctx.dtypes, strict=True):
            grads.append(None if other is None else (grad * other).sum_to_size(shape).to(dtype))
        return *grads, None, None


def product(input: Any, other: Any, **options: Any) -> Any:
    """`torch.mul`; keeps the origins of the factors that its gradients need."""
    if not isinstance(other, Tensor) or not isinstance(input, Tensor) or options:
        return _scaled(input, other, **options)
    if not (lean_mode(input) or lean_mode(other)) or input.is_complex() or other.is_complex():
        return torch.mul(input, other)
    own = (input.requires_grad, other.requires_grad)
    needed = [origin_of(factor) if want else None for factor, want in ((other, own[0]), (input, own[1]))]
    plain = all(origin is None or origin.step.function is None for origin in needed)
    if plain:
        for factor, want in ((other, own[0]), (input, own[1])):
            if want:
                mark_kept(factor)
        y = torch.mul(input, other)
    else:
        factors = [factor for factor, origin in zip((other, input), needed, strict=True) if origin is not None]
        reader, sources = reading(*(origin for origin in needed if origin is not None), of=factors)
        y = _Product.apply(input, other, reader, sources)
    first = origin_of(input) if needed[1] is None else needed[1].as_kept()
    second = origin_of(other) if needed[0] is None else needed[0].as_kept()
    ahead, large = ([first, second], input) if input.shape == y.shape else ([second, first], other)
    fits = large.shape == y.shape and large.dtype == y.dtype
    note(y, torch.mul, ahead, change=Tensor.mul_ if fits else None, fresh=True)
    return y


_scaled = noted(torch.mul)


def keeps_its_input(
    stock: Callable[..., Tensor], input: Tensor, *parameters: Tensor | None, y: Tensor, link: Any = None
) -> Tensor:
    """Note that `y` is `stock(input, *parameters)`, of which autograd keeps the input anyway; `link`: see `Step`."""
    if lean_mode(y):
        mark_kept(input)
        note_of(y, stock, with_near(input, itself(input, kept=True)), parameters, fresh=True, link=link)
    return y


def note_of(
    y: Tensor,
    apply: Callable[..., Tensor],
    first: Origin,
    parameters: tuple[Tensor | None, ...],
    cost: int = 0,
    fresh: bool = False,
    link: Any = None,
) -> None:
    """Note that `y` is `apply(x, *parameters)`, of an x that comes about so; parameters may be None."""
    present = tuple(parameter is not None for parameter in parameters)

    def again(x: Tensor, *values: Tensor) -> Tensor:
        given = iter(values)
        return apply(x, *(next(given) if there else None for there in present))

    own = [itself(parameter, True) for parameter in parameters if parameter is not None]
    note(y, again, [first, *own], cost=cost, fresh=fresh, link=link)


_METHODS = (
    "view reshape view_as reshape_as transpose permute flatten unflatten contiguous chunk split unbind __getitem__ neg "
    "to float double half bfloat16 type_as expand expand_as unsqueeze squeeze repeat_interleave swapaxes movedim "
    "add sub rsub __rsub__ div true_divide tile repeat narrow select clone masked_fill"
)
_FUNCTIONS = (
    "reshape transpose permute flatten unflatten chunk split unbind neg unsqueeze squeeze repeat_interleave swapaxes "
    "movedim add sub rsub div true_divide tile narrow select clone cat concat concatenate stack roll tensor_split "
    "masked_fill"
)
EXPRESSIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{function: noted(function) for name in _METHODS.split() if (function := getattr(Tensor, name, None)) is not None},
    **{
        function: noted(function) for name in _FUNCTIONS.split() if (function := getattr(torch, name, None)) is not None
    },
    Tensor.add_: _noted_in_place(Tensor.add_, torch.add),
    Tensor.sub_: _noted_in_place(Tensor.sub_, torch.sub),
    **{function: noted(function) for function in (F.pad, F.interpolate)},
    torch.mul: product,
    Tensor.mul: product,
    torch.multiply: product,
    Tensor.multiply: product,
}
