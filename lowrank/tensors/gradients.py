"""Weight gradients straight from a Tucker form of the input, by the cheapest exact order of contractions.

With the input X = core x_m U_m and the output gradient dY, a weight gradient is a product of three parts. Each mode
other than the channels is handled on one of two sides: dY is projected on U_m, or the core is expanded by U_m.
Spatial modes of a convolution with a kernel have to be expanded, since their positions are shifted against each other.
The channel factor is applied to the core before the two sides meet, or to the small result afterwards. All choices give
the same gradient; `plan` counts the multiplications of each and takes the least, which covers rebuilding X as well.

Sources: AMC (NeurIPS 2024), sec. 3; ASI, sec. 3; WASI, app. A.1, for linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from lowrank.tensors.eager import remembered
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry, Shape
from lowrank.tensors.tucker import Tucker, ascending, mode_correlation, mode_product


@dataclass(frozen=True)
class Plan:
    """One order of contractions.

    Attributes:
        pointwise: treat the layer as a product per position, so that spatial modes may be projected too.
        project: modes in which dY is projected, in order.
        expand: modes in which the core is expanded, in order, channels last when among them.
        macs: multiplications that it takes.
    """

    pointwise: bool
    project: tuple[int, ...]
    expand: tuple[int, ...]
    macs: int


def weight_gradient(tucker: Tucker, grad: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradient of a layer whose input is known as a Tucker form.

    Args:
        tucker: the input, of shape (B, C, H, W) or (B, ..., I), in `grad.dtype`.
        grad: gradient of the output, (B, O, H', W') or (B, ..., O).
        geometry: the layer.

    Returns:
        The gradient, (O, C/g, K_h, K_w), (O, I) or, of a transposed convolution, (C, O/g, K_h, K_w), equal to
        autograd's on `tucker.dense()`.
    """
    channel = geometry.channel_axis % grad.ndim
    factored = tuple(factor is not None for factor in tucker.factors)
    plan = plan_gradient(geometry, tucker.shape, tucker.ranks, factored, grad.shape[channel])
    core, factors = tucker.core, list(tucker.factors)
    if plan.pointwise:
        core, factors = _sample(core, factors, geometry)
    for mode in plan.expand:
        core = mode_product(core, _matrix(factors[mode]), mode)
    for mode in plan.project:
        grad = mode_product(grad, _matrix(factors[mode]).mT, mode)
    remaining = None if channel in plan.expand else factors[channel]
    if plan.pointwise:
        dense = mode_correlation(grad, core, channel)  # (O, r_1) or (O, C)
        result = _apply_channels(dense, remaining, geometry.groups)
        result = result.view(*result.shape, *geometry.kernel) if isinstance(geometry, ConvGeometry) else result
    elif remaining is None:
        return geometry.weight_gradient(core, grad)
    else:
        dense = geometry.by_output(geometry.weight_gradient(core, grad, groups=1), 1)
        result = _apply_channels(dense, remaining, geometry.groups)
    return geometry.by_output(result)


