"""How a run begins, whatever its task: what is done is skipped, and a dry run says what would be done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from experiment.errors import InUseError
from experiment.folder import RunFolder, Status
from experiment.jobs import FAILURE
from experiment.record import TABLE, Run

_WOULD = {Status.NEW: "would run", Status.INTERRUPTED: "would resume", Status.DONE: "is done, would skip"}


def nothing_to_do(run: Run, folder: RunFolder, dry_run: bool, check: Callable[[], object] = lambda: None) -> str | None:
    """What to say of a run that is not to be begun, as it is done or only asked after; None if it is.

    Args:
        run: which run.
        folder: of the run.
        dry_run: whether it is only asked after.
        check: raises what the run would refuse later; called where it would be done, but is only asked after.

    Raises:
        ExperimentError: its folder holds a run with other settings, or on other data; or it is only asked after, and
            cannot be written.
    """
    for earlier in _earlier(run, folder):
        if (difference := earlier.difference) is not None:
            print(f"note: {earlier.path} holds no part of this run, as it is of other settings ({difference})")
        elif dry_run:
            return f"would take over: {run}\n  folder: {earlier.path}, which gets its name of now: {folder.path}"
        else:
            folder.take_over(earlier)
            print(f"taken over: {earlier.path} holds this run under its earlier name; it is {folder.path} now")
    status = folder.status()
    if folder.result.name == TABLE and status is Status.DONE and not _is_table(folder):
        status = Status.NEW
    if dry_run:
        if status is not Status.DONE:
            folder.require_place()
            check()
        return f"{_WOULD[status]}: {run}\n  folder: {folder.path}"
    if status is not Status.DONE:
        return None
    with contextlib.suppress(OSError):
        (folder.path / FAILURE).unlink(missing_ok=True)  # of a try with other settings, which was refused
    return f"done already: {run}\n  result: {folder.result}"


@contextlib.contextmanager
def at_work_on(run: Run, folder: RunFolder, config: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Hold the folder of a run that is to be done; see `experiment.RunFolder.locked`.

    One with other settings that was killed before it saved anything gives way, which is said.

    Raises:
        InUseError: another process is at work in it, or has done the run since it was looked at.
    """
    other = folder.difference if folder.known else None
    with folder.locked(config, begun):
        if other is not None:
            print(f"note: the run with other settings in {folder.path} had saved nothing, and is gone ({other})")
        if nothing_to_do(run, folder, dry_run=False) is not None:
            raise InUseError(f"another process has just done {run}; its result is {folder.result}")
        yield


def _earlier(run: Run, folder: RunFolder) -> Iterator[RunFolder]:
    """The folder of a run that has none, by the name that its method had before budgets were in it."""
    if folder.path.exists() or folder.path.parts[-3:-2] != (run.method,) or folder.result.name == TABLE:
        return
    for method in folder.path.parents[2].glob("*/"):
        earlier = folder.at(method.joinpath(*folder.path.parts[-2:]))
        if run.method.startswith(f"{method.name}_") and earlier.known:
            yield earlier


def _is_table(folder: RunFolder) -> bool:
    from lowrank import PerplexityTable, TableError

    try:
        PerplexityTable.load(folder.result)
    except TableError:
        return False
    return True
