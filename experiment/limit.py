"""How many of its training samples a limit leaves of a data set, for a quick look: a number of them, or a share."""

from __future__ import annotations

import math
from typing import Any

from experiment.errors import ExperimentError


def check_limit(limit: Any, name: str) -> None:
    """Refuse what can be the limit of no data set.

    Args:
        limit: None where there is none.
        name: of the setting, for the error.

    Raises:
        ExperimentError: it is neither a whole number from 1 nor a share above 0.
    """
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and not (number and 0 < limit < math.inf and (limit <= 1 or float(limit).is_integer())):
        raise ExperimentError(f"{name} is {limit!r}; allowed are whole numbers from 1, or a share above 0, up to 1")


def count_within(limit: float, there: int, name: str, classes: int = 1) -> int:
    """How many samples a limit stands for.

    Args:
        limit: above 1 their number, else a share.
        there: samples that there are.
        name: of the setting, for the error.
        classes: of each of which one sample is needed.

    Raises:
        ExperimentError: it is no limit, or there are not as many, or fewer than are needed.
    """
    check_limit(limit, name)
    count = round(limit * there) if limit <= 1 else int(limit)
    if not classes <= count <= there:
        least = "1" if classes == 1 else f"the {classes} classes"
        raise ExperimentError(
            f"{name} is {limit:g}, {count} of {there} training samples; allowed are whole numbers from {least} to "
            f"{there}, or such a share of them, up to 1"
        )
    return count
