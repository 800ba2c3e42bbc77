"""Computing tensors again in the backward pass from what another layer keeps anyway; exact.

A layer normalisation has to keep its input. Its output, and what linear layers and smooth activations make of that, can
be computed again from it by the same operations, bit for bit. So whoever needs such a tensor in the backward pass keeps
its *origin* in place of the tensor: the sources, and how to rebuild it.

| layer | kept in place of |
|---|---|
| LayerNorm | its input, as in PyTorch; notes it as the origin of its output |
| GELU, SiLU | the origin of its input, if that is less than the input |
| Linear that keeps its input | the origin of its input |
| attention (`attend`) | the origin of the joint projection, in place of all that follows from it, the output too |

The price is that attention, and a linear layer in front of an activation or of it, run once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.tensors.eager import refuse_double_backward, saved, wants_gradient
from lowrank.tensors.notes import Notes

Rebuild = Callable[..., Tensor]


@dataclass(frozen=True)
class Origin:
    """How to compute a tensor again: `rebuild(*sources)` is the tensor.

    Attributes:
        sources: tensors that are to be kept for it, parameters among them.
        rebuild: from the sources to the tensor; refers to no tensor itself.
        kept: whether another layer keeps all sources in any case.
    """

    sources: tuple[Tensor, ...]
    rebuild: Rebuild
    kept: bool

    @property
    def nbytes(self) -> int:
        """Bytes that keeping it adds: none if all are kept in any case."""
        own = [source for source in self.sources if not isinstance(source, nn.Parameter)]
        return 0 if self.kept else sum(source.untyped_storage().nbytes() for source in own)


def _itself(x: Tensor) -> Tensor:
    return x


# The sources live as long as the tensor that can be computed from them, whatever else keeps them: so what a layer keeps
# is decided by what it is given, the same in a checkpoint's first pass as in its second.
_ORIGINS: Notes[tuple[Origin, tuple[int, ...]]] = Notes()


def _note(tensor: Tensor, origin: Origin) -> None:
    _ORIGINS.note(tensor, (origin, tuple(source._version for source in origin.sources)))


def _find(tensor: Tensor) -> Origin | None:
    origin, versions = _ORIGINS.find(tensor) or (None, ())
    if origin is None or versions != tuple(source._version for source in origin.sources):
        return None
    return origin


def origin_of(x: Tensor) -> Origin:
    """The way to have a tensor in the backward pass that keeps least: its origin, or the tensor itself."""
    origin = _find(x)
    if origin is None or origin.nbytes >= x.untyped_storage().nbytes():
        return Origin((x,), _itself, False)
    return origin


def known_origin(x: Tensor) -> Origin | None:
    """The origin of a tensor whose sources another layer keeps; None if there is none."""
    origin = _find(x)
    return origin if origin is not None and origin.kept else None


def note_linear(x: Tensor, y: Tensor, apply: Rebuild, parameters: tuple[Tensor | None, ...], keeps_x: bool) -> None:
    """Note that `y` is `apply(x, *parameters)`.

    Args:
        x: input of a linear layer.
        y: its output.
        apply: the layer as a function of its input and parameters; refers to no tensor itself.
        parameters: of the layer.
        keeps_x: whether the layer keeps `x` itself.
    """
    if not lean_mode(y):
        return
    before = _find(x) or Origin((x,), _itself, keeps_x)
    present = tuple(parameter is not None for parameter in parameters)
    own = tuple(parameter for parameter in parameters if parameter is not None)
    count, inner = len(before.sources), before.rebuild

    def rebuild(*sources: Tensor) -> Tensor:
        given = iter(sources[count:])
        return apply(inner(*sources[:count]), *(next(given) if there else None for there in present))

    _note(y, Origin((*before.sources, *own), rebuild, before.kept))


def lean_mode(x: Tensor) -> bool:
    """Whether what autograd keeps for `x` is this module's to decide: in plain eager training without autocast."""
    if not wants_gradient(x):
        return False
    device = x.device.type
    return not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


