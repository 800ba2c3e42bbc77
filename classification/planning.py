"""Where ASI's ranks come from in a run: a perplexity table and a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiment import ExperimentError, Record
from lowrank import ASI, PerplexityTable, RankPlan, select_ranks


@dataclass(frozen=True)
class Budget:
    """A perplexity table and one of two budgets.

    Args:
        table: file of the perplexity table.
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget, as the papers take HOSVD at energy 0.8.
    """

    table: str
    mib: float | None = None
    run: str | None = None

    @property
    def nbytes(self) -> float:
        """The budget in bytes."""
        if (self.mib is None) == (self.run is None):
            raise ExperimentError("a budget needs either --model.budget.mib or --model.budget.run, not both")
        if self.mib is not None:
            return self.mib * 2**20
        assert self.run is not None
        return Record.load(Path(self.run) / "result.json").memory_bytes["activation_formula"]

    def plan(self, names: Sequence[str]) -> RankPlan:
        """Ranks of these layers within the budget."""
        return select_ranks(PerplexityTable.load(self.table), self.nbytes, names)

    def ranks_for(self, method: ASI, names: Sequence[str]) -> ASI:
        """The method with the ranks of `plan`."""
        return replace(method, ranks=self.plan(names))
