"""The one registry of data sets, and what a loader returns."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import classification.data as package
from experiment import ExperimentError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: anything with a length and `images[index]`: a PIL image, or a uint8 array (H, W) or (H, W, 3).
        labels: class numbers, shape (N,), int64.
    """

    images: Sequence[Any]
    labels: np.ndarray


@dataclass(frozen=True)
class Splits:
    """The fixed parts of a data set.

    Attributes:
        train, val, test: no image is in two of them.
        classes: names of the classes, in the order of their numbers.
        fingerprint: short hash that changes with the data.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    fingerprint: str


Loader = Callable[[Path], Splits]
_LOADERS: dict[str, Loader] = {}


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Register a loader `(root) -> Splits` under a name; `root` is the folder that holds all data sets."""

    def register(loader: Loader) -> Loader:
        _LOADERS[name] = loader
        return loader

    return register


def _loaders() -> dict[str, Loader]:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _LOADERS


def names() -> list[str]:
    """Names of all data sets."""
    return sorted(_loaders())


def load_splits(name: str, root: Path) -> Splits:
    """Load a data set.

    Raises:
        ExperimentError: unknown name, or the data set is missing or damaged.
    """
    loaders = _loaders()
    if name not in loaders:
        raise ExperimentError(f"there is no data set {name!r}; allowed: {', '.join(sorted(loaders))}")
    return loaders[name](root)
