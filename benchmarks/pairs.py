"""Times as ratios: two ways of doing a thing alternate in one process, so that what else the machine does hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Time of one way over that of another: the median of pairs, and the lowest and the highest pair."""

    median: float
    low: float
    high: float


def seconds(work: Work, clock: Clock = time.perf_counter) -> float:
    """Time of one call by a clock; work that returns a number has measured itself."""
    start = clock()
    own = work()
    return own if isinstance(own, float) else clock() - start


def ratio(first: Work, second: Work, pairs: int, clock: Clock = time.perf_counter) -> Ratio:
    """Time of `first` over time of `second`, in `pairs` pairs A B A B after one call of each to warm up."""
    first(), second()
    ratios = [seconds(first, clock) / seconds(second, clock) for _ in range(pairs)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
