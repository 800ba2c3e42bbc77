"""From the records of finished runs to one summary per task, setup, model and data set."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import mean, stdev
from typing import Any, TypeVar

import pandas as pd

from experiment import ExperimentError, Record, Run
from experiment.files import below
from experiment.plan import PLANNED, load_plan
from experiment.record import RESULT
from report.methods import BASELINE, method_order
from report.metrics import METRICS, Metrics
from report.recipes import Recipe, recipes

LARGEST = 10**24  # bytes, FLOPs, seconds; more is an error in a file
T = TypeVar("T")
Key = tuple[int | str, str, Recipe]  # of a row: layers, method, and in what its runs differ from those of others
MEANS = {
    "activation_formula_bytes": ("memory_bytes", "activation_formula"),
    "saved_measured_bytes": ("memory_bytes", "saved_measured"),
    "peak_measured_bytes": ("memory_bytes", "peak_measured"),
    "peak_inference_bytes": ("memory_bytes", "peak_inference"),
    "weight_bytes": ("memory_bytes", "weight_measured"),
    "weight_gradient_bytes": ("memory_bytes", "weight_gradient_measured"),
    "weight_optimizer_bytes": ("memory_bytes", "weight_optimizer_measured"),
    "weight_emulated_bytes": ("memory_bytes", "weight_emulated_formula"),
    "flops_paper": ("flops", "paper"),
    "flops_corrected": ("flops", "corrected"),
    "step_median_s": ("time_s", "step_median"),
    "train_loss": ("loss", "train_last"),
}
RATIOS = {
    "activation_formula_times_less": "activation_formula_bytes",
    "saved_measured_times_less": "saved_measured_bytes",
    "flops_paper_times_less": "flops_paper",
    "flops_corrected_times_less": "flops_corrected",
    "step_median_times_less": "step_median_s",
}
EQUAL_ACCURACY_RATIOS = {
    "equal_accuracy_times_less": "activation_formula_bytes",
    "equal_accuracy_flops_times_less": "flops_corrected",
    "equal_accuracy_saved_times_less": "saved_measured_bytes",
    "equal_accuracy_step_times_less": "step_median_s",
}
EQUAL_MEMORY_DIFFERENCES = {
    "equal_memory_difference_points": "activation_formula_bytes",
    "equal_saved_difference_points": "saved_measured_bytes",
}


@dataclass(frozen=True)
class Reported:
    """A published row: accuracy in percent; memory in bytes and FLOPs by the papers' formulas, NaN if not stated.

    Attributes:
        accuracy: the main accuracy of the task; see `report.metrics`.
        other: the one beside it.
    """

    accuracy: float
    memory_bytes: float = math.nan
    flops: float = math.nan
    other: float = math.nan


@dataclass(frozen=True, order=True)
class Group:
    """What one table and one figure are about."""

    task: str
    setup: str
    model: str
    dataset: str

    @property
    def folder(self) -> PurePath:
        """Folder of its outputs, relative to the folder of all outputs."""
        return PurePath(self.task, self.setup, self.model, self.dataset)

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}, setup {self.setup}"


def find_runs(root: Path) -> list[tuple[Path, Record]]:
    """Every whole record below a folder with its file, one a run; a line of warning for each file that is left out.

    Of several records of one run, as a copied folder gives, the first in the order of paths is taken.

    Raises:
        ExperimentError: there is none, and why if there are files of that name.
    """
    if not root.is_dir():
        raise ExperimentError(f"{root} is not a folder; give the folder that holds the runs")
    found, problems = _whole(below(root, RESULT), lambda path: (path, _record(path)))
    if problems and not found:
        raise ExperimentError(problems[0] + (f"; {len(problems) - 1} more are not read either" if problems[1:] else ""))
    if not found:
        raise ExperimentError(f"no finished run below {root}; finish one first, or give another runs folder")
    once: dict[Run, tuple[Path, Record]] = {}
    for path, record in found:
        first, taken = once.setdefault(record.run, (path, record))
        if first != path:
            same = "a copy of" if record == taken else "another record of the run in"
            problems.append(f"{path} is {same} {first}, which is shown; keep one of them")
    _warn(problems)
    return list(once.values())


def read_planned(root: Path) -> dict[Run, Path]:
    """Every run that is planned below a folder, with its own folder; a line of warning for each plan that is none."""
    plans, problems = _whole(below(root, PLANNED), lambda path: (path, load_plan(path)))
    _warn(problems)
    return {run: _beside(path, run) for path, plan in plans for run in plan if run.task in METRICS}


def _beside(plan: Path, run: Run) -> Path:
    """The folder of a run of a plan, which lies in that of its data set."""
    return plan.parent.joinpath(*run.folder(Path()).parts[4:])


def _whole(paths: Iterable[Path], read: Callable[[Path], T]) -> tuple[list[T], list[str]]:
    """What can be read of files, and what is wrong with the others: one that is damaged hides no other."""
    found, problems = [], []
    for path in paths:
        try:
            found.append(read(path))
        except Exception as error:  # a file from anywhere may be anything
            why = str(error) if isinstance(error, ExperimentError) else f"{path}: {type(error).__name__}: {error}"
            problems.append(" ".join(why.split())[:400])
    return found, problems


def _warn(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"report: warning: left out: {problem}", file=sys.stderr)


def _record(path: Path) -> Record:
    record = Record.load(path)
    if record.run.task not in METRICS:
        raise ExperimentError(f"{path} is of the task {record.run.task!r}; known are {', '.join(METRICS)}")
    parts = {name: getattr(record, name) for name in ("accuracy", "memory_bytes", "flops", "time_s")}
    for part, values in parts.items():
        for name, value in values.items():
            if not 0 <= value <= LARGEST:
                raise ExperimentError(f"{path} has {value:.3g} as {part}.{name}, which no run can have")
    return record


def group_of(run: Run) -> Group:
    """The table that a run is in."""
    return Group(run.task, run.setup, run.model, run.dataset)


def group_records(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """The records of each table, tables in alphabetical order."""
    groups = defaultdict(list)
    for record in records:
        groups[group_of(record.run)].append(record)
    return dict(sorted(groups.items()))


def summarise(
    records: Sequence[Record],
    baseline: str = BASELINE,
    reported: Mapping[tuple[int | str, str], Reported] | None = None,
    planned: Iterable[Run] = (),
) -> pd.DataFrame:
    """One row per number of layers and method, by layers ("all" last), then by method; also for those not yet run.

    Runs of one layers and method that were trained by different recipes, or with other settings of the method, have a
    row each, and a row is compared with rows of its own recipe alone; see `report.recipes`.

    A mean is over all seeds of its row; where one seed lacks the number it is NaN. "times_less" is the baseline's value
    at the same number of layers over the row's. `equal_accuracy_times_less` is the least formula memory among the
    baseline's rows whose mean main accuracy is at least that of the row, over the row's memory, and
    `equal_accuracy_..._times_less` the same of corrected FLOPs, of what is kept and of a step's time; NaN if none
    reaches it. `equal_memory_difference_points` is the row's main accuracy less the highest of the baseline's rows
    whose formula memory is at most the row's, and `equal_saved_difference_points` the same of what is kept; NaN if
    there is none.

    Args:
        records: records of one group.
        baseline: the method that ratios refer to.
        reported: published rows, by layers and method.
        planned: runs that there should be; those of them that are not among the records are missing.

    Returns:
        Columns with their units in their names. `recipe` says in what a row's recipe or settings differ from others of
        the table, "" where all are the same. `seeds` is a tuple; the standard deviations are of the sample, NaN for
        one seed. `missing` is the number of planned runs that are not there. `reported_difference_points` is the
        accuracy on the validation split less the reported one, which is of a validation split as well.
    """
    planned = list(planned)
    metrics = METRICS[[*(record.run for record in records), *planned][0].task]
    recipe_of = recipes(records)
    rows: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        rows[record.run.layers, record.run.method, recipe_of(record)].append(record)
    absent = set(planned) - {record.run for record in records}
    missing: Counter[Key] = Counter()
    for run in absent:
        own = sorted(key[2] for key in rows if key[:2] == (run.layers, run.method))
        missing[run.layers, run.method, own[0] if own else Recipe()] += 1
    keys = sorted(
        rows.keys() | missing.keys(),
        key=lambda key: (key[0] == "all", 0 if key[0] == "all" else key[0], method_order(key[1]), key[2]),
    )
    table = pd.DataFrame([_row(key, rows[key], missing[key], metrics) for key in keys])
    published = [(reported or {}).get(key[:2], Reported(math.nan)) for key in keys]
    table["reported_accuracy_percent"] = [row.accuracy for row in published]
    table["reported_other_percent"] = [row.other for row in published]
    table["reported_memory_bytes"] = [row.memory_bytes for row in published]
    table["reported_flops"] = [row.flops for row in published]
    difference = table[f"{metrics.published}_mean_percent"] - table["reported_accuracy_percent"]
    table["reported_difference_points"] = difference.round(10)
    return _with_ratios(table, [key[2].trained for key in keys], baseline, metrics)


def _row(key: Key, records: Sequence[Record], missing: int, metrics: Metrics) -> dict[str, Any]:
    seeds = tuple(sorted(record.run.seed for record in records))
    row: dict[str, Any] = {"layers": key[0], "method": key[1], "recipe": str(key[2])}
    row |= {"n": len(seeds), "missing": missing, "seeds": seeds}
    for name in (metrics.main, metrics.other):
        percents = [100 * record.accuracy.get(name, math.nan) for record in records]
        row[f"{name}_mean_percent"], row[f"{name}_std_percent"] = _mean(percents), _std(percents)
    for column, (part, name) in MEANS.items():
        row[column] = _mean([getattr(record, part).get(name, math.nan) for record in records])
    row["weight_training_bytes"] = sum(row[f"weight{part}_bytes"] for part in ("", "_gradient", "_optimizer"))
    return row


# Sums of shares differ in their last bits by the order of seeds; ten digits keep equal accuracies equal.
def _mean(values: Sequence[float]) -> float:
    return math.nan if not values or any(map(math.isnan, values)) else round(float(mean(values)), 10)


def _std(values: Sequence[float]) -> float:
    return math.nan if len(values) < 2 or any(map(math.isnan, values)) else round(float(stdev(values)), 10)


def _with_ratios(table: pd.DataFrame, trained: Sequence[str], baseline: str, metrics: Metrics) -> pd.DataFrame:
    """The table with what compares its rows with the baseline's; `trained` tells the recipes to compare within."""
    recipe = pd.Series(list(trained), table.index, dtype=object)
    reference = table[table["method"] == baseline]
    compared = _baseline_rows(table, recipe, reference)

    def of_baseline(column: str) -> pd.Series:
        found = [math.nan if place is None else table[column][place] for place in compared]
        return pd.Series(found, table.index, dtype=float)

    for ratio, column in RATIOS.items():
        table[ratio] = _divide(of_baseline(column), table[column])
    accuracy = table[metrics.mean]
    table[metrics.difference] = (accuracy - of_baseline(metrics.mean)).round(10)
    table["train_loss_difference"] = (table["train_loss"] - of_baseline("train_loss")).round(10)
    for ratio, column in EQUAL_ACCURACY_RATIOS.items():
        # Of as much accuracy: turned around, so that the least of a cost is the most of its negative.
        table[ratio] = _divide(
            -_best(recipe, reference, -accuracy, -reference[metrics.mean], -reference[column]), table[column]
        )
    for difference, column in EQUAL_MEMORY_DIFFERENCES.items():
        best = _best(recipe, reference, table[column], reference[column], reference[metrics.mean])
        table[difference] = (accuracy - best).round(10)
    return table


