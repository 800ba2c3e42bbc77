"""Domination against its definition, point by point."""

from __future__ import annotations

import random

import pytest

from report.pareto import dominated


def by_definition(costs, accuracies):
    points = list(zip(costs, accuracies, strict=True))
    return [
        any(c <= cost and a >= accuracy and (c < cost or a > accuracy) for c, a in points) for cost, accuracy in points
    ]


@pytest.mark.parametrize("seed", range(40))
def test_against_the_definition(seed):
    """Few distinct values, so that ties in cost, in accuracy and in both are common."""
    source = random.Random(seed)
    count = source.randrange(1, 25)
    costs = [source.randrange(6) for _ in range(count)]
    accuracies = [source.randrange(6) for _ in range(count)]
    assert dominated(costs, accuracies) == by_definition(costs, accuracies)


def test_equal_points_do_not_dominate_each_other():
    assert dominated([1, 1, 1], [5, 5, 4]) == [False, False, True]


def test_no_points():
    assert dominated([], []) == []
