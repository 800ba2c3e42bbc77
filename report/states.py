"""How far each planned run is that has no record yet, as its folder says it."""

from __future__ import annotations

from pathlib import Path

from experiment.history import METRICS
from experiment.jobs import FAILURE
from experiment.lock import holder

DONE, RUNNING, FAILED, INTERRUPTED, PLANNED = "done", "running", "failed", "interrupted", "planned"
STATES = (DONE, RUNNING, FAILED, INTERRUPTED, PLANNED)


def state_of(folder: Path) -> str:
    """One of `STATES` but "done" for a run's folder, which need not exist; nothing in it is touched."""
    if holder(folder) is not None:
        return RUNNING
    if (folder / FAILURE).exists():
        return FAILED
    return INTERRUPTED if (folder / METRICS).exists() else PLANNED
