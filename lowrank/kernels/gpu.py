"""Passes over a GPU's memory, one kernel each, in Triton, which comes with PyTorch for CUDA.

NaN passes the gates that it passes in PyTorch on a GPU: "between", too, which it does not on a CPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank.kernels.gpu_int8 import restore_blocks, restore_columns, round_blocks, round_columns
from lowrank.kernels.gpu_subspace import iterate

__all__ = [
    "VERSION",
    "apply",
    "iterate",
    "pack",
    "restore_blocks",
    "restore_columns",
    "round_blocks",
    "round_columns",
    "try_out",
]
VERSION = triton.__version__
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # computed in float32
_BYTES, _ELEMENTS = 256, 2048  # that one program writes


@triton.jit
def _pack(x, bits, count, low, high, GATE: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    there = place < count
    value = tl.load(x + place, mask=there, other=0).to(tl.float32)
    if GATE == "above":
        passes = (value <= low) == 0
    elif GATE == "between":
        passes = ((value <= low) | (value >= high)) == 0
    elif GATE == "within":
        passes = (value > low) & (value < high)
    elif GATE == "strictly above":
        passes = value > low
    else:
        passes = value != 0
    joined = tl.sum((passes & there).to(tl.int32) << bit, 1)
    tl.store(bits + byte, joined.to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def _apply(grad, bits, out, count, inner, outer, TWO: tl.constexpr, ELEMENTS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = place < count
    byte = tl.load(bits + place // 8, mask=there, other=0).to(tl.int32)
    passes = (byte >> (place % 8).to(tl.int32)) & 1
    value = tl.load(grad + place, mask=there, other=0).to(tl.float32)
    elsewhere = value * outer if TWO else 0.0
    tl.store(out + place, tl.where(passes == 1, value * inner, elsewhere), mask=there)


def try_out() -> None:
    """Build and run a kernel; raises whatever stands against that."""
    ones = torch.ones(8, device="cuda")
    pack(ones, "above", 0.0, 0.0, torch.empty(1, dtype=torch.uint8, device="cuda"))


def pack(x: Tensor, gate: str, low: float, high: float, bits: Tensor) -> bool:
    """See `passes.pack`; booleans are taken too, for "not zero"."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dtype not in (*_DTYPES, torch.uint8):
        return False
    if x.numel():
        with torch.cuda.device_of(x):
            _pack[(triton.cdiv(len(bits), _BYTES),)](x, bits, x.numel(), low, high, GATE=gate, BYTES=_BYTES)
    return True


def apply(grad: Tensor, bits: Tensor, inner: float, outer: float | None, out: Tensor) -> bool:
    """See `passes.apply`."""
    if grad.dtype not in _DTYPES:
        return False
    count = grad.numel()
    if count:
        settings = (count, inner, outer or 0.0)
        with torch.cuda.device_of(grad):
            programs = (triton.cdiv(count, _ELEMENTS),)
            _apply[programs](grad, bits, out, *settings, TWO=outer is not None, ELEMENTS=_ELEMENTS)
    return True
