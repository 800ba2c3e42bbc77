"""ASI (ICML 2025): Tucker factors at fixed ranks, from one warm-started subspace iteration per mode and step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.errors import SettingError
from lowrank.kernels.iterations import Iteration
from lowrank.methods.base import Method, Tensors, exact_flops
from lowrank.methods.ranked import RankedMethod
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.decompose import ALGORITHMS, Algorithm, first_iteration, subspace_iteration
from lowrank.tensors.geometry import Geometry, Shape
from lowrank.tensors.memory_layout import bytes_of
from lowrank.tensors.sample import is_large
from lowrank.tensors.storage import columns, store
from lowrank.tensors.tucker import Tucker, iteration_order
from lowrank.tensors.worth import CONVOLVED_A_CALL, MACS_A_CALL, MOVED_A_CALL

Bases = list[Tensor | None]
Found = tuple[Tucker, Bases]
# What keeping an input takes in operator calls, see `price`: for each mode that has a factor, and in reads of it.
_CALLS_A_MODE, _READS = 18, 3
_KEPT_SHARE = 0.99  # of the captured energy; less makes the bases due


@dataclass(frozen=True, repr=False)
class ASI(RankedMethod):
    """Activation Subspace Iteration: fixed ranks, one warm-started subspace iteration per mode and step (ICML 2025).

    Args:
        ranks: one rank per mode in the order of the input's shape, such as [8, 16, 3, 3] for (B, C, H, W) or
            [8, 16, 32] for (B, N, I); one number for every mode; one of these per layer name, as a mapping; or the plan
            that `select_ranks` returns. A rank above its dimension is cut to it. None: not chosen yet, and refused by
            `convert`. Higher: a closer weight gradient, more memory and time.
        algorithm: "sequential" iterates each mode on the tensor already truncated in the modes before it (faster), and
            reads the input once where that starts with a mode of positions (height, width, tokens) whose basis of the
            step before is there, see `subspace_iteration`; "published" iterates each mode on the full tensor.
        warm_start: start each step from the basis of the step before, resampled where the size is another one;
            otherwise from the same random one every time.
        seed: seed of the first, random basis. The global random state is neither read nor changed.
        refresh: when to iterate the bases anew: 1, at every forward pass in training mode that autograd records, as in
            the paper; n, at every n-th of them (with checkpointing inside a model there are two a step); "energy",
            when the share of the input's energy that they capture falls to less than 0.99 of what it was after the
            latest iteration, which takes one more read of the input to know. In between, the input is only projected on
            them, but for the batch mode, whose samples change with every step: it is iterated on what the other
            modes left. Less often: faster, and a coarser gradient where the activations drift.
        storage: how core, factors and the bases that are carried from step to step are kept. "input": in the input's
            own dtype; "float32" or "bfloat16", where that is less; "int8", with scales: a quarter of the bytes of
            float32, for half a percent of error. With the last two, processors that have instructions for it make large
            products in bfloat16, see `lowrank.tensors.halves`. A plan of `select_ranks` brings one for each layer.
        derive: True keeps nothing of an input that can be computed again from what another layer keeps of its own, by
            convolutions of few products and what stands between them: in an inverted bottleneck the two wide inputs
            follow from the narrow one. The weight gradient is then as near as what that layer keeps, and a step runs
            these convolutions once more. A number, such as 20000, allows that many products for each number of an
            input, where True allows 256: inputs then follow by a 3 x 3 convolution of 512 channels (4,608), or by
            several blocks of them, which take at most a third of what they take anyway. "slopes": also which slope ReLU
            and its like have is taken from such an input, and not kept as a bit for each number. So the gradients of
            inputs are near ones too, for far less memory, where most of what is left are bits. In models that
            `torch.compile` has compiled, in checkpoints, and under hooks for saved tensors, such an input is kept as
            the method keeps it. A plan of `select_ranks` says which layers derive.
    """

    algorithm: Algorithm = "sequential"
    warm_start: bool = True
    seed: int = 233
    refresh: int | Literal["energy"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_refresh()
        if self.algorithm not in ALGORITHMS:
            raise SettingError(f"ASI algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        if not isinstance(self.warm_start, bool):
            raise SettingError(f"ASI warm_start is {self.warm_start!r}; allowed: True and False")

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
        return f"asi{self._form_tag()}{rank}{variant}{'' if self.warm_start else '_cold'}{held}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        shape = tuple(x.shape)
        ranks = self.kept_ranks(shape, self.ranks_for(shape))
        if ranks == shape:
            return store(x, Tucker(x, (None,) * x.ndim), self.storage), state
        # Per mode a basis, then when they are due, per mode the scale of a basis in int8, and the passes (`_passes`).
        state = in_places(state, (*[2] * x.ndim, 0, *[1] * x.ndim, 0))
        stored, due, scales, counted = state[: x.ndim], state[x.ndim], state[x.ndim + 1 : -1], state[-1]
        held = [restored_basis(*pair) for pair in zip(stored, scales, strict=True)]
        starts = [self._start(x, mode, rank, held[mode], name) for mode, rank in enumerate(ranks)]
        left, passes = None, _passes(counted)
        if self.algorithm == "sequential" and is_large(shape):
            counted = torch.tensor(0) if x.is_meta else _count(passes + 1)
        if self.refresh == 1:
            tucker, bases = self._iterated(x, starts, passes)
        else:
            there = all(start is old for start, old in zip(starts[1:], held[1:], strict=True))
            tucker, bases, left = self._refreshed(x, starts, due if there else None, passes)
        kept = store(x, tucker, self.storage)
        if not self.warm_start:
            return kept, () if counted is None else (*[None] * (2 * x.ndim + 1), counted)
        scale: list[Tensor | None] = [None] * x.ndim
        if self.storage != "input":  # where it is, bases of halves stay as they were computed
            bases, scale = list(kept[1 : x.ndim + 1]), list(kept[x.ndim + 2 :]) or scale
        # A smaller batch, such as an epoch's last, leaves the batch basis of the full one in place.
        if stored[0] is not None and stored[0].shape[0] > x.shape[0]:
            bases[0], scale[0] = stored[0], scales[0]
        further = (left, *scale, counted)
        return kept, (*bases, *(further if any(tensor is not None for tensor in further) else ()))

    def first_step(self, shape: Shape, state: Tensors) -> Iteration | None:
        if self.algorithm != "sequential" or self.refresh != 1 or not self.warm_start or not state:
            return None
        ranks = self.kept_ranks(shape, self.ranks_for(shape))
        mode, modes = iteration_order(shape, ranks)[0], len(shape)
        state = in_places(state, (*[2] * modes, 0, *[1] * modes, 0))
        basis = restored_basis(state[mode], state[modes + 1 + mode])
        if ranks == shape or basis is None or basis.shape != (shape[mode], ranks[mode]):
            return None
        return first_iteration(shape, mode, basis, _passes(state[-1]))

    def _iterated(self, x: Tensor, starts: Bases, passes: int, held: Sequence[int] = ()) -> Found:
        return subspace_iteration(x, starts, self.algorithm, held, self.to_eight_bits, passes)

    def _refreshed(self, x: Tensor, starts: Bases, before: Tensor | None, passes: int) -> tuple[Tucker, Bases, Tensor]:
        """Compress by bases that are iterated only when that is due.

        Args:
            before: what the step before left, a scalar: the steps since the bases were iterated, from 1; or, with
                "energy", the share that they captured then. None: there are no bases yet.
            passes: that were made before.

        Returns:
            The Tucker form, the bases, and the same scalar for the next step; after values that are not finite it is
            one that makes the bases due.
        """

        def fresh() -> Found:
            return self._iterated(x, starts, passes)

        def held() -> Found:
            return self._iterated(x, starts, passes, held=range(1, x.ndim))

        def share(found: Found) -> Tensor:
            """Of the energy, the squared norm, what a projection on orthonormal bases holds."""
            wide = torch.promote_types(x.dtype, torch.float32)
            kept, total = (torch.linalg.vector_norm(tensor, dtype=wide) for tensor in (found[0].core, x))
            return (kept / total).square()

        if before is None:
            found = fresh()
            # One iteration from a random start captures little: more than all there is makes the next step's due.
            left = torch.full((), 2.0 if self.refresh == "energy" else 1, device=x.device)
        elif self.refresh == "energy":
            projected = held()
            due = ~(share(projected) >= _KEPT_SHARE * before)  # also where one of them is not a number
            found = _either(due, fresh, lambda: projected)
            left = torch.where(due, share(found), before)
        else:
            due = before >= self.refresh
            found = _either(due, fresh, held)
            left = torch.where(due, 1, before + 1)
        if self.refresh != "energy":
            left = torch.where(found[0].core.isfinite().all(), left, self.refresh)
        return *found, left

    def can_use(self, other: Method, shape: Shape) -> bool:
        if type(other) is not type(self) or not isinstance(other, ASI):
            return False  # a subclass may keep something else
        if (other.algorithm, other.refresh, other.storage) != (self.algorithm, self.refresh, self.storage):
            return False
        return all(own <= found for own, found in zip(self.ranks_for(shape), other.ranks_for(shape), strict=True))

    def _start(self, x: Tensor, mode: int, rank: int, stored: Tensor | None, name: str) -> Tensor | None:
        size = x.shape[mode]
        if rank >= size:
            return None
        # Samples change from step to step, so any rows of the batch basis serve a smaller batch as well.
        fits = stored is not None and (stored.shape[0] == size or (mode == 0 and stored.shape[0] > size))
        if stored is not None and fits and stored.shape[1] == rank:
            start = stored if stored.shape[0] == size else stored[:size]
            return start if start.device == x.device else start.to(x.device)
        if stored is not None and mode > 0 and stored.shape[1] == rank:
            return _resampled(stored, size).to(x.device)
        wide = x.dtype == torch.float64
        return _random_basis(size, rank, f"{self.seed}/{name}/{mode}", wide).to(x.device)

    def subspace_flops(self, shape: Shape, ranks: Shape) -> int:
        """Of the mean step; with "energy" of one that iterates, the most that it takes."""
        ranks = self.kept_ranks(shape, ranks)
        if ranks == shape:
            return 0
        sequential = self.algorithm == "sequential"
        each = costs.subspace_flops(shape, ranks, sequential)
        if self.refresh == 1 or not isinstance(self.refresh, int):
            return each
        held = costs.subspace_flops(shape, ranks, sequential, range(1, len(shape)))
        return (each + (self.refresh - 1) * held) // self.refresh

    def price(self, x: Tensor, geometry: Geometry, out_channels: int) -> tuple[int, float]:
        shape = tuple(x.shape)
        ranks = self.ranks_for(shape)
        modes = sum(rank < size for rank, size in zip(ranks, shape, strict=True))
        calls = _CALLS_A_MODE * modes + _READS * bytes_of(x) / MOVED_A_CALL
        calls += self.fewest_gradient_macs(geometry, shape, ranks, out_channels) / MACS_A_CALL
        calls -= geometry.macs(shape, out_channels) / CONVOLVED_A_CALL
        return bytes_of(x) - self.form_bytes(x, ranks), calls

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = self.ranks_for(shape)
        return LayerCost(
            activation_bytes=self.form_bytes(x, ranks),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_subspace(shape, ranks)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient)
            + self.subspace_flops(shape, ranks)
            + self.gradient_flops(geometry, shape, ranks, out_channels),
        )


def in_places(state: Tensors, dimensions: Sequence[int]) -> Tensors:
    """A state with a tensor of these dimensions, or None, in each place: all None where it is another one, as a linear
    layer's is that was given an input of more modes or fewer."""
    if len(state) > len(dimensions):
        state = ()
    for tensor, dimension in zip(state, dimensions, strict=False):
        if tensor is not None and tensor.dim() != dimension:
            state = ()
            break
    return (*state, *[None] * (len(dimensions) - len(state)))


