"""How far each planned run is that has no record yet, as its folder says it."""

from __future__ import annotations

from pathlib import Path

from experiment.history import METRICS
from experiment.jobs import FAILURE
from experiment.lock import holder

DONE, RUNNING, FAILED, INTERRUPTED, PLANNED = "done", "running", "failed", "interrupted", "planned"


def state_of(folder: Path) -> str:
    """What a run without a record is: running, failed, interrupted or planned. Nothing in its folder is touched.

    Args:
        folder: of the run; need not exist.
    """
    if holder(folder) is not None:
        return RUNNING
    if (folder / FAILURE).exists():
        return FAILED
    return INTERRUPTED if (folder / METRICS).exists() else PLANNED
