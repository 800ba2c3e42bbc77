"""Weight gradients from Tucker factors by compiled kernels; where they cannot, they say so, and callers do without."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank.kernels.choice import kernel_and_room, kernel_for

Contraction = Literal["spread", "samples", "images", "rows", "windows"]
_KINDS: dict[Contraction, int] = {"spread": 0, "samples": 1, "images": 2, "rows": 3, "windows": 4}
Sizes = tuple[int, ...]
_MOST_SAMPLES, _MOST = 11, 64  # ranks of the batch; columns of any side: of more, BLAS makes larger products faster
# Of `expand`: columns and rows of the matrix, numbers behind the mode, and of the product; of others BLAS is faster;
# and small matrices for each column: as the kernel takes the large one, it is no more than such a part of the product.
_MOST_EXPANDED, _LEAST_ROWS, _BEHIND, _LEAST_PRODUCT, _PART = 16, 32, range(2, 10), 2**17, 6


def contract(
    kind: Contraction,
    grad: Tensor,
    core: Tensor,
    factors: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    window: tuple[Sizes, Sizes, Sizes, Sizes] = ((1, 1), (1, 1), (0, 0), (1, 1)),
    begun: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What a convolution's weight gradient is made of, and its bias gradient, in one read of the output's gradient.

    Args:
        kind: what is done. "spread": the gradient is projected on the batch's factor and meets the core at each
            position. "samples" and "images": it is projected in all modes, that of the batch or those of the image
            ahead, and meets the core. "rows", of a group for each channel: it is projected on the batch's factor, and
            on that of the height as each place of the kernel meets it; the core is spread along the width. "windows":
            it is projected in all modes, as each place of the kernel meets them, and meets nothing yet.
        grad: (B, O, H', W'), float32, or nothing is done.
        core: (r_0, r_1, r_2, r_3).
        factors: of the batch (B, r_0), or None, with any kind but "images": r_0 is B; with "rows" of the channels
            (C, r_1), or None: r_1 is C; of height and width (H, r_2) and (W, r_3).
        window: kernel, stride, padding ahead, of zeros, and dilation; a kernel of one place where not "rows" or
            "windows".
        begun: what is made ahead of all else where there is a factor of the batch and the kind is not "images": the
            product of that, with a column of ones beside it, and the gradient, (r_0 + 1, O, H', W').

    Returns:
        The weight gradient against the core's channels (O, r_1); with "rows" all of it, (C, 1, K_h, K_w); with
        "windows" what is left of the gradient, (r_0, O, K_h r_2, K_w r_3). And the bias gradient, (O,). None: not for
        these.
    """
    samples, channels, height, width = factors
    given = [None if factor is None else factor.contiguous() for factor in (samples, channels, height, width)]
    there = [factor for factor in (*given, begun) if factor is not None]
    found = kernel_and_room("contract", grad, core, *there)
    if found is None or not grad.numel():
        return None
    kernel, room_of = found
    full = height.shape[0], width.shape[0]
    numbers = (_KINDS[kind], *grad.shape, *core.shape, *full, *(one for pair in window for one in pair))
    threads = torch.get_num_threads()
    plan = _plan((*numbers, int(channels is not None), int(samples is None), int(begun is not None)))
    room = room_of(plan, threads)
    if room < 0:
        return None
    (ranks, outputs), ((down, along), *_) = (core.shape, grad.shape[1]), window
    if kind == "windows":
        shape: Sizes = (ranks[0], outputs, down * ranks[2], along * ranks[3])
    else:
        shape = (outputs, 1, down, along) if kind == "rows" else (outputs, ranks[1])
    out, bias, scratch = grad.new_empty(shape), grad.new_empty(outputs), grad.new_empty(room)
    of_factors = (0 if factor is None else factor.data_ptr() for factor in given)
    made = scratch.data_ptr(), out.data_ptr(), bias.data_ptr(), 0 if begun is None else begun.data_ptr()
    pointers = grad.data_ptr(), *of_factors, core.data_ptr(), *made
    kernel(plan, (ctypes.c_int64 * len(pointers))(*pointers), threads)
    return out, bias


def expand(x: Tensor, matrix: Tensor) -> Tensor | None:
    """The product of a matrix of few columns and each of many small matrices.

    Args:
        x: (left, n, right), float32, or nothing is done.
        matrix: (m, n).

    Returns:
        (left, m, right); None: not for these.
    """
    (left, n, right), m = x.shape, matrix.shape[0]
    few = n <= _MOST_EXPANDED and right in _BEHIND
    if not few or m < _LEAST_ROWS or left < _PART * n or left * m * right < _LEAST_PRODUCT:
        return None
    matrix = matrix.contiguous()
    found = kernel_and_room("expand", x, matrix)
    if found is None:
        return None
    kernel, room_of = found
    sizes = (left, n, right, m, torch.get_num_threads())
    out, scratch = x.new_empty(left, m, right), x.new_empty(room_of(*sizes))
    kernel(x.data_ptr(), matrix.data_ptr(), out.data_ptr(), scratch.data_ptr(), *sizes)
    return out


def can_contract(grad: Tensor) -> bool:
    """Whether there is a kernel for such a gradient, (B, O, H', W'), and a batch of few samples without a factor."""
    return 0 < len(grad) <= _MOST_SAMPLES and kernel_for("contract", grad) is not None


def are_few(ranks: Sizes, kernel: Sizes = (1, 1)) -> bool:
    """Whether ranks (r_0, r_1, r_2, r_3) are few enough for the kernel."""
    sides = (k * rank for k, rank in zip(kernel, ranks[2:], strict=True))
    return ranks[0] <= _MOST_SAMPLES and max(*sides, ranks[1]) <= _MOST


@lru_cache(maxsize=4096)
def _plan(numbers: Sizes) -> Any:
    """What the kernel is told of the sizes."""
    return (ctypes.c_int64 * len(numbers))(*numbers)
