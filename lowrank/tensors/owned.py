"""Gradients that nobody else has, which a backward pass may write its own result to.

PyTorch's engine does the same where it adds up gradients: it counts who refers to a tensor, and to its memory. Here
the counts also have those of Python, and what they are of a gradient that nobody else has is found by trying it.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowrank.tensors.eager import Node, in_batch

Counts = tuple[int, int, int, int, int]
_ASKED = (
    *((torch._C, "_has_storage"), (torch._C, "_storage_Use_Count"), (torch._C, "_dispatch_keys")),
    *((torch, "_debug_has_internal_overlap"), (Tensor, "_use_count")),
)


def is_owned(grad: Tensor) -> bool:
    """Whether the backward pass of a `Node`, which is to call this itself with what it was given, and nothing in the
    same expression, may write to it.

    Not so where the user has it or a part of it, a hook has kept it, another branch of the graph waits for it, its
    memory is not PyTorch's own, it stands for others, as in `torch.func.vmap`, it is of inference mode, which lets
    nobody write to it outside, or the pass is itself differentiated; and on a CPU alone: elsewhere who is to read it
    may not have come to that yet.
    """
    if type(grad) is not Tensor or grad.device.type != "cpu" or torch.is_grad_enabled() or in_batch():
        return False
    alone = counts_alone()
    return alone != () and _counts(grad) == alone


def _counts(grad: Tensor) -> Counts | None:
    """What PyTorch dispatches it by, and who refers to the object, to the tensor, to its memory, and to the object that
    Python has of that: the one that somebody has is the one that this asks for, and is counted once.

    None: the memory is another's, such as NumPy's, or another process may have it, or it is not there, or some of the
    numbers may be on the same place of it.
    """
    if not torch._C._has_storage(grad) or torch._debug_has_internal_overlap(grad):
        return None
    storage: Any = grad.untyped_storage()
    if not storage.resizable() or storage.is_shared():
        return None
    keys, uses = torch._C._dispatch_keys(grad).raw_repr(), torch._C._storage_Use_Count(storage._cdata)
    return keys, sys.getrefcount(grad), grad._use_count(), uses, sys.getrefcount(storage)  # type: ignore


class _Trial(Node):
    """A node that counts who refers to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Counts | None]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_from_as_far(grad))
        return grad, None


def _from_as_far(grad: Tensor) -> Counts | None:
    return _counts(grad)  # as `is_owned` calls it


@lru_cache(maxsize=1)
def counts_alone() -> Counts | tuple[()]:
    """The counts of a gradient that nobody else has, for who is not in a backward pass yet; an empty tuple, which is
    nothing's: this version of PyTorch does not tell."""
    if not all(hasattr(owner, name) for owner, name in _ASKED):
        return ()
    found: list[Counts | None] = []
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(2, device="cpu", dtype=torch.float32, requires_grad=True)
        _Trial.apply(x, found).neg().sum().backward()  # which saves nothing, so that no hook for that is called
    return found[0] or ()
