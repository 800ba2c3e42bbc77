"""Shuffling and augmentation by nothing but the seed and the epoch, so that a resumed run sees the same batches.

Several processes share each batch: what they take together is what one process would take with the joined batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from experiment.processes import Place, place
from experiment.signals import in_worker


class EpochShuffle(Sampler[Any]):
    """A random order of `length` indices per epoch; the trainer tells the epoch through `set_epoch`.

    Args:
        length: number of samples.
        seed: of the order.
        place: of the process that takes its share: every `count`-th index of the order that all processes have. Of the
            order's last, less than `count`, none takes any, as each has to take as many as the others.

    Attributes:
        first: of this process's indices of an epoch, from which on they are given.
    """

    def __init__(self, length: int, seed: int, place: Place = Place()) -> None:  # noqa: B008 - it is frozen
        self.length, self.seed, self.place = length, seed, place
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.place.count

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed((self.seed * 100_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        yield from order[self.place.rank :: self.place.count][self.first : len(self)]


class AugmentingShuffle(EpochShuffle):
    """The same order; with each index comes the seed that its image's augmentation is drawn from in this epoch.

    The seed goes with the index, so that it does not matter which process loads the image, and when.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in super().__iter__():
            drawn = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
            yield index, int(drawn[0]) >> 1  # torch takes 63 bits


class EachOnce(Sampler[list[int]]):
    """Batches in which all processes together have every sample once; each has as many batches as the others.

    A process that has one sample more than another takes it into its last batch.

    Args:
        length: number of samples.
        size: of a batch.
        place: of the process.

    Raises:
        ValueError: there are fewer samples than processes.
    """

    def __init__(self, length: int, size: int, place: Place) -> None:
        self.length, self.size, self.place = length, size, place
        self.least = length // place.count  # that a process has
        if self.least < 1:
            raise ValueError(f"{length} samples are too few for {place.count} processes")

    def __len__(self) -> int:
        return -(-self.least // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        own = list(range(self.place.rank, self.length, self.place.count))
        last = (len(self) - 1) * self.size
        yield from (own[start : start + self.size] for start in range(0, last, self.size))
        yield own[last:]


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """What torch draws on the CPU in this block comes from the seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class QuietLoader(DataLoader):
    """Leaves the global random state alone, which a stock loader draws from whenever it starts.

    So what is drawn while a network trains does not depend on how often its data was loaded.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        own = torch.Generator().manual_seed((torch.initial_seed() + place().rank) % 2**63)
        super().__init__(*arguments, generator=own, worker_init_fn=in_worker, **options)


class EpochLoader(QuietLoader):
    """Loads nothing before the first batch is asked for, and goes on within an epoch by what its state says.

    A trainer makes its iterator before it tells the epoch; worker processes would fetch images of another one by then.
    """

    _taken = _skipped = 0  # batches of this epoch

    def __iter__(self) -> Iterator[Any]:
        self._taken, self._skipped = self._skipped, 0  # also where no batch of this epoch is asked for
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        self.sampler.first = self._taken * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches of the epoch have been taken."""
        return {"batches": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next epoch after so many batches."""
        self._skipped = state["batches"]
