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

from lowrank.decompose import check_energy, spectrum


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