def _baseline_rows(table: pd.DataFrame, recipe: pd.Series, reference: pd.DataFrame) -> list[Any]:
    """For each row the place of the baseline's at its depth and of its recipe, itself if it is one; None where there is
    none, or more than one, as nothing says which."""
    found: dict[tuple[Any, str], list[Any]] = defaultdict(list)
    for place in reference.index:
        found[table["layers"][place], recipe[place]].append(place)
    compared = []
    for place in table.index:
        own = found[table["layers"][place], recipe[place]]
        compared.append(place if place in own else own[0] if len(own) == 1 else None)
    return compared


def _best(
    recipe: pd.Series, reference: pd.DataFrame, limits: pd.Series, costs: pd.Series, gains: pd.Series
) -> pd.Series:
    """For each row, the most gain of the reference's rows of its recipe that cost at most its limit, NaN for none."""
    every = list(zip(recipe[reference.index], costs, gains, strict=True))
    found = [
        max((gain for other, cost, gain in every if other == own and cost <= limit and gain == gain), default=math.nan)
        for own, limit in zip(recipe, limits, strict=True)
    ]
    return pd.Series(found, recipe.index, dtype=float)


def _divide(above: pd.Series, below: pd.Series) -> pd.Series:
    return above.astype(float) / below.where(below > 0)
