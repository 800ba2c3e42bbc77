"""Decompositions of an activation: pure functions from a tensor to its `Tucker` form.

Sources: HOSVD, De Lathauwer et al. 2000; ASI, sec. 3 (one warm-started subspace iteration per mode); sequential
truncation, Vannieuwenhoven et al. 2012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lowrank.errors import NonFiniteError, SettingError
from lowrank.kernels import passes
from lowrank.tensors.eager import remembered
from lowrank.tensors.sample import sampled, share_of, turn_of
from lowrank.tensors.tucker import Tucker, in_memory_order, iteration_order, mode_correlation, mode_order, mode_product

Algorithm = Literal["sequential", "published"]
ALGORITHMS: tuple[Algorithm, ...] = ("sequential", "published")
# Sizes behind a mode that make an unfolding's products many small ones: three of them take longer than a copy.
_SCATTERED = range(2, 16)


def check_energy(energy: float) -> None:
    """Raise `SettingError` unless 0 < energy <= 1."""
    if not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise SettingError(f"energy is {energy!r}; allowed is a number above 0 and at most 1, such as 0.8")


def allowed_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks cut to what a tensor can have: none above its mode's size, nor above the product of the others."""
    return _allowed_ranks(tuple(shape), tuple(ranks))


@remembered
def _allowed_ranks(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    cut = [min(rank, size) for rank, size in zip(ranks, shape, strict=True)]
    for _ in cut:
        for mode, rank in enumerate(cut):
            others = prod(cut[:mode]) * prod(cut[mode + 1 :])
            cut[mode] = min(rank, max(others, 1))
    return tuple(cut)


@dataclass(frozen=True)
class Spectrum:
    """One mode of a tensor: the energies of its singular vectors, and what the left ones are made of.

    Attributes:
        energies: shape (k,), squared singular values, largest first; k is the smaller side of the unfolding.
        vectors: singular vectors in the same order, as columns: the left ones, or, with `unfolding`, the right ones.
        unfolding: the unfolding (n, k) where it is tall, so that left vectors are formed only as they are needed.
        size: n, the size of the mode.
        longest: the larger side of the unfolding; sets how small a singular value counts as zero.
    """

    energies: Tensor
    vectors: Tensor
    unfolding: Tensor | None
    size: int
    longest: int

    def rank(self, energy: float) -> int:
        """Smallest number of vectors that hold the share `energy` of the total; 1 for an all-zero tensor.

        At energy 1 this is the numerical rank. Shares closer than rounding error count as reached, so a tie (equal
        singular values whose share is exactly `energy`) is decided as exact arithmetic would decide it.
        """
        values = self.energies.double()
        epsilon = torch.finfo(self.energies.dtype).eps
        if energy >= 1:
            smallest = (self.longest * epsilon) ** 2 * values[0]
            return max(1, int((values > smallest).sum()))
        target = energy * values.sum() * (1 - 16 * epsilon)
        return min(int((values.cumsum(0) < target).sum()) + 1, len(values))

    def basis(self, rank: int) -> Tensor:
        """The first `rank` left singular vectors, (n, rank); a copy that holds on to nothing else."""
        vectors = self.vectors[:, :rank]
        if self.unfolding is None:
            return vectors.clone(memory_format=torch.contiguous_format)
        # The columns of the product are orthogonal already; QR scales them, and completes those that are zero.
        return torch.linalg.qr(self.unfolding @ vectors)[0].contiguous()


def spectrum(x: Tensor, mode: int, exact: bool = False) -> Spectrum:
    """Singular vectors of the mode-`mode` unfolding, by the eigen-decomposition of its smaller Gram matrix.

    Args:
        x: real tensor of any shape, float32 or float64.
        mode: which unfolding.
        exact: use a full SVD of the unfolding instead. Needed where singular values below the square root of the
            rounding error matter, that is at energy 1; much slower.

    Raises:
        NonFiniteError: `x` holds NaN or infinite values.
    """
    n = x.shape[mode]
    width = x.numel() // n
    if exact:
        _require_finite(x.sum())
        driver = "gesvd" if x.is_cuda else None  # there the usual one loses the smallest singular values
        unfolded = x.movedim(mode, 0).reshape(n, width)
        vectors, values, _ = torch.linalg.svd(unfolded, full_matrices=False, driver=driver)
        return Spectrum(values.square(), vectors, None, n, max(n, width))
    unfolding = x.movedim(mode, 0).reshape(n, width) if n > width else None
    gram = mode_correlation(x, x, mode) if unfolding is None else unfolding.mT @ unfolding
    _require_finite(gram.diagonal().sum())
    return Spectrum(*_eigenvectors(gram), unfolding, n, max(n, width))


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and not below zero, and eigenvectors of a Gram matrix."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        # In single precision LAPACK can fail to converge on the clustered tiny eigenvalues of real activations.
        values, vectors = torch.linalg.eigh(gram.double())
    return values.flip(0).clamp_min(0).to(gram.dtype), vectors.flip(1).to(gram.dtype)


def _require_finite(total: Tensor) -> None:
    if not math.isfinite(total.item()):
        raise NonFiniteError("the tensor has NaN or infinite values (or too large ones), so it cannot be decomposed")


def spectra(x: Tensor, exact: bool = False) -> list[Spectrum]:
    """One `Spectrum` per mode, each of the full tensor."""
    ordered, place = in_memory_order(x)
    return [spectrum(ordered, place[mode], exact) for mode in range(x.ndim)]


def leading(mode: Spectrum, rank: int) -> Tensor | None:
    """The first `rank` left vectors of a mode, (n, rank); None, the identity, where that is all of the mode."""
    return None if rank >= mode.size else mode.basis(rank)


def project(x: Tensor, vectors: Sequence[Tensor | None]) -> Tucker:
    """Project `x` on orthonormal columns per mode (None: leave the mode as it is), in the order of least time."""
    core, place = in_memory_order(x)
    for mode, u in _ordered(vectors, mode_order(x.shape, _ranks(x, vectors))):
        core = mode_product(core, u.mT, place[mode])
    return Tucker(core.permute(place).contiguous(), tuple(vectors))


def _ranks(x: Tensor, matrices: Sequence[Tensor | None]) -> list[int]:
    return [size if u is None else u.shape[1] for size, u in zip(x.shape, matrices, strict=True)]


def _ordered(matrices: Sequence[Tensor | None], order: list[int]) -> list[tuple[int, Tensor]]:
    """The modes that have a matrix, in this order, and the matrices."""
    found = [(mode, matrices[mode]) for mode in order]
    return [(mode, u) for mode, u in found if u is not None]


def hosvd(x: Tensor, energy: float) -> Tucker:
    """Truncated higher-order SVD: every mode cut at `energy`, all decompositions of the full tensor.

    Args:
        x: real tensor; halves are computed in float32.
        energy: share of squared singular values that each mode keeps, 0 < energy <= 1.

    Returns:
        `Tucker` in `x.dtype`, see `Tucker.to`; ranks at least 1 and at most the dimension.

    Raises:
        SettingError: energy out of range.
        NonFiniteError: `x` holds NaN or infinite values.
    """
    check_energy(energy)
    wide = _widen(x)
    modes = spectra(wide, exact=energy >= 1)
    return project(wide, [leading(mode, mode.rank(energy)) for mode in modes]).to(x.dtype)


def svd(x: Tensor, energy: float) -> Tucker:
    """Truncated SVD of the batch-mode unfolding, as a `Tucker` whose other factors are the identity.

    Arguments, result and errors as in `hosvd`. Stores K (B + C H W) numbers for a (B, C, H, W) tensor.
    """
    check_energy(energy)
    wide = _widen(x)
    batch = spectrum(wide, 0, exact=energy >= 1)
    return project(wide, [leading(batch, batch.rank(energy))] + [None] * (x.ndim - 1)).to(x.dtype)


def subspace_iteration(
    x: Tensor,
    starts: Sequence[Tensor | None],
    algorithm: Algorithm = "sequential",
    held: Sequence[int] = (),
    passes_before: int = 0,
) -> tuple[Tucker, list[Tensor | None]]:
    """One subspace iteration per mode, from a given start.

    Args:
        x: real tensor; halves are computed in float32.
        starts: per mode a matrix (n_m, r_m) with r_m <= n_m, float32 or float64: the basis of the step before, or a
            random one. None leaves the mode as it is.
        algorithm: `published` iterates each mode on the full tensor (ASI, sec. 3.2); `sequential` iterates each mode
            on the tensor that the modes before it have already truncated, in the order of `iteration_order`, and of a
            large one on the part of the fibres that `share_of` names.
        held: modes whose starts are bases already: `x` is projected on them, ahead of all else, and the other modes are
            iterated on what is left.
        passes_before: how many there were: in each, another part of a large tensor is in turn, see `turn_of`.

    Returns:
        The `Tucker` form in `x.dtype`, see `Tucker.to`, and the bases in the starts' dtype, to start from in the next
        step.
    """
    wide, place = in_memory_order(_widen(x))
    bases = list(starts)
    published = algorithm == "published"
    pairs = _ordered(starts, iteration_order(x.shape, _ranks(x, starts)))
    pairs.sort(key=lambda pair: pair[0] not in held)
    asked = [(place[mode], start, mode in held) for mode, start in pairs]
    steps = _steps(wide.shape, asked, published, passes_before)
    found = None if published else passes.subspace(wide, steps)
    core, made = _by_operators(wide, steps, published) if found is None else found
    for (mode, _), basis in zip(pairs, made, strict=True):
        bases[mode] = basis
    return Tucker(core.permute(place).contiguous(), tuple(bases)).to(x.dtype), bases


def _steps(
    shape: Sequence[int], asked: list[tuple[int, Tensor, bool]], published: bool, passes_before: int
) -> list[passes.Step]:
    """The modes in turn, each with its start, and the share of its fibres; asked: of each, whether it is held."""
    current, steps = list(shape), []
    for mode, start, held in asked:
        rank = start.shape[1]
        share = passes.HELD if held else 1 if published else share_of(current, mode, rank)
        if share == 1 or held:
            steps.append(passes.Step(mode, start, share))
        else:
            steps.append(passes.Step(mode, start, share, *turn_of(passes_before, prod(current[mode + 1 :]), share)))
        current[mode] = rank
    return steps


def _by_operators(x: Tensor, steps: Sequence[passes.Step], published: bool) -> tuple[Tensor, list[Tensor]]:
    """As `passes.subspace`; published: each mode is iterated on all that those held leave."""
    core, bases = x, []
    for mode, start, share, *turn in steps:
        if share == passes.HELD:
            x = core = mode_product(core, start.to(core.dtype).mT, mode)
            bases.append(start)
            continue
        source, at = _ahead(x if published else core, mode)
        part = (source, at) if share == 1 else _ahead(*sampled(core, mode, share, *turn))
        bases.append(basis := _iterate(*part, start, share != 1))
        if published:
            core = mode_product(core, basis.mT, mode)
        else:
            core = mode_product(source, basis.mT, at).movedim(at, mode).contiguous()
    return core, bases


def _ahead(x: Tensor, mode: int) -> tuple[Tensor, int]:
    """A copy of `x` with `mode` ahead of the others, where that pays, and the mode's place."""
    if mode > 0 and prod(x.shape[mode + 1 :]) in _SCATTERED:
        return x.movedim(mode, 0).contiguous(), 0
    return x, mode


def _iterate(x: Tensor, mode: int, start: Tensor, part: bool) -> Tensor:
    """orth(X X^T start) for the unfolding X of `mode`; orth(start), if X is a part of all there is, of zeros alone."""
    start = start.to(x.dtype)
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return _laid_out(torch.linalg.qr(_image(x, mode, start, part))[0])
    basis, triangle = torch.linalg.qr(_correlated(x, mode, start))
    if not all(0 < abs(number) < math.inf for number in triangle.diagonal().tolist()):
        basis = torch.linalg.qr(_image(x, mode, start, part))[0]
    return _laid_out(basis)


def _image(x: Tensor, mode: int, start: Tensor, part: bool) -> Tensor:
    """X X^T start, with other numbers where the start's are not finite, and columns of them where it would be zero.

    A step that met NaN leaves a basis of NaN. From columns of zeros QR would give unit vectors, and if `x` has only
    zeros in their places, as on the border of an image, they would stay for good.
    """
    other = _others(start)
    start = torch.where(start.isfinite(), start, other)
    image = _correlated(x, mode, start)
    return torch.where(image.any(0), image, torch.where(x.any(), other, start) if part else other)


def _correlated(x: Tensor, mode: int, start: Tensor) -> Tensor:
    return mode_correlation(x, mode_product(x, start.mT, mode), mode)


def _laid_out(basis: Tensor) -> Tensor:
    """As it comes back from a file, also with a single column, so that the next step rounds the same."""
    return basis.clone(memory_format=torch.contiguous_format)


def _others(start: Tensor) -> Tensor:
    """Numbers in which no direction is favoured, of the start's shape; always the same."""
    n, r = start.shape
    recorded = start.is_cuda and torch.cuda.is_current_stream_capturing()  # into memory that is the graph's
    if torch.compiler.is_compiling() or recorded:
        return _spread(n * r, start.dtype, start.device).view(n, r)
    count = max(1024, 1 << (n * r - 1).bit_length())  # few sizes that are remembered
    return _remembered_spread(count, start.dtype, start.device)[: n * r].view(n, r)


def _spread(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=device).square().cos().to(dtype)


@lru_cache(maxsize=64)
def _remembered_spread(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _spread(count, dtype, device)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
