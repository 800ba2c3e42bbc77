"""Numbers as published, from `configs/published/<task>.yaml` (tables) and `<task>_curves.yaml` (points of figures).

Each file is a list; each entry is one published row:

    - {setup: A, model: mcunet, dataset: pets, method: hosvd_0.8, layers: 2, accuracy: 18.6, memory_mib: 0.13}

`layers` is a whole number or `all`, and in curves also `unknown`; `method` is the tag of the runs; `accuracy` is in
percent, of segmentation the mIoU, beside which `macc` may stand; `memory_mib` (2^20 bytes) and `flops` are by the
papers' formulas. Other keys are for readers of the file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiment import ExperimentError
from experiment.record import check_layers
from report.summary import Group, Reported

NAMES = ("setup", "model", "dataset", "method")
REQUIRED = (*NAMES, "layers", "accuracy")
PERCENTS = ("accuracy", "macc")
NUMBERS = ("memory_mib", "memory_mean_mib", "memory_std_mib", "flops", "backward_flops")
OPTIONAL = ("macc", *NUMBERS, "source", "note")
UNKNOWN = "unknown"

Published = Mapping[Group, Mapping[tuple[int | str, str], Reported]]


@dataclass(frozen=True)
class Point:
    """One point of a published curve; `layers` may be "unknown"."""

    layers: int | str
    method: str
    reported: Reported


def load_published(folder: Path, task: str) -> Published:
    """The published rows of a task's tables: for each table, by layers and method.

    Empty if there is no file for the task.

    Raises:
        ExperimentError: the file cannot be read or an entry does not fit the schema; names file, entry and key.
    """
    published: dict[Group, dict[tuple[int | str, str], Reported]] = defaultdict(dict)
    for where, group, point in _points(folder / f"{task}.yaml", task, ()):
        key = (point.layers, point.method)
        if key in published[group]:
            raise ExperimentError(f"{where}: {group}, {point.method}, layers {point.layers} is there twice")
        published[group][key] = point.reported
    return dict(published)


def load_curves(folder: Path, task: str) -> Mapping[Group, Sequence[Point]]:
    """The points of a task's published curves, for each table; empty if there is no file for the task.

    Raises:
        ExperimentError: as `load_published`.
    """
    curves: dict[Group, list[Point]] = defaultdict(list)
    for _, group, point in _points(folder / f"{task}_curves.yaml", task, (UNKNOWN,)):
        curves[group].append(point)
    return dict(curves)


def _points(path: Path, task: str, further_layers: Sequence[str]) -> Iterator[tuple[str, Group, Point]]:
    for number, entry in enumerate(_entries(path) if path.exists() else [], start=1):
        where = f"{path}, entry {number}"
        try:
            group, point = _parse(entry, task, further_layers)
        except ValueError as error:
            raise ExperimentError(f"{where}: {error}") from None
        yield where, group, point


def _entries(path: Path) -> list[Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ExperimentError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return []
    if not isinstance(content, list):
        raise ExperimentError(f"{path} must be a list of entries with the keys {', '.join(REQUIRED)}")
    return content


def _parse(entry: Any, task: str, further_layers: Sequence[str]) -> tuple[Group, Point]:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a mapping with the keys {', '.join(REQUIRED)}")
    if missing := [key for key in REQUIRED if key not in entry]:
        raise ValueError(f"lacks {', '.join(missing)}")
    if unknown := [str(key) for key in entry if key not in REQUIRED + OPTIONAL]:
        raise ValueError(f"has the unknown key {', '.join(unknown)}; allowed are {', '.join(REQUIRED + OPTIONAL)}")
    for name in NAMES:
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} is {entry[name]!r}, not text; write it in quotes")
    if entry["layers"] not in further_layers:
        check_layers(entry["layers"])
    for key in PERCENTS:
        if _number(entry, key) > 100:
            raise ValueError(f"{key} is {entry[key]:g}, not a number from 0 to 100 (percent)")
    for key in NUMBERS:
        _number(entry, key)
    group = Group(task, entry["setup"], entry["model"], entry["dataset"])
    reported = Reported(
        accuracy=_number(entry, "accuracy"),
        memory_bytes=2**20 * _number(entry, "memory_mib"),
        flops=_number(entry, "flops"),
        other=_number(entry, "macc"),
    )
    return group, Point(entry["layers"], entry["method"], reported)


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key, math.nan)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key} is {value!r}, not a number from 0")
    return float(value)
