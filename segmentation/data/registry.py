"""The data sets that the suite can make or prepare, and the check that one is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from experiment import ExperimentError
from segmentation.compose import datasets
from segmentation.data.folders import file_hashes, fingerprint_of, read_list
from segmentation.data.scenes import SETS, write_scenes


def require_data(config: Config) -> None:
    """Make the digit scenes if they are not there; of any other data set only check that it is.

    Raises:
        ExperimentError: the data set is not there.
    """
    root = Path(datasets(config)[0]["data_root"])
    if root.is_dir():
        return
    name = config.get("dataset", "")
    if name not in SETS:
        command = f"; python -m segmentation prepare {name} --data-dir {root.parent}" if name else ""
        raise ExperimentError(f"there is no data set in {root}{command}")
    print(f"writing {name} to {root}", flush=True)
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
    """Look at a config's data.

    Raises:
        ExperimentError: a part of them is not there, or an image was cut.
    """
    parts = datasets(config)
    roots = {Path(part["data_root"]) for part in parts}
    if not all(root.is_dir() for root in roots):
        return Data()
    root = min(roots, key=str)
    try:
        hashes = file_hashes(root, {path for part in parts for path in _files(part)})
        training = {path for part in datasets(config.train_dataloader) for path in _files(part, "img_path")}
        others = {path for part in parts for path in _files(part, "img_path")} - training
    except OSError as error:
        raise ExperimentError(f"the data set in {root} cannot be read ({error.filename}: {error.strerror})") from None
    trained, tested = (tuple(hashes[path] for path in sorted(paths)) for paths in (training, others))
    return Data(fingerprint_of(root, hashes), trained, tested)


def _files(part: dict[str, Any], kind: str | None = None) -> set[Path]:
    """The images and label maps of one data set's config, or those of one kind, as its `data_prefix` has it."""
    root = Path(part["data_root"])
    prefixes = [root / prefix for name, prefix in part.get("data_prefix", {}).items() if kind in (None, name)]
    if not part.get("ann_file"):
        return {path for prefix in prefixes for path in prefix.rglob("*") if path.is_file()}
    names = set(read_list(root / part["ann_file"]))
    return {path for prefix in prefixes for path in prefix.iterdir() if path.stem in names}
