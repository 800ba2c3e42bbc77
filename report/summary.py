"""From the records of finished runs to one summary per task, setup, model and data set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import mean, stdev
from typing import Any

import pandas as pd

from experiment import ExperimentError, Record, find_records
from report.methods import method_order
from report.metrics import METRICS, Metrics

BASELINE = "vanilla"
MEANS = {
    "activation_formula_bytes": ("memory_bytes", "activation_formula"),
    "saved_measured_bytes": ("memory_bytes", "saved_measured"),
    "peak_measured_bytes": ("memory_bytes", "peak_measured"),
    "peak_inference_bytes": ("memory_bytes", "peak_inference"),
    "flops_paper": ("flops", "paper"),
    "flops_corrected": ("flops", "corrected"),
    "step_median_s": ("time_s", "step_median"),
}
RATIOS = {
    "activation_formula_times_less": "activation_formula_bytes",
    "saved_measured_times_less": "saved_measured_bytes",
    "flops_paper_times_less": "flops_paper",
    "flops_corrected_times_less": "flops_corrected",
    "step_median_times_less": "step_median_s",
}


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


def read_records(root: Path) -> list[Record]:
    """Every record below a folder.

    Raises:
        ExperimentError: there is none, or one is damaged, or two are of one run.
    """
    if not root.is_dir():
        raise ExperimentError(f"{root} is not a folder; give the folder that holds the runs")
    records = list(find_records(root))
    if not records:
        raise ExperimentError(f"no finished run below {root}; finish one first, or give another runs folder")
    seen = set()
    for run in (record.run for record in records):
        if run in seen:
            raise ExperimentError(f"two records of one run ({run}) below {root}; give a folder that holds it once")
        seen.add(run)
    return records


def group_records(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """The records of each table, tables in alphabetical order."""
    groups = defaultdict(list)
    for record in records:
        run = record.run
        groups[Group(run.task, run.setup, run.model, run.dataset)].append(record)
    return dict(sorted(groups.items()))


def summarise(
    records: Sequence[Record],
    baseline: str = BASELINE,
    reported: Mapping[tuple[int | str, str], float] | None = None,
    reported_other: Mapping[tuple[int | str, str], float] | None = None,
) -> pd.DataFrame:
    """One row per number of layers and method, by layers ("all" last), then by method.

    A mean is over all seeds of its row; where one seed lacks the number it is NaN. "times_less" is the baseline's value
    at the same number of layers over the row's. `equal_accuracy_times_less` is the least formula memory among the
    baseline's rows whose mean main accuracy is at least that of the row, over the row's memory; NaN if none reaches it.

    Args:
        records: records of one group.
        baseline: the method that ratios refer to.
        reported: published main accuracies in percent, by layers and method; see `report.metrics`.
        reported_other: the same of the other accuracy.

    Returns:
        Columns with their units in their names. `seeds` is a tuple; the standard deviations are of the sample, NaN for
        one seed.
    """
    metrics = METRICS[records[0].run.task]
    rows = defaultdict(list)
    for record in records:
        rows[record.run.layers, record.run.method].append(record)
    keys = sorted(rows, key=lambda key: (key[0] == "all", 0 if key[0] == "all" else key[0], method_order(key[1])))
    table = pd.DataFrame([_row(rows[key], metrics) for key in keys])
    table["reported_accuracy_percent"] = [(reported or {}).get(key, math.nan) for key in keys]
    if metrics.reported_other is not None:
        table["reported_other_percent"] = [(reported_other or {}).get(key, math.nan) for key in keys]
    return _with_ratios(table, baseline, metrics)


def _row(records: Sequence[Record], metrics: Metrics) -> dict[str, Any]:
    run = records[0].run
    seeds = tuple(sorted(record.run.seed for record in records))
    row: dict[str, Any] = {"layers": run.layers, "method": run.method, "n": len(seeds), "seeds": seeds}
    for name in (metrics.main, metrics.other):
        percents = [100 * record.accuracy.get(name, math.nan) for record in records]
        row[f"{name}_mean_percent"], row[f"{name}_std_percent"] = _mean(percents), _std(percents)
    for column, (part, name) in MEANS.items():
        row[column] = _mean([getattr(record, part).get(name, math.nan) for record in records])
    return row


# Sums of shares differ in their last bits by the order of seeds; ten digits keep equal accuracies equal.
def _mean(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else round(float(mean(values)), 10)


def _std(values: Sequence[float]) -> float:
    return math.nan if len(values) < 2 or any(map(math.isnan, values)) else round(float(stdev(values)), 10)


def _with_ratios(table: pd.DataFrame, baseline: str, metrics: Metrics) -> pd.DataFrame:
    reference = table[table["method"] == baseline]
    at_depth = reference.set_index("layers")
    for ratio, column in RATIOS.items():
        table[ratio] = _divide(table["layers"].map(at_depth[column]), table[column])
    accuracy = table[metrics.mean]
    table[metrics.difference] = (accuracy - table["layers"].map(at_depth[metrics.mean]).astype(float)).round(10)
    memory = [_least_memory(reference[reference[metrics.mean] >= value]) for value in accuracy]
    table["equal_accuracy_times_less"] = _divide(pd.Series(memory), table["activation_formula_bytes"])
    return table


def _divide(above: pd.Series, below: pd.Series) -> pd.Series:
    return above.astype(float) / below.where(below > 0)


def _least_memory(reaching: pd.DataFrame) -> float:
    return float(reaching["activation_formula_bytes"].min())
