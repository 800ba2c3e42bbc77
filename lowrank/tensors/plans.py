"""Orders of contractions of a weight gradient from Tucker factors, their multiplications, and the time that they take.

The cost of an order is fitted to one core of an x86-64 server: a read and a write for each product, more with the
numbers that are made of each, and more where it is many products of small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Literal

from lowrank.kernels.contractions import Contraction, are_few
from lowrank.tensors.eager import remembered
from lowrank.tensors.geometry import ConvGeometry, Geometry, Shape
from lowrank.tensors.tucker import ascending

# In numbers read from memory:
_CALL = 2**14  # an operator call
_FAR = 2**19  # numbers beyond a core's cache
_ROWS, _ROW = 7, 16  # columns beside that of ones which are projected on in a read of rows of so many numbers
_WINDOWS = 2**17  # what each place of a kernel meets, of one mode
_GATHERED = 10  # a number of dY projected on that, which is brought to where it is multiplied
# Multiplications that take as long as one number read: of a convolution, of groups at 3 x 3, and otherwise.
# Whole numbers: PyTorch 2.13 fails on a fraction that a backward pass reads while it is compiled for any size.
_DENSE, _DEPTHWISE, _WIDE = 5, 1, 4
_CONTRACTED = 8  # of a compiled contraction
_IMAGE = 500  # of it, for each image
_NARROW = 8  # columns of an image that it takes row by row


Meet = Literal["positions", "shifts", "windows", "rows"]
Work = tuple[int, float]  # multiplications and cost


@dataclass(frozen=True)
class Plan:
    """One order of contractions.

    Attributes:
        meet: how the two sides meet: each position of dY with one of the input ("positions"), in a convolution of the
            rebuilt input's positions ("shifts"), in a product, as each place of the kernel meets it ("windows"), or, of
            a group for each channel, in rows of both: dY as the kernel meets it down an image, and the core, expanded
            in the last mode, as it does along it ("rows").
        project: modes in which dY is projected, in order.
        expand: modes in which the core is expanded, in order, channels last when among them.
        macs: multiplications that it takes.
        cost: time that it takes, in numbers read from memory.
        kind: which of the compiled contractions it is, if any.
    """

    meet: Meet
    project: tuple[int, ...]
    expand: tuple[int, ...]
    macs: int
    cost: float
    kind: Contraction | None


@remembered
def plan_gradient(
    geometry: Geometry,
    shape: Shape,
    ranks: Shape,
    factored: tuple[bool, ...],
    out_channels: int,
    joined: bool = True,
    begun: bool = False,
) -> Plan:
    """The order of the least cost; arguments as of `candidate_plans`."""
    best, *others = candidate_plans(geometry, shape, ranks, factored, out_channels, joined, begun)
    for plan in others:  # a plain loop, which torch.compile can trace
        best = plan if plan.cost < best.cost else best
    return best


@remembered
def fewest_macs(geometry: Geometry, shape: Shape, ranks: Shape, factored: tuple[bool, ...], out_channels: int) -> int:
    """Multiplications of the order that takes fewest, if not least time; arguments as of `candidate_plans`."""
    return min(plan.macs for plan in candidate_plans(geometry, shape, ranks, factored, out_channels))


def candidate_plans(
    geometry: Geometry,
    shape: Shape,
    ranks: Shape,
    factored: tuple[bool, ...],
    out_channels: int,
    joined: bool = True,
    begun: bool = False,
) -> list[Plan]:
    """Every order of contractions that is worth a thought; at least one.

    Args:
        geometry: the layer.
        shape: shape of its input.
        ranks: shape of the core.
        factored: per mode, whether there is a factor (otherwise the core is full in that mode).
        out_channels: O.
        joined: whether a projection ahead of all else, on the batch's factor where there is one, makes the bias
            gradient as well, which would take another read; the multiplications of that are not counted.
        begun: whether that projection is made with the output's gradient, and takes nothing.
    """
    channel = geometry.channel_axis % len(shape)
    samples = [mode for mode in range(len(shape)) if mode != channel and factored[mode]]
    sketch = _Sketch(geometry, shape, ranks, out_channels, channel, joined, factored, begun)
    plans = []
    for tail in ((), (channel,)) if factored[channel] else ((),):
        whole = bool(tail) or not factored[channel]
        if geometry.pointwise:
            for count in range(len(samples) + 1):
                for project in combinations(samples, count):
                    expand = tuple(mode for mode in samples if mode not in project)
                    plans += [sketch.positions(one, expand, tail, whole, samples) for one in sketch.orders(project)]
        if not isinstance(geometry, ConvGeometry):
            continue
        batch = tuple(mode for mode in samples if mode == 0)
        spatial = tuple(mode for mode in samples if mode != 0)
        for project, expand in (((), batch), (batch, ())) if batch else (((), ()),):
            plans.append(sketch.shifts(project, expand + spatial, tail, whole))
            if geometry.has_windows and len(spatial) == len(geometry.kernel):
                plans += [sketch.windows(project + one, expand, tail, whole) for one in sketch.sides(spatial)]
        own = geometry.groups == out_channels == shape[channel]  # a group for each channel
        images = len(geometry.kernel) == 2 and spatial == (2, 3)
        if own and geometry.has_windows and not geometry.pointwise and images and whole:
            plans.append(sketch.rows(batch, tail))
    return plans


@dataclass
class _Sketch:
    """Makes plans for one layer; attributes as the arguments of `candidate_plans`."""

    geometry: Geometry
    shape: Shape
    ranks: Shape
    out_channels: int
    channel: int
    joined: bool
    factored: tuple[bool, ...]
    begun: bool

    def __post_init__(self) -> None:
        self.grad_shape = self.geometry.output_shape(self.shape, self.out_channels)

    def orders(self, project: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Orders in which to project dY on these modes: what shrinks it most ahead; the batch ahead of all."""
        shrinking = _by_growth(project, self.grad_shape, dict(enumerate(self.ranks)))
        rest = tuple(mode for mode in shrinking if mode != 0)
        found = [shrinking, (0, *rest)] if 0 in shrinking[1:] else [shrinking]
        return [*found, (0, 2, 3), (2, 3, 0)] if project == (0, 2, 3) and self.channel == 1 else found

    def positions(
        self, project: tuple[int, ...], expand: tuple[int, ...], tail: tuple[int, ...], whole: bool, samples: list[int]
    ) -> Plan:
        grad_shape, channel = self.grad_shape, self.channel
        full = {mode: size if mode == channel else grad_shape[mode] for mode, size in enumerate(self.shape)}
        # A strided layer reads only some positions; a mode without a factor is sampled before anything else.
        ranks = tuple(r if m == channel or m in samples else full[m] for m, r in enumerate(self.ranks))
        expand = _by_growth(expand, ranks, full) + tail
        core, expanding = _products(ranks, full, expand)
        grad, projecting = self._projected(project, dict(enumerate(self.ranks)))
        macs = prod(core) * self.out_channels
        meeting = _CALL + prod(grad) + prod(core) + macs / 12
        return self._plan("positions", project, expand, whole, [expanding, projecting, (macs, meeting)])

    def shifts(self, project: tuple[int, ...], expand: tuple[int, ...], tail: tuple[int, ...], whole: bool) -> Plan:
        assert isinstance(self.geometry, ConvGeometry)
        full = dict(enumerate(self.shape))
        expand = _by_growth(expand, self.ranks, full) + tail
        core, expanding = _products(self.ranks, full, expand)
        grad, projecting = self._projected(project, dict(enumerate(self.ranks)))
        grouped = self.geometry if whole else replace(self.geometry, groups=1)
        macs = grouped.macs((grad[0], *core[1:]), self.out_channels)
        for_one = _DENSE if grouped.groups == 1 else _DEPTHWISE if grouped.kernel == (3, 3) else _WIDE
        meeting = _CALL + prod(grad) + prod(core) + macs / for_one
        return self._plan("shifts", project, expand, whole, [expanding, projecting, (macs, meeting)])

    def sides(self, spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Orders in which to project dY on what each place of the kernel meets: as it shrinks, and as compiled."""
        assert isinstance(self.geometry, ConvGeometry)
        shrinking = _by_growth(spatial, self.grad_shape, self._met())
        return [shrinking] if shrinking == spatial else [shrinking, spatial]

    def _met(self) -> dict[int, int]:
        assert isinstance(self.geometry, ConvGeometry)
        met = {mode: k * self.ranks[mode] for mode, k in enumerate(self.geometry.kernel, 2)}
        return dict(enumerate(self.ranks)) | met

    def windows(self, project: tuple[int, ...], expand: tuple[int, ...], tail: tuple[int, ...], whole: bool) -> Plan:
        assert isinstance(self.geometry, ConvGeometry)
        core, expanding = _products(self.ranks, dict(enumerate(self.shape)), expand + tail)
        grad, projecting = self._projected(project, self._met())
        inputs = core[1] // (self.geometry.groups if whole else 1)
        macs = prod(grad) * inputs
        laid_out = 4 * self.out_channels * inputs * prod(self.geometry.kernel)  # the result, and its copy
        meeting = (
            4 * _CALL
            + _WINDOWS * len(self.geometry.kernel)
            + _GATHERED * prod(grad)
            + prod(core)
            + laid_out
            + macs / 12
        )
        return self._plan("windows", project, expand + tail, whole, [expanding, projecting, (macs, meeting)])

    def rows(self, batch: tuple[int, ...], tail: tuple[int, ...]) -> Plan:
        assert isinstance(self.geometry, ConvGeometry)
        down, along = self.geometry.kernel
        sizes = dict(enumerate(self.ranks)) | {2: down * self.ranks[2]}
        core, expanding = _products(self.ranks, {1: self.shape[1], 3: along * self.grad_shape[3]}, (*tail, 3))
        grad, projecting = self._projected((*batch, 2), sizes)
        macs = prod(grad) * along
        meeting = 4 * _CALL + _WINDOWS + _GATHERED * (prod(grad) + prod(core)) + macs / 12
        return self._plan("rows", (*batch, 2), (*tail, 3), True, [expanding, projecting, (macs, meeting)])

    def _projected(self, project: tuple[int, ...], sizes: dict[int, int]) -> tuple[list[int], Work]:
        shape, (macs, cost) = _products(self.grad_shape, sizes, project)
        numbers = prod(self.grad_shape)
        if self.begun and project[:1] == (0,):
            return shape, (macs, cost - _CALL - numbers * (1 + sizes[0] / 12 + self.joined))
        if self.joined and project and numbers >= _FAR:  # in the read of the sum, and in little more time
            first = project[0]
            right = prod(self.grad_shape[first + 1 :])
            if first == 0:
                cost += 3 * _CALL - numbers * (1 + sizes[0] / 48)
            elif sizes[first] <= _ROWS and right >= _ROW:
                cost += 3 * _CALL - numbers * (1 + sizes[first] / 16)
        return shape, (macs, cost)

    def _plan(
        self,
        meet: Meet,
        project: tuple[int, ...],
        expand: tuple[int, ...],
        whole: bool,
        parts: list[Work],
    ) -> Plan:
        macs, cost = sum(part[0] for part in parts), sum(part[1] for part in parts)
        kind = self._kind(meet, project, expand)
        if self.joined and kind is not None:
            cost = self._compiled(kind, parts)
        if not whole:
            kernel = prod(self.geometry.kernel) if isinstance(self.geometry, ConvGeometry) else 1
            inputs, rank = self.shape[self.channel], self.ranks[self.channel]
            applied = self.out_channels * (inputs // self.geometry.groups) * rank * kernel
            macs, cost = macs + applied, cost + _CALL + applied / 12
        return Plan(meet, project, expand, macs, cost, kind)

    def _kind(self, meet: Meet, project: tuple[int, ...], expand: tuple[int, ...]) -> Contraction | None:
        geometry, factored = self.geometry, self.factored
        if type(geometry) is not ConvGeometry or len(geometry.kernel) != 2 or geometry.padding_mode != "zeros":
            return None
        positions = meet == "positions"
        if not all(factored[2:]) or not are_few(self.ranks, (1, 1) if positions else geometry.kernel):
            return None
        if positions and 1 not in expand:
            kinds: dict[tuple[int, ...], Contraction] = {(0,): "spread", (0, 2, 3): "samples", (2, 3, 0): "images"}
            if not factored[0]:
                kinds = {(): "spread", (2, 3): "samples", (3, 2): "samples"}
            return kinds.get(project)
        if meet == "rows":
            return "rows"
        return "windows" if meet == "windows" and project == ((0, 2, 3) if factored[0] else (2, 3)) else None

    def _compiled(self, kind: Contraction, parts: list[Work]) -> float:
        """Cost of a compiled contraction beyond the read that the bias gradient takes in any case."""
        (expanding, _), (projecting, _), (meeting, laid_out) = parts
        samples, outputs, *_, width = self.grad_shape
        numbers, rank = prod(self.grad_shape), self.ranks[0]
        if kind == "images":
            return 2 * _CALL + _IMAGE * samples * outputs
        cost: float = 2 * _CALL
        if self.factored[0] and self.begun:
            cost -= numbers
            projecting -= numbers * rank
        elif self.factored[0]:
            cost += numbers * rank / 48 + numbers // samples * (rank + 1)
            projecting -= numbers * rank
        if kind == "spread":
            return cost + (expanding + meeting) / _CONTRACTED
        if kind == "rows":
            macs = expanding + projecting + meeting
            return cost + macs / _CONTRACTED * (8 if width < _NARROW else 4 / 3)
        cost += projecting / _CONTRACTED + _IMAGE / 2 * rank * outputs
        return cost + laid_out if kind == "windows" else cost


def _products(start: Shape, sizes: dict[int, int], modes: tuple[int, ...]) -> tuple[list[int], Work]:
    """Sizes after, and multiplications and cost of, mode products that change each of `modes` to its new size in turn.

    The cost of one is a read and a write, more with the new size, and more where it is many products of small matrices.
    """
    current, macs, cost = list(start), 0, 0.0
    for mode in modes:
        numbers, n, right = prod(current), current[mode], prod(current[mode + 1 :])
        left = numbers // (n * right) if numbers else 1
        small = 0.0 if left == 1 else 20 / n if right == 1 else 500 / (n * right)
        current[mode] = sizes[mode]
        macs += numbers * sizes[mode]
        cost += _CALL + numbers * (1 + sizes[mode] / 12 + small) + prod(current)
    return current, (macs, cost)


def _by_growth(modes: tuple[int, ...], before: Shape, after: dict[int, int]) -> tuple[int, ...]:
    return tuple(modes[index] for index in ascending([after[mode] / before[mode] for mode in modes]))