class _Smooth(torch.autograd.Function):
    """An activation whose derivative is computed from its input, which is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: _Curve, origin: Origin, shared: list[Tensor]) -> Tensor:
        ctx.curve, ctx.rebuild, ctx.shared = curve, origin.rebuild, shared
        ctx.save_for_backward(*origin.sources)
        return curve.function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        with torch.no_grad():
            x = ctx.shared.pop() if ctx.shared else ctx.rebuild(*saved(ctx, ctx.curve.name))
            grad_x = ctx.curve.derivative(grad, x)
        if torch.is_grad_enabled():
            grad_x = refuse_double_backward(ctx.curve.name, grad_x, grad)
        return grad_x, None, None, None


@dataclass(frozen=True)
class _Curve:
    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]


def _smooth(x: Tensor, curve: _Curve) -> Tensor:
    origin = origin_of(x)
    # The layer behind, if it needs the output, computes the input again just before this one needs it: it leaves it.
    shared: list[Tensor] = []
    y = _Smooth.apply(x, curve, origin, shared)
    inner = origin.rebuild

    def rebuild(*sources: Tensor) -> Tensor:
        shared[:] = [inner(*sources)]
        return curve.function(shared[0])

    _note(y, Origin(origin.sources, rebuild, True))
    return y


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.gelu(input, approximate=approximate)
    backward = torch.ops.aten.gelu_backward.default
    forward = lambda x: F.gelu(x, approximate=approximate)  # noqa: E731
    return _smooth(input, _Curve("GELU", forward, lambda grad, x: backward(grad, x, approximate=approximate)))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`; keeps the origin of its input."""
    if not lean_mode(input) or inplace:
        return F.silu(input, inplace)
    return _smooth(input, _Curve("SiLU", F.silu, torch.ops.aten.silu_backward.default))


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; notes its input, which it keeps, as the origin of its output."""
    y = F.layer_norm(input, normalized_shape, weight, bias, eps)
    if lean_mode(y):
        shape = tuple(normalized_shape)
        note_linear(input, y, lambda x, w, b: F.layer_norm(x, shape, w, b, eps), (weight, bias), keeps_x=True)
    return y


@dataclass(frozen=True)
class _Mixing:
    """One call of an attention function: how to compute its output again, with a graph through it.

    A layer behind it that needs the output for its own gradient computes it just before this node needs the same. It
    leaves what it made, so that attention is computed again once.

    Attributes:
        function: of queries, keys and values in one tensor, and of further tensors or None.
        rebuild: that one tensor from its sources.
        count: how many sources it has.
        wanted: per argument of the function, whether it wants a gradient; None: it is None.
        made: arguments and output of the latest call, until the gradient is taken.
    """

    function: Rebuild
    rebuild: Rebuild
    count: int
    wanted: tuple[bool | None, ...]
    made: list[tuple[list[Tensor | None], Tensor]] = field(default_factory=list)

    def again(self, *kept: Tensor) -> Tensor:
        """The output, from the sources and the further tensors; leaves the graph for `gradients`."""
        given = iter([self.rebuild(*kept[: self.count]), *kept[self.count :]])
        leaves = [None if want is None else next(given).detach().requires_grad_(want) for want in self.wanted]
        with torch.enable_grad():
            y = self.function(*leaves)
        self.made[:] = [(leaves, y)]
        return y.detach()

    def gradients(self, grad: Tensor, *kept: Tensor) -> list[Tensor | None]:
        """One per argument; None where it is not wanted or the output does not depend on it."""
        if not self.made:
            self.again(*kept)
        leaves, y = self.made.pop()
        inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, inputs, grad, allow_unused=True))
        return [next(found) if want else None for want in self.wanted]


class _Attend(torch.autograd.Function):
    """Attention that is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, mixing: _Mixing, kept: tuple[Tensor, ...], projected: Tensor, *others: Any) -> Tensor:
        ctx.mixing = mixing
        ctx.save_for_backward(*kept)
        return mixing.function(projected, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        found = ctx.mixing.gradients(grad.detach(), *saved(ctx, "attention"))
        return None, None, *(refuse_double_backward("attention", one, grad) if again else one for one in found)


def attend(function: Rebuild, projected: Tensor, *others: Tensor | None) -> Tensor:
    """`function(projected, *others)`, without keeping what it computes inside, nor its output for the layer behind.

    Args:
        function: without randomness; refers to no tensor itself.
        projected: queries, keys and values, of which the origin is kept.
        others: further tensors that it takes, such as a mask, kept as they are.
    """
    if not lean_mode(projected):
        return function(projected, *others)
    wanted = tuple(None if argument is None else argument.requires_grad for argument in (projected, *others))
    origin = origin_of(projected)
    kept = (*origin.sources, *(other for other in others if other is not None))
    mixing = _Mixing(function, origin.rebuild, len(origin.sources), wanted)
    y = _Attend.apply(mixing, kept, projected, *others)
    _note(y, Origin(kept, mixing.again, True))
    return y
