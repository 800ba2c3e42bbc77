"""Where a method's ranks come from in a run: a perplexity table, a memory budget and a way to choose within it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiment.budget import budget_bytes, budget_tag, check_divisor, check_mib
from experiment.errors import ExperimentError
from experiment.folder import DATA, DATASET, IDENTITY
from experiment.moved import if_moved
from experiment.provenance import fingerprint
from experiment.record import RESULT, Record
from lowrank import BudgetError, PerplexityTable, RankPlan, Storage, select_ranks

RankChoice = Literal["perplexity", "per_layer", "one_energy", "random"]


@dataclass(frozen=True)
class Budget:
    """A perplexity table and one of two budgets.

    Args:
        table: file of the perplexity table.
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget, as the papers take HOSVD at energy 0.8.
        divisor: what that run's memory is divided by: 20 for a twentieth of it.
        name: what the tag of the run says of the budget; by default it says how much it is.
    """

    table: str
    mib: float | None = None
    run: str | None = None
    divisor: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        check_divisor(self.divisor, self.run)
        check_mib(self.mib)

    @property
    def nbytes(self) -> float:
        """The budget in bytes."""
        return budget_bytes(self.mib, self.run, self.divisor)

    @property
    def tag(self) -> str:
        """What the tag of a run with this budget ends in; see `experiment.budget.budget_tag`."""
        return budget_tag(self.mib, self.run, self.divisor, self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What the tag of a run with this budget stands for, by "budget.NAME": its size or its source, and how its
        perplexity was measured.

        Raises:
            TableError: it is no whole table.
        """
        table = self._table()
        size = {"mib": self.mib} if self.run is None else {"of": budget_tag(None, self.run, self.divisor)}
        measured = {"energies": list(table.energies), "batches": table.batches, "derive": table.derives}
        told = size | measured | _measured_by(Path(self.table))
        return {f"budget.{name}": value for name, value in told.items()}

    def _table(self) -> PerplexityTable:
        if not Path(self.table).exists():
            raise ExperimentError(
                f"perplexity table {self.table} cannot be read: there is no such file; measure it first, by "
                f"the command measure with the configs of this run{if_moved(self.table)}"
            )
        return PerplexityTable.load(self.table)

    def plan(
        self,
        names: Sequence[str],
        choice: RankChoice = "perplexity",
        seed: int = 0,
        storage: Storage = "input",
        derive: bool | int = False,
    ) -> RankPlan:
        """Ranks of these layers within the budget, chosen in one of four ways; `seed` is of the random one.

        Raises:
            ExperimentError: only by perplexity can ranks be chosen for another storage than the input's own, and with
                `derive`, see `lowrank.select_ranks`; or the table was measured without it.
        """
        if choice != "perplexity" and (storage != "input" or derive):
            told = "derive" if derive else f"storage {storage!r}"
            raise ExperimentError(f"--model.rank_choice is {choice!r} with {told}; allowed: 'perplexity'")
        table = self._table().only(names)
        if derive and table.derives != derive:
            raise ExperimentError(
                f"the perplexity table {self.table} does not say which inputs follow from which, as a method with "
                f"derive={derive} needs it; measure one with --model.derive {str(derive).lower()} (segmentation: "
                f"--derive)"
            )
        if choice == "perplexity":
            return select_ranks(table, self.nbytes, storages=(storage,), derive=derive)
        if choice == "per_layer":
            return select_ranks(table.without_mixed(), self.nbytes)
        return one_energy(table, self.nbytes) if choice == "one_energy" else random_energies(table, self.nbytes, seed)

    def identity(
        self,
        model: str | None,
        batch_shape: tuple[int, ...],
        choice: RankChoice = "perplexity",
        seed: int = 0,
        dataset: str | None = None,
    ) -> dict[str, Any]:
        """The budget by its content, as a part of a run's identity.

        Args:
            model: name of the run's network.
            batch_shape: of the run's training batches.
            choice, seed: as of `plan`.
            dataset: name of the run's data set; None: it is not looked at.

        Raises:
            ExperimentError: the table was not measured for this very run, or the budget is that of a run on another
                data set.
            TableError: it is no whole table.
        """
        table = self._table()
        if (table.model, table.batch_shape) != (model, batch_shape):
            raise ExperimentError(
                f"the perplexity table {self.table} is of {table.model} on batches {table.batch_shape}, this run of "
                f"{model} on batches {batch_shape}; measure it again"
            )
        if dataset is not None:
            self._require_data(dataset)
        content = json.dumps(json.loads(Path(self.table).read_text(encoding="utf-8")), sort_keys=True)
        ways = {} if choice == "perplexity" else {"choice": choice, "seed": seed}
        return {"table": fingerprint([content.encode()]), "bytes": self.nbytes, **ways}

    def require_data(self, fingerprint: str | None, measured: str | None = None) -> None:
        """Refuse a table or a run on other data than a run's of the same name, as where images have changed since.

        Args:
            fingerprint: of the run's data; None where these are not there.
            measured: of what of them a table is measured on, where that is told; else it is of all of them, as it was
                of tables of before.

        Raises:
            ExperimentError: see above.
        """
        table = _identity_beside(Path(self.table)).get(DATA)
        told = {f"the perplexity table {self.table}": fingerprint if table == measured else table}
        if self.run is not None:
            told[f"the run {self.run}, whose memory is the budget,"] = Record.load(
                Path(self.run) / RESULT
            ).provenance.get("data_fingerprint")
        for what, other in told.items():
            if fingerprint is not None and other not in (None, fingerprint):
                raise ExperimentError(
                    f"{what} is of other data (fingerprint {other} there, {fingerprint} here), as where images have "
                    f"changed since; restore the data set, or delete that folder and make it again"
                )

    def require_weights(self, identity: Mapping[str, Any], weights_of: Callable[[Mapping[str, Any]], str]) -> None:
        """Refuse a table that was measured on other weights than those that a run starts from.

        What is not loaded does not count: a new classifier is another one for each seed.

        Args:
            identity: of the run.
            weights_of: what an identity of the run's task says of the weights, in words.

        Raises:
            ExperimentError: see above.
        """
        measured = _identity_beside(Path(self.table))
        there, here = weights_of(measured), weights_of(identity)
        if measured and there != here:
            raise ExperimentError(
                f"the perplexity table {self.table} was measured on other weights than this run starts from ({there} "
                f"there, {here} here); measure it on these, or start from those"
            )

    def _require_data(self, dataset: str) -> None:
        """Refuse a table or a run of another data set, as far as they tell theirs."""
        found = _dataset_of(_identity_beside(Path(self.table)))
        if found not in (None, dataset):
            raise ExperimentError(
                f"the perplexity table {self.table} is of the data set {found}, this run of {dataset}; measure it again"
            )
        used = dataset if self.run is None else Record.load(Path(self.run) / RESULT).run.dataset
        if used != dataset:
            raise ExperimentError(
                f"the budget is what the run {self.run} on the data set {used} used, this run is on {dataset}; take "
                f"that of a run on {dataset}, or give its size as budget.mib"
            )


