"""The choice of ranks per layer: least total perplexity within a memory budget, exactly (ASI, sec. 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lowrank.errors import BudgetError, TableError
from lowrank.ranks.table import Candidates, Energy, PerplexityTable
from lowrank.tensors.storage import STORAGES, Storage, check_storage

MOST_BYTES = 2**62  # of a budget; more is without limit


@dataclass(frozen=True)
class RankPlan:
    """Ranks chosen for each layer; `lowrank.ASI(ranks=plan)` takes it as it is.

    Attributes:
        ranks: per layer name, one rank per mode.
        energies: per layer name, the energy that was chosen: a number for all modes, or one for each.
        nbytes: bytes that the plan keeps, at most the budget.
        perplexity: sum over the layers.
        storages: per layer name, the storage that was chosen.
        derived: per name of a layer that keeps nothing, since its input follows from what another one keeps, that one's
            name; its ranks are those of the input as it is, its storage is the other one's.
    """

    ranks: dict[str, tuple[int, ...]]
    energies: dict[str, Energy]
    nbytes: int
    perplexity: float
    storages: dict[str, Storage] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)

    def with_derived(self, ahead: dict[str, str], table: PerplexityTable) -> RankPlan:
        """The same with layers of a table whose inputs follow from those of the plan's: per name, the other's."""
        shapes = {layer.name: layer.input_shape for layer in table.layers}
        whole: dict[str, Energy] = dict.fromkeys(ahead, 1.0)
        chosen = {**self.ranks, **{name: shapes[name] for name in ahead}}
        energies, storages = {**self.energies, **whole}, dict(self.storages)
        storages |= {name: self.storages[other] for name, other in ahead.items()}
        names = [name for name in shapes if name in chosen]  # in the model's order
        ranks, energies = {name: chosen[name] for name in names}, {name: energies[name] for name in names}
        return replace(self, ranks=ranks, energies=energies, storages=storages, derived=dict(ahead))

    @classmethod
    def of(cls, table: PerplexityTable, entries: Sequence[int]) -> RankPlan:
        """The plan that takes, for each layer of a table in its order, the candidate at this place."""
        return cls.from_candidates({layer.name: table.candidates(layer) for layer in table.layers}, entries)

    @classmethod
    def from_candidates(cls, layers: Mapping[str, Candidates], entries: Sequence[int]) -> RankPlan:
        """The plan that takes, of each layer's candidates, the one at this place."""
        picks = [(name, candidates, at) for (name, candidates), at in zip(layers.items(), entries, strict=True)]
        return cls(
            ranks={name: candidates.ranks[at] for name, candidates, at in picks},
            energies={name: candidates.energies[at] for name, candidates, at in picks},
            nbytes=sum(candidates.nbytes[at] for _, candidates, at in picks),
            perplexity=sum(candidates.perplexity[at] for _, candidates, at in picks),
            storages={name: candidates.storages[at] for name, candidates, at in picks},
        )


def select_ranks(
    table: PerplexityTable,
    budget_bytes: float,
    names: Iterable[str] | None = None,
    storages: Iterable[Storage] = STORAGES,
    derive: bool = False,
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
        derive: True gives all bytes to the layers from whose inputs those of others follow, and to these none; see
            `derive` of `TuckerMethod` and of `measure_perplexity`. The plan's perplexity is still the sum over all.

    Raises:
        BudgetError: the budget is no number, or below the least that the layers need; states that least.
        SettingError: a storage that does not exist.
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
    if derive:
        rest, ahead = table.deriving()
        return select_ranks(rest, budget_bytes, storages=storages).with_derived(ahead, table)
    storages = tuple(storages)
    for storage in storages:
        check_storage(storage)
    layers = table.stored_as(storages)
    for name, candidates in layers.items():
        if not np.isfinite(candidates.perplexity).all():
            raise TableError(f"the perplexity of layer {name!r} is not finite; measure it again")
    options = [_undominated(candidates) for candidates in layers.values()]
    least = sum(int(nbytes[0]) for nbytes, _, _ in options)
    try:
        unlimited = budget_bytes >= MOST_BYTES
    except TypeError:
        raise BudgetError(f"the budget is {budget_bytes!r}; allowed is a number of bytes, such as 200_000") from None
    budget_bytes = max(min(budget_bytes, MOST_BYTES), -MOST_BYTES)  # whole numbers may be beyond what floats can hold
    if not budget_bytes >= least:
        raise BudgetError(
            f"the budget of {budget_bytes:g} bytes ({budget_bytes / 2**20:.6g} MiB) is below the minimum for these "
            f"{len(layers)} layers: {least} bytes ({least / 2**20:.6g} MiB)"
        )
    chosen = _solve(options, int(budget_bytes))
    places = [int(index[choice]) for (_, _, index), choice in zip(options, chosen, strict=True)]
    plan = RankPlan.from_candidates(layers, places)
    best = sum(int(nbytes[-1]) for nbytes, _, _ in options)
    if best == plan.nbytes < 0.9 * budget_bytes and not unlimited:
        warnings.warn(
            f"the best candidates of all {len(layers)} layers take {best} of the {int(budget_bytes)} bytes of the "
            f"budget; to use the rest, measure perplexity at higher energies as well",
            stacklevel=2,
        )
    return plan


Options = tuple[np.ndarray, np.ndarray, np.ndarray]  # bytes ascending, perplexity descending, index of the candidate


def _undominated(candidates: Candidates) -> Options:
    """A layer's candidates without those that another beats in both bytes and perplexity."""
    nbytes = np.array(candidates.nbytes, dtype=np.int64)
    cost = np.array(candidates.perplexity, dtype=np.float64)
    kept = _pareto(nbytes, cost)
    return nbytes[kept], cost[kept], kept


def _pareto(nbytes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the points with no other point at most as large and at most as costly; sizes ascending."""
    order = np.lexsort((cost, nbytes))
    best = np.minimum.accumulate(cost[order])
    improves = np.concatenate(([True], cost[order][1:] < best[:-1]))
    return order[improves]


def _relaxation(options: list[Options]) -> tuple[np.ndarray, np.ndarray]:
    """Least cost of the linear relaxation as a function of the budget: its corners (bytes, cost).

    Each corner is a choice without fractions: the steps along the layers' lower convex hulls, steepest first.
    """
    start_bytes, start_cost = 0, 0.0
    steps: list[tuple[float, int, float]] = []
    for nbytes, cost, _ in options:
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
    """Index of the chosen option per layer."""
    slack = 1e-9 * sum(float(cost[0]) for _, cost, _ in options)  # rounding must not drop the best choice
    size, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for at, (nbytes, cost, _) in enumerate(options):
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
        alive = alive[_pareto(size[alive], value[alive])]
        size, value = size[alive], value[alive]
        trail.append((parents[alive], choices[alive]))
    state = int(np.argmin(value))  # sizes ascend, so the first of equal values is the smallest
    chosen = []
    for parents, choices in reversed(trail):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]
