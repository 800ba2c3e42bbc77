"""Passes over memory that compiled kernels make; where one cannot, it says so, and the caller does without."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import inf, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels import iterations
from lowrank.kernels.choice import kernel_for, on_gpu
from lowrank.kernels.library import library

Gate = Literal["above", "between", "within", "strictly above", "not zero"]
GATES: dict[Gate, int] = {"above": 0, "between": 1, "within": 1, "strictly above": 2, "not zero": 3}
GateOf = Literal["SiLU", "GELU"]
_GATES_OF: dict[GateOf, int] = {"SiLU": 0, "GELU": 1}
_MOST_PROJECTED = 12  # columns; of more, a product of BLAS takes less
_MOST_ROWS, _ROW = 8, 16  # columns of the product of a mode with so many numbers behind it
_SWAPPED = range(5, 65)  # bytes of a row that is one vector; it is read and written as a whole


def pack(x: Tensor, gate: Gate, low: float, high: float, bits: Tensor) -> bool:
    """Write one bit per element, whether it passes a gate.

    Args:
        x: (n,), on a CPU float32 or float64, on a GPU boolean or a float of at most 32 bits, or nothing is done.
        gate: "above", not `x <= low`; "between" and "within", `low < x < high`; "strictly above", `x > low`; "not
            zero". NaN passes the first and the last; on a GPU also "between".
        low, high: of the gate.
        bits: (ceil(n / 8),), uint8, to write to; the first element is the lowest bit.

    Returns:
        Whether it was done.
    """
    if x.is_cuda:
        found = on_gpu(x, bits)
        return found is not None and found.pack(x, gate, low, high, bits)
    kernel = kernel_for("pack", x, stored=(bits, torch.uint8))
    if kernel is None:
        return False
    threads = torch.get_num_threads()
    kernel(x.data_ptr(), bits.data_ptr(), x.numel(), GATES[gate], low, high, threads)  # type: ignore[operator]
    return True


def clamp(x: Tensor, gate: Gate, low: float, high: float, bits: Tensor, out: Tensor) -> bool:
    """`pack` and `torch.clamp` in one pass; to the last bit, but on Arm, where the sign of a zero that PyTorch makes of
    zeros depends on how many numbers there are.

    Args:
        x: (n,), on a CPU float32, or nothing is done.
        gate: "above", or "between"; of the first `high` is infinite.
        low, high: of the gate, and of the clamp.
        bits: (ceil(n / 8),), uint8, to write to.
        out: (n,), to write to; may be `x` itself.

    Returns:
        Whether it was done.
    """
    kernel = kernel_for("clamp", x, out, stored=(bits, torch.uint8))
    if kernel is None:
        return False
    pointers = x.data_ptr(), bits.data_ptr(), out.data_ptr()
    kernel(*pointers, x.numel(), GATES[gate], low, high, torch.get_num_threads())  # type: ignore[operator]
    return True


def apply(grad: Tensor, bits: Tensor, inner: float, outer: float | None, out: Tensor) -> bool:
    """Multiply each element by one of two slopes, by its bit.

    Args:
        grad: (n,), on a CPU float32 or float64, on a GPU a float of at most 32 bits, or nothing is done.
        bits: what `pack` wrote.
        inner: slope where the bit is set.
        outer: slope elsewhere; None: zero there, also where the gradient is infinite or NaN.
        out: (n,), to write to; may be `grad` itself.

    Returns:
        Whether it was done.
    """
    if grad.is_cuda:
        found = on_gpu(grad, bits, out)
        return found is not None and found.apply(grad, bits, inner, outer, out)
    kernel = kernel_for("apply", grad, out, stored=(bits, torch.uint8))
    if kernel is None:
        return False
    pointers = grad.data_ptr(), bits.data_ptr(), out.data_ptr()
    slopes = int(outer is not None), inner, outer or 0.0
    kernel(*pointers, grad.numel(), *slopes, torch.get_num_threads())  # type: ignore[operator]
    return True


def row_products(a: Tensor, b: Tensor, scales: Tensor | None = None) -> Tensor | None:
    """Inner product of each row of one matrix with the same row of another.

    Args:
        a, b: (n, k), float32, or nothing is done.
        scales: (n,), by which each row of `b` is multiplied in place, behind the product.

    Returns:
        (n,); None: not for these.
    """
    tensors = (a, b) if scales is None else (a, b, scales)
    kernel = kernel_for("rows", *tensors) if a.shape == b.shape else None
    if kernel is None:
        return None
    out = a.new_empty(a.shape[0])
    pointers = a.data_ptr(), b.data_ptr(), None if scales is None else scales.data_ptr(), out.data_ptr()
    kernel(*pointers, *a.shape, torch.get_num_threads())  # type: ignore[operator]
    return out


def depthwise(
    x: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor | None:
    """Weight gradient of a convolution of two dimensions with a group for each channel.

    Args:
        x: its input, (B, C, H, W), float32, or nothing is done.
        grad: of its output, (B, C, H', W'); both are read in its order in memory, contiguous or with channels last.
        kernel, stride, padding, dilation: two numbers each; `padding` is that ahead of the image, of zeros.

    Returns:
        (C, 1, K_h, K_w); None: not for these.
    """
    if library() is None or not grad.numel():
        return None
    last = not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    x, grad = x.contiguous(memory_format=form), grad.contiguous(memory_format=form)
    work = kernel_for("depthwise", *(one.permute(0, 2, 3, 1) if last else one for one in (x, grad)))
    if work is None:
        return None
    plan, room = _depthwise_plan((*x.shape, *grad.shape[2:], *kernel, *stride, *padding, *dilation, int(last)))
    threads = torch.get_num_threads()
    out, scratch = x.new_empty(x.shape[1], 1, *kernel), x.new_empty(threads * room)
    work(x.data_ptr(), grad.data_ptr(), out.data_ptr(), scratch.data_ptr(), plan, threads)  # type: ignore[operator]
    return out


@lru_cache(maxsize=4096)
def _depthwise_plan(numbers: tuple[int, ...]) -> tuple[Any, int]:
    """What the kernel is told of the sizes, and the numbers of scratch memory that each thread takes."""
    plan = (ctypes.c_int64 * len(numbers))(*numbers)
    found: Any = library()
    return plan, found.depthwise_room_float(plan)


def can_project(x: Tensor, columns: int, mode: int = 0) -> bool:
    """Whether there is a kernel for the product of such a tensor, in this mode, and so many columns, see `project`."""
    few = columns <= _MOST_ROWS and prod(x.shape[mode + 1 :]) >= _ROW if mode else columns <= _MOST_PROJECTED
    return few and x.numel() > 0 and kernel_for("project", x) is not None


def project_mode(x: Tensor, columns: Tensor, mode: int) -> Tensor | None:
    """Product of a tensor in one of its modes and a few columns, in one read of it.

    Args:
        x: (..., n, ...), float32, or nothing is done.
        columns: (n, r); r at most 12 in the first mode, 8 in others, which have a vector of numbers behind them.
        mode: the place of n.

    Returns:
        (..., r, ...); None: not for these.
    """
    if not can_project(x, columns.shape[1], mode):
        return None
    if mode == 0:
        projected = project(x.flatten(1), columns)
        return None if projected is None else projected.view(-1, *x.shape[1:])
    found = iterations.subspace(x, [iterations.Iteration(mode, columns, iterations.HELD)])
    return None if found is None else found[0]


def project(x: Tensor, columns: Tensor) -> Tensor | None:
    """Product of a matrix's few columns and a long matrix, `columns.mT @ x`, in one read of the long one.

    Args:
        x: (n, m), float32, or nothing is done.
        columns: (n, r), r at most 12.

    Returns:
        (r, m); None: not for these.
    """
    kernel = kernel_for("project", x, columns) if columns.shape[1] <= _MOST_PROJECTED else None
    if kernel is None:
        return None
    out = x.new_empty(columns.shape[1], x.shape[1])
    pointers = x.data_ptr(), columns.data_ptr(), out.data_ptr()
    kernel(*pointers, *x.shape, columns.shape[1], torch.get_num_threads())  # type: ignore[operator]
    return out


def can_mask(x: Tensor) -> bool:
    """Whether there is a kernel for gradients (B, ...) of a contiguous tensor, see `masked_project`."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or x.dtype != torch.float32 or x.is_cuda:
        return False
    return library() is not None and len(x) > 0 and x.numel() // len(x) % 8 == 0


