"""One bit per element: masks, packed, and applied to a gradient; by compiled kernels in one pass, where there are any,
otherwise by PyTorch's operators piece by piece, so that a piece stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _disable_current_modes

from lowrank.kernels import passes
from lowrank.tensors import head_start
from lowrank.tensors.tucker import in_memory_order

Rule = Callable[[Tensor, Tensor, Tensor], object]
_threshold_backward = torch.ops.aten.threshold_backward.grad_input
_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.grad_input


@dataclass(frozen=True)
class Gate:
    """Which elements a curve of two slopes passes on, see `passes.pack`.

    Called as `pack` calls a gate, it is a backward operator of PyTorch: so what becomes of infinities and NaN is what
    becomes of them there.
    """

    rule: passes.Gate
    low: float = 0.0
    high: float = 0.0

    def __call__(self, ones: Tensor, piece: Tensor, out: Tensor) -> None:
        if self.rule == "above":
            _threshold_backward(ones, piece, self.low, grad_input=out)
        elif self.rule in ("between", "within"):
            _hardtanh_backward(ones, piece, self.low, self.high, grad_input=out)
            if self.rule == "within" and piece.is_cuda:  # where NaN passes Hardtanh, and not Hardsigmoid
                out.masked_fill_(piece.isnan(), 0)
        elif self.rule == "strictly above":
            torch.gt(piece, self.low, out=out)
        else:
            torch.ne(piece, 0, out=out)


@dataclass(frozen=True)
class Slopes:
    """What becomes of a gradient by its bits: it is multiplied by `inner`, or by `outer`, see `passes.apply`."""

    inner: float = 1.0
    outer: float | None = None

    def __call__(self, piece: Tensor, mask: Tensor, out: Tensor) -> None:
        if self.outer is None:
            _threshold_backward(piece, mask, 0, grad_input=out)
        else:
            _leaky_relu_backward(piece, mask, self.outer / self.inner if self.inner else 0.0, False, grad_input=out)
        if self.inner != 1:
            out.mul_(self.inner)


# A word holds eight bytes that are 0 or 1. The product moves the lowest bit of byte i to bit 56 + i; no two terms meet,
# so nothing carries.
GATHER = 0x0102040810204080
CHUNK = 2**18  # elements that are handled at once on a CPU; a multiple of 8


def pack(x: Tensor, gate: Rule) -> tuple[Tensor, list[int]]:
    """Which elements a gate lets through, one bit each.

    Args:
        x: any tensor.
        gate: `gate(ones, piece, out)` writes 1 or 0 to `out` for every element of `piece`, a flat piece of `x`. `ones`
            has the size of the piece, so that a backward operator of PyTorch with slopes 1 and 0 is a gate.

    Returns:
        Bytes of shape (ceil(n / 8),), uint8, for n elements in the order in which they lie in memory; and the place of
        each dimension in that order.
    """
    ordered, place = in_memory_order(x)
    flat, chunk = ordered.view(-1), _chunk(x)
    bits = flat.new_empty(_bytes(flat.numel()), dtype=torch.uint8)
    if isinstance(gate, Gate) and passes.pack(flat, gate.rule, gate.low, gate.high, bits):
        return bits, place
    dtype = x.dtype if x.is_floating_point() else torch.float32
    mask = flat.new_empty((min(chunk // 8, len(bits)), 8), dtype=dtype)
    one = mask.new_ones(1)
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        packed = bits[start // 8 : start // 8 + _bytes(len(piece))]
        room = mask[: len(packed)]
        entries = room.view(-1)
        gate(one.expand_as(piece), piece, entries[: len(piece)])
        entries[len(piece) :].zero_()
        packed.copy_(join_words(room) if x.is_cuda else join_sums(room))
    return bits, place


def pack_clamped(
    x: Tensor, gate: Gate, high: float, inplace: bool
) -> tuple[Tensor, list[int], Tensor, head_start.Begun | None] | None:
    """`pack`, and the tensor clamped between the gate's lower limit and `high`, in one pass.

    Args:
        x: any tensor.
        gate: "above" or "between".
        high: infinite where the gate is "above".
        inplace: whether the clamped tensor is to be written to `x`.

    Returns:
        What `pack` returns, the clamped tensor, in the memory order of `x`, and what of its compression was begun, if
        anything; None: there is no kernel for these.
    """
    ordered, place = in_memory_order(x)
    if ordered.device.type != "cpu" or not ordered.numel() or ordered.data_ptr() != x.data_ptr():
        return None
    # ReLU and clamp do not agree on the strides of dimensions of size 1.
    form = _form(x) if gate.rule == "above" else torch.preserve_format
    flat, out = ordered.view(-1), x if inplace else torch.empty_like(x, memory_format=form)
    bits = flat.new_empty(_bytes(flat.numel()), dtype=torch.uint8)
    begun = None
    if inplace and x.is_contiguous():
        begun = head_start.clamp(flat.view(x.shape), gate.rule, gate.low, high, bits)
    if begun is not None:
        return bits, place, x, begun
    order = [place.index(position) for position in range(x.ndim)]
    done = passes.clamp(flat, gate.rule, gate.low, high, bits, out.permute(order).view(-1))
    return (bits, place, out, None) if done else None


def _form(x: Tensor) -> torch.memory_format:
    """In which PyTorch's iterator writes what it makes of each element of `x`."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.preserve_format


