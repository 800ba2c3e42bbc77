"""Counts by formula: what the papers count, and the corrected counts.

Functions named `paper_*` reproduce the papers' released formulas so that published columns can be matched, with their
conventions: a convolution counts one per multiply-add and ignores `groups`; its forward pass counts input positions;
the gradient with respect to the input is never counted; a linear layer counts two per multiply-add in the exact
passes and one in the low-rank ones. The others count floating-point operations, two per multiply-add, of what is
executed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lowrank.tensors.geometry import ConvGeometry, Geometry, Shape
from lowrank.tensors.sample import taken
from lowrank.tensors.tucker import iteration_order, mode_order


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer in one training step.

    Attributes:
        activation_bytes: bytes kept of the layer's input, by the method's formula.
        flops_paper: operations in the papers' convention (forward, compression, weight gradient).
        flops: floating-point operations of forward, compression, weight gradient and, where the input needs one,
            input gradient.
        weight_bytes: bytes of the weight as it is held, without the bias.
    """

    activation_bytes: int = 0
    flops_paper: int = 0
    flops: int = 0
    weight_bytes: int = 0

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(
            self.activation_bytes + other.activation_bytes,
            self.flops_paper + other.flops_paper,
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
        )


def tucker_numel(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in a core and its factors as the papers count them: prod r_m + sum n_m r_m (AMC, sec. 3)."""
    return prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


def paper_forward(geometry: Geometry, shape: Shape, out_channels: int) -> int:
    """Forward pass as the papers count it."""
    if isinstance(geometry, ConvGeometry):
        return prod(geometry.kernel) * out_channels * prod(shape)  # of a transposed convolution all that there is
    return prod(shape[:-1]) * out_channels * (2 * shape[-1] - 1)


def paper_weight_gradient(geometry: Geometry, shape: Shape, out_channels: int) -> int:
    """Exact weight gradient as the papers count it."""
    if isinstance(geometry, ConvGeometry):
        return prod(geometry.kernel) * out_channels * shape[0] * shape[1] * geometry.applications(shape)
    return out_channels * shape[-1] * (2 * prod(shape[:-1]) - 1)


def paper_tucker_gradient(geometry: Geometry, shape: Shape, ranks: Shape, out_channels: int) -> int:
    """Low-rank weight gradient as the papers count it: conv and linear with 3-D and 4-D inputs.

    The papers have no 2-D linear layer; its count follows the same scheme (project, contract, expand).
    """
    if isinstance(geometry, ConvGeometry):
        batch, channels, *sizes = shape
        k0, k1, *inner = ranks
        kernel, positions = prod(geometry.kernel), prod(geometry.output_shape(shape, out_channels)[2:])
        places = geometry.applications(shape)
        expanded, core = 0, prod(ranks)
        for size, rank in zip(sizes, inner, strict=True):
            expanded += core * size
            core = core // rank * size
        return (
            k0 * out_channels * positions * batch
            + expanded
            + out_channels * k0 * k1 * kernel * places
            + out_channels * channels * kernel * k1
        )
    if len(shape) == 2:
        batch, inputs = shape
        k1, k2 = ranks
        return batch * out_channels * k1 + k1 * k2 * out_channels + out_channels * inputs * k2
    if len(shape) == 3:
        batch, tokens, inputs = shape
        k1, k2, k3 = ranks
        return (
            batch * tokens * out_channels * k1
            + k1 * k2 * k3 * tokens
            + k1 * k3 * inputs * tokens
            + inputs * out_channels * tokens * k1
        )
    batch, height, width, channels = shape
    k1, k2, k3, k4 = ranks
    return (
        batch * k1 * height * width * out_channels
        + height * k1 * k2 * k3 * k4
        + width * k3 * k1 * height * out_channels
        + channels * k4 * k1 * height * k3
        + k1 * k3 * height * channels * out_channels
    )


def paper_subspace(shape: Shape, ranks: Shape) -> int:
    """One subspace iteration per mode as the papers count it."""
    return sum(2 * prod(shape) * rank + rank**3 for rank in ranks)


def paper_factored_pass(tokens: int, inputs: int, outputs: int, rank: int) -> int:
    """A pass through the two factors of a weight as the WASI paper counts it, forward or to the input's gradient."""
    return tokens * rank * (2 * inputs - 1) + tokens * outputs * (2 * rank - 1)


def paper_iteration(n: int, m: int, rank: int) -> int:
    """One subspace iteration of an (n, m) matrix as the WASI paper counts it."""
    return n * rank * (2 * m - 1) + m * rank * (2 * n - 1) + 2 * max(n, rank) * min(n, rank) ** 2


def paper_weight_svd(outputs: int, inputs: int) -> int:
    """A full SVD of a weight as the WASI paper counts it."""
    small, large = sorted((outputs, inputs))
    return 4 * large * small**2 + 8 * small**3


def factored_update_flops(outputs: int, inputs: int, rank: int, svd: bool) -> int:
    """The update of a weight of this rank from the gradients of its factors, as executed without momentum.

    The subspace iteration (`factors.subspace_update`) is three Gram matrices of the rank's size with their Cholesky
    factors and triangular solves, and a few products more. The SVD (`factors.tangent`, `factors.truncated`) is one of
    them, two QRs of factors of three times the rank, and an SVD between, which counts 21 s^3 (Golub and Van Loan,
    sec. 8.6).
    """
    if not svd:
        return (11 * outputs + 9 * inputs) * rank**2 + 19 * rank**3
    tangent = (10 * outputs + 2 * inputs) * rank**2 + rank**3 // 3
    sides = sum(4 * size * min(size, 3 * rank) ** 2 for size in (outputs, inputs))
    between = min(outputs, inputs, 3 * rank)
    return tangent + sides + 21 * between**3 + 2 * (outputs + inputs) * between * rank


def paper_svd(geometry: Geometry, shape: Shape, modes: Sequence[int]) -> int:
    """Full SVDs of unfoldings as the papers count them: max^2 min for a convolution, max min^2 for a linear layer."""
    total = 0
    for mode in modes:
        small, large = sorted((shape[mode], prod(shape) // shape[mode]))
        total += large**2 * small if isinstance(geometry, ConvGeometry) else large * small**2
    return total


def subspace_flops(shape: Shape, ranks: Shape, sequential: bool, held: Sequence[int] = ()) -> int:
    """One subspace iteration per mode as executed: three products, and a QR with its Q formed (4 n r^2).

    Modes that are held come first, with one product each. Two products of a sequential iteration are of the share of
    the fibres that `share_of` names, of a contiguous tensor.
    """
    order = iteration_order(shape, ranks)
    current, total = list(shape), 0
    for mode in [mode for mode in order if mode in held and ranks[mode] < shape[mode]]:
        total += 2 * prod(current) * ranks[mode]
        current[mode] = ranks[mode]
    full = prod(current)
    for mode in [mode for mode in order if mode not in held and ranks[mode] < shape[mode]]:
        rank = ranks[mode]
        source = taken(current, mode, rank) if sequential else full
        total += 4 * source * rank + 4 * shape[mode] * rank**2 + 2 * prod(current) * rank
        current[mode] = rank
    return total


def gram_svd_flops(shape: Shape, ranks: Shape, modes: Sequence[int]) -> int:
    """Left singular vectors by Gram matrices as executed, and the projection on the kept ones.

    The symmetric eigen-decomposition with vectors counts 9 k^3 (Golub and Van Loan, sec. 8.3).
    """
    total = 0
    for mode in modes:
        n, width = shape[mode], prod(shape) // shape[mode]
        small = min(n, width)
        total += 2 * prod(shape) * small + 9 * small**3
        if n > width:
            total += 2 * prod(shape) * ranks[mode] + 4 * n * ranks[mode] ** 2
    current = list(shape)
    for mode in mode_order(shape, ranks):
        if mode in modes and ranks[mode] < shape[mode]:
            total += 2 * prod(current) * ranks[mode]
            current[mode] = ranks[mode]
    return total
