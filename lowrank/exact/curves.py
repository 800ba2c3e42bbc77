"""Activations that take many slopes: they keep the origin of their input, and their output takes nothing; exact.

| function | kept |
|---|---|
| GELU, SiLU, Hardswish, Mish, ELU, softplus, powers | the origin of the input: the input, if that is less |
| sigmoid, tanh, softmax | nothing, where the input takes nothing; otherwise the output, as in PyTorch |
| ReLU and its like | nothing, where the input takes nothing and no layer to have again; otherwise one bit per element |

The next layer, if it keeps its input as it is, keeps the origin of the activation's output: the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact import activations
from lowrank.exact.chains import GELU, SILU, Limits
from lowrank.exact.edges import edge_of, placed
from lowrank.exact.near import follow, note_near
from lowrank.exact.origins import (
    Reader,
    come_about,
    find,
    itself,
    known,
    lean_mode,
    note,
    note_origin,
    origin_of,
    reading,
    takes_nothing,
)
from lowrank.tensors.eager import Node, saved
from lowrank.tensors.owned import is_owned

_aten = torch.ops.aten


@dataclass(frozen=True)
class Curve:
    """An elementwise function (softmax: along a dimension).

    Attributes:
        name: for messages.
        function: of the input.
        derivative: of the output gradient and the input, the input gradient.
        within: the same, written to the output gradient; None: there is no such operator.
        change: the function in place; None: by way of a copy.
        by_output: whether the derivative is the same of the output in the place of the input.
        link: what it is of a chain, see `chains`; None: nothing.
        of_result: of the output gradient and the output, the input gradient, where PyTorch keeps the output; there
            second derivatives go on.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    change: Callable[[Tensor], Tensor] | None = None
    by_output: bool = False
    link: Any = None
    of_result: Callable[[Tensor, Tensor], Tensor] | None = None
    within: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Sloped:
    """What an unread gradient of a curve's output is computed with.

    Attributes:
        grad: the gradient of its input.
        input: the step that gives the input; a hook may hand the gradient to another curve.
        link: of the curve, for the same reason.
    """

    grad: Tensor
    input: Any
    link: Any


class _Curved(Node):
    """A curve whose input, or output, is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        curve: Curve,
        reader: Reader,
        inplace: bool,
        sources: tuple[Tensor, ...],
        results: list[weakref.ref[Tensor]],
    ) -> Tensor:
        ctx.curve, ctx.reader, ctx.results = curve, reader, results
        ctx.save_for_backward(*sources)
        if not inplace:
            return curve.function(x)
        ctx.mark_dirty(x)
        return x.copy_(curve.function(x)) if curve.change is None else curve.change(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made: Any = getattr(grad, "origin", None)
        mine = type(made) is Sloped and made.input is ctx.reader.steps[0] and made.link is ctx.curve.link
        if mine and not torch.is_grad_enabled():
            ctx.reader.done()
            return made.grad, *[None] * 5
        owned = ctx.curve.within is not None and is_owned(grad)
        x = ctx.reader.one(*saved(ctx, ctx.curve.name))
        if owned and (grad.dtype, grad.shape, grad.stride()) == (x.dtype, x.shape, x.stride()):
            return ctx.curve.within(grad, x), *[None] * 5
        again = torch.is_grad_enabled() and not ctx.curve.by_output
        found = _followed(ctx, x, grad) if again else ctx.curve.derivative(grad, x)
        return found, *[None] * 5


def _followed(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a curve's input with a graph."""
    curve = ctx.curve
    y = ctx.results[0]() if ctx.results else None
    if y is not None and y.grad_fn is ctx:
        with torch.no_grad():
            value = curve.function(x)
        found: Tensor = curve.of_result(grad, placed(edge_of(y), value))
        return found
    # Not every derivative of PyTorch has one of its own, but every function has two.
    x = x.view_as(x)  # hooks of `x` itself are for the gradient that comes of this
    (found,) = torch.autograd.grad(curve.function(x), x, grad, create_graph=True)
    return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are on one memory, as a tensor and a part of it are, so that who changes one changes both."""
    with torch._C.DisableTorchFunctionSubclass():
        return one is other or one.untyped_storage()._cdata == other.untyped_storage()._cdata


def curved(x: Tensor, curve: Curve, inplace: bool = False) -> Tensor:
    """A curve of a tensor in lean mode."""
    origin = origin_of(x)
    if inplace and any(_share_memory(source.tensor, x) for source in origin.sources):
        origin = replace(itself(x.clone()), near=origin.near)
    options: dict[str, Any] = {"change": curve.change, "fresh": True, "link": curve.link}
    output = come_about(curve.function, [origin], **options) if curve.by_output else None
    reader, sources = reading(origin if output is None else output, of=[x])
    results: list[weakref.ref[Tensor]] = []
    y: Tensor = _Curved.apply(x, curve, reader, inplace, sources, results)
    if curve.of_result is not None:
        results.append(weakref.ref(y))
    if output is None:
        note(y, curve.function, [origin.as_kept()], **options)
    else:
        note_origin(y, output.as_kept())
        note_near(y, follow(curve.function, [origin], **options))
    return y


def _slopes(operator: Any, room: str, **options: Any) -> dict[str, Any]:
    """`derivative` and `within` of a curve, by PyTorch's operator, which names what it writes to."""
    write = getattr(operator, room)
    return {
        "derivative": lambda grad, x: operator.default(grad, x, **options),
        "within": lambda grad, x: write(grad, x, **options, **{room: grad}),
    }


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.gelu(input, approximate=approximate)
    forward = lambda x: F.gelu(x, approximate=approximate)  # noqa: E731
    link = GELU if approximate == "tanh" else None
    return curved(
        input, Curve("GELU", forward, **_slopes(_aten.gelu_backward, "grad_input", approximate=approximate), link=link)
    )


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.silu(input, inplace)
    return curved(input, _silu, inplace)


