"""Decompositions of an activation: pure functions from a tensor to its `Tucker` form.

Sources: HOSVD, De Lathauwer et al. 2000; ASI, sec. 3 (one warm-started subspace iteration per mode); sequential
truncation, Vannieuwenhoven et al. 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lowrank.errors import NonFiniteError, SettingError
from lowrank.kernels import iterations, passes
from lowrank.tensors import halves, head_start
from lowrank.tensors.eager import remembered
from lowrank.tensors.sample import sampled, share_of, turn_of
from lowrank.tensors.tucker import Tucker, in_memory_order, iteration_order, mode_correlation, mode_order, mode_product

Sizes = tuple[int, ...]
Algorithm = Literal["sequential", "published"]
ALGORITHMS: tuple[Algorithm, ...] = ("sequential", "published")
# Sizes behind a mode that make an unfolding's products many small ones: three of them take longer than a copy.
_SCATTERED = range(2, 16)


def check_energy(energy: float) -> None:
    """Raise `SettingError` unless 0 < energy <= 1."""
    if isinstance(energy, bool) or not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise SettingError(f"energy is {energy!r}; allowed is a number above 0 and at most 1, such as 0.8")


def allowed_ranks(shape: Sequence[int], ranks: Sequence[int]) -> Sizes:
    """Ranks cut to what a tensor can have: none above its mode's size, nor above the product of the others."""
    return _allowed_ranks(tuple(shape), tuple(ranks))


@remembered
def _allowed_ranks(shape: Sizes, ranks: Sizes) -> Sizes:
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
    if not total.is_meta and not math.isfinite(total.item()):
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
    to_eight_bits: bool = False,
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
        to_eight_bits: whether no more of the numbers is kept, so that large products of `sequential` may be made in
            bfloat16, see `halves`.
        passes_before: how many there were: in each, another part of a large tensor is in turn, see `turn_of`.

    Returns:
        The `Tucker` form in `x.dtype`, see `Tucker.to`, and the bases in the starts' dtype, to start from in the next
        step.
    """
    wide, place = in_memory_order(_widen(x))
    bases = list(starts)
    published = algorithm == "published"
    ranks = tuple([None if start is None else start.shape[1] for start in starts])
    course = _course(tuple(x.shape), tuple(place), ranks, tuple(held), published)
    steps: list[iterations.Iteration] = []
    for mode, share, right in course:
        start = starts[mode]
        assert start is not None, "the course is of those that are cut"
        steps.append(iterations.Iteration(place[mode], start, share, *turn_of(passes_before, right, share)))
    core, made = _one_by_one(wide, steps, published, to_eight_bits)
    for (mode, _, _), basis in zip(course, made, strict=True):
        bases[mode] = basis
    if place != sorted(place):
        core = core.permute(place)
    return Tucker(core.contiguous(), tuple(bases)).to(x.dtype), bases


@remembered
def _course(
    shape: Sizes, place: Sizes, ranks: tuple[int | None, ...], held: Sizes, published: bool
) -> tuple[tuple[int, int, int], ...]:
    """The modes that are cut, in turn, those that are held ahead of the others; of each the share of its fibres, and
    the product of the sizes behind it in memory.

    Args:
        shape: of the tensor.
        place: of each mode in memory.
        ranks: None: the mode is left as it is.
        held, published: see `subspace_iteration`.
    """
    order = iteration_order(shape, [size if rank is None else rank for size, rank in zip(shape, ranks, strict=True)])
    current = [0] * len(shape)
    for mode, at in enumerate(place):
        current[at] = shape[mode]
    course = []
    for mode in sorted(order, key=lambda mode: mode not in held):
        at, rank = place[mode], ranks[mode]
        if rank is None:
            continue
        share = iterations.HELD if mode in held else 1 if published else share_of(current, at, rank)
        course.append((mode, share, prod(current[at + 1 :])))
        current[at] = rank
    return tuple(course)


def first_iteration(shape: Sequence[int], mode: int, start: Tensor, passes_before: int) -> iterations.Iteration:
    """That of `subspace_iteration` of a contiguous tensor whose first mode in turn is this one."""
    share = share_of(shape, mode, start.shape[1])
    return iterations.Iteration(mode, start, share, *turn_of(passes_before, prod(shape[mode + 1 :]), share))


def _one_by_one(
    x: Tensor, steps: Sequence[iterations.Iteration], published: bool, to_eight_bits: bool
) -> tuple[Tensor, list[Tensor]]:
    """As `iterations.subspace`, which makes the last steps where it can; published: each mode is iterated on all that
    those held leave."""
    core: Tensor = x
    bases: list[Tensor] = []
    for at, step in enumerate(steps):
        begun = None if at or published else head_start.begun_of(x, step)
        rest = None if published else iterations.subspace(core, steps[at:], None if begun is None else begun.found)
        if rest is not None:
            if begun is not None:
                head_start.take(begun)
            return rest[0], bases + rest[1]
        if published and step.share != iterations.HELD:
            basis = _iterated(x, step)[0]
            core = mode_product(core, basis.mT, step.mode)
        elif not published and to_eight_bits and halves.are_worth(core, step.mode, step.start.shape[1]):
            core, basis = _in_halves(core, step)
        else:
            core, basis = _one(core, step)
            x = core
        bases.append(basis)
    return core, bases


def _one(x: Tensor, step: iterations.Iteration) -> tuple[Tensor, Tensor]:
    """One step: what is left of a tensor, and the basis."""
    if step.share == iterations.HELD:
        return mode_product(x, step.start.to(x.dtype).mT, step.mode), step.start
    basis, source, place = _iterated(x, step)
    return mode_product(source, basis.mT, place).movedim(place, step.mode).contiguous(), basis


def _iterated(x: Tensor, step: iterations.Iteration) -> tuple[Tensor, Tensor, int]:
    """A basis; and the tensor, or what was made of it on the way, with the place of the mode there."""
    mode, start, share, *turn = step
    basis = iterations.iterate(x, step)
    if basis is not None:
        return basis, x, mode
    source, place = _ahead(x, mode)
    part = (source, place) if share == 1 else _ahead(*sampled(x, mode, share, *turn))
    return _iterate(*part, start, share != 1), source, place


def _in_halves(x: Tensor, step: iterations.Iteration) -> tuple[Tensor, Tensor]:
    """One step in bfloat16: what is left of a tensor, and the basis."""
    mode, start, share, *turn = step
    unfolding, basis = halves.unfolded(x, mode), start
    if share != iterations.HELD:
        part = unfolding if share == 1 else halves.unfolded(*sampled(x, mode, share, *turn))
        image_of = lambda start: (part @ (start.to(halves.HALF).mT @ part).mT).to(x.dtype)  # noqa: E731
        basis = _basis(image_of, part, start, share != 1)
    return halves.projected(unfolding, basis.mT.to(halves.HALF), x.shape, mode), basis


def _ahead(x: Tensor, mode: int) -> tuple[Tensor, int]:
    """A copy of `x` with `mode` ahead of the others, where that pays, and the mode's place."""
    if mode > 0 and prod(x.shape[mode + 1 :]) in _SCATTERED:
        left, n, right = prod(x.shape[:mode]), x.shape[mode], prod(x.shape[mode + 1 :])
        return passes.swapped(x.reshape(left, n, right)).view(n, *x.shape[:mode], *x.shape[mode + 1 :]), 0
    return x, mode


