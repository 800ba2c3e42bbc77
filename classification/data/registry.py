"""The one registry of data sets, and what a loader returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import classification.data as package
from classification.registry import Registry
from experiment import ExperimentError


class MissingDataError(ExperimentError):
    """A data set is not there; says what to run."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: anything with a length and `images[index]`: a PIL image, or a uint8 array (H, W) or (H, W, 3).
        labels: class numbers, shape (N,), int64.
        positions: place of each image in the official training set, shape (N,), where that was divided for validation.
    """

    images: Sequence[Any] | np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None = None

    def pick(self, indices: np.ndarray) -> ImageSet:
        """Some of the images, in this order; those that are files are still read only when asked for."""
        images = self.images[indices] if isinstance(self.images, np.ndarray) else Picked(self.images, indices)
        return ImageSet(images, self.labels[indices], None if self.positions is None else self.positions[indices])


class Picked(Sequence[Any]):
    """Some images of a sequence."""

    def __init__(self, images: Sequence[Any], indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self.images[int(self.indices[index])]


@dataclass(frozen=True)
class TextSet:
    """Labelled texts.

    Attributes:
        texts: one a sample.
        labels: class numbers, shape (N,), int64.
        positions: as of `ImageSet`.
    """

    texts: Sequence[str]
    labels: np.ndarray
    positions: np.ndarray | None = None

    def pick(self, indices: np.ndarray) -> TextSet:
        """Some of the texts, in this order."""
        positions = None if self.positions is None else self.positions[indices]
        return TextSet([self.texts[index] for index in indices], self.labels[indices], positions)


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

    @property
    def kind(self) -> str:
        """What the samples are: images or texts."""
        return "texts" if isinstance(self.test, TextSet) else "images"


@dataclass(frozen=True)
class Archive:
    """A file that a data set is published as.

    Attributes:
        name: of the file.
        checksum: "md5:..." or "sha256:..." of it.
        url: where it is; None if it cannot be had without an account.
        into: folder below the one of all data sets that it is unpacked into.
        unpack: whether it is a tar archive; another file is put there as it is.
        inside: of an archive in it that is unpacked in its place: its path there.
    """

    name: str
    checksum: str
    url: str | None
    into: str = "."
    unpack: bool = True
    inside: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what it has to be.

    Attributes:
        folder: of the data set, below the one of all data sets.
        archives: what it is made from.
        instead: files of which any one, if it is given, is enough in their place.
        classes, train, test: official numbers of classes, of samples to train and validate on, and of test samples.
        most_bytes: what it may take on the disk.
        checksums: of files in its folder, "md5:..." or "sha256:...", by name.
        arrange: given that folder, does what is to be done after unpacking.
        terms: how a user gets the archives that have no address.
    """

    folder: str
    archives: tuple[Archive, ...]
    classes: int
    train: int
    test: int
    most_bytes: int
    checksums: tuple[tuple[str, str], ...] = ()
    arrange: Callable[[Path], None] | None = None
    terms: str = ""
    instead: tuple[Archive, ...] = ()


Loader = Callable[[Path], Splits]
dataset: Registry[Loader] = Registry("data set", package)  # decorates a loader `(root) -> Splits`
source: Registry[Source] = Registry("data set to prepare", package)  # takes the `Source` of a data set of this name
names = dataset.names
