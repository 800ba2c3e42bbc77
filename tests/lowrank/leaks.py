"""What is alive after a block of code, and was not before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakIdKeyDictionary


def _tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


@contextmanager
def no_tensor_left(collect: bool = True) -> Iterator[None]:
    """No tensor that the block makes may outlive it, with `collect` not even until the collector has been there.

    Compared are tensors, not how many there are: what earlier tests left may go meanwhile.
    """
    before = WeakIdKeyDictionary(dict.fromkeys(_tensors(), True))
    yield
    if collect:
        gc.collect()
    assert not [tensor.shape for tensor in _tensors() if tensor not in before]
