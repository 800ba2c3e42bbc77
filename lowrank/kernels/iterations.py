"""Subspace iterations by compiled kernels; where one cannot, it says so, and the caller does without."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.kernels.choice import kernel_and_room, on_gpu

HELD = 0  # of a step: its start is a basis already


class Iteration(NamedTuple):
    """Of `subspace`: a mode, and the part of its fibres that its basis is iterated on.

    Attributes:
        mode: its place.
        start: (n, r), at most 128 columns and 2048 rows.
        share: of the fibres, see `sample.share_of`; or `HELD`, the start is a basis already.
        turn, ahead: see `sample.turn_of`.
    """

    mode: int
    start: Tensor
    share: int
    turn: int = 0
    ahead: int = 0


def subspace(
    x: Tensor, steps: Sequence[Iteration], begun: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]] | None:
    """Subspace iterations of one mode after the other, see `lowrank.tensors.decompose.subspace_iteration`.

    Args:
        x: of at most 8 modes, float32, or nothing is done.
        steps: one for each mode that is cut.
        begun: what the first step leaves, and its basis, where it was made already.

    Returns:
        The core, and a basis for each step, the start itself where that is one; None: not for these.
    """
    starts = [start.contiguous() for _, start, *_ in steps]
    found = kernel_and_room("subspace", x, *starts) if steps else None
    if found is None:
        return None
    kernel, room_of = found
    sizes = tuple(x.shape)
    ranks = tuple([(mode, start.shape[1], share) for mode, start, share, *_ in steps])
    shape, plan = plan_of(sizes, ranks)
    room = room_of(plan)
    if room < 0:
        return None
    if begun is not None:
        rest = subspace(begun[0], steps[1:]) if len(steps) > 1 else (begun[0], [])
        return None if rest is None else (rest[0], [begun[1], *rest[1]])
    core, scratch = x.new_empty(shape), x.new_empty(room)
    bases = []
    pointers = [x.data_ptr(), core.data_ptr(), scratch.data_ptr()]
    for own, (_, start, share, turn, ahead) in zip(starts, steps, strict=True):
        basis = own if share == HELD else x.new_empty(own.shape)
        bases.append(start if share == HELD else basis)
        pointers += own.data_ptr(), basis.data_ptr(), turn, ahead
    memory = (ctypes.c_int64 * len(pointers))(*pointers)
    kernel(plan, memory, torch.get_num_threads())
    return core, bases


def iterate(x: Tensor, step: Iteration) -> Tensor | None:
    """A basis of a mode by one subspace iteration, on a GPU.

    Args:
        x: float32, or nothing is done.
        step: with a start in float32, of at most 2**14 numbers, both sizes counted as the next power of two.

    Returns:
        (n, r), of finite numbers whatever the others are; None: not for these.
    """
    found = on_gpu(x, step.start)
    return None if found is None else found.iterate(x, *step)


@lru_cache(maxsize=4096)
def plan_of(sizes: tuple[int, ...], steps: tuple[tuple[int, int, int], ...]) -> tuple[list[int], Any]:
    """Shape of the core, and what the kernel is told of the sizes."""
    shape = list(sizes)
    for mode, rank, _ in steps:
        shape[mode] = rank
    plan = [len(sizes), *sizes, len(steps), *[number for step in steps for number in step]]
    return shape, (ctypes.c_int64 * len(plan))(*plan)
