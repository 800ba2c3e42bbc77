"""Methods of a user's own: they import nothing of the suite but `lowrank`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lowrank


@dataclass(frozen=True)
class Halved(lowrank.Vanilla):
    """Keeps the input in half precision."""

    scale: float = 1.0

    @property
    def tag(self):
        return f"halved_{self.scale:g}"

    def compress(self, x, geometry, state, name):
        return (x.half(),), ()

    def weight_gradient(self, kept, grad, geometry, shape):
        return self.scale * geometry.weight_gradient(kept[0].to(grad.dtype), grad)


@dataclass(frozen=True)
class FirstChannels(lowrank.Vanilla):
    """Keeps as many channels as its rank of the second mode says, and zeros in place of the others."""

    ranks: Any = None

    @property
    def tag(self):
        return "first_channels"

    def for_layer(self, name):
        ranks = getattr(self.ranks, "ranks", self.ranks)
        return replace(self, ranks=ranks[name]) if isinstance(ranks, Mapping) else self

    def compress(self, x, geometry, state, name):
        return (x[:, : self.ranks[1]].clone(),), ()

    def weight_gradient(self, kept, grad, geometry, shape):
        (x,) = kept
        whole = x.new_zeros(shape)
        whole[:, : x.shape[1]] = x
        return geometry.weight_gradient(whole, grad)
