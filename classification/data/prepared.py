"""Data sets that are ready: what `prepare` notes of them, and loading them by name."""

from __future__ import annotations

import json
import pickle
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io.matlab import MatReadError

from classification.data.files import check_pixels
from classification.data.folders import image_folder
from classification.data.registry import MissingDataError, Splits, TextSet, dataset, names, source
from experiment import ExperimentError
from experiment.files import write_whole

SCHEMA = 2  # since fingerprints are of the images' bytes
# What readers of lists, batches and .mat files raise when a file is missing or damaged.
DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError),
    *(NotImplementedError, struct.error, pickle.UnpicklingError, MatReadError),
)


@dataclass(frozen=True)
class Mark:
    """The note beside a prepared data set that its archives and numbers were found right.

    Args:
        path: the file, `NAME.prepared.json` in the folder of all data sets.
    """

    path: Path

    @classmethod
    def of(cls, name: str, root: Path) -> Mark:
        """The mark of a data set."""
        return cls(root / f"{name}.prepared.json")

    def write(self, splits: Splits) -> None:
        """Note that the data set is ready."""
        parts = {part: len(getattr(splits, part).labels) for part in ("train", "val", "test")}
        content = {"schema": SCHEMA, "classes": len(splits.classes), **parts, "fingerprint": splits.fingerprint}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")

    def require(self, splits: Splits) -> None:
        """Raise unless the data set is the one that was prepared."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            noted, schema = content["fingerprint"], content["schema"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise ExperimentError(f"{self.path} cannot be read; delete it and prepare the data set again") from None
        if noted != splits.fingerprint and schema == 1:
            raise ExperimentError(
                f"{self.path} is of an earlier version, which did not look at what is in the images; delete it and "
                f"prepare the data set again: what is there is checked, and nothing is downloaded"
            )
        if noted != splits.fingerprint:
            raise ExperimentError(
                f"the data set has changed since {self.path} was written (fingerprint {noted} then, "
                f"{splits.fingerprint} now); delete both and prepare it again"
            )


_ahead: dict[tuple[str, Path], Splits] = {}  # what was read for its fingerprint, until the run takes it


def load_splits(name: str, root: Path) -> Splits:
    """Load a data set: one that is registered, or else a folder of images of this name.

    Args:
        name: of the data set.
        root: folder that holds all data sets.

    Raises:
        MissingDataError: the data set is to be prepared first.
        ExperimentError: unknown name, or the data set is damaged.
    """
    ahead = _ahead.pop((name, root), None)
    if ahead is not None:
        return ahead
    splits = _load(name, root)
    check_splits(name, splits)
    return splits


def load_ahead(name: str, root: Path) -> Splits:
    """As `load_splits`, whose next call then gives what this one has read: a run reads its data set once.

    `forget_ahead` is to be called when the run is over, or not to be begun.
    """
    forget_ahead()
    _ahead[name, root] = splits = load_splits(name, root)
    return splits


def forget_ahead() -> None:
    """Drop what no run has taken."""
    _ahead.clear()


def check_splits(name: str, splits: Splits) -> None:
    """Refuse what no network can be trained on.

    Raises:
        ExperimentError: fewer than two classes, a part with other numbers of samples and labels, labels that are no
            class numbers, or images in memory that are no 8-bit images.
    """
    count = len(splits.classes)
    if count < 2:
        raise ExperimentError(f"data set {name} has {count} class{'es' * (count != 1)}; needed are two or more")
    for part in ("train", "val", "test"):
        found = getattr(splits, part)
        labels = np.asarray(found.labels)
        samples = found.texts if isinstance(found, TextSet) else found.images
        where = f"part {part} of data set {name}"
        if labels.ndim != 1 or len(samples) != len(labels):
            raise ExperimentError(f"{where} has {len(samples)} samples and labels of shape {labels.shape}")
        if not len(labels):
            raise ExperimentError(f"{where} has no samples")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ExperimentError(f"{where} has labels of kind {labels.dtype}; allowed are whole numbers")
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            raise ExperimentError(
                f"{where} has the label {labels[wrong[0]]} at sample {wrong[0]}; allowed are 0 to {count - 1}, for its "
                f"{count} classes"
            )
        if isinstance(samples, np.ndarray):
            check_pixels(samples[0], f"{where}, image 0,")
        if not isinstance(found, TextSet) and part == "train" and len(np.unique(labels)) < 2:
            raise ExperimentError(f"{where} has images of one class alone")


def _load(name: str, root: Path) -> Splits:
    known = names()
    if name not in known:
        if (root / name).is_dir():
            return image_folder(root / name)
        raise ExperimentError(
            f"there is no data set {name!r}; allowed: {', '.join(known)}, or a folder {root / name} with one folder of "
            f"images per class"
        )
    if name not in source.entries:
        return dataset.find(name)(root)
    mark = Mark.of(name, root)
    if not (mark.path.exists() and (root / source.find(name).folder).exists()):
        raise MissingDataError(f"data set {name} is not prepared in {root}; run: {_command(name, root)}")
    splits = read(name, root)
    mark.require(splits)
    return splits


def _command(name: str, root: Path) -> str:
    return shlex.join(["python", "-m", "classification", "prepare", name, "--root", str(root)])


def read(name: str, root: Path) -> Splits:
    """Load a data set that is prepared or about to be, and say so if a file is missing or damaged."""
    try:
        return dataset.find(name)(root)
    except DAMAGED as error:
        raise ExperimentError(
            f"data set {name} in {root / source.find(name).folder} is damaged ({type(error).__name__}: {error}); "
            f"delete it and run: {_command(name, root)}"
        ) from None