def _identity_beside(table: Path) -> dict[str, Any]:
    """The identity of the measurement that left a table in its folder; empty of a table from elsewhere."""
    try:
        found = json.loads(table.with_name(IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _dataset_of(identity: Mapping[str, Any]) -> Any:
    """The data set of a measurement; those of before all told it have it among the settings, if at all."""
    data = identity.get("data")
    return identity.get(DATASET, data.get("dataset") if isinstance(data, dict) else None)


def _measured_by(table: Path) -> dict[str, Any]:
    """Those settings of the measurement that its folder tells and the table does not, as each task has them."""
    identity = _identity_beside(table)
    parts = [part for part in (identity.get("model"), identity.get("perplexity")) if isinstance(part, dict)]
    every = {name: value for part in parts for name, value in part.items()}
    return {name: every.get(name) for name in ("mode_energies", "storages")} if identity else {}


def one_energy(table: PerplexityTable, budget_bytes: float) -> RankPlan:
    """The highest energy that, taken for every layer, is within the budget.

    Raises:
        BudgetError: not even the lowest is.
    """
    plans = [RankPlan.of(table, [place] * len(table.layers)) for place in range(len(table.energies))]
    fitting = [plan for plan in plans if plan.nbytes <= budget_bytes]
    if not fitting:
        raise _below(table, budget_bytes, min(plan.nbytes for plan in plans))
    return fitting[-1]


def random_energies(table: PerplexityTable, budget_bytes: float, seed: int) -> RankPlan:
    """Energies that use the budget up without looking at perplexity.

    From the lowest energy everywhere, a layer drawn at random goes to its next energy, until no layer's next one fits.

    Raises:
        BudgetError: the lowest energies are above the budget.
    """
    source = np.random.default_rng(seed)
    chosen = [0] * len(table.layers)
    nbytes = RankPlan.of(table, chosen).nbytes
    if nbytes > budget_bytes:
        raise _below(table, budget_bytes, nbytes)
    open_layers = set(range(len(table.layers)))
    while open_layers:
        drawn = int(source.choice(sorted(open_layers)))
        sizes, place = table.layers[drawn].nbytes, chosen[drawn]
        if place + 1 == len(sizes) or nbytes + sizes[place + 1] - sizes[place] > budget_bytes:
            open_layers.remove(drawn)
        else:
            chosen[drawn], nbytes = place + 1, nbytes + sizes[place + 1] - sizes[place]
    return RankPlan.of(table, chosen)


def _below(table: PerplexityTable, budget_bytes: float, least: int) -> BudgetError:
    return BudgetError(
        f"the budget of {budget_bytes:g} bytes is below what the lowest energy of the perplexity table, "
        f"{table.energies[0]:g}, takes in {len(table.layers)} layers: {least} bytes"
    )
