"""Which points of a cost and accuracy trade-off are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def dominated(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Whether each point is dominated.

    A point is dominated if another one has at least its accuracy and at most its cost, and is strictly better in one
    of the two. Equal points do not dominate each other.

    >>> dominated([1, 2, 3], [50, 60, 55])
    [False, False, True]
    """
    flags = [False] * len(costs)
    best_of_cheaper = float("-inf")
    by_cost = sorted(range(len(costs)), key=costs.__getitem__)
    for _, same_cost in groupby(by_cost, key=costs.__getitem__):
        indices = list(same_cost)
        best = max(accuracies[index] for index in indices)
        for index in indices:
            flags[index] = accuracies[index] <= best_of_cheaper or accuracies[index] < best
        best_of_cheaper = max(best_of_cheaper, best)
    return flags
