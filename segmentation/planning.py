"""Where ASI's ranks come from in a run: a perplexity table and a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiment import budget_bytes
from experiment.budget import check_divisor
from lowrank import ASI, PerplexityTable, select_ranks


@dataclass(frozen=True)
class Budget:
    """A perplexity table and one of two budgets.

    Args:
        table: file of the perplexity table.
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget.
        divisor: what that run's memory is divided by: 20 for a twentieth of it.
    """

    table: str
    mib: float | None = None
    run: str | None = None
    divisor: int = 1

    def __post_init__(self) -> None:
        check_divisor(self.divisor, self.run, "budget")

    @property
    def nbytes(self) -> float:
        """The budget in bytes."""
        return budget_bytes(self.mib, self.run, "budget", self.divisor)

    def ranks_for(self, method: ASI, names: Sequence[str]) -> ASI:
        """The method with the ranks of least perplexity for these layers within the budget."""
        table = PerplexityTable.load(self.table)
        return replace(method, ranks=select_ranks(table, self.nbytes, list(names), (method.storage,)))
