"""Training steps at small batches, and with channels last in memory, as comparisons."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

import lowrank
from benchmarks.comparisons import Comparison, NoWeightGradient, Setting, training_step
from benchmarks.pairs import Work
from benchmarks.peers import RANKS
from lowrank.methods.base import Method

FEW_CALLS = 2**18  # `smallest` of convert
# Ways of `batch_steps`: a method, in how many parts the batch is taken, and `smallest` of convert.
WAYS: dict[str, tuple[Method | None, int, float]] = {
    "vanilla": (None, 1, 0),
    "vanilla in 2 parts": (None, 2, 0),
    "lean": (lowrank.Vanilla(), 1, 0),
    "lean, small ones whole": (lowrank.Vanilla(), 1, FEW_CALLS),
    "lean in 2 parts": (lowrank.Vanilla(), 2, 0),
    "asi": (lowrank.ASI(RANKS), 1, 0),
    "asi, small ones whole": (lowrank.ASI(RANKS), 1, FEW_CALLS),
    "asi_int8": (lowrank.ASI(RANKS, storage="int8"), 1, 0),
}


def batch_steps(setting: Setting) -> Iterator[Comparison]:
    """The same for small batches: lean layers alone and halves one after the other too, and vanilla over itself.

    One thread by processor time, since a step of one image is short, and whatever else the machine does would count;
    of several, that would count a thread that waits.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for network, layers, name in product(setting.networks, ("4", "all"), WAYS):
        for other in ("vanilla", "limit") if name == "asi" else ("vanilla",):
            pair = partial(_both_ways, network, layers, name, other, setting)
            yield Comparison("batch step", f"{network}, last {layers}", name, other, pair, clock)


def _both_ways(network: str, layers: str, way: str, other: str, setting: Setting) -> tuple[Work, Work]:
    method, parts, smallest = WAYS[way]
    own = training_step(network, layers, method, setting, parts=min(parts, setting.batch), smallest=smallest)
    return own, training_step(network, layers, NoWeightGradient() if other == "limit" else None, setting)


# Of `channels_last`: a way, whether it has its channels last, and the same of what it is compared with.
ORDERS = (
    ("vanilla", True, "vanilla", False),
    ("lean", True, "vanilla", True),
    ("asi", True, "vanilla", True),
    ("asi_int8", True, "vanilla", True),
    ("asi", True, "limit", True),
    ("asi", True, "asi", False),
)


def channels_last(setting: Setting) -> Iterator[Comparison]:
    """Steps of networks and images with their channels last in memory, against vanilla's, the limit's and others'."""
    for network, layers, order in product(setting.networks, ("4", "all"), ORDERS):
        names = [f"{way}, channels last" if last else way for way, last in (order[:2], order[2:])]
        pair = partial(_both_orders, network, layers, order, setting)
        yield Comparison("channels last", f"{network}, last {layers}", names[0], names[1], pair)


def _both_orders(network: str, layers: str, order: tuple[str, bool, str, bool], setting: Setting) -> tuple[Work, Work]:
    def step(way: str, last: bool) -> Work:
        method = NoWeightGradient() if way == "limit" else WAYS[way][0]
        return training_step(network, layers, method, setting, channels_last=last)

    first, first_last, second, second_last = order
    return step(first, first_last), step(second, second_last)
