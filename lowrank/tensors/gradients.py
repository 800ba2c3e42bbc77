"""Weight gradients straight from a Tucker form of the input, by the exact order of contractions that takes least time.

With the input X = core x_m U_m and the output gradient dY, a weight gradient is a product of three parts. Each mode
other than the channels is handled on one of two sides: dY is projected on U_m, or the core is expanded by U_m.
Positions of a convolution with a kernel are shifted against each other: spatial modes are expanded, or dY is projected
on U_m as each place of the kernel meets it. The channel factor is applied to the core before the two sides meet, or to
the small result afterwards. All choices give the same gradient; `plan_gradient` takes the one of the least cost, which
covers rebuilding X as well.

Sources: AMC (NeurIPS 2024), sec. 3; ASI, sec. 3; WASI, app. A.1, for linear layers.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lowrank.kernels import contractions, passes
from lowrank.tensors import halves
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry, Shape
from lowrank.tensors.gradient_start import is_expected, is_small, product_of, with_ones
from lowrank.tensors.memory_layout import channels_last, is_channels_last
from lowrank.tensors.plans import Plan, plan_gradient
from lowrank.tensors.tucker import Tucker, mode_correlation, mode_product

_LARGE = 2**20  # numbers of a gradient of which there is to be no second one
_AT_ONCE = 2**18  # of such a gradient, that are laid out together


def weight_gradient(tucker: Tucker, grad: Tensor, geometry: Geometry, to_eight_bits: bool = False) -> Tensor:
    """Weight gradient of a layer whose input is known as a Tucker form.

    Args:
        tucker: the input, of shape (B, C, H, W) or (B, ..., I), in `grad.dtype`, or in another one to compute in.
        grad: gradient of the output, (B, O, H', W') or (B, ..., O).
        geometry: the layer.
        to_eight_bits: whether the input is kept to no more, so that large products may be in bfloat16, see `halves`.

    Returns:
        The gradient, (O, C/g, K_h, K_w), (O, I) or, of a transposed convolution, (C, O/g, K_h, K_w), equal to
        autograd's on `tucker.dense()`.
    """
    found = _laid_out_gradients(tucker, grad.to(tucker.core.dtype), geometry, to_eight_bits, with_bias=False)
    return found[0].to(grad.dtype)


def gradients(tucker: Tucker, grad: Tensor, geometry: Geometry, to_eight_bits: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients of a layer's weight and bias, from one read of the output's gradient where a kernel makes both.

    Args:
        tucker, grad, geometry, to_eight_bits: as of `weight_gradient`.

    Returns:
        The weight gradient, and the bias gradient, (O,): the sum of `grad` over all else.
    """
    dtype = grad.dtype
    grad = grad.to(tucker.core.dtype)
    weight, bias = _laid_out_gradients(tucker, grad, geometry, to_eight_bits, with_bias=True)
    return weight.to(dtype), (geometry.bias_gradient(grad) if bias is None else bias).to(dtype)


def projects_batch(
    shape: Shape, ranks: Shape, factored: tuple[bool, ...], grad: Tensor, geometry: Geometry, with_bias: bool
) -> bool:
    """Whether the gradients of a layer begin with the product of its contiguous output gradient and the batch's factor.

    Args:
        shape, ranks, factored: of the Tucker form.
        grad, geometry: as of `weight_gradient`.
        with_bias: whether the bias gradient is wanted as well, as of `gradients`.
    """
    if not factored[0] or not is_small(grad, ranks[0]):
        return False
    if isinstance(geometry, ConvGeometry) and is_channels_last(grad):
        return False
    joined = with_bias and passes.can_project(grad, ranks[0] + 1)
    outputs = grad.shape[geometry.channel_axis % grad.ndim]
    plan = plan_gradient(geometry, shape, ranks, factored, outputs, joined, True)
    return plan.project[:1] == (0,) or plan.kind in ("spread", "samples", "rows", "windows")


