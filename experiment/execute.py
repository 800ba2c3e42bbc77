"""How a run begins, whatever its task: what is done is skipped, and a dry run says what would be done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from experiment.errors import InUseError
from experiment.folder import RunFolder, Status
from experiment.record import TABLE, Run

_WOULD = {Status.NEW: "would run", Status.INTERRUPTED: "would resume", Status.DONE: "is done, would skip"}


def nothing_to_do(run: Run, folder: RunFolder, dry_run: bool) -> str | None:
    """What to say of a run that is not to be begun, as it is done or only asked after; None if it is.

    Raises:
        ExperimentError: its folder holds a run with other settings, or on other data.
    """
    status = folder.status()
    if folder.result.name == TABLE and status is Status.DONE and not _is_table(folder):
        status = Status.NEW
    if dry_run:
        return f"{_WOULD[status]}: {run}\n  folder: {folder.path}"
    return f"done already: {run}\n  result: {folder.result}" if status is Status.DONE else None


@contextlib.contextmanager
def locked(run: Run, folder: RunFolder, config: str) -> Iterator[None]:
    """Hold the folder of a run that is to be done; see `experiment.RunFolder.locked`.

    Raises:
        InUseError: another process is at work in it, or has done the run since it was looked at.
    """
    with folder.locked(config):
        if nothing_to_do(run, folder, dry_run=False) is not None:
            raise InUseError(f"another process has just done {run}; its result is {folder.result}")
        yield


def _is_table(folder: RunFolder) -> bool:
    from lowrank import PerplexityTable, TableError

    try:
        PerplexityTable.load(folder.result)
    except TableError:
        return False
    return True
