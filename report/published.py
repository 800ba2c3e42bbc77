"""Accuracies as published, from `configs/published/<task>.yaml`.

The file is a list; each entry is one published number:

    - {setup: A, model: mcunet, dataset: pets, method: hosvd_0.8, layers: 2, accuracy: 39.2, source: "ASI, fig. 4"}

`layers` is a whole number or `all`, `method` the tag of the runs, `accuracy` in percent: of segmentation the mIoU.
`source`, and of segmentation `macc` (percent), may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiment import ExperimentError
from experiment.record import check_layers
from report.summary import Group

NAMES = ("setup", "model", "dataset", "method")
REQUIRED = (*NAMES, "layers", "accuracy")
OPTIONAL = ("source", "macc")

Place = tuple[int | str, str]
Published = Mapping[Group, Mapping[Place, float]]


def load_published(folder: Path, task: str, key: str | None = "accuracy") -> Published:
    """The published accuracies of a task in percent: for each table, by layers and method.

    Empty if there is no file for the task, or no `key`; entries without that key are left out.

    Raises:
        ExperimentError: the file cannot be read or an entry does not fit the schema; names file, entry and key.
    """
    path = folder / f"{task}.yaml"
    if key is None or not path.exists():
        return {}
    published: dict[Group, dict[Place, float]] = {}
    seen: dict[Group, set[Place]] = {}
    for number, entry in enumerate(_entries(path), start=1):
        try:
            group, place, values = _parse(entry, task)
        except ValueError as error:
            raise ExperimentError(f"{path}, entry {number}: {error}") from None
        if place in seen.setdefault(group, set()):
            raise ExperimentError(f"{path}, entry {number}: {group}, {place[1]}, layers {place[0]} is there twice")
        seen[group].add(place)
        if key in values:
            published.setdefault(group, {})[place] = values[key]
    return published


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


def _parse(entry: Any, task: str) -> tuple[Group, Place, dict[str, float]]:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a mapping with the keys {', '.join(REQUIRED)}")
    if missing := [key for key in REQUIRED if key not in entry]:
        raise ValueError(f"lacks {', '.join(missing)}")
    if unknown := [str(key) for key in entry if key not in REQUIRED + OPTIONAL]:
        raise ValueError(f"has the unknown key {', '.join(unknown)}; allowed are {', '.join(REQUIRED + OPTIONAL)}")
    for name in NAMES:
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} is {entry[name]!r}, not text; write it in quotes")
    check_layers(entry["layers"])
    values = {key: entry[key] for key in ("accuracy", "macc") if key in entry}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(f"{key} is {value!r}, not a number from 0 to 100 (percent)")
    group = Group(task, entry["setup"], entry["model"], entry["dataset"])
    return group, (entry["layers"], entry["method"]), {key: float(value) for key, value in values.items()}