_silu = Curve("SiLU", F.silu, **_slopes(_aten.silu_backward, "grad_input"), change=_aten.silu_.default, link=SILU)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardswish`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.hardswish(input, inplace)
    return curved(input, _hardswish, inplace)


_hardswish = Curve(
    "Hardswish", F.hardswish, **_slopes(_aten.hardswish_backward, "out"), change=_aten.hardswish_.default
)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.mish`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.mish(input, inplace)
    return curved(input, Curve("Mish", F.mish, _aten.mish_backward.default, _aten.mish_.default), inplace)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """`torch.nn.functional.softplus`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.softplus(input, beta, threshold)
    curve = Curve(
        "Softplus",
        lambda x: F.softplus(x, beta, threshold),
        lambda grad, x: _aten.softplus_backward.default(grad, x, beta, threshold),
    )
    return curved(input, curve)


def power(input: Any, exponent: Any, **options: Any) -> Any:
    """`torch.pow`; with a number as exponent it keeps the origin of its input."""
    if options or not lean_mode(input) or not isinstance(exponent, int | float) or exponent in (0, 1):
        return torch.pow(input, exponent, **options)
    if exponent == 2:  # of every RMSNorm that is written out
        slope = lambda grad, x: (grad * x).mul_(2)  # noqa: E731
    else:
        slope = lambda grad, x: grad * (exponent * x.pow(exponent - 1))  # noqa: E731
    return curved(input, Curve("pow", lambda x: x.pow(exponent), slope))


def _where_input_takes_nothing(
    stock: Callable[..., Tensor],
    otherwise: Callable[..., Tensor],
    curve: Any,
    enough: Callable[[Tensor], bool] = takes_nothing,
) -> Any:
    """A function with the arguments of `stock`; `curve` makes a `Curve` of all but the first."""

    def function(input: Tensor, *arguments: Any, inplace: bool = False, **options: Any) -> Tensor:
        own = {**options, "inplace": True} if inplace else options
        if not enough(input) or not lean_mode(input) or "out" in options:
            return otherwise(input, *arguments, **own)
        return curved(input, curve(*arguments, **options), inplace)

    function.__name__, function.__doc__ = stock.__name__, f"`{stock.__name__}`; see the table of this module."
    return function


def _where_input_is_free(stock: Callable[..., Tensor], otherwise: Callable[..., Tensor], curve: Any) -> Any:
    """The same for curves of two slopes, for whose bits alone no layer is worth running again."""

    def function(input: Tensor, *arguments: Any, inplace: bool = False) -> Tensor:
        origin = known(input) if lean_mode(input) else None
        if origin is not None and origin.nbytes == 0 and origin.step.cost == 0:
            return curved(input, curve(*arguments), inplace)
        y = otherwise(input, *arguments, **({"inplace": True} if inplace else {}))
        if origin is not None:
            own = curve(*arguments)
            note(y, own.function, [origin], change=own.change, fresh=True)
        return y

    function.__name__, function.__doc__ = stock.__name__, f"`{stock.__name__}`; see the table of this module."
    return function


def _by_output(name: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Curve]:
    return lambda *_: Curve(name, forward, lambda grad, x: backward(grad, forward(x)), of_result=backward)


def _takes_little(x: Tensor) -> bool:
    """Whether scores of attention add no more than biases of positions, which all samples share."""
    origin = find(x)
    return origin is not None and 4 * origin.nbytes <= x.nbytes


def _softmax_curve(dim: Any, _stacklevel: int = 3, dtype: Any = None) -> Curve:
    forward = lambda x: F.softmax(x, dim, dtype=dtype)  # noqa: E731

    def of_result(grad: Tensor, y: Tensor) -> Tensor:
        found: Tensor = _aten._softmax_backward_data.default(grad, y, dim, y.dtype)
        return found

    def derivative(grad: Tensor, x: Tensor) -> Tensor:
        return of_result(grad, forward(x)).to(x.dtype)

    return Curve("softmax", forward, derivative, of_result=of_result if dtype is None else None)


def _hardtanh_curve(name: str, low: float, high: float) -> Curve:
    backward = _aten.hardtanh_backward.default
    function, change = (lambda x: F.hardtanh(x, low, high)), (lambda x: _aten.hardtanh_.default(x, low, high))
    return Curve(name, function, lambda grad, x: backward(grad, x, low, high), change, True, Limits(low, high))


sigmoid = _where_input_takes_nothing(
    torch.sigmoid, torch.sigmoid, _by_output("sigmoid", torch.sigmoid, _aten.sigmoid_backward.default)
)
tanh = _where_input_takes_nothing(torch.tanh, torch.tanh, _by_output("tanh", torch.tanh, _aten.tanh_backward.default))
softmax = _where_input_takes_nothing(F.softmax, F.softmax, _softmax_curve, _takes_little)
_relu_slope = lambda grad, x: _aten.threshold_backward.default(grad, x, 0)  # noqa: E731
_relu_curve = Curve("ReLU", F.relu, _relu_slope, _aten.relu_.default, True, Limits(low=0.0))
_relu = _where_input_is_free(F.relu, activations.relu, lambda: _relu_curve)
_relu6 = _where_input_is_free(F.relu6, activations.relu6, lambda: _hardtanh_curve("ReLU6", 0.0, 6.0))
_hardtanh = _where_input_is_free(
    F.hardtanh, activations.hardtanh, lambda low=-1.0, high=1.0: _hardtanh_curve("Hardtanh", low, high)
)
_leaky_relu = _where_input_is_free(F.leaky_relu, activations.leaky_relu, lambda slope=0.01: _leaky_curve(slope))


def _leaky_curve(slope: float) -> Curve:
    backward = _aten.leaky_relu_backward.default
    function, change = (lambda x: F.leaky_relu(x, slope)), (lambda x: _aten.leaky_relu_.default(x, slope))
    return Curve("LeakyReLU", function, lambda grad, x: backward(grad, x, slope, False), change)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`; keeps nothing, or one bit per element."""
    found: Tensor = _hardtanh(input, min_val, max_val, inplace=inplace)
    return found


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`; keeps nothing, or one bit per element."""
    found: Tensor = _leaky_relu(input, negative_slope, inplace=inplace)
    return found


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`; keeps nothing, or one bit per element."""
    found: Tensor = _relu(input, inplace=inplace)
    return found


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu6`; keeps nothing, or one bit per element."""
    found: Tensor = _relu6(input, inplace=inplace)
    return found
