"""Times as ratios: two ways of doing a thing alternate in one process, so that what else the machine does hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of one way over that of another: the median of pairs, and the lowest and the highest pair."""

    median: float
    low: float
    high: float


def seconds(work: Work) -> float:
    """Wall-clock time of one call; work that returns a number has measured itself."""
    start = time.perf_counter()
    own = work()
    return own if isinstance(own, float) else time.perf_counter() - start


def ratio(first: Work, second: Work, pairs: int) -> Ratio:
    """Time of `first` over time of `second`, in `pairs` pairs A B A B after one call of each to warm up."""
    first(), second()
    ratios = [seconds(first) / seconds(second) for _ in range(pairs)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
