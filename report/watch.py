"""`python -m report --watch`: how far the runs of a folder are, seen from that folder alone, wherever they are done.

A run is done with its record, running while a process holds its folder, failed where its log says why, else waiting.
One that has a record and a log was asked for with other settings since, which was refused.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table

from experiment import ExperimentError, Run
from experiment.folder import CONFIG
from experiment.history import METRICS, read_rows
from experiment.jobs import FAILURE, duration
from experiment.lock import holder
from experiment.record import RESULT, is_result
from report.methods import method_order
from report.states import DONE, FAILED, RUNNING, state_of
from report.summary import group_of, read_planned

LOOK = 5.0  # seconds between two looks
SHOWN = 12  # runs at work, and failed ones, that are listed
WAITING = "waiting"  # what is planned, and what was interrupted
STATES = (DONE, RUNNING, WAITING, FAILED)


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        run: which run.
        state: one of `STATES`.
        text: of one at work how far it is, in words, and of one that has failed why.
        seconds: that one at work still takes, as its epochs took so far; NaN where that is not known.
    """

    run: Run
    state: str
    text: str = ""
    seconds: float = math.nan


class Watch:
    """All runs that are planned below a folder; what is done is looked at once.

    Args:
        root: folder of all runs.

    Raises:
        ExperimentError: none is planned there.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._done = root, set[Run]()
        if not root.is_dir():
            raise ExperimentError(f"{root} is not a folder; give the folder that holds the runs")

    def look(self) -> list[State]:
        """Each planned run, by table, layers, method and seed.

        Raises:
            ExperimentError: none is planned.
        """
        folders = read_planned(self._root)
        if not folders:
            raise ExperimentError(f"no run is planned below {self._root}; a sweep plans them, also before it begins")
        return [self._state(run, folders[run]) for run in sorted(folders, key=_order)]

    def _state(self, run: Run, folder: Path) -> State:
        if run in self._done or is_result(folder / RESULT, run=run):
            self._done.add(run)
            refused = (folder / FAILURE).exists() and holder(folder) is None  # at its end a run takes its log away
            return State(run, FAILED, _last_line(folder / FAILURE)) if refused else State(run, DONE)
        state = state_of(folder)
        if state == RUNNING:
            return State(run, RUNNING, *_progress(folder))
        return State(run, FAILED, _last_line(folder / FAILURE)) if state == FAILED else State(run, WAITING)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _order(run: Run) -> tuple[Any, ...]:
    depth = math.inf if run.layers == "all" else run.layers
    return (group_of(run), depth, method_order(run.method), run.seed)


def _progress(folder: Path) -> tuple[str, float]:
    """How far a run at work is and who does it, and the seconds left."""
    by = holder(folder) or "just ended"
    seconds = [row["seconds"] for row in read_rows(folder / METRICS) if "seconds" in row]
    unit, total, step = _length(folder / CONFIG)
    if not total:
        return by, math.nan
    done = len(seconds) * step
    left = max(0.0, (total - done) / step) * statistics.median(seconds) if seconds else math.nan
    return f"{unit} {min(done, total):g}/{total:g}, {by}", left


def _length(path: Path) -> tuple[str, float, float]:
    """What a run is long in, how long it is, and how much of it each row is; 0 where its config does not say."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Plain)
        if "trainer" in content:
            return "epoch", float(content["trainer"]["max_epochs"] or 0), 1.0
        return "iteration", float(content["train_cfg"]["max_iters"]), float(content["train_cfg"]["val_interval"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        return "", 0.0, 1.0


class _Plain(yaml.SafeLoader):
    """Reads plain values, and nothing of what a config has beside them, such as tuples."""


_Plain.add_multi_constructor("", lambda loader, suffix, node: None)


def shown(states: Sequence[State]) -> Stack:
    """The tables and lines of one look."""
    parts: list[Any] = []
    groups: dict[Any, list[State]] = defaultdict(list)
    for state in states:
        groups[group_of(state.run)].append(state)
    for group, own in groups.items():
        parts.append(_table(str(group), own))
    running = [state for state in states if state.state == RUNNING]
    failed = [state for state in states if state.state == FAILED]
    for state in running[:SHOWN]:
        left = "" if math.isnan(state.seconds) else f", {duration(state.seconds)} left"
        parts.append(f"running  {_name(state.run)}: {state.text}{left}")
    for state in failed[:SHOWN]:
        parts.append(f"failed   {_name(state.run)}: {state.text}")
    for what, listed in ((RUNNING, running), (FAILED, failed)):
        if len(listed) > SHOWN:
            parts.append(f"and {len(listed) - SHOWN} more {what}")
    counts = Counter(state.state for state in states)
    parts.append(", ".join(f"{counts[name]} {name}" for name in STATES) + f" of {len(states)} runs")
    return Stack(*parts)


def _name(run: Run) -> str:
    return f"{run.model} on {run.dataset}, {run.method}, last {run.layers}, seed {run.seed}"


def _table(title: str, states: Iterable[State]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("layers", "method"):
        table.add_column(name)
    for name in STATES:
        table.add_column(name, justify="right")
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for state in states:
        rows[str(state.run.layers), state.run.method][state.state] += 1
    for (layers, method), counts in rows.items():
        table.add_row(layers, method, *(str(counts[name]) if counts[name] else "" for name in STATES))
    return table


def watch(root: Path) -> int:
    """Show how far the runs below a folder are, on a terminal until none is left to wait for, elsewhere once.

    Returns:
        0 if all are done, else 1.

    Raises:
        ExperimentError: there is nothing to watch.
    """
    watched, console = Watch(root), Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    states = watched.look()
    if not console.is_terminal:
        console.print(shown(states))
        return _code(states)
    try:
        with Live(shown(states), console=console, auto_refresh=False) as live:
            while any(state.state in (RUNNING, WAITING) for state in states):
                time.sleep(LOOK)
                states = watched.look()
                live.update(shown(states), refresh=True)
    except KeyboardInterrupt:
        pass
    return _code(states)


def _code(states: Iterable[State]) -> int:
    return 0 if all(state.state == DONE for state in states) else 1
