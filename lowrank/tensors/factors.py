"""A matrix as two factors, and the update of a weight that is held so: pure functions on tensors.

Source: WASI (ICLR 2026), sec. 3 (weight subspace iteration, Alg. 1). There, as in the public code, the right factor is
formed with the basis of the step before. Here it is formed with the new one, so neither a sign nor a rotation that the
orthogonalisation takes can tear the two factors apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import NonFiniteError
from lowrank.tensors.decompose import Spectrum, check_energy, spectrum

# Above this squared length of a spanning vector, against 1 where nothing turns, Gram matrices lose too many digits.
LARGEST_TURN = 4.0
PROBES = (0.0, 0.7, 1.9, 2.6)  # frequencies of the directions along which a basis is looked at


class Factors(NamedTuple):
    """The matrix `left @ right` of shape (O, I), never formed.

    Attributes:
        left: shape (O, s).
        right: shape (s, I).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix itself, (O, I)."""
        return self.left @ self.right

    def scaled(self, factor: float | Tensor) -> Factors:
        """`factor` times the matrix."""
        return Factors(self.left, self.right * factor)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same matrix with factors in another dtype."""
        return Factors(self.left.to(dtype), self.right.to(dtype))


def factorise(weight: Tensor, energy: float) -> Factors:
    """The least number of singular vectors that hold the share `energy` of the squared singular values (Eq. 5 to 7).

    Args:
        weight: (O, I), real; halves are computed in float32.
        energy: above 0 and at most 1.

    Returns:
        Factors in `weight.dtype`: `left` (O, K) with orthonormal columns, `right` (K, I).

    Raises:
        SettingError: energy out of range.
        NonFiniteError: `weight` holds NaN or infinite values.
    """
    check_energy(energy)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    columns = _columns(wide, exact=energy >= 1)
    return _projected(columns, columns.rank(energy), wide).to(weight.dtype)


def refactorise(weight: Tensor, rank: int, energy: float) -> Factors:
    """Factors of exactly this rank where the weight has no more than that; otherwise those that `factorise` gives.

    So the product of two factors of this rank, rounded to its dtype, is taken apart without a loss.

    Args:
        weight: (O, I), real.
        rank: K, from 1 to min(O, I).
        energy: for a weight of a higher rank.

    Raises:
        SettingError: energy out of range.
        NonFiniteError: `weight` holds NaN or infinite values.
    """
    wide = weight.double()
    found = _projected(_columns(wide, exact=weight.dtype == torch.float64), rank, wide)
    summed = torch.promote_types(weight.dtype, torch.float32)
    # Of the product's entries, and of its sums and the singular vectors.
    rounding = torch.finfo(weight.dtype).eps + (16 + rank) * torch.finfo(summed).eps
    lost = torch.linalg.vector_norm(wide - found.dense())
    if bool(lost > rounding * torch.linalg.vector_norm(wide)):
        return factorise(weight, energy)
    return found.to(weight.dtype)


def _columns(weight: Tensor, exact: bool) -> Spectrum:
    """The singular vectors of a weight's columns; see `spectrum`."""
    try:
        return spectrum(weight, 0, exact)
    except NonFiniteError:
        raise NonFiniteError(
            "the weight has NaN or infinite values (or too large ones), so it cannot be held as two factors"
        ) from None


def _projected(columns: Spectrum, rank: int, weight: Tensor) -> Factors:
    """A weight's projection on the first singular vectors of its columns."""
    left = columns.basis(rank)
    return Factors(left, left.mT @ weight)


def joined(terms: Sequence[Factors]) -> Factors:
    """The sum of matrices: their factors side by side."""
    return Factors(torch.cat([term.left for term in terms], 1), torch.cat([term.right for term in terms], 0))


