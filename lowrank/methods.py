"""The methods: one frozen dataclass each. It says what is kept of a layer's input and how gradients come from that.

To add a method, subclass `Method` here: `compress` and `weight_gradient` are all it needs, `cost` to be accounted for.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank import costs
from lowrank.costs import LayerCost
from lowrank.decompose import (
    ALGORITHMS,
    Algorithm,
    check_energy,
    hosvd,
    subspace_iteration,
    svd,
)
from lowrank.errors import SettingError
from lowrank.geometry import Geometry, Shape
from lowrank.gradients import plan_gradient, weight_gradient
from lowrank.tucker import Tucker

Tensors = tuple[Tensor | None, ...]


class Method(ABC):
    """How a layer keeps its input for the backward pass.

    The defaults keep the forward pass and the gradient with respect to the input exact.

    Attributes:
        layer_family: class of the converted layer, for methods that also hold the weight in another way.
        keeps_input: whether what is kept is the input as it is, which may then be kept in another form.
    """

    layer_family: ClassVar[type[nn.Module] | None] = None
    keeps_input: ClassVar[bool] = False

    @property
    @abstractmethod
    def tag(self) -> str:
        """Short name with the setting that matters, fit for a folder and a table row."""

    def for_layer(self, name: str) -> Method:
        """The method as the layer `name` uses it."""
        return self

    def reason_against(self, layer: nn.Module) -> str | None:
        """Why `layer` cannot be converted with this method, or None."""
        return None

    @abstractmethod
    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        """What to keep of an input.

        Args:
            x: the input, (B, C, H, W) or (B, ..., I), without a graph.
            geometry: the layer.
            state: what the method returned as state at the step before; empty at first.
            name: the layer's name.

        Returns:
            The tensors to keep for the backward pass, and the state for the next step.
        """

    def can_use(self, other: Method, shape: Shape) -> bool:
        """Whether what `other` keeps of an input of shape `shape` serves this method at least as well as its own."""
        return False

    @abstractmethod
    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        """Weight gradient from the kept tensors and the output gradient; `shape` is the input's."""

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """Bytes of what was kept of an input of shape `shape`, by the method's formula."""
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def input_gradient(self, grad: Tensor, weight: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        """Gradient with respect to the input, shape `shape`."""
        return geometry.input_gradient(grad, weight, shape)

    @abstractmethod
    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        """Cost of one training step for the input `x`; only methods with data-dependent ranks read its values."""


def _exact_flops(geometry: Geometry, shape: Shape, out_channels: int, input_gradient: bool) -> int:
    """Forward and, if needed, input gradient."""
    return 2 * geometry.macs(shape, out_channels) * (2 if input_gradient else 1)


@dataclass(frozen=True)
class Vanilla(Method):
    """Keep the input as it is: ordinary training."""

    keeps_input: ClassVar[bool] = True

    @property
    def tag(self) -> str:
        return "vanilla"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return (x,), ()

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        (x,) = kept
        assert x is not None
        return geometry.weight_gradient(x, grad)

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        return LayerCost(
            activation_bytes=x.numel() * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_weight_gradient(geometry, shape, out_channels),
            flops=_exact_flops(geometry, shape, out_channels, input_gradient) + 2 * geometry.macs(shape, out_channels),
        )


class _TuckerMethod(Method):
    """Shared by the methods that keep a Tucker form."""

    def can_use(self, other: Method, shape: Shape) -> bool:
        return self == other

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        core, *factors = kept
        assert core is not None
        return weight_gradient(Tucker(core, tuple(factors)).to(grad.dtype), grad, geometry)

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """As in the papers: a factor counts for every mode, also where it is the identity and is not stored."""
        core = kept[0]
        assert core is not None
        return costs.tucker_numel(shape, core.shape) * core.element_size()

    def _gradient_flops(self, geometry: Geometry, shape: Shape, ranks: Shape, out_channels: int) -> int:
        factored = tuple(rank < size for rank, size in zip(ranks, shape, strict=True))
        return 2 * plan_gradient(geometry, shape, ranks, factored, out_channels).macs


@dataclass(frozen=True)
class SVD(_TuckerMethod):
    """Truncated SVD of the batch-mode unfolding, anew at every step (AMC, NeurIPS 2024, baseline SVD_eps).

    Args:
        energy: share of the squared singular values that is kept, above 0 and at most 1. More: a closer weight
            gradient and more memory.
    """

    energy: float

    def __post_init__(self) -> None:
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"svd_{self.energy:g}"

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """Bytes of the two factors of the batch-mode unfolding."""
        core = kept[0]
        assert core is not None
        return core.shape[0] * (shape[0] + prod(shape[1:])) * core.element_size()

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        tucker = svd(x, self.energy)
        return (tucker.core, *tucker.factors), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = svd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=ranks[0] * (shape[0] + prod(shape[1:])) * x.element_size(),
            # The published baseline rebuilds the input in full, so its weight gradient costs the exact one's.
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, (0,))
            + costs.paper_weight_gradient(geometry, shape, out_channels),
            flops=_exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, (0,))
            + self._gradient_flops(geometry, shape, ranks, out_channels),
        )


