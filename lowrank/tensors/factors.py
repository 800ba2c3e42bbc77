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

from lowrank.tensors.decompose import check_energy, spectrum

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
    columns = spectrum(wide, 0, exact=energy >= 1)
    left = columns.basis(columns.rank(energy))
    return Factors(left, left.mT @ wide).to(weight.dtype)


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


def subspace_update(weight: Factors, change: Factors) -> Factors:
    """`subspace_step` from L on the matrix W = L R + `change`, for a weight that the step before has left.

    Since L has orthonormal columns, W W^T L has the span of Y = W (L^T W)^+ = L + (1 - L L^T) change (L^T W)^+, that
    is of L and a correction of the change's rank; and L'^T L follows from Y. So a change of small rank costs about two
    Gram matrices (of L^T W and of Y), where the plain step takes two QRs and three products with all of W.

    Args:
        weight: L R of shape (O, I) and rank K, float32 or float64.
        change: A B of any rank.

    Returns:
        Factors of rank K as of `subspace_step`, up to a rotation of the K directions and rounding.
    """
    left, right = weight
    if not _orthonormal_columns(left):
        return subspace_step(left, joined([weight, change]))
    along = left.mT @ change.left  # (K, s)
    rows = torch.addmm(right, along, change.right)  # L^T W, (K, I)
    weights = _against_pseudo_inverse(change.right, rows)  # B (L^T W)^+, (s, K)
    spanning = torch.addmm(left, torch.addmm(change.left, left, along, alpha=-1), weights)  # Y, (O, K)
    gram = spanning.mT @ spanning
    if not bool(gram.diagonal().max() < LARGEST_TURN):
        return subspace_step(left, joined([weight, change]))
    triangle = torch.linalg.cholesky_ex(gram)[0]
    basis = torch.linalg.solve_triangular(triangle, spanning.mT, upper=False).mT.contiguous()
    moved = torch.addmm(right, spanning.mT @ change.left, change.right)  # Y^T W, since Y^T L = 1
    return Factors(basis, torch.linalg.solve_triangular(triangle, moved, upper=False))


def _orthonormal_columns(left: Tensor) -> bool:
    """Whether L^T L is the identity up to rounding, looked at along a few directions; a Gram matrix would cost more."""
    rank = left.shape[1]
    phases = torch.arange(rank, dtype=left.dtype, device=left.device)[:, None] * torch.tensor(PROBES).to(left)
    probes = torch.cos(phases + 1)
    apart = left.mT @ (left @ probes) - probes
    return bool(apart.abs().max() <= 64 * torch.finfo(left.dtype).eps)


def _against_pseudo_inverse(matrix: Tensor, rows: Tensor) -> Tensor:
    """`matrix rows^+` for (s, I) and (K, I), by the Gram matrix of the rows in double precision.

    A multiple of the identity, as large as rounding makes the Gram matrix uncertain, keeps directions finite in which
    the rows vanish.
    """
    wide = rows.double()
    gram = wide @ wide.mT
    uncertain = 16 * len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    gram.diagonal().add_(uncertain + torch.finfo(gram.dtype).tiny)
    triangle = torch.linalg.cholesky_ex(gram)[0]
    return torch.cholesky_solve(wide @ matrix.double().mT, triangle).mT.to(rows.dtype)


def truncated(matrix: Factors, rank: int) -> Factors:
    """The nearest matrix of at most this rank, from its truncated SVD; `left` has orthonormal columns."""
    left, left_small = torch.linalg.qr(matrix.left)
    right, right_small = torch.linalg.qr(matrix.right.mT)
    vectors, values, others = torch.linalg.svd(left_small @ right_small.mT, full_matrices=False)
    rank = min(rank, len(values))
    return Factors(left @ vectors[:, :rank], (values[:rank, None] * others[:rank]) @ right.mT)


def gradient_factors(x: Tensor, grad: Tensor, weight: Factors) -> Factors:
    """Factors of a weight gradient `grad^T x` that serve a subspace iteration as well as the gradient itself.

    With weight L R and gradient G, the iteration on any a L R - b G reads of G what a projection on the columns of
    L, G R^T and G G^T L leaves of it. So at most three times the weight's rank has to be held.

    Args:
        x: (T, I), the layer's input.
        grad: (T, O), gradient of the output.
        weight: (O, I) of rank K, `left` with orthonormal columns.

    Returns:
        Factors of rank min(T, 3 K); the exact gradient where T is the smaller one.
    """
    left, right = weight
    if len(x) <= 3 * left.shape[1]:
        return Factors(grad.mT, x)
    by_left = x.mT @ (grad @ left)
    spanned = grad.mT @ (x @ torch.cat([right.mT, by_left], 1))
    basis = _orthonormal(torch.cat([left, spanned], 1))
    return Factors(basis, (grad @ basis).mT @ x)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]
