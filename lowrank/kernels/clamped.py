"""A tensor clamped and the first step of its compression, in one pass over memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowrank.kernels.choice import kernel_and_room
from lowrank.kernels.iterations import Iteration, plan_of
from lowrank.kernels.passes import GATES, Gate


def clamp_and_begin(
    x: Tensor, gate: Gate, low: float, high: float, bits: Tensor, step: Iteration
) -> tuple[Tensor, Tensor] | None:
    """`passes.clamp` of a tensor in its place, and the first step of `iterations.subspace` on what it becomes.

    Args:
        x: of at most 8 modes, float32, or nothing is done.
        gate, low, high, bits: as of `passes.clamp`, of all numbers of `x` in their order.
        step: on a part of whole planes.

    Returns:
        What the step leaves of the tensor, and its basis: bit for bit those of one call after the other. None: not for
        these, and nothing is done.
    """
    start = step.start.contiguous()
    found = kernel_and_room("clamped", x, start, stored=(bits, torch.uint8)) if step.share > 1 else None
    if found is None:
        return None
    kernel, room_of = found
    shape, plan = plan_of(tuple(x.shape), ((step.mode, start.shape[1], step.share),))
    room = room_of(plan)
    if room < 0:
        return None
    left, basis, scratch = x.new_empty(shape), x.new_empty(start.shape), x.new_empty(room)
    tensors = (one.data_ptr() for one in (x, left, scratch, start, basis))
    memory = (ctypes.c_int64 * 8)(*tensors, step.turn, step.ahead, bits.data_ptr())
    kernel(plan, memory, GATES[gate], low, high, torch.get_num_threads())
    return left, basis