def factor_gradients(
    tucker: Tucker, grad: Tensor, left: Tensor, right: Tensor, through: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the two factors of a linear layer's weight L R, without the gradient G of the weight itself.

    Args:
        tucker: the input, of shape (B, ..., I), in `grad.dtype`.
        grad: gradient of the output, (B, ..., O).
        left: L, (O, K), in `grad.dtype`.
        right: R, (K, I), in `grad.dtype`.
        through: `grad @ left`, (B, ..., K), where it is known.

    Returns:
        G R^T, (O, K), and L^T G, (K, I), equal to autograd's on `tucker.dense()`. Source: WASI, sec. 3.
    """
    geometry, channels = LinearGeometry(), tucker.factors[-1]
    against_core = (*tucker.factors[:-1], None)
    if channels is not None and channels.shape[1] <= right.shape[0]:
        # The gradient against the core's channels is no larger than L: G = found U^T.
        found = weight_gradient(Tucker(tucker.core, against_core), grad, geometry)
        return found @ (right @ channels).mT, (left.mT @ found) @ channels.mT
    inner = right if channels is None else right @ channels
    shrunk = Tucker(mode_product(tucker.core, inner, grad.ndim - 1), against_core)  # x R^T
    through = grad @ left if through is None else through
    return weight_gradient(shrunk, grad, geometry), weight_gradient(tucker, through, geometry)


def factor_gradient_macs(shape: Shape, ranks: Shape, outputs: int, rank: int, through_known: bool) -> int:
    """Multiplications of `factor_gradients`.

    Args:
        shape: of the input, (B, ..., I).
        ranks: of its Tucker form; as `shape`, where it is kept as it is.
        outputs: O.
        rank: K, of the weight.
        through_known: whether `grad @ left` is made in any case.
    """
    geometry, inputs, channel_rank = LinearGeometry(), shape[-1], ranks[-1]
    factored = tuple(r < size for r, size in zip(ranks, shape, strict=True))
    against_core = (*factored[:-1], False)
    if factored[-1] and channel_rank <= rank:
        found = plan_gradient(geometry, (*shape[:-1], channel_rank), ranks, against_core, outputs).macs
        return found + 2 * rank * channel_rank * (outputs + inputs)
    inner = rank * inputs * channel_rank if factored[-1] else 0
    through = 0 if through_known else prod(shape[:-1]) * outputs * rank
    of_left = plan_gradient(geometry, (*shape[:-1], rank), (*ranks[:-1], rank), against_core, outputs).macs
    of_right = plan_gradient(geometry, shape, ranks, factored, rank).macs
    return inner + prod(ranks) * rank + of_left + through + of_right


def _matrix(factor: Tensor | None) -> Tensor:
    assert factor is not None, "a plan names only modes that have a factor"
    return factor


def _sample(core: Tensor, factors: list[Tensor | None], geometry: Geometry) -> tuple[Tensor, list[Tensor | None]]:
    """Keep the rows and columns that a strided 1x1 convolution reads."""
    factors = list(factors)
    for mode, stride in enumerate(geometry.stride if isinstance(geometry, ConvGeometry) else (), 2):
        if stride == 1:
            continue
        factor = factors[mode]
        if factor is None:
            core = core[(slice(None),) * mode + (slice(None, None, stride),)]
        else:
            factors[mode] = factor[::stride]
    return core, factors


def _apply_channels(dense: Tensor, factor: Tensor | None, groups: int) -> Tensor:
    """Turn a gradient (O, r, ...) against core channels into (O, C/g, ...): each group reads its own rows."""
    outputs, rank, *kernel = dense.shape
    if factor is None:
        blocks = dense.reshape(groups, outputs // groups, groups, rank // groups, *kernel)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(outputs, -1, *kernel)
    if groups == 1:
        return mode_product(dense, factor, 1)  # contiguous, so that autograd takes it for the gradient as it is
    rows = factor.reshape(groups, -1, rank)  # (g, C/g, r)
    by_group = dense.reshape(groups, outputs // groups, rank, -1)  # (g, O/g, r, K)
    return torch.einsum("gorx,gcr->gocx", by_group, rows).reshape(outputs, -1, *kernel)


@remembered
def plan_gradient(
    geometry: Geometry, shape: Shape, ranks: Shape, factored: tuple[bool, ...], out_channels: int
) -> Plan:
    """The order with the fewest multiplications; arguments as of `candidate_plans`."""
    best, *others = candidate_plans(geometry, shape, ranks, factored, out_channels)
    for plan in others:  # a plain loop, which torch.compile can trace
        best = plan if plan.macs < best.macs else best
    return best


def candidate_plans(
    geometry: Geometry, shape: Shape, ranks: Shape, factored: tuple[bool, ...], out_channels: int
) -> list[Plan]:
    """Every order of contractions that is worth a thought; at least one.

    Args:
        geometry: the layer.
        shape: shape of its input.
        ranks: shape of the core.
        factored: per mode, whether there is a factor (otherwise the core is full in that mode).
        out_channels: O.
    """
    channel = geometry.channel_axis % len(shape)
    samples = [mode for mode in range(len(shape)) if mode != channel and factored[mode]]
    plans = []
    for tail in ((), (channel,)) if factored[channel] else ((),):
        if geometry.pointwise:
            plans += [
                _pointwise_plan(geometry, shape, ranks, project, tail, samples, out_channels)
                for count in range(len(samples) + 1)
                for project in combinations(samples, count)
            ]
        if isinstance(geometry, ConvGeometry):
            spatial = tuple(mode for mode in samples if mode != 0)
            batch = tuple(mode for mode in samples if mode == 0)
            for project, expand in (((), batch + spatial), (batch, spatial)) if batch else (((), spatial),):
                whole_channels = bool(tail) or not factored[channel]
                plans.append(
                    _correlation_plan(geometry, shape, ranks, project, expand + tail, whole_channels, out_channels)
                )
    return plans


def _products(start: Shape, sizes: dict[int, int], modes: tuple[int, ...]) -> tuple[list[int], int]:
    """Sizes after, and multiplications of, mode products that change each of `modes` to its new size in turn."""
    current, macs = list(start), 0
    for mode in modes:
        macs += prod(current) * sizes[mode]
        current[mode] = sizes[mode]
    return current, macs


def _by_growth(modes: tuple[int, ...], before: Shape, after: dict[int, int]) -> tuple[int, ...]:
    return tuple(modes[index] for index in ascending([after[mode] / before[mode] for mode in modes]))


def _pointwise_plan(
    geometry: Geometry,
    shape: Shape,
    ranks: Shape,
    project: tuple[int, ...],
    tail: tuple[int, ...],
    samples: list[int],
    out_channels: int,
) -> Plan:
    channel = geometry.channel_axis % len(shape)
    grad_shape = geometry.output_shape(shape, out_channels)
    full = {mode: shape[mode] if mode == channel else grad_shape[mode] for mode in range(len(shape))}
    small = dict(enumerate(ranks))
    # A strided layer reads only some positions; a mode without a factor is sampled before anything else.
    ranks = tuple(r if m == channel or m in samples else full[m] for m, r in enumerate(ranks))
    project = _by_growth(project, grad_shape, small)
    expand = _by_growth(tuple(mode for mode in samples if mode not in project), ranks, full) + tail
    _, project_macs = _products(grad_shape, small, project)
    core, expand_macs = _products(ranks, full, expand)
    macs = project_macs + expand_macs + prod(core) * out_channels
    if not tail and ranks[channel] != shape[channel]:
        macs += out_channels * (shape[channel] // geometry.groups) * ranks[channel]
    return Plan(True, project, expand, macs)


def _correlation_plan(
    geometry: ConvGeometry,
    shape: Shape,
    ranks: Shape,
    project: tuple[int, ...],
    expand: tuple[int, ...],
    whole_channels: bool,
    out_channels: int,
) -> Plan:
    full = dict(enumerate(shape))
    tail = tuple(mode for mode in expand if mode == 1)
    expand = _by_growth(tuple(mode for mode in expand if mode != 1), ranks, full) + tail
    core, expand_macs = _products(ranks, full, expand)
    grad_shape = geometry.output_shape(shape, out_channels)
    grad, project_macs = _products(grad_shape, dict(enumerate(ranks)), project)
    grouped = geometry if whole_channels else replace(geometry, groups=1)
    macs = expand_macs + project_macs + grouped.macs((grad[0], *core[1:]), out_channels)
    if not whole_channels:
        macs += out_channels * (shape[1] // geometry.groups) * core[1] * prod(geometry.kernel)
    return Plan(False, project, expand, macs)