def masked_project(x: Tensor, bits: Tensor, columns: Tensor) -> Tensor | None:
    """`apply` of slopes one and zero, in place, and `project` of what is left, in one pass: bit for bit the same.

    Args:
        x: (n, m), float32, m a multiple of 8, or nothing is done; is written to.
        bits: what `pack` wrote.
        columns: (n, r), r at most 12.

    Returns:
        (r, m); None: not for these, and nothing is done.
    """
    fits = columns.shape[1] <= _MOST_PROJECTED and x.shape[1] % 8 == 0 and x.numel() > 0
    kernel = kernel_for("masked_project", x, columns, stored=(bits, torch.uint8)) if fits else None
    if kernel is None:
        return None
    out = x.new_empty(columns.shape[1], x.shape[1])
    pointers = x.data_ptr(), bits.data_ptr(), columns.data_ptr(), out.data_ptr()
    kernel(*pointers, *x.shape, columns.shape[1], torch.get_num_threads())  # type: ignore[operator]
    return out


def swapped(x: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy (n, left, right) of a tensor (left, n, right), contiguous; `out`, where that is given to be written to."""
    left, n, right = x.shape
    row = right * x.itemsize
    fits = row in _SWAPPED and n * row >= _SWAPPED[-1] and left > 0
    kernel = kernel_for("swap", *((x,) if out is None else (x, out))) if fits else None
    if kernel is None:
        turned = x.transpose(0, 1)
        return turned.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(turned)
    out = x.new_empty(n, left, right) if out is None else out
    kernel(x.data_ptr(), out.data_ptr(), left, n, right, torch.get_num_threads())  # type: ignore[operator]
    return out


def affine(
    x: Tensor, scale: Tensor, shift: Tensor, other: Tensor | None = None, low: float = -inf, high: float = inf
) -> Tensor | None:
    """`clamp(x * scale + shift + other, low, high)` in one pass, bit for bit what PyTorch's operators make of it.

    Args:
        x: (B, C, ...), float32, or nothing is done.
        scale, shift: (C,).
        other: of the shape of `x`.
        low, high: limits; NaN stays.

    Returns:
        Of the shape of `x`; None: not for these.
    """
    given = (x, scale, shift) if other is None else (x, scale, shift, other)
    kernel = kernel_for("affine", *given) if x.ndim > 2 and (other is None or other.shape == x.shape) else None
    if kernel is None or not rounds_as_batch_norm():
        return None
    return _affine(kernel, x, scale, shift, other, low, high)


def _affine(
    kernel: Any, x: Tensor, scale: Tensor, shift: Tensor, other: Tensor | None, low: float, high: float
) -> Tensor:
    out, (samples, channels, *sizes) = torch.empty_like(x), x.shape
    pointers = x.data_ptr(), scale.data_ptr(), shift.data_ptr(), None if other is None else other.data_ptr()
    limits = low, high, torch.get_num_threads()
    kernel(*pointers, out.data_ptr(), samples * channels, channels, prod(sizes), *limits)
    return out


@lru_cache(maxsize=1)
def rounds_as_batch_norm() -> bool:
    """Whether the kernel multiplies and adds as PyTorch's normalisation does: both at once, on processors that can, or
    one after the other."""
    own: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are here
    with torch.no_grad(), torch.inference_mode(False):
        x = torch.linspace(-3, 3, 2 * 3 * 5 * 41, **own).sin_().mul_(7).view(2, 3, 5, 41)
        weight, bias, mean, variance = torch.linspace(0.3, 1.7, 12, **own).view(4, 3)
        scale = variance.rsqrt() * weight
        shift = torch.addcmul(bias, mean, scale, value=-1)
        y = F.batch_norm(x, mean, torch.ones(3, **own), scale, bias, False, 0.0, 1e-30)
        return torch.equal(y, _affine(kernel_for("affine", x, scale, shift), x, scale, shift, None, -inf, inf))


def can_gate(g: Tensor, u: Tensor) -> bool:
    """Whether there are kernels for gates of such tensors."""
    return kernel_for("gate", g, u) is not None


def gate(g: Tensor, u: Tensor, by: GateOf = "SiLU") -> Tensor | None:
    """`f(g) * u` in one pass, up to rounding.

    Args:
        g, u: of one shape, float32, or nothing is done.
        by: f, SiLU or GELU as approximated with a tanh.

    Returns:
        Of the same shape; None: not for these.
    """
    kernel = kernel_for("gate", g, u) if g.shape == u.shape else None
    if kernel is None:
        return None
    out = torch.empty_like(g)
    numbers = g.numel(), _GATES_OF[by], torch.get_num_threads()
    kernel(g.data_ptr(), u.data_ptr(), out.data_ptr(), *numbers)  # type: ignore[operator]
    return out


def gate_gradients(grad: Tensor, g: Tensor, u: Tensor, by: GateOf = "SiLU") -> tuple[Tensor, Tensor] | None:
    """Gradients of `g` and of `u` from that of `f(g) * u`, in one pass, up to rounding.

    Args:
        grad, g, u: of one shape, float32, or nothing is done.
        by: f, see `gate`.

    Returns:
        Both of the same shape; None: not for these.
    """
    kernel = kernel_for("slopes", grad, g, u) if grad.shape == g.shape == u.shape else None
    if kernel is None:
        return None
    for_g, for_u = torch.empty_like(g), torch.empty_like(u)
    pointers = grad.data_ptr(), g.data_ptr(), u.data_ptr(), for_g.data_ptr(), for_u.data_ptr()
    kernel(*pointers, g.numel(), _GATES_OF[by], torch.get_num_threads())  # type: ignore[operator]
    return for_g, for_u
