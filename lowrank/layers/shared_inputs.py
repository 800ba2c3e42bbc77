"""Inputs that several layers are given, such as a block's first convolution and its shortcut: kept once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.exact.slots import in_checkpoint
from lowrank.layers.token_mask import current_mask
from lowrank.methods.base import Method, Tensors
from lowrank.tensors.geometry import Shape
from lowrank.tensors.notes import Glimpse, Notes


@dataclass(frozen=True)
class _Kept:
    """What a layer keeps of an input; holds none of it alive."""

    dtype: torch.dtype
    mask: Tensor | None
    method: Method
    glimpses: tuple[Glimpse | None, ...]


_KEPT: Notes[_Kept] = Notes()


def find_kept(input: Tensor, x: Tensor, method: Method) -> Tensors | None:
    """What another layer keeps of this input, if `method` can use it and it is kept to this moment.

    Args:
        input: the tensor that the layers are given.
        x: the same as the layer computes with it.
        method: of the layer that asks.
    """
    known = _KEPT.find(input)
    if known is None or known.dtype != x.dtype or known.mask is not current_mask():
        return None
    if not _serves(known.method, method, tuple(x.shape)):
        return None
    kept = tuple(None if glimpse is None else glimpse.tensor() for glimpse in known.glimpses)
    gone = any(glimpse is not None and tensor is None for glimpse, tensor in zip(known.glimpses, kept, strict=True))
    return None if gone else kept


def _serves(found: Method, method: Method, shape: Shape) -> bool:
    """Whether what one method keeps serves another one. In a checkpoint, which drops it at first and has it there when
    it runs again, both have to keep the same."""
    if not method.can_use(found, shape):
        return False
    return torch.compiler.is_compiling() or not in_checkpoint() or found.can_use(method, shape)


def note_kept(input: Tensor, x: Tensor, method: Method, kept: Tensors) -> None:
    """Remember what a layer keeps of this input."""
    if not torch.compiler.is_compiling():
        glimpses = tuple(None if tensor is None else Glimpse(tensor) for tensor in kept)
        _KEPT.note(input, _Kept(x.dtype, current_mask(), method, glimpses))