def subspace_step(start: Tensor, matrix: Factors) -> Factors:
    """One subspace iteration on a matrix W: L = orth(W W^T start), and R = L^T W with this new L.

    W^T start is orthogonalised as well before W is applied to it. That changes no span, but keeps the directions of
    small singular values, which rounding would otherwise drown.

    Args:
        start: (O, K), float32 or float64: the basis of the step before.
        matrix: W, (O, I).

    Returns:
        Factors of rank K; their product is the projection L L^T W.
    """
    left, right = matrix
    rows = _orthonormal(right.mT @ (left.mT @ start))
    basis = _orthonormal(left @ (right @ rows))
    return Factors(basis, (basis.mT @ left) @ right)


def subspace_update(held: Factors, d_left: Tensor, d_right: Tensor, rate: float | Tensor) -> Factors:
    """`subspace_step` from L on the matrix W = L R - rate T, where T is the `tangent` that the two gradients tell.

    With orthonormal L, W = L R' - rate N P R for R' = R - rate d_right, N = (1 - L L^T) d_left and P = (R R^T)^+. So
    W W^T L has the span of Y = W R'^+ = L - rate N P R R'^+, and L'^T L follows from Y. That takes Gram matrices of R,
    R' and Y, where the plain step takes two QRs and products with factors of three times the rank.

    Args:
        held: L R, (O, I) of rank K, float32 or float64; `left` with orthonormal columns, see `orthonormalised`.
        d_left: (O, K), gradient of L.
        d_right: (K, I), gradient of R.
        rate: what the gradients are multiplied by.

    Returns:
        Factors of rank K as of `subspace_step`, up to a rotation of the K directions and rounding.
    """
    left, right = held
    rows = right - rate * d_right  # L^T W, (K, I)
    against_held, against_rows = _InverseGram(right), _InverseGram(rows)
    overlap = against_rows(right.double() @ rows.double().mT)  # R R'^+, (K, K)
    turned = d_left @ (-rate * against_held(overlap.mT).mT).to(left.dtype)
    normal = torch.addmm(turned, left, left.mT @ turned, alpha=-1)
    spanning = left + normal  # Y, (O, K)
    gram = spanning.mT @ spanning
    if not bool(gram.diagonal().max() < LARGEST_TURN):
        return steady(subspace_step(left, joined([held, tangent(held, d_left, d_right).scaled(-rate)])), left)
    triangle = torch.linalg.cholesky_ex(gram)[0]
    basis = torch.linalg.solve_triangular(triangle, spanning.mT, upper=False).mT.contiguous()
    moved = torch.addmm(rows, -rate * against_held(normal.mT @ d_left), right)  # Y^T W, since Y^T L = 1
    return Factors(basis, torch.linalg.solve_triangular(triangle, moved, upper=False))


def tangent(held: Factors, d_left: Tensor, d_right: Tensor) -> Factors:
    """The part of a matrix G that the gradients of two factors tell: its projection on the tangent space at L R.

    That is L L^T G + (1 - L L^T) G R^T (R R^T)^+ R (Koch and Lubich 2007). The rest of G, normal to L and to R, changes
    one subspace iteration on L R - lr G by a term with lr squared alone; where L or R is square, there is no rest.

    Args:
        held: L R, (O, I) of rank K, float32 or float64; `left` with orthonormal columns, see `orthonormalised`.
        d_left: G R^T, (O, K).
        d_right: L^T G, (K, I).

    Returns:
        Factors of rank 2 K.
    """
    left, right = held
    against = _InverseGram(right)(d_left)
    normal = torch.addmm(against, left, left.mT @ against, alpha=-1)
    return Factors(torch.cat([left, normal], 1), torch.cat([d_right, right], 0))


