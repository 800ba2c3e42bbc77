"""Inputs that several layers are given, such as a block's first convolution and its shortcut: kept once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lowrank.methods.base import Method, Tensors


class SharedInputs:
    """What was kept of an input, for further layers that are given the same tensor.

    Holds nothing alive: an entry ends with its input, or with the backward pass that needed what was kept.
    """

    def __init__(self) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def find(self, input: Tensor, x: Tensor, method: Method) -> Tensors | None:
        """What another layer keeps of this input, if `method` can use it."""
        if torch.compiler.is_compiling() or input not in self._entries:
            return None
        version, dtype, other, references = self._entries[input]
        if (version, dtype) != (input._version, x.dtype) or not method.can_use(other, tuple(x.shape)):
            return None
        kept = tuple(reference and reference() for reference in references)
        lost = any(reference is not None and tensor is None for reference, tensor in zip(references, kept, strict=True))
        return None if lost else kept

    def add(self, input: Tensor, x: Tensor, method: Method, kept: Tensors) -> None:
        """Remember what a layer keeps of this input."""
        if not kept or torch.compiler.is_compiling() or input.is_inference():
            return
        references = [tensor if tensor is None else TensorWeakRef(tensor) for tensor in kept]
        self._entries[input] = (input._version, x.dtype, method, references)


SHARED_INPUTS = SharedInputs()
