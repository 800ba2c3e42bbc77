"""A memory budget: given in MiB, or what a finished run used, or a part of that."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from experiment.errors import ExperimentError
from experiment.record import RESULT, Record

BUDGET_METHOD = "hosvd_0.8"  # the papers give ASI the memory that this method used
PUBLISHED, OF_HOSVD = "published", "hosvd"
BUDGET_HELP = (
    "ASI's memory: published, hosvd for that of the HOSVD run, or such as 1/22 for that part of the vanilla run's "
    "(default: published where it is known, else hosvd)"
)


def budget_bytes(mib: float | None, run: str | None, setting: str, divisor: int = 1) -> float:
    """The budget in bytes.

    Args:
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget, as the papers take HOSVD at energy 0.8.
        setting: name of the setting that holds them, for the error's message.
        divisor: what that run's memory is divided by: 20 for a twentieth of it; see `check_divisor`.

    Raises:
        ExperimentError: not exactly one of the two is given, or there is no such run.
    """
    if (mib is None) == (run is None):
        raise ExperimentError(f"a budget needs either {setting}.mib or {setting}.run, not both")
    if mib is not None:
        return mib * 2**20
    assert run is not None
    return Record.load(Path(run) / RESULT).memory_bytes["activation_formula"] / divisor


def check_divisor(divisor: int, run: str | None, setting: str) -> None:
    """Arguments as of `budget_bytes`.

    Raises:
        ExperimentError: the divisor is not of a run, or below 1.
    """
    if divisor < 1 or (divisor > 1 and run is None):
        raise ExperimentError(
            f"{setting}.divisor is {divisor}; allowed are whole numbers from 1, and with {setting}.run alone"
        )


def budget_word(text: str) -> str:
    """A word that says whose memory ASI's budget is, as a command line takes it.

    Raises:
        ArgumentTypeError: it is none of "published", "hosvd" and such as "1/22".
    """
    part = text.removeprefix("1/")
    if text not in (PUBLISHED, OF_HOSVD) and (part == text or not part.isdecimal() or int(part) < 1):
        raise ArgumentTypeError(f"{text!r} is neither published nor hosvd nor such as 1/22")
    return text


def budget_source(word: str | None, is_published: bool) -> tuple[str | None, int]:
    """The method whose run gives the budget, None for the published one; and what its memory is divided by.

    Args:
        word: what `budget_word` takes; None for the published budget where there is one, else that of the HOSVD run.
        is_published: whether a budget is published for this network, data set and depth.
    """
    word = word or (PUBLISHED if is_published else OF_HOSVD)
    if word in (PUBLISHED, OF_HOSVD):
        return (None if word == PUBLISHED else BUDGET_METHOD), 1
    return "vanilla", int(word.removeprefix("1/"))
