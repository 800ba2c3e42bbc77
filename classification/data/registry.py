"""The one registry of data sets, and what a loader returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import classification.data as package
from classification.registry import Registry


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
class TextSet:
    """Labelled texts.

    Attributes:
        texts: one a sample.
        labels: class numbers, shape (N,), int64.
    """

    texts: Sequence[str]
    labels: np.ndarray


@dataclass(frozen=True)
class Splits:
    """The fixed parts of a data set.

    Attributes:
        train, val, test: no sample is in two of them; all of images, or all of texts.
        classes: names of the classes, in the order of their numbers.
        fingerprint: short hash that changes with the data.
    """

    train: ImageSet | TextSet
    val: ImageSet | TextSet
    test: ImageSet | TextSet
    classes: tuple[str, ...]
    fingerprint: str


Loader = Callable[[Path], Splits]
dataset: Registry[Loader] = Registry("data set", package)  # decorates a loader `(root) -> Splits`
names = dataset.names


def load_splits(name: str, root: Path) -> Splits:
    """Load a data set.

    Raises:
        ExperimentError: unknown name, or the data set is missing or damaged.
    """
    return dataset.find(name)(root)