def orthonormalised(held: Factors, d_left: Tensor, d_right: Tensor) -> tuple[Factors, Tensor, Tensor]:
    """The same matrix with orthonormal columns in `left`, and the gradients of its new factors.

    With L = Q S these are Q and S R, with gradients d_left S^T and S^-T d_right. Of directions in which S is singular
    `d_right` tells nothing; there the gradient is zero. Nothing is computed where the columns are orthonormal already.

    Args:
        held: L R, (O, I) of rank K <= O, float32 or float64.
        d_left: (O, K), gradient of L.
        d_right: (K, I), gradient of R.
    """
    left, right = held
    if _orthonormal_columns(left):
        return held, d_left, d_right
    basis, turn = torch.linalg.qr(left)
    solved = turn @ _InverseGram(left.mT)(d_right.mT).mT  # S (S^T S)^+ d_right
    return Factors(basis, turn @ right), d_left @ turn.mT, solved


def _orthonormal_columns(left: Tensor) -> bool:
    """Whether L^T L is the identity up to rounding, looked at along a few directions; a Gram matrix would cost more."""
    rank = left.shape[1]
    phases = torch.arange(rank, dtype=left.dtype, device=left.device)[:, None] * torch.tensor(PROBES).to(left)
    probes = torch.cos(phases + 1)
    apart = left.mT @ (left @ probes) - probes
    return bool(apart.abs().max() <= 64 * torch.finfo(left.dtype).eps)


class _InverseGram:
    """Multiplies matrices (s, K) by (rows rows^T)^+ for rows (K, I), in double precision.

    A multiple of the identity, as large as rounding makes the Gram matrix uncertain, keeps directions finite in which
    the rows vanish. One step of refinement takes its effect back in all others.
    """

    def __init__(self, rows: Tensor) -> None:
        wide = rows.double()
        self.gram = wide @ wide.mT
        uncertain = 16 * len(self.gram) * torch.finfo(wide.dtype).eps * self.gram.diagonal().max()
        padded = self.gram.clone()
        padded.diagonal().add_(uncertain + torch.finfo(wide.dtype).tiny)
        self.triangle = torch.linalg.cholesky_ex(padded)[0]

    def __call__(self, matrix: Tensor) -> Tensor:
        wanted = matrix.double().mT
        found = torch.cholesky_solve(wanted, self.triangle)
        found += torch.cholesky_solve(wanted - self.gram @ found, self.triangle)
        return found.mT.to(matrix.dtype)


def truncated(matrix: Factors, rank: int) -> Factors:
    """The nearest matrix of at most this rank, from its truncated SVD; `left` has orthonormal columns.

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite.
    """
    left, left_small = torch.linalg.qr(matrix.left)
    right, right_small = torch.linalg.qr(matrix.right.mT)
    vectors, values, others = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    if values.is_cuda and not bool(values.isfinite().all()):  # which the CPU's SVD says itself
        raise torch.linalg.LinAlgError("the matrix has NaN or infinite values")
    rank = min(rank, len(values))
    return Factors(left @ vectors[:, :rank], (values[:rank, None] * others[:rank]) @ right.mT)


def steady(found: Factors, before: Tensor) -> Factors:
    """The same matrix, whose `left` is turned to be as near as can be to that of the step before.

    The factors of a matrix are any of many. Turned so, those of a weight move as little as the weight does, and the
    mean of factors over steps is near to factors of the mean, as whoever averages parameters takes for granted.

    Args:
        found: (O, I) of rank K, float32 or float64; `left` with orthonormal columns.
        before: (O, K).
    """
    turn = _nearest_rotation(found.left.mT @ before)
    return Factors(found.left @ turn, turn.mT @ found.right)


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """The orthogonal matrix that is nearest to a square one: by products alone, where it is nearly one already."""
    found = matrix
    for _ in range(_PRODUCTS):
        gram = found.mT @ found
        gram.diagonal().sub_(1)
        apart = gram.abs().max()
        if bool(apart <= 4 * torch.finfo(found.dtype).eps):
            return found
        if not bool(apart <= _NEARLY):
            break
        found = torch.addmm(found, found, gram, alpha=-0.5)
    vectors, _, others = torch.linalg.svd(matrix, full_matrices=False)
    return vectors @ others


_PRODUCTS, _NEARLY = 8, 0.5


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]
