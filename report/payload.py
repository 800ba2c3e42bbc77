"""What the page shows, as JSON: every number once, in rows; how they are put into words is the page's own affair."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.colors import to_hex

from experiment import Record, Run
from experiment.finite import finite
from experiment.history import METRICS as CURVES
from experiment.jobs import FAILURE
from experiment.record import RESULT
from report.comparison import compared_rows
from report.details import details
from report.metrics import METRICS, Metrics
from report.pareto import dominated
from report.plots import looks_of
from report.published import Point
from report.recipes import recipe_labels
from report.shown import AXES, COLUMNS
from report.states import DONE, state_of
from report.summary import Group, group_records
from report.tables import RECIPE_NOTE, recipes_differ

CHUNK = 32  # runs whose details are packed together; one is unpacked when one of its runs is looked at
FURTHER = ("missing", "main_std", "other_std", "dominated")  # beside the columns
DIGITS = 7  # significant ones of a number in a row


@dataclass(frozen=True)
class Listed:
    """A run that the page knows: finished, with its record, or not."""

    run: Run
    folder: Path
    record: Record | None


def listed_runs(found: Sequence[tuple[Path, Record]], planned: Mapping[Run, Path]) -> list[Listed]:
    """The finished runs, then those that are planned and not finished."""
    done = [Listed(record.run, path.parent, record) for path, record in found]
    known = {one.run for one in done}
    return done + [Listed(run, folder, None) for run, folder in planned.items() if run not in known]


def compose(
    tables: Mapping[Group, pd.DataFrame],
    runs: Sequence[Listed],
    curves: Mapping[Group, Sequence[Point]],
    baseline: str,
    other: tuple[str, Mapping[Group, pd.DataFrame]] | None = None,
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        tables: the summary of each group.
        runs: that they are of.
        curves: published points of each group.
        baseline: the method that ratios refer to.
        other: the name of another folder of runs and its summaries, to be compared with these.
    """
    setups: dict[tuple[str, str], list[Group]] = {}
    for group in sorted(tables):
        setups.setdefault((group.task, group.setup), []).append(group)
    places = {key: place for place, key in enumerate(setups)}
    methods = [method for table in tables.values() for method in table["method"]]
    methods += [point.method for points in curves.values() for point in points]
    looks = looks_of(list(dict.fromkeys(methods)))
    labels = _labels(runs)
    return {
        "baseline": baseline,
        "columns": [asdict(column) for column in COLUMNS],
        "axes": AXES,
        "keys": [*(column.key for column in COLUMNS), *FURTHER],
        "looks": {method: [to_hex(look.colour), look.marker, look.dash] for method, look in looks.items()},
        "setups": [_setup(*key, {group: tables[group] for group in groups}, curves) for key, groups in setups.items()],
        "runs": [_run(one, places, labels.get(one.run)) for one in runs],
        "made_by": {
            name: sorted({str(one.record.provenance.get(name, "not recorded")) for one in runs if one.record})
            for name in ("hardware", "code_version")
        },
        "chunk": CHUNK,
        "details": [_packed(runs[start : start + CHUNK]) for start in range(0, len(runs), CHUNK)],
        "compared": None if other is None else {"name": other[0], "rows": compared_rows(tables, other[1])},
    }


def _setup(
    task: str, setup: str, tables: Mapping[Group, pd.DataFrame], curves: Mapping[Group, Sequence[Point]]
) -> dict[str, Any]:
    metrics = METRICS[task]
    published = [
        [group.model, group.dataset, point.method, point.layers, told.accuracy, told.memory_bytes, told.flops]
        for group in tables
        for point in curves.get(group, ())
        for told in [point.reported]
    ]
    return {
        "title": f"Setup {setup} ({task})",
        "accuracy": [metrics.main_title, metrics.other_title, metrics.label],
        "note": " ".join([metrics.note, *([RECIPE_NOTE] if any(map(recipes_differ, tables.values())) else [])]),
        "published_accuracy": metrics.published_label,
        "published": [[_plain(value) for value in point] for point in published],
        "rows": [row for group, table in tables.items() for row in _rows(group, table, metrics)],
    }


def _rows(group: Group, table: pd.DataFrame, metrics: Metrics) -> Iterator[list[Any]]:
    known = {"main": metrics.mean, "main_std": metrics.std, "difference": metrics.difference}
    known |= {"other": f"{metrics.other}_mean_percent", "other_std": f"{metrics.other}_std_percent"}
    worse = [_dominated(table, axis, metrics.mean) for axis in AXES]
    for place, row in enumerate(table.to_dict("records")):
        told = {"model": group.model, "dataset": group.dataset, "dominated": [flags[place] for flags in worse]}
        told |= {key: row[name] for key, name in known.items()}
        keys = (*(column.key for column in COLUMNS), *FURTHER)
        yield [_plain(told[key] if key in told else row[key]) for key in keys]


def _dominated(table: pd.DataFrame, axis: str, accuracy: str) -> list[int]:
    """For each row 1 where another one is better at no more cost, 0 where none is or a number is missing."""
    whole = table[(table[axis] > 0) & table[accuracy].notna()]
    flags = dict(zip(whole.index, dominated(list(whole[axis]), list(whole[accuracy])), strict=True))
    return [int(flags.get(index, False)) for index in table.index]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _labels(runs: Sequence[Listed]) -> dict[Run, str]:
    """What is different in the recipe of each finished run, as its row of a summary says it."""
    labels: dict[Run, str] = {}
    for records in group_records(one.record for one in runs if one.record is not None).values():
        label = recipe_labels(records)
        labels |= {record.run: label(record) for record in records}
    return labels


def _run(one: Listed, places: Mapping[tuple[str, str], int], recipe: str | None) -> list[Any]:
    run = one.run
    state = state_of(one.folder) if one.record is None else DONE
    written = (one.folder / name for name in (RESULT, CURVES, FAILURE))
    when = next((_time(path) for path in written if path.exists()), None)
    where = (places[run.task, run.setup], run.model, run.dataset)
    return [*where, run.method, run.layers, run.seed, state, recipe, when, str(one.folder)]


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M")


def _packed(runs: Sequence[Listed]) -> str:
    """Details of runs as JSON, compressed, in base64."""
    content = json.dumps(finite([details(one.folder, one.record) for one in runs]), allow_nan=False)
    return base64.b64encode(gzip.compress(content.encode(), 6, mtime=0)).decode()