def _passes(counted: Tensor | None) -> int:
    """How many passes over large inputs a layer has made, by which the part that is in turn is told.

    Counted on the CPU, which no device waits for, but where it has just been loaded. A graph that is recorded right
    then has the part of the first pass in all of them.
    """
    if counted is None or counted.is_meta:
        return 0
    return 0 if counted.is_cuda and torch.cuda.is_current_stream_capturing() else int(counted)


@lru_cache(maxsize=64)
def _count(passes: int) -> Tensor:
    """The number as a tensor that nobody writes to: the same one for all layers that are at it."""
    with torch.inference_mode(False):
        return torch.tensor(passes, device="cpu")


def restored_basis(stored: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """A basis as it is computed with; the stored tensor itself, where that is float32 or float64."""
    if stored is None or (scale is None and stored.dtype in (torch.float32, torch.float64)):
        return stored
    return columns(stored, scale, torch.float32)


def _either(due: Tensor, fresh: Callable[[], Found], held: Callable[[], Found]) -> Found:
    """What one of two ways finds. Both are of the same sizes, which is all that can be told without numbers."""
    return fresh() if due.is_meta or bool(due) else held()


def _resampled(basis: Tensor, size: int) -> Tensor:
    """A start (size, r) from a basis (n, r) of other positions, such as those of a longer text or a larger image: its
    columns, interpolated linearly."""
    return F.interpolate(basis.mT.unsqueeze(0), size, mode="linear", align_corners=False)[0].mT.contiguous()


def _random_basis(size: int, rank: int, seed: str, wide: bool) -> Tensor:
    """Normal numbers (size, rank), in float64 if `wide`, else float32, that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    dtype = torch.float64 if wide else torch.float32
    return torch.randn(size, rank, generator=generator, dtype=dtype, device="cpu")
