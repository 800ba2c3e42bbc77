"""ASI (ICML 2025): Tucker factors at fixed ranks, from one warm-started subspace iteration per mode and step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.methods.base import Method, Tensors, TuckerMethod, exact_flops
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import ALGORITHMS, Algorithm, allowed_ranks, kept_whole, subspace_iteration
from lowrank.tensors.geometry import Geometry, Shape
from lowrank.tensors.tucker import Tucker

Bases = list[Tensor | None]
Found = tuple[Tucker, Bases]
_MODES = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_KEPT_SHARE = 0.99  # of the captured energy; less makes the bases due


@dataclass(frozen=True)
class ASI(TuckerMethod):
    """Activation Subspace Iteration: fixed ranks, one warm-started subspace iteration per mode and step (ICML 2025).

    Args:
        ranks: one rank per mode in the order of the input's shape, such as [8, 16, 3, 3] for (B, C, H, W); one number
            for every mode; or, per layer name, one of these: a mapping, or the result of `select_ranks`. A rank above
            its dimension is cut to it. Higher: a closer weight gradient, more memory and time. None: not chosen yet;
            converting with it is refused.
        algorithm: "sequential" iterates each mode on the tensor already truncated in the modes before it (faster);
            "published" iterates each mode on the full tensor.
        warm_start: start each step from the basis of the step before; otherwise from the same random one every time.
        seed: seed of the first, random basis. The global random state is neither read nor changed.
        refresh: when to iterate the bases anew: 1, at every forward pass in training mode that autograd records, as in
            the paper; n, at every n-th of them (with checkpointing inside a model there are two a step); "energy",
            when the share of the input's energy that they capture falls to less than 0.99 of what it was after the
            latest iteration, which takes one more read of the input to know. In between, the input is only projected on
            them, but for the batch mode, whose samples change with every step: it is iterated on what the other
            modes left. Less often: faster, and a coarser gradient where the activations drift.
    """

    ranks: Any = None
    algorithm: Algorithm = "sequential"
    warm_start: bool = True
    seed: int = 233
    refresh: int | Literal["energy"] = 1

    def __post_init__(self) -> None:
        self._check_refresh()
        if self.algorithm not in ALGORITHMS:
            raise SettingError(f"ASI algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            return
        for ranks in per_layer.values() if isinstance(per_layer, Mapping) else (per_layer,):
            _check_ranks(ranks)

    def _check_refresh(self) -> None:
        counts = isinstance(self.refresh, int) and not isinstance(self.refresh, bool) and self.refresh >= 1
        if not counts and self.refresh != "energy":
            raise SettingError(f"ASI refresh is {self.refresh!r}; allowed: a whole number of steps from 1, or 'energy'")
        if self.refresh != 1 and not self.warm_start:
            raise SettingError(f"ASI refresh is {self.refresh!r} with warm_start off; bases are only held if stored")

    @property
    def tag(self) -> str:
        variant = "" if self.algorithm == "sequential" else f"_{self.algorithm}"
        rank = f"_rank{self.ranks}" if isinstance(self.ranks, int) else ""
        held = "" if self.refresh == 1 else "_by_energy" if self.refresh == "energy" else f"_every{self.refresh}"
        return f"asi{rank}{variant}{'' if self.warm_start else '_cold'}{held}"

    def for_layer(self, name: str) -> ASI:
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            raise SettingError("ASI has no ranks yet; give numbers or the result of select_ranks")
        if not isinstance(per_layer, Mapping):
            return self
        if name not in per_layer:
            raise SettingError(f"the ranks name no layer {name!r}; they name {', '.join(per_layer) or 'none'}")
        return replace(self, ranks=per_layer[name])

    def reason_against(self, layer: nn.Module) -> str | None:
        modes = next((n for kind, n in _MODES.items() if isinstance(layer, kind)), None)
        if modes is not None and isinstance(self.ranks, Sequence) and len(self.ranks) != modes:
            return f"{len(self.ranks)} ranks for a convolution, whose input has {modes} modes; give one per mode"
        return None

    def ranks_for(self, shape: Sequence[int]) -> Shape:
        """The ranks for an input of this shape, each at most its dimension and what the other ranks allow."""
        if isinstance(self.ranks, int):
            return allowed_ranks(shape, [self.ranks] * len(shape))
        if len(self.ranks) != len(shape):
            raise SettingError(
                f"{len(self.ranks)} ranks for an input with {len(shape)} modes {tuple(shape)}; give one per mode"
            )
        return allowed_ranks(shape, self.ranks)

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        ranks = self.ranks_for(x.shape)
        if kept_whole(x.shape, ranks):
            return (x, *[None] * x.ndim), state
        # The last entry says when the bases are due.
        state = (*state, *[None] * (x.ndim + 1 - len(state)))
        stored, due = state[: x.ndim], state[x.ndim]
        starts = [self._start(x, mode, rank, stored[mode], name) for mode, rank in enumerate(ranks)]
        if self.refresh == 1:
            tucker, bases = subspace_iteration(x, starts, self.algorithm)
            when: Tensors = ()
        else:
            known = all(start is old for start, old in zip(starts[1:], stored[1:], strict=True))
            tucker, bases, left = self._refreshed(x, starts, due if known else None)
            when = (left,)
        kept = (tucker.core, *tucker.factors)
        if not self.warm_start:
            return kept, ()
        # A smaller batch, such as an epoch's last, leaves the batch basis of the full one in place.
        if stored[0] is not None and stored[0].shape[0] > x.shape[0]:
            bases[0] = stored[0]
        return kept, (*bases, *when)

    def _refreshed(self, x: Tensor, starts: Bases, before: Tensor | None) -> tuple[Tucker, Bases, Tensor]:
        """Compress by bases that are iterated only when that is due.

        Args:
            before: what the step before left, a scalar: the steps since the bases were iterated, from 1; or, with
                "energy", the share that they captured then. None: there are no bases yet.

        Returns:
            The Tucker form, the bases, and the same scalar for the next step; after values that are not finite it is
            one that makes the bases due.
        """
        factored = [start is not None for start in starts]

        def fresh() -> Found:
            return subspace_iteration(x, starts, self.algorithm)

        def held() -> Found:
            return subspace_iteration(x, starts, self.algorithm, held=range(1, x.ndim))

        def share(found: Found) -> Tensor:
            """Of the energy, the squared norm, what a projection on orthonormal bases holds."""
            wide = torch.promote_types(x.dtype, torch.float32)
            kept, total = (torch.linalg.vector_norm(tensor, dtype=wide) for tensor in (found[0].core, x))
            return (kept / total).square()

        if before is None:
            found = fresh()
            # One iteration from a random start captures little: more than all there is makes the next step's due.
            left = torch.tensor(2.0 if self.refresh == "energy" else 1, device=x.device)
        elif self.refresh == "energy":
            projected = held()
            due = ~(share(projected) >= _KEPT_SHARE * before)  # also where one of them is not a number
            found = _either(due, fresh, lambda: projected, factored)
            left = torch.where(due, share(found), before)
        else:
            due = before >= self.refresh
            found = _either(due, fresh, held, factored)
            left = torch.where(due, 1, before + 1)
        if self.refresh != "energy":
            left = torch.where(found[0].core.isfinite().all(), left, self.refresh)
        return *found, left

    def can_use(self, other: Method, shape: Shape) -> bool:
        if type(other) is not type(self) or not isinstance(other, ASI):
            return False  # a subclass may keep something else
        if (other.algorithm, other.refresh) != (self.algorithm, self.refresh):
            return False
        return all(own <= found for own, found in zip(self.ranks_for(shape), other.ranks_for(shape), strict=True))

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """At its own ranks, also where another layer's larger ones are shared."""
        core = kept[0]
        assert core is not None
        return costs.kept_numel(shape, self.ranks_for(shape)) * core.element_size()

    def _start(self, x: Tensor, mode: int, rank: int, stored: Tensor | None, name: str) -> Tensor | None:
        size = x.shape[mode]
        if rank >= size:
            return None
        # Samples change from step to step, so any rows of the batch basis serve a smaller batch as well.
        fits = stored is not None and (stored.shape[0] == size or (mode == 0 and stored.shape[0] > size))
        if stored is not None and fits and stored.shape[1] == rank:
            return (stored if stored.shape[0] == size else stored[:size]).to(x.device)
        wide = x.dtype == torch.float64
        return _random_basis(size, rank, f"{self.seed}/{name}/{mode}", wide).to(x.device)

    def subspace_flops(self, shape: Shape, ranks: Shape) -> int:
        """Of the mean step; with "energy" of one that iterates, the most that it takes."""
        if kept_whole(shape, ranks):
            return 0
        sequential = self.algorithm == "sequential"
        each = costs.subspace_flops(shape, ranks, sequential)
        if not isinstance(self.refresh, int) or self.refresh == 1:
            return each
        held = costs.subspace_flops(shape, ranks, sequential, range(1, len(shape)))
        return (each + (self.refresh - 1) * held) // self.refresh

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = self.ranks_for(shape)
        return LayerCost(
            activation_bytes=costs.kept_numel(shape, ranks) * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_subspace(shape, ranks)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + self.subspace_flops(shape, ranks)
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )


