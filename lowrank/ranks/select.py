"""The choice of ranks per layer: least total perplexity within a memory budget, exactly (ASI, sec. 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowrank.errors import BudgetError, TableError
from lowrank.methods.deriving import check_derive, measured_with, reach
from lowrank.ranks.groups import Pick, groups_of, pareto, pick_of
from lowrank.ranks.table import Energy, PerplexityTable
from lowrank.tensors.storage import STORAGES, Storage, check_storage

MOST_BYTES = 2**62  # of a budget; more is without limit


@dataclass(frozen=True)
class RankPlan:
    """Ranks chosen for each layer; `lowrank.ASI(ranks=plan)` takes it as it is.

    Attributes:
        ranks: per layer name, one rank per mode.
        energies: per layer name, the energy that was chosen: a number for all modes, or one for each.
        nbytes: bytes that the plan keeps, at most the budget. An input that several layers are given counts for each of
            them, as in `Account`: their ranks may differ; what is kept of it once is less.
        perplexity: sum over the layers.
        storages: per layer name, the storage that was chosen.
        derived: per name of a layer that keeps nothing, since its input follows from what another one keeps, that one's
            name; its ranks are those of the input as it is, its storage is the other one's.
        reach: products per number by which they follow, if the table was measured with a number; otherwise 0.
    """

    ranks: dict[str, tuple[int, ...]]
    energies: dict[str, Energy]
    nbytes: int
    perplexity: float
    storages: dict[str, Storage] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    reach: int = 0

    @classmethod
    def of(cls, table: PerplexityTable, entries: Sequence[int]) -> RankPlan:
        """The plan that takes, for each layer of a table in its order, the candidate at this place."""
        rows = [(layer.name, table.candidates(layer), at) for layer, at in zip(table.layers, entries, strict=True)]
        return cls.from_picks([pick_of(*row) for row in rows])

    @classmethod
    def from_picks(cls, picks: Sequence[Pick], reach: int = 0) -> RankPlan:
        """The plan of what was chosen for each layer."""
        return cls(
            ranks={pick.name: pick.ranks for pick in picks},
            energies={pick.name: pick.energy for pick in picks},
            nbytes=sum(pick.nbytes for pick in picks),
            perplexity=sum(pick.perplexity for pick in picks),
            storages={pick.name: pick.storage for pick in picks},
            derived={pick.name: pick.ahead for pick in picks if pick.ahead is not None},
            reach=reach,
        )


def select_ranks(
    table: PerplexityTable,
    budget_bytes: float,
    names: Iterable[str] | None = None,
    storages: Iterable[Storage] = STORAGES,
    derive: bool | int = False,
) -> RankPlan:
    """Choose one candidate per layer, ranks and storage: least total perplexity, never more than `budget_bytes`.

    The candidates of a layer are one for each energy of the table, and the mixed ones and those in other storages if
    they were measured; `table.without_mixed()` gives the published choice, one energy per layer.

    This is a multiple-choice knapsack, solved to optimality in whole bytes. Layer by layer, partial choices are
    extended; a partial choice is dropped when another is no larger and no worse, or when the linear relaxation of what
    is left shows that it cannot beat a complete choice already known. Of equally good choices the smallest is taken.

    Args:
        table: perplexity table.
        budget_bytes: the budget; a fraction of a byte is dropped.
        names: the layers to choose for; all of the table by default.
        storages: to choose from.
        derive: True chooses as well whether inputs that follow from another layer's are kept or derived from what that
            one keeps, whose bytes then serve them all; see `derive` of `ASI` and of `measure_perplexity`. Of a
            layer and those behind it either all derive or none. Never worse than without. By as many products as the
            table was measured with; a number has to be the same.

    Raises:
        BudgetError: the budget is no number, or below the least that the layers need; states that least.
        SettingError: a storage that does not exist, or `derive` out of what is allowed.
        TableError: a name that the table does not have, none of the storages for a layer, a perplexity that is not
            finite, or `derive` with a table that was not measured so.

    Warns:
        UserWarning: more than a tenth of the budget is left though every layer has its best candidate.
    """
    if not isinstance(table, PerplexityTable):
        raise TableError(
            f"the table is {table!r}; allowed is a PerplexityTable: measured, or by PerplexityTable.load(path)"
        )
    table = table if names is None else table.only(names)
    storages = tuple(storages)
    for storage in storages:
        check_storage(storage)
    check_derive(derive)
    derive = measured_with(derive)
    groups = groups_of(table, storages, derive)
    options = [(group.nbytes, group.perplexity) for group in groups]
    least = sum(int(nbytes[0]) for nbytes, _ in options)
    try:
        unlimited, some = budget_bytes >= MOST_BYTES, budget_bytes > 0
    except TypeError:
        some = False
    if not some:  # nor is one that is not a number
        raise BudgetError(f"the budget is {budget_bytes!r}; allowed is a number of bytes, such as 200_000")
    budget_bytes = min(budget_bytes, MOST_BYTES)  # whole numbers may be beyond what floats can hold
    if not budget_bytes >= least:
        raise BudgetError(
            f"the budget of {budget_bytes:g} bytes ({budget_bytes / 2**20:.6g} MiB) is below the minimum for these "
            f"{len(table.layers)} layers: {least} bytes ({least / 2**20:.6g} MiB)"
        )
    chosen = _solve(options, int(budget_bytes))
    picks = {pick.name: pick for group, choice in zip(groups, chosen, strict=True) for pick in group.ways[choice]}
    plan = RankPlan.from_picks([picks[name] for name in table.names], reach(table.derives if derive else False))
    best = sum(int(nbytes[-1]) for nbytes, _ in options)
    if best == plan.nbytes < 0.9 * budget_bytes and not unlimited:
        warnings.warn(
            f"the best candidates of all {len(table.layers)} layers take {best} of the {int(budget_bytes)} bytes of "
            f"the budget; to use the rest, measure perplexity at higher energies as well",
            stacklevel=2,
        )
    return plan


Options = tuple[np.ndarray, np.ndarray]  # of a group, see `Group`: bytes ascending, perplexity descending


def _relaxation(options: list[Options]) -> tuple[np.ndarray, np.ndarray]:
    """Least cost of the linear relaxation as a function of the budget: its corners (bytes, cost).

    Each corner is a choice without fractions: the steps along the layers' lower convex hulls, steepest first.
    """
    start_bytes, start_cost = 0, 0.0
    steps: list[tuple[float, int, float]] = []
    for nbytes, cost in options:
        start_bytes += int(nbytes[0])
        start_cost += float(cost[0])
        at = 0
        while at + 1 < len(nbytes):
            slopes = (cost[at + 1 :] - cost[at]) / (nbytes[at + 1 :] - nbytes[at])
            ahead = at + 1 + int(len(slopes) - 1 - np.argmin(slopes[::-1]))
            steps.append((float(slopes.min()), int(nbytes[ahead] - nbytes[at]), float(cost[ahead] - cost[at])))
            at = ahead
    steps.sort(key=lambda step: step[0])
    sizes = start_bytes + np.concatenate(([0], np.cumsum([step[1] for step in steps], dtype=np.int64)))
    costs = start_cost + np.concatenate(([0.0], np.cumsum([step[2] for step in steps])))
    return sizes.astype(np.int64), costs


def _solve(options: list[Options], budget: int) -> list[int]:
    """Index of the chosen option per group."""
    slack = 1e-9 * sum(float(cost[0]) for _, cost in options)  # rounding must not drop the best choice
    size, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for at, (nbytes, cost) in enumerate(options):
        parents = np.repeat(np.arange(len(size)), len(nbytes))
        choices = np.tile(np.arange(len(nbytes)), len(size))
        size = size[parents] + nbytes[choices]
        value = value[parents] + cost[choices]
        corner_sizes, corner_costs = _relaxation(options[at + 1 :])
        left = budget - size
        feasible = left >= corner_sizes[0]
        floor = np.searchsorted(corner_sizes, left, side="right") - 1
        reachable = np.min((value + corner_costs[floor])[feasible])
        bound = value + np.interp(left, corner_sizes, corner_costs)
        alive = np.flatnonzero(feasible & (bound <= reachable + slack))
        alive = alive[pareto(size[alive], value[alive])]
        size, value = size[alive], value[alive]
        trail.append((parents[alive], choices[alive]))
    state = int(np.argmin(value))  # sizes ascend, so the first of equal values is the smallest
    chosen = []
    for parents, choices in reversed(trail):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]
