"""Two folders of runs, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from report.metrics import METRICS
from report.summary import Group

NAMES = ("layers", "method", "recipe")
KEPT, STEP = "saved_measured_bytes", "step_median_s"


def compared_rows(one: Mapping[Group, pd.DataFrame], other: Mapping[Group, pd.DataFrame]) -> list[list[Any]]:
    """Every row that is in both folders' summaries.

    Returns:
        Task, setup, model, data set, layers, method and recipe; then of each folder its number of runs, its accuracy
        (%, mean), what is kept (bytes) and the time of a step (s), the first folder's ahead of the second's: eight
        values. A number that is missing is None.
    """
    rows = []
    for group in sorted(one.keys() & other.keys()):
        numbers = ["n", METRICS[group.task].mean, KEPT, STEP]
        both = one[group].merge(other[group], on=list(NAMES), suffixes=("", "_other"))
        both = both[(both["n"] > 0) & (both["n_other"] > 0)]
        for row in both.to_dict("records"):
            found = [row[name + ending] for name in numbers for ending in ("", "_other")]
            values = [None if isinstance(value, float) and math.isnan(value) else value for value in found]
            where = [group.task, group.setup, group.model, group.dataset]
            rows.append([*where, *(row[name] for name in NAMES), *values])
    return rows