def _either(due: Tensor, fresh: Callable[[], Found], held: Callable[[], Found], factored: list[bool]) -> Found:
    """What one of two ways finds, by a scalar that a compiled graph does not know before it runs.

    `factored` says which modes have a basis.
    """
    if not torch.compiler.is_compiling():
        return fresh() if bool(due) else held()

    def tensors(way: Callable[[], Found]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            tucker, bases = way()
            found = [tucker.core, *[basis for basis in bases if basis is not None]]
            return [tensor.clone() for tensor in found]  # a branch may not return one of its inputs

        return run

    core, *found = torch.cond(due, tensors(fresh), tensors(held), ())
    bases: Bases = [found.pop(0) if one else None for one in factored]
    return Tucker(core, tuple(bases)), bases


@torch.library.custom_op("lowrank::random_basis", mutates_args=())  # a compiled graph can hold no generator itself
def _random_basis(size: int, rank: int, seed: str, wide: bool) -> Tensor:
    """Normal numbers (size, rank), in float64 if `wide`, else float32, that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(size, rank, generator=generator, dtype=_basis_dtype(wide))


@_random_basis.register_fake
def _(size: int, rank: int, seed: str, wide: bool) -> Tensor:
    return torch.empty(size, rank, dtype=_basis_dtype(wide))


def _basis_dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _check_ranks(ranks: Any) -> None:
    sequence = [ranks] if isinstance(ranks, int) else ranks
    valid = isinstance(sequence, Sequence) and not isinstance(sequence, str) and len(sequence) > 0
    if not valid or not all(isinstance(rank, int) and rank >= 1 for rank in sequence):
        raise SettingError(f"ranks are {ranks!r}; allowed are whole numbers from 1, one per mode or one for all")
