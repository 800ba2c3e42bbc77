"""The gates of language models, f(g) * u by SiLU or GELU: their gradients are one compiled pass, and so is the product
when it is computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank.exact import expressions
from lowrank.exact.chains import Gate
from lowrank.exact.curves import Sloped
from lowrank.exact.edges import edge_of, placed
from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.origins import Reader, lean_mode, note, origin_of, reading
from lowrank.exact.sources import Origin
from lowrank.kernels import passes
from lowrank.layers.lazy import lazy_gradient
from lowrank.tensors.eager import Node, saved


class _Gated(Node):
    """A product of s = f(g) and u, which keeps the origins of g and u.

    The gradient of s is handed on unread, with that of g, which f has to make of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        u: Tensor,
        gate: Gate,
        reader: Reader,
        place: tuple[Tensor | None],
        sources: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.gate, ctx.reader, ctx.place = gate, reader, place
        ctx.save_for_backward(*sources)
        return torch.mul(s, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.reader(*saved(ctx, "product"))
        if torch.is_grad_enabled():
            with torch.no_grad():
                s = ctx.gate.function(g)
            return grad * u, grad * placed(ctx.place[0], s), *[None] * 4
        made = passes.gate_gradients(grad, g, u, ctx.gate.by)
        if made is None:
            return grad * u, grad * ctx.gate.function(g), *[None] * 4
        of_g, of_u = made
        make = lambda: grad * u  # noqa: E731
        sloped = Sloped(of_g, ctx.reader.steps[0], ctx.gate)
        return lazy_gradient(grad, grad.stride(), make, sloped), of_u, *[None] * 4


def product(input: Any, other: Any, **options: Any) -> Any:
    """`torch.mul`; keeps the origins of its factors, of a gate those of its input."""
    for s, u in ((input, other), (other, input)):
        found = None if options else _gate(s, u)
        if found is not None:
            gate, ahead = found
            of_u = origin_of(u)
            reader, sources = reading(ahead, of_u, of=[None, u])
            y: Tensor = _Gated.apply(s, u, gate, reader, (edge_of(s),), sources)
            note(y, partial(_again, gate), [ahead.as_kept(), of_u.as_kept()], fresh=True)
            return y
    return expressions.product(input, other, **options)


def _gate(s: Any, u: Any) -> tuple[Gate, Origin] | None:
    """What `s` is a gate by, and of what, if that and a compiled pass over it and `u` are there; None otherwise."""
    if not (isinstance(s, Tensor) and isinstance(u, Tensor) and s.shape == u.shape and s is not u):
        return None
    if not (lean_mode(s) and lean_mode(u) and passes.can_gate(s, u)):
        return None
    origin = origin_of(s)
    gate = origin.step.link
    if not isinstance(gate, Gate):
        return None
    return gate, Origin(origin.step.inputs[0], origin.sources, origin.parts, origin.place)


def _again(gate: Gate, g: Tensor, u: Tensor) -> Tensor:
    if not torch.is_grad_enabled() and (found := passes.gate(g, u, gate.by)) is not None:
        return found
    return gate.function(g) * u


_STOCK = (torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)
LEAN_FUNCTIONS |= dict.fromkeys(_STOCK, product)
