"""Augmentation whose random draws depend on a sample's place in the run alone, so that a resumed run draws the same.

MMEngine's own samplers go on at the right index after a resume, but the generators that the augmentation draws from
start anew. With the samplers and the data set here, each sample is drawn from generators seeded by the run's seed and
its place in the stream, in whichever worker process that happens. `place_draws` puts them where MMEngine's own are, in
any config.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler, worker_init_fn
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS

from experiment.limit import count_within
from experiment.signals import in_worker


class Place(int):
    """An index that knows which draw of the run it is."""

    draw: tuple[int, int, int]  # seed, epoch from 1 (0 of an endless stream), number in the stream of all processes

    def __reduce__(self) -> Any:  # on its way to a worker
        return _place, (int(self), self.draw)


def _place(index: int, draw: tuple[int, int, int]) -> Place:
    place = Place(index)
    place.draw = draw
    return place


@DATA_SAMPLERS.register_module()
class PlacedSampler(InfiniteSampler):
    """MMEngine's endless sampler with a `Place` for every index.

    Of several processes each takes its share of the samples that one would take, drawn as that one would draw them.
    """

    first = 0

    def skip(self, num_samples: int) -> None:
        """Go on as after this many samples of this process."""
        super().skip(num_samples)
        self.first = num_samples

    def __iter__(self) -> Iterator[Place]:
        for number, index in zip(itertools.count(self.first), super().__iter__(), strict=False):
            yield _place(index, (self.seed, 0, number * self.world_size + self.rank))


@DATA_SAMPLERS.register_module()
class PlacedEpochs(DefaultSampler):
    """MMEngine's sampler of one epoch after another with a `Place` for every index."""

    def __iter__(self) -> Iterator[Place]:
        for number, index in enumerate(super().__iter__()):
            yield _place(index, (self.seed, 1 + self.epoch, number * self.world_size + self.rank))


_PLACED = {one.__base__.__name__: one.__name__ for one in (PlacedSampler, PlacedEpochs)}


def place_draws(config: Config) -> str | None:
    """Put in place, of what a config trains on, samplers and a data set by which a resumed run draws the same.

    Returns:
        The type of a sampler that is not known, which stays, so that a resumed run may draw otherwise; None if all is
        in place.
    """
    loader = config.train_dataloader
    sampler, dataset = loader.get("sampler") or loader.get("batch_sampler") or {}, loader.dataset
    kind = _name(sampler.get("type"))
    if kind in _PLACED:
        sampler["type"] = _PLACED[kind]
    elif kind not in _PLACED.values():
        return kind
    if _name(dataset.get("type")) != PlacedDataset.__name__:
        loader.dataset = {"type": PlacedDataset.__name__, "dataset": dataset}
    return None


def _name(kind: Any) -> str:
    """Of a type as configs have it: a class, or its name, which may say where it is registered."""
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


@FUNCTIONS.register_module()
def worker_of_run(worker_id: int, seed: int) -> None:
    """What a process that loads images does first: as MMEngine's own do, and see `experiment.signals.in_worker`."""
    told = torch.utils.data.get_worker_info()
    worker_init_fn(worker_id, told.num_workers if told else 0, get_rank(), seed)
    in_worker()


@DATASETS.register_module()
class PlacedDataset:
    """A data set that seeds the generators of numpy and Python before it draws a sample with a `Place`.

    In a process that loads images, it seeds torch's as well; in the run's own that is the network's. What else is asked
    of it is asked of the data set in it.

    Args:
        dataset: config of the data set.
        limit: take this many of its samples, or up to 1 this share of them, at random.
        limit_seed: draws them. The samples of a smaller limit are among those of a larger one.

    Raises:
        ExperimentError: the data set has fewer samples, or the limit is no such number.
    """

    def __init__(self, dataset: dict[str, Any], limit: float | None = None, limit_seed: int = 233) -> None:
        self.dataset = DATASETS.build(dataset)
        if limit is None:
            return
        there = len(self.dataset)
        count = count_within(limit, there, "the limit")
        chosen = np.random.default_rng(limit_seed).permutation(there)[:count]
        self.dataset.get_subset_(sorted(map(int, chosen)))

    @property
    def metainfo(self) -> dict[str, Any]:
        """Classes and palette."""
        return dict(self.dataset.metainfo)

    def full_init(self) -> None:
        """Load the list of samples."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, Place):
            state = np.random.SeedSequence(index.draw).generate_state(2)
            random.seed(int(state[0]))
            np.random.seed(state[1])  # noqa: NPY002 - the global one is what MMSegmentation's transforms draw from
            if torch.utils.data.get_worker_info() is not None:
                torch.manual_seed(int(state[0]))
        return self.dataset[int(index)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # it is not made yet
            raise AttributeError(name)
        return getattr(self.dataset, name)
