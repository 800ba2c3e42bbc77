"""The data sets that the suite can make or prepare, and the check that one is there."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from experiment import ExperimentError
from experiment.contents import Content
from segmentation.compose import class_count, datasets
from segmentation.data.folders import ThereError, file_contents, fingerprint_of
from segmentation.data.listing import Listing, listing_of, root_of, tell_unread
from segmentation.data.prepare import DATASETS, is_prepared
from segmentation.data.scenes import SETS, write_scenes
from segmentation.data.seen import Seen, look, require_matching


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
        measured: the same of those to train on, which alone a perplexity table is of.
        trained: hashes of the bytes of the images to train on.
        tested: the same of those to validate or test on.
    """

    fingerprint: str | None = None
    measured: str | None = None
    trained: tuple[bytes, ...] = ()
    tested: tuple[bytes, ...] = ()


def data_of(config: Config) -> Data:
    """Look at a config's data: at every image and label map that its data sets load.

    Raises:
        ExperimentError: a part of them is not there, an image was cut or is stored turned, a label is too high, or
            labels stand for other classes where a network is validated than where it is trained.
    """
    roots = _roots(config)
    if not all(root.is_dir() for root in roots):
        return Data()
    parts = [_Part(roots.index(root_of(part)), part, listing_of(part)) for part in datasets(config)]
    _require_alike(parts)
    tell_unread(one.listing for one in parts)
    contents: dict[Path, Content] = {}
    for number, root in enumerate(roots):
        chosen = {path for one in parts if one.root == number for path in one.listing.names}
        try:
            contents |= file_contents(root, chosen, look, is_prepared(config))
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise ExperimentError(f"the data set in {root} cannot be read ({reason})") from None
    seen = {path: Seen.of(one.seen) for path, one in contents.items()}
    for one in parts:
        require_matching(one.config, one.listing, seen, class_count(config), is_prepared(config))
    trained = parts[: len(datasets(config.train_dataloader))]
    training, every = (frozenset[Path]().union(*(one.listing.images for one in some)) for some in (trained, parts))
    hashes = {path: one.digest for path, one in contents.items()}
    return Data(
        _fingerprint(parts, hashes),
        _fingerprint(trained, hashes),
        tuple(hashes[path] for path in sorted(training)),
        tuple(hashes[path] for path in sorted(every - training)),
    )


class _Part(NamedTuple):
    """A data set of a config: the number of its folder, its own config, and its files."""

    root: int
    config: dict[str, Any]
    listing: Listing


def _require_alike(parts: Sequence[_Part]) -> None:
    """Labels are compared as numbers, whatever they stand for."""
    for one in parts[1:]:
        first, other = parts[0].listing, one.listing
        where = root_of(one.config) / (one.config.get("data_prefix") or {}).get("img_path", "")
        for label, (there, here) in enumerate(zip_longest(first.classes, other.classes)):
            if first.classes and other.classes and there != here:
                raise ExperimentError(
                    f"the data set of {where} has other classes than that to train on: its label {label} is {here!r}, "
                    f"there {there!r}; give both the same metainfo.classes, in one order"
                )
        if first.labels and other.labels and first.reduced != other.reduced:
            raise ExperimentError(
                f"the data set of {where} has reduce_zero_label={other.reduced}, and that to train on {first.reduced}, "
                f"so that a label stands for another class; set both alike"
            )


def _fingerprint(parts: Iterable[_Part], hashes: Mapping[Path, bytes]) -> str:
    """Of one folder names are as they are in it; further folders are told apart by their numbers."""
    told = {
        (f"{one.root}:{name}" if one.root else name, hashes[path])
        for one in parts
        for path, name in one.listing.names.items()
    }
    return fingerprint_of(told)


def _roots(config: Config) -> list[Path]:
    """The folders of a config's data sets, each once, in their order."""
    return list(dict.fromkeys(root_of(part) for part in datasets(config)))
