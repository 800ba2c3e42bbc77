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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

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


class _Registry:
    """Origins by tensor: an entry ends with its tensor. Sources that nobody else keeps live until then."""

    def __init__(self) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def note(self, tensor: Tensor, origin: Origin) -> None:
        sources = [
            (TensorWeakRef(source) if origin.kept else partial(_itself, source), source._version)
            for source in origin.sources
        ]
        self._entries[tensor] = (tensor._version, sources, origin.rebuild, origin.kept)

    def find(self, tensor: Tensor) -> Origin | None:
        if torch.compiler.is_compiling() or tensor not in self._entries:
            return None
        version, references, rebuild, kept = self._entries[tensor]
        sources = [(reference(), before) for reference, before in references]
        changed = any(source is None or source._version != before for source, before in sources)
        if changed or tensor._version != version:
            return None
        return Origin(tuple(source for source, _ in sources if source is not None), rebuild, kept)


_ORIGINS = _Registry()


def origin_of(x: Tensor) -> Origin:
    """The way to have a tensor in the backward pass that keeps least: its origin, or the tensor itself."""
    origin = _ORIGINS.find(x)
    if origin is None or origin.nbytes >= x.untyped_storage().nbytes():
        return Origin((x,), _itself, False)
    return origin


def known_origin(x: Tensor) -> Origin | None:
    """The origin of a tensor whose sources another layer keeps; None if there is none."""
    origin = _ORIGINS.find(x)
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
    before = _ORIGINS.find(x) or Origin((x,), _itself, keeps_x)
    present = tuple(parameter is not None for parameter in parameters)
    own = tuple(parameter for parameter in parameters if parameter is not None)
    count, inner = len(before.sources), before.rebuild

    def rebuild(*sources: Tensor) -> Tensor:
        given = iter(sources[count:])
        return apply(inner(*sources[:count]), *(next(given) if there else None for there in present))

    _ORIGINS.note(y, Origin((*before.sources, *own), rebuild, before.kept))


def lean_mode(x: Tensor) -> bool:
    """Whether what autograd keeps for `x` is this module's to decide: neither compiled nor under autocast."""
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x = ctx.shared.pop() if ctx.shared else ctx.rebuild(*ctx.saved_tensors)
        return ctx.curve.derivative(grad, x), None, None, None


@dataclass(frozen=True)
class _Curve:
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

    _ORIGINS.note(y, Origin(origin.sources, rebuild, True))
    return y


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`; keeps the origin of its input."""
    if not lean_mode(input):
        return F.gelu(input, approximate=approximate)
    backward = torch.ops.aten.gelu_backward.default
    forward = lambda x: F.gelu(x, approximate=approximate)  # noqa: E731
    return _smooth(input, _Curve(forward, lambda grad, x: backward(grad, x, approximate=approximate)))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`; keeps the origin of its input."""
    if not lean_mode(input) or inplace:
        return F.silu(input, inplace)
    return _smooth(input, _Curve(F.silu, torch.ops.aten.silu_backward.default))


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.mixing.gradients(grad, *ctx.saved_tensors)


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
    _ORIGINS.note(y, Origin(kept, mixing.again, True))
    return y


class LeanLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose output need not be kept by those who use it."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class LeanGELU(nn.GELU):
    """`nn.GELU` that keeps the origin of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate)


class LeanSiLU(nn.SiLU):
    """`nn.SiLU` that keeps the origin of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


RECOMPUTING_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    lean.__mro__[1]: lean for lean in (LeanLayerNorm, LeanGELU, LeanSiLU)
}
RECOMPUTING_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.gelu: gelu,
    F.silu: silu,
    F.layer_norm: layer_norm,
}
