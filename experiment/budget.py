"""A memory budget: given in MiB, or what a finished run used."""

from __future__ import annotations

from pathlib import Path

from experiment.errors import ExperimentError
from experiment.record import RESULT, Record


def budget_bytes(mib: float | None, run: str | None, setting: str) -> float:
    """The budget in bytes.

    Args:
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget, as the papers take HOSVD at energy 0.8.
        setting: name of the setting that holds the two, for the error's message.

    Raises:
        ExperimentError: not exactly one of the two is given, or there is no such run.
    """
    if (mib is None) == (run is None):
        raise ExperimentError(f"a budget needs either {setting}.mib or {setting}.run, not both")
    if mib is not None:
        return mib * 2**20
    assert run is not None
    return Record.load(Path(run) / RESULT).memory_bytes["activation_formula"]
