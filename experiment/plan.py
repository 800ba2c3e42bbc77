"""What was set out to be run, so that a report can show what is missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from experiment.errors import ExperimentError
from experiment.files import below, file_lock, write_whole
from experiment.record import Run

PLANNED = "planned.json"
_SHARED = ("task", "setup", "model", "dataset")  # the same for all runs of a file
_OWN = ("method", "layers", "seed")


def plan_of(run: Run, root: Path) -> Path:
    """The file in which a run is planned below the folder of all runs."""
    return run.folder(root).parents[2] / PLANNED


def add_planned(root: Path, runs: Iterable[Run]) -> None:
    """Add runs to what is planned below a folder: one `planned.json` for each task, setup, model and data set.

    Raises:
        ExperimentError: a plan that is there is damaged, or the folder cannot be written.
    """
    plans: dict[Path, set[Run]] = defaultdict(set)
    for run in runs:
        plans[plan_of(run, root)].add(run)
    for path, asked in plans.items():
        if asked <= _known(path):  # also where nothing can be written
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(path):
                _add(path, asked)
        except OSError as error:
            raise ExperimentError(f"{path} cannot be written ({error.strerror}); give another --runs-dir") from None


def _add(path: Path, asked: set[Run]) -> None:
    """Add runs of one task, setup, model and data set to their plan, whose lock is held."""
    entries = sorted(([getattr(run, key) for key in _OWN] for run in asked | _known(path)), key=str)
    shared = {key: getattr(next(iter(asked)), key) for key in _SHARED}
    text = ",\n  ".join(json.dumps(entry) for entry in entries)
    write_whole(path, f'{{"run": {json.dumps(shared)},\n "{"/".join(_OWN)}": [\n  {text}]}}\n')


def _known(path: Path) -> set[Run]:
    return set(load_plan(path)) if path.exists() else set()


def find_planned(root: Path) -> list[Run]:
    """Every run that is planned below a folder.

    Raises:
        ExperimentError: a plan is damaged.
    """
    return [run for path in below(root, PLANNED) for run in load_plan(path)]


def load_plan(path: Path) -> list[Run]:
    """The runs of one plan.

    Raises:
        ExperimentError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shared = {key: content["run"][key] for key in _SHARED}
        return [Run(**shared, **dict(zip(_OWN, entry, strict=True))) for entry in content["/".join(_OWN)]]
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExperimentError(f"{path} is not a plan ({error}); delete it, the next sweep writes it anew") from None
