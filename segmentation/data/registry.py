"""The data sets that the suite can make or prepare, and the check that one is there."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from experiment import ExperimentError
from segmentation.compose import datasets
from segmentation.data.folders import ThereError, file_hashes, fingerprint_of
from segmentation.data.listing import listing_of, root_of, tell_unread
from segmentation.data.prepare import DATASETS, is_prepared
from segmentation.data.scenes import SETS, write_scenes


def require_data(config: Config) -> None:
    """Make the digit scenes if they are not there; of any other data set only check that it is.

    Raises:
        ExperimentError: the data set is not there.
    """
    for root in _roots(config):
        if root.is_dir():
            continue
        name = config.get("dataset", "")
        if name not in SETS:
            words = ["python", "-m", "segmentation", "prepare", name, "--data-dir", str(root.parent)]
            command = f"; {shlex.join(words)}" if name in DATASETS else ""
            raise ExperimentError(f"there is no data set in {root}{command}")
        print(f"writing {name} to {root}", flush=True)
        with contextlib.suppress(ThereError):  # of another run that began at the same time
            write_scenes(root, SETS[name])


@dataclass(frozen=True)
class Data:
    """What a config trains, validates and tests on.

    Attributes:
        fingerprint: a short hash of the names and bytes of all images and label maps; None if they are not there.
        trained: hashes of the bytes of the images to train on.
        tested: the same of those to validate or test on.
    """

    fingerprint: str | None = None
    trained: tuple[bytes, ...] = ()
    tested: tuple[bytes, ...] = ()


def data_of(config: Config) -> Data:
    """Look at a config's data: at every image and label map that its data sets load.

    Raises:
        ExperimentError: a part of them is not there, or an image was cut.
    """
    roots = _roots(config)
    if not all(root.is_dir() for root in roots):
        return Data()
    parts = [(roots.index(root_of(part)), listing_of(part)) for part in datasets(config)]
    tell_unread(one for _, one in parts)
    hashes: dict[Path, bytes] = {}
    names: set[tuple[int, str, Path]] = {
        (number, name, path) for number, one in parts for path, name in one.names.items()
    }
    for number, root in enumerate(roots):
        try:
            chosen = {path for place, _, path in names if place == number}
            hashes |= file_hashes(root, chosen, is_prepared(config))
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise ExperimentError(f"the data set in {root} cannot be read ({reason})") from None
    count = len(datasets(config.train_dataloader))
    training, every = (frozenset[Path]().union(*(one.images for _, one in some)) for some in (parts[:count], parts))
    trained, tested = (tuple(hashes[path] for path in sorted(paths)) for paths in (training, every - training))
    # Of one folder names are as they are in it; further folders are told apart by their numbers.
    told = {(f"{number}:{name}" if number else name, hashes[path]) for number, name, path in names}
    return Data(fingerprint_of(told), trained, tested)


def _roots(config: Config) -> list[Path]:
    """The folders of a config's data sets, each once, in their order."""
    return list(dict.fromkeys(root_of(part) for part in datasets(config)))