def _laid_out_gradients(
    tucker: Tucker, grad: Tensor, geometry: Geometry, to_eight_bits: bool, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_gradients`, and of a gradient with its channels last, which no product of one of its modes may copy."""
    if isinstance(geometry, ConvGeometry) and is_channels_last(grad):
        return _of_channels_last(tucker, grad, geometry, to_eight_bits, with_bias)
    batch = tucker.factors[0]
    if not with_bias:
        joined = False
    elif batch is None:
        joined = contractions.can_contract(grad)
    else:
        joined = passes.can_project(grad, batch.shape[1] + 1)
    return _gradients(tucker, grad, geometry, joined, to_eight_bits)


def _of_channels_last(
    tucker: Tucker, grad: Tensor, geometry: ConvGeometry, to_eight_bits: bool, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """A convolution whose positions meet one by one is a linear layer there. Of any other, what a projection on the
    batch's factor leaves of the gradient is so few images that they may be copied; and the channels' factor is applied
    last, so that a large gradient lies as the weight does and is not laid out again beside itself."""
    (batch, channels, *sides), bias = tucker.factors, None
    positions = grad.movedim(1, -1)
    if geometry.is_product:
        linear = Tucker(tucker.core.movedim(1, -1).contiguous(), (batch, *sides, channels))
        weight, bias = _laid_out_gradients(linear, positions, LinearGeometry(), to_eight_bits, with_bias)
        return geometry.by_output(weight.view(*weight.shape, *geometry.kernel), 1), bias
    if batch is not None:
        left, bias = _project_ahead(positions, batch, 0, LinearGeometry() if with_bias else None)
        grad, with_bias = left.movedim(-1, 1), False
    apart = channels is not None and geometry.groups == 1 and type(geometry) is ConvGeometry
    few = Tucker(tucker.core, (None, None if apart else channels, *sides))
    joined = with_bias and contractions.can_contract(grad.movedim(1, -1))
    weight, found = _gradients(few, grad, geometry, joined, to_eight_bits)
    if apart:
        weight = (weight.movedim(1, -1) @ _matrix(channels).mT).movedim(-1, 1)
    return weight, found if with_bias else bias


def _gradients(
    tucker: Tucker, grad: Tensor, geometry: Geometry, joined: bool, to_eight_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight gradient and, where `joined` and the plan has it so, the bias gradient."""
    channel = geometry.channel_axis % grad.ndim
    factored = tuple(factor is not None for factor in tucker.factors)
    begun = is_expected(grad, tucker.ranks[0])
    plan = plan_gradient(geometry, tucker.shape, tucker.ranks, factored, grad.shape[channel], joined, begun)
    last = isinstance(geometry, ConvGeometry) and is_channels_last(grad)
    if last and (plan.meet != "shifts" or plan.project):
        grad = grad.contiguous()
    compiled = None if plan.kind is None else _by_kernel(tucker, grad, geometry, plan, last)
    if compiled is not None:
        return compiled
    core, factors, bias = tucker.core, list(tucker.factors), None
    halved = to_eight_bits and any(factored) and plan.kind is None  # whose error is small beside that of truncation
    if plan.meet == "positions":
        core, factors = _sample(core, factors, geometry)
    for mode in plan.expand:
        matrix = _matrix(factors[mode])
        core = mode_product(core, matrix if plan.meet != "rows" or mode == 1 else _along(geometry, matrix), mode)
    for mode in plan.project:
        if mode == plan.project[0] and (mode == 0 or plan.meet == "positions"):
            grad, bias = _project_ahead(grad, _matrix(factors[mode]), mode, geometry if joined else None)
        elif mode > 1 and plan.meet in ("windows", "rows"):
            assert isinstance(geometry, ConvGeometry)
            grad = mode_product(grad, geometry.windows(_matrix(factors[mode]), mode - 2), mode)
        else:
            grad = mode_product(grad, _matrix(factors[mode]).mT, mode)
    remaining = None if channel in plan.expand else factors[channel]
    if plan.meet == "positions":
        correlation = halves.mode_correlation if halved else mode_correlation
        dense = correlation(grad, core, channel)  # (O, r_1) or (O, C)
        result = _apply_channels(dense, remaining, geometry.groups, halved)
        result = result.view(*result.shape, *geometry.kernel) if isinstance(geometry, ConvGeometry) else result
        return geometry.by_output(result), bias
    if plan.meet == "rows":
        assert isinstance(geometry, ConvGeometry)
        return _correlate_rows(grad, core, geometry.kernel), bias
    groups = geometry.groups if remaining is None else 1
    if plan.meet == "windows":
        assert isinstance(geometry, ConvGeometry)
        dense = _correlate_windows(grad, core, geometry.kernel, groups, last)
    else:
        dense = geometry.weight_gradient(channels_last(core) if last else core, grad, groups=groups)
    if remaining is None:
        return dense, bias
    return geometry.by_output(_apply_channels(geometry.by_output(dense, 1), remaining, geometry.groups)), bias


def _by_kernel(
    tucker: Tucker, grad: Tensor, geometry: Geometry, plan: Plan, last: bool
) -> tuple[Tensor, Tensor] | None:
    """Both gradients, from the one read of a compiled kernel; None: not for these."""
    kind = plan.kind
    assert isinstance(geometry, ConvGeometry)
    assert kind is not None
    samples, channels, *sides = tucker.factors
    of_channels = channels if kind == "rows" else None
    factors = samples, of_channels, *(_matrix(side) for side in sides)
    window = geometry.kernel, geometry.stride, geometry.padding[::2], geometry.dilation
    begun = None if samples is None or kind == "images" else product_of(grad, samples)
    found = contractions.contract(kind, grad, tucker.core, factors, window, begun)  # type: ignore[arg-type]
    if found is None or kind == "rows":
        return found
    dense, bias = found
    if kind == "windows":
        whole = channels is None or 1 in plan.expand
        core = tucker.core if channels is None or not whole else mode_product(tucker.core, channels, 1)
        dense = _correlate_windows(dense, core, geometry.kernel, geometry.groups if whole else 1, last)
        return dense if whole else _apply_channels(dense, channels, geometry.groups), bias
    result = _apply_channels(dense, channels, geometry.groups)
    return result.view(*result.shape, *geometry.kernel), bias


def _project_ahead(grad: Tensor, factor: Tensor, mode: int, of_bias: Geometry | None) -> tuple[Tensor, Tensor | None]:
    """The output's gradient projected on the factor (n, r) of a mode, and the bias gradient of a layer, if one is
    given: the sum over the mode is one more column, of ones."""
    found = product_of(grad, factor) if mode == 0 else None
    if found is not None and of_bias is None:
        return found[:-1], None
    if found is None and grad.is_contiguous():
        found = passes.project_mode(grad, factor if of_bias is None else with_ones(factor), mode)
    if found is None:
        return mode_product(grad, factor.mT, mode), None
    if of_bias is None:
        return found, None
    last = factor.shape[1]
    return found.narrow(mode, 0, last).contiguous(), of_bias.bias_gradient(found.narrow(mode, last, 1))


def _correlate_windows(grad: Tensor, core: Tensor, kernel: Shape, groups: int, last: bool) -> Tensor:
    """Weight gradient (O, C/g, K_h, K_w), from the output's gradient (B, O, K_h r_2, K_w r_3) projected on what each
    place of the kernel meets, and a core (B, C, r_2, r_3); `last`: C is last in memory, as the product has it."""
    outputs, spatial, places = grad.shape[1], range(len(kernel)), prod(kernel)
    apart = [size for k, rank in zip(kernel, core.shape[2:], strict=True) for size in (k, rank)]
    along, ranks = [2 + 2 * axis for axis in spatial], [3 + 2 * axis for axis in spatial]
    gathered = grad.view(grad.shape[0], outputs, *apart).permute(1, *along, 0, *ranks)
    gathered = gathered.reshape(groups, outputs // groups * places, -1)
    inputs = core.transpose(0, 1).reshape(groups, core.shape[1] // groups, -1).mT
    count = outputs * inputs.shape[-1] * places
    if last or count <= _LARGE:
        found = torch.bmm(gathered, inputs).view(outputs, *kernel, -1).movedim(-1, 1)
        return found if last else found.contiguous()
    found = grad.new_empty(groups, outputs // groups, inputs.shape[-1], places)
    each = max(_AT_ONCE // found[:, :1].numel(), 1)
    for some, rows in zip(found.split(each, 1), gathered.split(each * places, 1), strict=True):
        some.copy_(torch.bmm(rows, inputs).unflatten(1, (-1, places)).mT)
    return found.view(outputs, -1, *kernel)


def _along(geometry: Geometry, factor: Tensor) -> Tensor:
    """What each place of a kernel meets along the width, (K_w W', r_3), of a factor (W, r_3)."""
    assert isinstance(geometry, ConvGeometry)
    met = geometry.windows(factor, 1).unflatten(0, (geometry.kernel[1], -1))
    return met.transpose(1, 2).reshape(-1, factor.shape[1])


def _correlate_rows(grad: Tensor, core: Tensor, kernel: Shape) -> Tensor:
    """Weight gradient (C, 1, K_h, K_w) of a group for each channel, from the output's gradient (B, C, K_h r_2, W'),
    projected on what each place of the kernel meets, and a core (B, C, r_2, K_w W') along the rows of what it meets."""
    down, along = kernel
    met = grad.unflatten(2, (down, -1)).permute(1, 2, 0, 3, 4).flatten(2)
    rows = core.unflatten(3, (along, -1)).permute(1, 0, 2, 4, 3).flatten(1, 3)
    return torch.bmm(met, rows).unsqueeze(1)


def factor_gradients(
    tucker: Tucker, grad: Tensor, left: Tensor, right: Tensor, through: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the two factors of a linear layer's weight L R, without the gradient G of the weight itself.

    Args:
        tucker: the input, of shape (B, ..., I), in `grad.dtype`, or in another one to compute in.
        grad: gradient of the output, (B, ..., O).
        left: L, (O, K), in `grad.dtype`.
        right: R, (K, I), in `grad.dtype`.
        through: `grad @ left`, (B, ..., K), where it is known.

    Returns:
        G R^T, (O, K), and L^T G, (K, I), equal to autograd's on `tucker.dense()`. Source: WASI, sec. 3.
    """
    dtype = grad.dtype
    if dtype != tucker.core.dtype:
        given = (None if one is None else one.to(tucker.core.dtype) for one in (grad, left, right, through))
        of_left, of_right = factor_gradients(tucker, *given)  # type: ignore[arg-type]
        return of_left.to(dtype), of_right.to(dtype)
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


def _apply_channels(dense: Tensor, factor: Tensor | None, groups: int, halved: bool = False) -> Tensor:
    """Turn a gradient (O, r, ...) against core channels into (O, C/g, ...): each group reads its own rows."""
    outputs, rank, *kernel = dense.shape
    if factor is None:
        blocks = dense.reshape(groups, outputs // groups, groups, rank // groups, *kernel)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(outputs, -1, *kernel)
    if groups == 1:
        product = halves.mode_product if halved else mode_product
        return product(dense, factor, 1)  # contiguous, so that autograd takes it for the gradient as it is
    rows = factor.reshape(groups, -1, rank)  # (g, C/g, r)
    by_group = dense.reshape(groups, outputs // groups, rank, -1)  # (g, O/g, r, K)
    return torch.einsum("gorx,gcr->gocx", by_group, rows).reshape(outputs, -1, *kernel)