@dataclass(frozen=True)
class HOSVD(_TuckerMethod):
    """Truncated higher-order SVD, anew at every step (AMC, NeurIPS 2024).

    Args:
        energy: share of the squared singular values that each mode keeps, above 0 and at most 1. More: a closer
            weight gradient and more memory. The papers use 0.8.
    """

    energy: float

    def __post_init__(self) -> None:
        check_energy(self.energy)

    @property
    def tag(self) -> str:
        return f"hosvd_{self.energy:g}"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        tucker = hosvd(x, self.energy)
        return (tucker.core, *tucker.factors), ()

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape, modes = tuple(x.shape), range(x.ndim)
        ranks = hosvd(x, self.energy).ranks
        return LayerCost(
            activation_bytes=costs.tucker_numel(shape, ranks) * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_svd(geometry, shape, modes)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=_exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.gram_svd_flops(shape, ranks, modes)
            + self._gradient_flops(geometry, shape, ranks, out_channels),
        )


@dataclass(frozen=True)
class ASI(_TuckerMethod):
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
    """

    ranks: Any = None
    algorithm: Algorithm = "sequential"
    warm_start: bool = True
    seed: int = 233

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise SettingError(f"ASI algorithm is {self.algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            return
        for ranks in per_layer.values() if isinstance(per_layer, Mapping) else (per_layer,):
            _check_ranks(ranks)

    @property
    def tag(self) -> str:
        variant = "" if self.algorithm == "sequential" else f"_{self.algorithm}"
        rank = f"_rank{self.ranks}" if isinstance(self.ranks, int) else ""
        return f"asi{rank}{variant}{'' if self.warm_start else '_cold'}"

    def for_layer(self, name: str) -> ASI:
        per_layer = getattr(self.ranks, "ranks", self.ranks)
        if per_layer is None:
            raise SettingError("ASI has no ranks yet; give numbers or the result of select_ranks")
        if not isinstance(per_layer, Mapping):
            return self
        if name not in per_layer:
            raise SettingError(f"the ranks name no layer {name!r}; they name {', '.join(per_layer) or 'none'}")
        return replace(self, ranks=per_layer[name])

    def ranks_for(self, shape: Sequence[int]) -> Shape:
        """The ranks for an input of this shape, each at most its dimension."""
        if isinstance(self.ranks, int):
            return tuple(min(self.ranks, size) for size in shape)
        if len(self.ranks) != len(shape):
            raise SettingError(
                f"{len(self.ranks)} ranks for an input with {len(shape)} modes {tuple(shape)}; give one per mode"
            )
        return tuple(min(rank, size) for rank, size in zip(self.ranks, shape, strict=True))

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        state = (*state, *[None] * (x.ndim - len(state)))  # modes without a basis are not in a state dict
        starts = [self._start(x, mode, rank, state[mode], name) for mode, rank in enumerate(self.ranks_for(x.shape))]
        tucker, bases = subspace_iteration(x, starts, self.algorithm)
        kept = (tucker.core, *tucker.factors)
        if not self.warm_start:
            return kept, ()
        # A smaller batch, such as an epoch's last, leaves the batch basis of the full one in place.
        if state[0] is not None and state[0].shape[0] > x.shape[0]:
            bases[0] = state[0]
        return kept, tuple(bases)

    def can_use(self, other: Method, shape: Shape) -> bool:
        if not isinstance(other, ASI) or other.algorithm != self.algorithm:
            return False
        return all(own <= found for own, found in zip(self.ranks_for(shape), other.ranks_for(shape), strict=True))

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """At its own ranks, also where another layer's larger ones are shared."""
        core = kept[0]
        assert core is not None
        return costs.tucker_numel(shape, self.ranks_for(shape)) * core.element_size()

    def _start(self, x: Tensor, mode: int, rank: int, stored: Tensor | None, name: str) -> Tensor | None:
        size = x.shape[mode]
        if rank >= size:
            return None
        # Samples change from step to step, so any rows of the batch basis serve a smaller batch as well.
        fits = stored is not None and (stored.shape[0] == size or (mode == 0 and stored.shape[0] > size))
        if stored is not None and fits and stored.shape[1] == rank:
            return stored[:size]
        wide = x.dtype == torch.float64
        return _random_basis(size, rank, f"{self.seed}/{name}/{mode}", wide).to(x.device)

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        ranks = self.ranks_for(shape)
        return LayerCost(
            activation_bytes=costs.tucker_numel(shape, ranks) * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_subspace(shape, ranks)
            + costs.paper_tucker_gradient(geometry, shape, ranks, out_channels),
            flops=_exact_flops(geometry, shape, out_channels, input_gradient)
            + costs.subspace_flops(shape, ranks, self.algorithm == "sequential")
            + self._gradient_flops(geometry, shape, ranks, out_channels),
        )


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
