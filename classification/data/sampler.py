"""Shuffling and augmentation by nothing but the seed and the epoch, so that a resumed run sees the same batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler


class EpochShuffle(Sampler[Any]):
    """A random order of `length` indices per epoch; the trainer tells the epoch through `set_epoch`."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed((self.seed * 100_003 + self.epoch) % 2**63)
        yield from torch.randperm(self.length, generator=generator).tolist()


class AugmentingShuffle(EpochShuffle):
    """The same order; with each index comes the seed that its image's augmentation is drawn from in this epoch.

    The seed goes with the index, so that it does not matter which process loads the image, and when.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in super().__iter__():
            drawn = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
            yield index, int(drawn[0]) >> 1  # torch takes 63 bits


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """What torch draws on the CPU in this block comes from the seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class EpochLoader(DataLoader):
    """Loads nothing before the first batch is asked for.

    A trainer makes its iterator before it tells the epoch; worker processes would fetch images of another one by then.
    """

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
