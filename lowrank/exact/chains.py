"""Steps that are computed again in one pass over memory, where a compiled kernel can.

A normalisation by known statistics, the sum of a residual block, and the limits of ReLU and its like, in this order,
of which the last two may be missing; and the gates of language models, see `lowrank.layers.gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.kernels import passes


@dataclass(frozen=True)
class Limits:
    """A step that clamps its input."""

    low: float = -inf
    high: float = inf


@dataclass(frozen=True)
class Sum:
    """A step that adds two tensors."""


@dataclass(frozen=True)
class Normalisation:
    """A step that scales and shifts by channel; its inputs are x (B, C, ...), weight and bias, if it has them, mean and
    inverse deviation, (C,) each.

    Attributes:
        weighted: whether there is a weight.
        biased: whether there is a bias.
    """

    weighted: bool
    biased: bool

    def scale_and_shift(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Of what stands behind x, (C,) each, rounded as PyTorch does."""
        *own, mean, inverse = given
        scale = inverse * own[0] if self.weighted else inverse
        if self.biased:
            return scale, torch.addcmul(own[-1], mean, scale, value=-1)
        return scale, torch.mul(mean, scale).neg_()


@dataclass(frozen=True)
class Gate:
    """A step that may be the gate of a product.

    Attributes:
        by: its function, see `passes.gate`.
    """

    by: passes.GateOf

    def function(self, g: Tensor) -> Tensor:
        """The step's function of its input."""
        return F.silu(g) if self.by == "SiLU" else F.gelu(g, approximate="tanh")


NO_LIMITS, SUM, SILU, GELU = Limits(), Sum(), Gate("SiLU"), Gate("GELU")


def joined(step: Any, known: dict[Any, Tensor]) -> Tensor | None:
    """What a step of a chain gives, in one pass with those ahead of it that nobody else needs; None: it is no chain, or
    not of a kind that the kernel takes.

    Args:
        step: an `origins.Step` with a link.
        known: what is known of steps, see `origins.Step.value`.
    """
    limits, other = NO_LIMITS, None
    if isinstance(step.link, Limits):
        limits, (step,) = step.link, step.inputs
        if step.link is None or not step.is_for_one(known):
            return None
    if step.link is SUM:
        first, second = step.inputs
        if not _is_normalisation(first, known):
            first, second = second, first
        if not _is_normalisation(first, known):
            return None
        step, other = first, second
    if not isinstance(step.link, Normalisation):
        return None
    x, *vectors = [ahead.value(known) for ahead in step.inputs]
    added = None if other is None else other.value(known)
    return passes.affine(x, *step.link.scale_and_shift(*vectors), added, limits.low, limits.high)


def _is_normalisation(step: Any, known: dict[Any, Tensor]) -> bool:
    return isinstance(step.link, Normalisation) and step.is_for_one(known)
