"""The first product of a weight gradient, made in the pass that makes the output's gradient.

The layer ahead of an activation reads the gradient that the activation has just written, to project it on the batch's
factor. So the activation makes that product while it writes, and notes it; the layer takes it where it is its own, and
makes its own where there is none, as where a hook gave it another gradient. The two are the same to the last bit, and
the layer goes on in the same order: it is told in the forward pass what it can count on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from lowrank.kernels import passes
from lowrank.tensors.notes import Notes

_LEAST = 2**18  # numbers of a gradient, of fewer the layer's read takes less than to ask it
_PART = 3  # of a gradient, that the product may take
_SEEN = 64  # numbers of a gradient by which it is known again
_ADDITIONS = ("AddBackward0",)  # which hand their gradient on as it is


@dataclass(eq=False)
class _Begun:
    """Of a gradient (B, ...) that it is noted of, the product with a factor (B, r) and a column of ones beside it,
    (r + 1, ...); None: that was taken. And some of the gradient's numbers: a hook may change it as `grad.data` or by
    NumPy, which count no changes; of a change of few numbers they do not tell."""

    factor: Tensor
    product: Tensor | None
    seen: Tensor


_BEGUN: Notes[_Begun] = Notes()
_EXPECTED: Notes[bool] = Notes()


def announce(y: Tensor) -> None:
    """Tell the layer ahead of an activation with the output `y` that its first product is to be made, if it is."""
    if y.numel() >= _LEAST and y.is_contiguous() and passes.can_mask(y):
        ahead = _ahead(y.grad_fn)
        if hasattr(ahead, "factor_of"):
            ahead.begun = True


@contextmanager
def expected(node: Any, grad: Tensor) -> Iterator[None]:
    """While a node makes its weight gradient: whether the first product was to be made, whoever did then."""
    begun = getattr(node, "begun", False)
    if begun:
        _EXPECTED.note(grad, True)
    yield
    if begun:
        _EXPECTED.note(grad, False)


def is_expected(grad: Tensor, rank: int) -> bool:
    """Whether the first product with a gradient and a factor of this rank was to be made."""
    return _EXPECTED.may_know(grad) and _EXPECTED.find(grad) is True and is_small(grad, rank)


def is_small(grad: Tensor, rank: int) -> bool:
    """Whether a product with a factor of this rank takes little memory beside the gradient."""
    return (rank + 1) * _PART <= grad.shape[0]


def mask(node: Any, grad: Tensor, bits: Tensor, place: Sequence[int]) -> bool:
    """Set a large gradient to zero where a bit is not set, in its place, and make the first product of the layer ahead,
    if that is to have one.

    Args:
        node: of the activation.
        grad: that nobody else has.
        bits, place: what `lowrank.exact.bits.pack` returned.

    Returns:
        Whether it was done.
    """
    if grad.numel() < _LEAST or not grad.is_contiguous() or list(place) != list(range(grad.ndim)):
        return False
    ahead = _ahead(node)
    ask = getattr(ahead, "factor_of", None)
    factor = None if ask is None else ask(ahead, grad)
    if factor is None or factor.shape[0] != grad.shape[0]:
        return False
    product = passes.masked_project(grad.flatten(1), bits, with_ones(factor))
    if product is None:
        return False
    increment_version(grad)
    _BEGUN.note(grad, _Begun(factor, product.view(-1, *grad.shape[1:]), _some_of(grad)))
    return True


def _ahead(node: Any) -> Any:
    """The node that is given the gradient which a node makes of its first input."""
    ahead = node.next_functions[0][0]
    while ahead is not None and (ahead.name() in _ADDITIONS or getattr(ahead, "hands_on", False)):
        ahead = ahead.next_functions[0][0]
    return ahead


def with_ones(factor: Tensor) -> Tensor:
    """A factor (n, r) with a column of ones beside it, (n, r + 1)."""
    return F.pad(factor, (0, 1), value=1.0)


def begun_numbers(grad: Tensor) -> int:
    """Numbers of the product that waits for whoever reads a gradient; 0: there is none."""
    begun = _BEGUN.find(grad) if _BEGUN.may_know(grad) else None
    return 0 if begun is None or begun.product is None else begun.product.numel()


def product_of(grad: Tensor, factor: Tensor) -> Tensor | None:
    """What was made of a gradient and this factor, if anything, for who asks first: (r + 1, ...)."""
    begun = _BEGUN.find(grad) if _BEGUN.may_know(grad) else None
    if begun is None or begun.product is None:
        return None
    if begun.factor is not factor and not torch.equal(begun.factor, factor):
        return None
    product, begun.product = begun.product, None
    return product if grad.is_contiguous() and torch.equal(begun.seen, _some_of(grad)) else None


def _some_of(grad: Tensor) -> Tensor:
    """A copy of some numbers of a contiguous gradient, of all samples, channels and places alike."""
    return grad.view(-1)[:: _step(grad.numel())].clone()


@lru_cache(maxsize=256)
def _step(count: int) -> int:
    step = max(count // _SEEN, 1)
    while gcd(step, count) > 1:
        step += 1
    return step