def masked(grad: Tensor, bits: Tensor, place: Sequence[int], rule: Rule, owned: bool = False) -> Tensor:
    """A gradient by a rule that reads the bits.

    Args:
        grad: gradient, of the shape of the tensor that `pack` was given, in any memory format.
        bits, place: what `pack` returned.
        rule: `rule(piece, mask, out)` writes to `out` what becomes of a flat piece of `grad`; `mask` holds 1 or 0 for
            each of its elements, in its dtype. `out` may be `piece` itself.
        owned: whether `grad` may be written to, see `is_owned`.

    Returns:
        The result, in the memory order of the tensor that was packed; in `grad`, where that lies so and may be written
        to.
    """
    order = [place.index(position) for position in range(grad.ndim)]
    turned = order != list(range(grad.ndim))
    source, chunk = grad.permute(order) if turned else grad, _chunk(grad)
    if owned and source.is_contiguous():
        result = source
        increment_version(grad)  # what was noted of it ends
    else:
        result = torch.empty_like(source, memory_format=torch.contiguous_format)
    if not source.is_contiguous():
        source = result.copy_(source)
    flat, flat_result = source.view(-1), result.view(-1)
    if isinstance(rule, Slopes) and passes.apply(flat, bits, rule.inner, rule.outer, flat_result):
        return result.permute(list(place)) if turned else result
    table = _table(grad.dtype, grad.device)
    mask = grad.new_empty((min(chunk // 8, len(bits)), 8))
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        packed = bits[start // 8 : start // 8 + _bytes(len(piece))]
        entries = torch.index_select(table, 0, packed.int(), out=mask[: len(packed)]).view(-1)
        rule(piece, entries[: len(piece)], flat_result[start : start + chunk])
    return result.permute(list(place)) if turned else result


def spread(bits: Tensor) -> Tensor:
    """The bits of bytes (n,) as booleans, shape (8 n,)."""
    return torch.index_select(_table(torch.bool, bits.device), 0, bits.int()).view(-1)


def join_sums(mask: Tensor) -> Tensor:
    """Bytes as numbers, shape (n,), of a mask of 0 and 1 of shape (n, 8): a product, of which BLAS makes one pass.

    Exact in whatever precision and order it sums, since even bfloat16 holds all integers up to 256.
    """
    return mask @ _powers(mask.dtype, mask.device)


def join_words(mask: Tensor) -> Tensor:
    """The same with whole-word arithmetic."""
    return (mask.bool().view(torch.int64)[:, 0] * GATHER) >> 56


def _chunk(x: Tensor) -> int:
    if x.is_meta:
        return -(-max(x.numel(), 1) // 8) * 8  # nothing is computed: one piece
    return 4 * CHUNK if x.is_cuda else CHUNK  # on a GPU starting an operator costs more than leaving the cache


def _bytes(elements: int) -> int:
    return -(-elements // 8)


# Made once in a process, out of sight of who counts what a step makes: every step is then the same to them.


@lru_cache(maxsize=8)
def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    with _disable_current_modes():
        return (2 ** torch.arange(8, device=device)).to(dtype)


@lru_cache(maxsize=8)
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For every byte, the eight entries of the mask that it stands for: shape (256, 8)."""
    with _disable_current_modes():
        every = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
        return (every & 1).to(dtype)