def _iterate(x: Tensor, mode: int, start: Tensor, part: bool) -> Tensor:
    """orth(X X^T start) for the unfolding X of `mode`; orth(start), if X is a part of all there is, of zeros alone."""
    image_of = lambda start: mode_correlation(x, mode_product(x, start.mT, mode), mode)  # noqa: E731
    return _basis(image_of, x, start.to(x.dtype), part)


def _basis(image_of: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, part: bool) -> Tensor:
    """See `_iterate`; image_of: the product of X X^T and a matrix."""
    if x.device.type != "cpu":
        return _laid_out(torch.linalg.qr(_image(image_of, x, start, part))[0])
    basis, triangle = torch.linalg.qr(image_of(start))
    if not all(0 < abs(number) < math.inf for number in triangle.diagonal().tolist()):
        basis = torch.linalg.qr(_image(image_of, x, start, part))[0]
    return _laid_out(basis)


def _image(image_of: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, part: bool) -> Tensor:
    """X X^T start, with other numbers where the start's are not finite, and columns of them where it would be zero.

    A step that met NaN leaves a basis of NaN. From columns of zeros QR would give unit vectors, and if `x` has only
    zeros in their places, as on the border of an image, they would stay for good.
    """
    other = _others(start)
    start = torch.where(start.isfinite(), start, other)
    image = image_of(start)
    return torch.where(image.any(0), image, torch.where(x.any(), other, start) if part else other)


def _laid_out(basis: Tensor) -> Tensor:
    """As it comes back from a file, also with a single column, so that the next step rounds the same."""
    return basis.clone(memory_format=torch.contiguous_format)


def _others(start: Tensor) -> Tensor:
    """Numbers in which no direction is favoured, of the start's shape; always the same."""
    n, r = start.shape
    recorded = start.is_cuda and torch.cuda.is_current_stream_capturing()  # into memory that is the graph's
    if start.is_meta or recorded:
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
