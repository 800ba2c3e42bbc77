"""What the methods share that keep a Tucker form at ranks that are fixed before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from lowrank.errors import SettingError
from lowrank.methods.base import Tensors, TuckerMethod, form_tag
from lowrank.methods.deriving import Derive
from lowrank.tensors.decompose import allowed_ranks
from lowrank.tensors.geometry import Shape
from lowrank.tensors.storage import stored_bytes

_MODES: dict[tuple[type[nn.Module], ...], int] = {
    (nn.Conv1d, nn.ConvTranspose1d): 3,
    (nn.Conv2d, nn.ConvTranspose2d): 4,
    (nn.Conv3d, nn.ConvTranspose3d): 5,
}


@dataclass(frozen=True, repr=False)
class RankedMethod(TuckerMethod):
    """A Tucker form at fixed ranks.

    Args:
        ranks: see `lowrank.ASI`.
        storage: see `lowrank.ASI`.
        derive: see `lowrank.ASI`.
    """

    ranks: Any = None
    follows: str | None = field(default=None, init=False, repr=False, compare=False)  # whose ranks are the whole shape
    leads: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            return
        for ranks in per_layer.values() if isinstance(per_layer, Mapping) else (per_layer,):
            _check_ranks(ranks)

    def for_layer(self, name: str) -> Self:
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            raise SettingError(f"{type(self).__name__} has no ranks yet; give numbers or the result of select_ranks")
        if not isinstance(per_layer, Mapping):
            return self
        if name not in per_layer:
            raise SettingError(f"the ranks name no layer {name!r}; they name {', '.join(per_layer) or 'none'}")
        chosen = getattr(self.ranks, "storages", {}).get(name, self.storage)
        if self.storage not in ("input", chosen):
            raise SettingError(f"the ranks of {name!r} were chosen for storage {chosen!r}, not {self.storage!r}")
        self._check_slopes()
        ahead = getattr(self.ranks, "derived", None)  # a plan's, of which other layers keep each for themselves
        derive = self._derives() if ahead is None or name in ahead or name in ahead.values() else False
        found = replace(self, ranks=per_layer[name], storage=chosen, derive=derive)
        object.__setattr__(found, "follows", (ahead or {}).get(name))
        object.__setattr__(found, "leads", name in (ahead or {}).values())
        return found

    def _form_tag(self) -> str:
        chosen = set(getattr(self.ranks, "storages", {}).values()) or {self.storage}
        return form_tag("mixed" if len(chosen) > 1 else chosen.pop(), self._derives())

    def _check_slopes(self) -> None:
        """Refuse slopes with a plan by a number of products: what follows by so many would be kept, and whole."""
        if self.derive == "slopes" and getattr(self.ranks, "derived", {}) and self.ranks.reach:
            raise SettingError(
                f"derive is 'slopes', and the ranks were chosen so that inputs follow by up to {self.ranks.reach} "
                f"products; choose them by a table that was measured with derive=True"
            )

    def _derives(self) -> Derive:
        """Of a plan by as many products as it was chosen with."""
        if not getattr(self.ranks, "derived", {}) or self.derive == "slopes":
            return self.derive
        return self.ranks.reach or True

    def reason_against(self, layer: nn.Module) -> str | None:
        modes = next((n for kinds, n in _MODES.items() if isinstance(layer, kinds)), None)
        if modes is not None and isinstance(self.ranks, Sequence) and len(self.ranks) != modes:
            return f"{len(self.ranks)} ranks for a convolution, whose input has {modes} modes; give one per mode"
        return None

    def reason_against_state(self, state: Tensors) -> str | None:
        """Of higher ranks than these; lower ones may be what a small batch has left."""
        for mode, basis in enumerate(state):
            rank = self.ranks if isinstance(self.ranks, int) else (*self.ranks, *[math.inf] * len(state))[mode]
            if basis is not None and basis.ndim == 2 and basis.shape[0] > basis.shape[1] > rank:
                return f"its basis of mode {mode} has rank {basis.shape[1]}, and the rank is {rank}"
        return None

    def given_ranks(self, shape: Sequence[int]) -> list[int]:
        """A rank for each mode of an input of this shape, as they were given."""
        if isinstance(self.ranks, int):
            return [self.ranks] * len(shape)
        if len(self.ranks) != len(shape):
            raise SettingError(
                f"{len(self.ranks)} ranks for an input with {len(shape)} modes {tuple(shape)}; give one per mode"
            )
        return list(self.ranks)

    def ranks_for(self, shape: Sequence[int]) -> Shape:
        """The ranks for an input of this shape, each at most its dimension and what the other ranks allow."""
        return allowed_ranks(shape, self.given_ranks(shape))

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """At its own ranks, also where another layer's larger ones are shared."""
        core = kept[0]
        assert core is not None
        dtype = core.dtype if core.is_floating_point() else torch.float32
        return stored_bytes(shape, self.kept_ranks(shape, self.ranks_for(shape)), dtype, self.storage)


def _check_ranks(ranks: Any) -> None:
    sequence = [ranks] if isinstance(ranks, int) else ranks
    valid = isinstance(sequence, Sequence) and not isinstance(sequence, str) and len(sequence) > 0
    if not valid or not all(type(rank) is not bool and isinstance(rank, int) and rank >= 1 for rank in sequence):
        raise SettingError(f"ranks are {ranks!r}; allowed are whole numbers from 1, one per mode or one for all")
