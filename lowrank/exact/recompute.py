"""Normalisations, linear layers and attention whose results are computed again in the backward pass; exact.

A normalisation has to keep its input. Its output, and what linear layers, activations and products make of that, come
about from it (see `origins`), so that they take nothing.

| layer | kept |
|---|---|
| LayerNorm, GroupNorm, RMSNorm, BatchNorm with stored statistics | the origin of its input |
| InstanceNorm, BatchNorm with batch statistics | its input, as in PyTorch |
| Linear that keeps its input | the origin of its input |
| attention, products of matrices | nothing, where queries, keys and values take nothing; otherwise as PyTorch |

The price is that attention, and a linear layer in front of an activation or of it, run once more in the backward pass;
not so in layers whose outputs are kept, see `recompute` of `convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact.chains import Normalisation
from lowrank.exact.expressions import is_fixed, keeps_its_input, note_of
from lowrank.exact.origins import (
    Origin,
    Reader,
    find,
    is_parameter,
    lean_mode,
    mark_kept,
    note,
    origin_of,
    reading,
    takes_nothing,
)
from lowrank.exact.steps import Rebuild
from lowrank.tensors.again import LAYER
from lowrank.tensors.eager import Node, is_batched, saved
from lowrank.tensors.memory_layout import plainly_last


def note_layer(
    ahead: Origin, y: Tensor, apply: Callable[..., Tensor], parameters: tuple[Tensor | None, ...], cost: int = LAYER
) -> None:
    """Note that `y` is `apply(x, *parameters)`.

    Args:
        ahead: origin of x, the input of a linear layer or convolution.
        y: its output, or that of a normalisation which is computed with it.
        apply: the layer as a function of its input and parameters; refers to no tensor itself.
        parameters: of the layer.
        cost: see `note`.
    """
    if lean_mode(y):
        note_of(y, apply, ahead, parameters, cost, fresh=True)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; keeps the origin of its input."""
    shape = tuple(normalized_shape)
    return _normalised(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), input, weight, bias)


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`torch.nn.functional.rms_norm`; keeps the origin of its input."""
    shape = tuple(normalized_shape)
    return _normalised(lambda x, w: F.rms_norm(x, shape, w, eps), input, weight)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`; keeps the origin of its input."""
    return _normalised(lambda x, w, b: F.group_norm(x, num_groups, w, b, eps), input, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`; notes its input, which it keeps, as the origin of its output."""
    y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return y
    again = lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.0, eps)  # noqa: E731
    return keeps_its_input(again, input, weight, bias, y=y)


def stock_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; keeps its input, with stored statistics the origin of it."""
    input = plainly_last(input)
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if y.requires_grad and 1 in (input.shape[0], *input.shape[2:]) and lean_mode(y):
        y.register_hook(_plain_gradient)  # strides of a gradient are in doubt only where a dimension is of size 1
    return y


def _plain_gradient(grad: Tensor) -> Tensor:
    """See `plainly_last`; a batch of gradients, which does not tell its order, in the order of its dimensions."""
    return grad.contiguous() if is_batched(grad) else plainly_last(grad)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if training and _knows_its_statistics(input, running_mean, running_var, weight, bias):
        y, mean, inverse = torch.native_batch_norm(input, weight, bias, running_mean, running_var, True, momentum, eps)
        again, link = partial(_by_statistics, eps), Normalisation(weight is not None, bias is not None)
        return keeps_its_input(again, input, weight, bias, mean, inverse, y=y, link=link)
    if training or running_mean is None:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        anew = lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.0, eps)  # noqa: E731
        return keeps_its_input(anew, input, weight, bias, y=y)
    stored = lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, False, 0.0, eps)  # noqa: E731
    return _normalised(stored, input, weight, bias, running_mean, running_var)


def _knows_its_statistics(input: Tensor, *vectors: Tensor | None) -> bool:
    """Whether a normalisation by the batch's statistics, with these running ones and parameters, gives the statistics
    as well, and refuses nothing."""
    own = (torch.float32, torch.float64)
    if not lean_mode(input) or input.device.type != "cpu" or input.dtype not in own or input.ndim < 2:
        return False
    fit = all(one is None or (one.shape == input.shape[1:2] and one.dtype == input.dtype) for one in vectors)
    return fit and input.numel() > input.shape[1]


_NOTHING = 1e-30  # beside a variance of one; PyTorch takes no zero


def _by_statistics(
    eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor
) -> Tensor:
    """A normalisation by known statistics, `mean` and `inverse` deviation (C,), in one pass; bit for bit what it was
    by those of the batch, since PyTorch multiplies the deviation by the weight first."""
    scale = inverse if weight is None else inverse * weight
    return F.batch_norm(x, mean, torch.ones_like(mean), scale, bias, False, 0.0, _NOTHING)


def _normalised(stock: Callable[..., Tensor], input: Tensor, *parameters: Tensor | None) -> Tensor:
    """`stock(input, *parameters)`, computed again with its input where that takes nothing and no linear layer, whose
    output is kept, so that the next one can be computed from it."""
    origin = find(input) if lean_mode(input) else None
    if origin is not None and (origin.nbytes == 0 or origin.stream) and origin.step.cost < LAYER:
        return _run_again(stock, (input, *parameters), 0, stream=True)
    return keeps_its_input(stock, input, *parameters, y=stock(input, *parameters))


@dataclass(frozen=True)
class _Call:
    """One call of attention or a normalisation: how to compute its output again, with a graph through it.

    A layer behind it that needs the output for its own gradient computes it just before this node needs the same. It
    leaves what it made, so that attention is computed again once.

    Attributes:
        function: of tensors or None, such as queries, keys, values and a mask.
        wanted: per argument of the function, whether it wants a gradient; None: it is None.
        made: arguments and output of the latest call, until the gradient is taken.
    """

    function: Rebuild
    wanted: tuple[bool | None, ...]
    made: list[tuple[list[Tensor | None], Tensor]] = field(default_factory=list)

    def again(self, *values: Tensor) -> Tensor:
        """The output, from the arguments that are not None; leaves the graph for `gradients`."""
        given = iter(values)
        leaves = [None if want is None else next(given).detach().requires_grad_(want) for want in self.wanted]
        with torch.enable_grad():
            y = self.function(*leaves)
        self.made[:] = [(leaves, y)]
        return y.detach()

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """One per argument; None where it is not wanted or the output does not depend on it."""
        leaves, y = self.made.pop()
        inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, inputs, grad, allow_unused=True))
        return [next(found) if want else None for want in self.wanted]

    def followed(self, grad: Tensor, *values: Tensor) -> list[Tensor | None]:
        """The gradients for these arguments, with a graph to them and to `grad`."""
        given = iter(values)
        # One may be computed from another: the function is given each as a tensor of its own, where its gradient ends.
        arguments = [None if want is None else (one := next(given)).view_as(one) for want in self.wanted]
        inputs = [one for one, want in zip(arguments, self.wanted, strict=True) if one is not None and want]
        found = iter(torch.autograd.grad(self.function(*arguments), inputs, grad, create_graph=True, allow_unused=True))
        return [next(found) if want else None for want in self.wanted]


class _Again(Node):
    """Attention or a normalisation that is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, reader: Reader, sources: tuple[Tensor, ...], *arguments: Any) -> Tensor:
        ctx.call, ctx.reader = call, reader
        ctx.save_for_backward(*sources)
        y: Tensor = call.function(*arguments)
        return y.detach() if y._is_view() and _is_new(y, arguments) else y  # as stock's, it may be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sources = saved(ctx, "attention or normalisation")
        if torch.is_grad_enabled():
            values = ctx.reader(*sources)
            ctx.call.made.clear()  # by a node behind, which had no need of a graph
            return None, None, None, *ctx.call.followed(grad, *values)
        if ctx.call.made:
            ctx.reader.done()
        else:
            ctx.call.again(*ctx.reader(*sources))
        return None, None, None, *ctx.call.gradients(grad)


def _is_new(y: Tensor, arguments: Sequence[Tensor | None]) -> bool:
    """Whether a function's output has memory of its own, such as a product that is put in another shape."""
    own = y.untyped_storage()._cdata
    return all(argument is None or argument.untyped_storage()._cdata != own for argument in arguments)


def attend(function: Rebuild, projected: Sequence[Tensor], *others: Tensor | None) -> Tensor:
    """`function(*projected, *others)`; where `projected` takes nothing, its output and what it computes inside neither.

    Args:
        function: without randomness; refers to no tensor itself.
        projected: queries, keys and values, in one tensor or several.
        others: such as a mask, whose origins are kept.
    """
    arguments = (*projected, *others)
    if not any(map(lean_mode, arguments)) or not all(map(takes_nothing, projected)):
        return function(*arguments)
    return _run_again(function, arguments, LAYER)


def _run_again(
    function: Rebuild, arguments: tuple[Tensor | None, ...], cost: int, layer: bool = False, stream: bool = False
) -> Tensor:
    """`function(*arguments)` in one node, which keeps the origins of the arguments.

    Args:
        function: see `attend`.
        arguments: of it.
        cost: see `note`; that of a layer, or 0.
        layer: whether it is a layer, which is not run again behind another one; attention is.
        stream: see `origin_of`.
    """
    call = _Call(function, tuple(None if argument is None else argument.requires_grad for argument in arguments))
    origins = [origin_of(argument, stream) for argument in arguments if argument is not None]
    reader, sources = reading(*origins, of=[argument for argument in arguments if argument is not None])
    with torch._C.DisableTorchFunctionSubclass():  # what the function calls in turn is part of this one node
        y: Tensor = _Again.apply(call, reader, sources, *arguments)
    if not layer and any(origin.step.cost >= LAYER for origin in origins):
        cost = 0
    note(y, call.again, [origin.as_kept() for origin in origins], cost=cost)
    return y


def products_of(stock: Callable[..., Tensor], costs: bool = True) -> Callable[..., Tensor]:
    """A function of tensors, such as a product of matrices, that keeps their origins where one of them takes nothing.

    So attention that is written out keeps nothing. A product with a weight is a layer, and takes what that takes.

    Args:
        stock: without randomness.
        costs: whether it takes as much as a layer.
    """

    @wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        lean = any(map(lean_mode, tensors)) and any(map(takes_nothing, tensors))
        others = [argument for argument in args if not isinstance(argument, Tensor)]
        if not lean or not all(map(is_fixed, (*others, *kwargs.values()))):
            return stock(*args, **kwargs)
        places = [(True, None) if isinstance(argument, Tensor) else (False, argument) for argument in args]

        def again(*values: Tensor | None) -> Tensor:
            given = iter(values)
            return stock(*(next(given) if there else other for there, other in places), **kwargs)

        return _run_again(again, tuple(tensors), LAYER if costs else 0, any(map(is_parameter, tensors)))

    return function


def scaled_sum(*arguments: Any, **options: Any) -> Tensor:
    """`torch.addcmul`; keeps the origins of its factors."""
    named = [options.pop(name) for name in ("input", "tensor1", "tensor2") if name in options]
    arguments = (*arguments, *named)
    if options.get("out") is not None or len(arguments) != 3 or not all(isinstance(x, Tensor) for x in arguments):
        return torch.addcmul(*arguments, **options)
    _, tensor1, tensor2 = arguments
    again = lambda a, b, c: torch.addcmul(a, b, c, **options)  # noqa: E731
    factors = [one for one, other in ((tensor1, tensor2), (tensor2, tensor1)) if other.requires_grad]
    if any(map(lean_mode, arguments)) and any(map(takes_nothing, factors)):
        return _run_again(again, arguments, 0)
    y = again(*arguments)
    if lean_mode(y):
        for factor in factors:
            mark_kept(factor)
        note(y, again, map(origin_of, arguments))
    return y


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; keeps the origins of its arguments."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if dropout_p:  # which random numbers it drew is nowhere kept
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
    function: Callable[..., Tensor] = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, **options)  # noqa: E731
    return attend(function, (query, key, value), attn_mask)
