"""Padding tokens, which have no part in the loss and so need no part of what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lowrank.tensors.geometry import Geometry, LinearGeometry

_MASK: ContextVar[Tensor | None] = ContextVar("token_mask", default=None)


@contextmanager
def token_mask(mask: Tensor | None) -> Iterator[None]:
    """Within it, converted linear layers leave padding tokens out of the activation that they compress.

    Padding gets no gradient from a loss that does not read it, so at full rank the weight gradient stays exact, and at
    low rank the whole rank serves real tokens. Inputs of other leading sizes are left as they are. Holds for this
    thread alone; the innermost of several masks rules. A compiled model leaves padding in.

    Whose tokens they are is told by their number alone: of an encoder and a decoder that are padded to one length,
    convert the layers of the side that the mask is of. What a checkpoint computes again in the backward pass has a mask
    where that pass is within as well.

    Args:
        mask: (B, N), true or 1 for real tokens; None for none.

    Example:
        with lowrank.token_mask(attention_mask):
            loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss
    """
    token = _MASK.set(mask)
    try:
        yield
    finally:
        _MASK.reset(token)


def current_mask() -> Tensor | None:
    """The mask that this thread is within."""
    return None if torch.compiler.is_compiling() else _MASK.get()


def without_padding(x: Tensor, geometry: Geometry) -> Tensor:
    """A linear layer's input (B, N, ...) with zeros for padding tokens; any other's, whose second mode is channels, as
    it is."""
    mask = current_mask()
    if (
        mask is None
        or type(geometry) is not LinearGeometry
        or x.ndim <= mask.ndim
        or x.shape[: mask.ndim] != mask.shape
    ):
        return x
    return x * mask.to(x.dtype).view(*mask.shape, *[1] * (x.ndim - mask.ndim))
