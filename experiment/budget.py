"""A memory budget: given in MiB, or what a finished run used, or a part of that; and the words that ask for one."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import ExperimentError
from experiment.moved import if_moved
from experiment.record import RESULT, Record

BUDGET_METHOD = "hosvd_0.8"  # the papers give ASI the memory that this method used
PUBLISHED, OF_HOSVD = "published", "hosvd"
OF_PAPERS = "papers"  # in tags: "published" is a variant of ASI
BUDGET_HELP = (
    "memory of the methods that take ranks, such as ASI; several train at each: published, hosvd for that of the HOSVD "
    "run, such as 1/22 for that part of the vanilla run's, or such as 0.5mib (default: published where it is known, "
    "else hosvd)"
)


def budget_bytes(mib: float | None, run: str | None, divisor: int = 1) -> float:
    """The budget in bytes.

    Args:
        mib: the budget in MiB (2^20 bytes).
        run: folder of a finished run whose formula memory is the budget, as the papers take HOSVD at energy 0.8.
        divisor: what that run's memory is divided by: 20 for a twentieth of it; see `check_divisor`.

    Raises:
        ExperimentError: not exactly one of the two is given, or there is no such run.
    """
    if mib is not None and run is None:
        return mib * 2**20
    return _of_run(mib, run).memory_bytes["activation_formula"] / divisor


def budget_tag(mib: float | None, run: str | None, divisor: int = 1, name: str | None = None) -> str:
    """What a method's tag says of its budget: its name, "0.5mib", "hosvd_0.8" for that run's, "1of20" of vanilla's.

    Arguments and errors as of `budget_bytes`.
    """
    if name is not None:
        return name
    if mib is not None and run is None:
        return f"{mib:g}mib"
    return _tag_of_part(_of_run(mib, run).run.method, divisor)


def _tag_of_part(method: str, divisor: int) -> str:
    part = [f"1of{divisor}"] if divisor > 1 else []
    return "_".join(part if part and method == "vanilla" else [method, *part])


def _of_run(mib: float | None, run: str | None) -> Record:
    if run is None or mib is not None:
        raise ExperimentError("a budget needs either its MiB or a run, not both: budget.mib or budget.run")
    path = Path(run) / RESULT
    if not path.exists():
        raise ExperimentError(
            f"the budget is what another run used, which is not done: there is no {path}; do it first{if_moved(path)}"
        )
    return Record.load(path)


def check_divisor(divisor: int, run: str | None) -> None:
    """Arguments as of `budget_bytes`.

    Raises:
        ExperimentError: the divisor is not of a run, or below 1.
    """
    if type(divisor) is not int or divisor < 1 or (divisor > 1 and run is None):
        raise ExperimentError(
            f"budget.divisor is {divisor}; allowed are whole numbers from 1, and with budget.run alone"
        )


def check_mib(mib: Any) -> None:
    """Raise `ExperimentError` unless it is None or a memory in MiB: a finite number above 0."""
    number = isinstance(mib, int | float) and not isinstance(mib, bool)
    if mib is not None and not (number and 0 < mib < math.inf):
        raise ExperimentError(f"budget.mib is {mib!r}; allowed are finite numbers above 0")


def budget_word(text: str) -> str:
    """A word that says how large a budget is, as a command line takes it.

    Raises:
        ArgumentTypeError: it is none of "published", "hosvd", such as "1/22", and such as "0.5mib".
    """
    if text not in (PUBLISHED, OF_HOSVD) and not re.fullmatch(r"1/[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?mib", text):
        raise ArgumentTypeError(f"{text!r} is neither published nor hosvd nor such as 1/22 or 0.5mib")
    return text


@dataclass(frozen=True)
class Source:
    """Where a sweep takes a budget from.

    Attributes:
        method: whose run gives it; None if it is `mib`.
        divisor: what that run's memory is divided by.
        mib: the budget in MiB.
        name: of the budget in tags, if not by its size.
    """

    method: str | None = None
    divisor: int = 1
    mib: float | None = None
    name: str | None = None

    @property
    def tag(self) -> str:
        """What the tag of a method says of this budget; see `budget_tag`."""
        if self.method is None:
            return budget_tag(self.mib, None, name=self.name)
        return _tag_of_part(self.method, self.divisor)


def budget_source(word: str | None, published: float | None, where: str) -> Source:
    """The source of a budget.

    Args:
        word: what `budget_word` takes; None for the published budget where there is one, else that of the HOSVD run.
        published: the budget in MiB that is published for this network, data set and depth, if one is.
        where: names those, for an error.

    Raises:
        ExperimentError: no budget is published there.
    """
    word = word or (PUBLISHED if published is not None else OF_HOSVD)
    if word == PUBLISHED:
        if published is None:
            raise ExperimentError(f"no budget is published for {where}; take it from HOSVD's run: --budget hosvd")
        return Source(mib=published, name=OF_PAPERS)
    if word == OF_HOSVD:
        return Source(BUDGET_METHOD)
    if word.endswith("mib"):
        return Source(mib=float(word.removesuffix("mib")))
    return Source("vanilla", int(word.removeprefix("1/")))
