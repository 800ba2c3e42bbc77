"""The data sets that the suite can make or prepare, and the check that one is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from experiment import ExperimentError
from segmentation.compose import datasets
from segmentation.data.folders import files_fingerprint, read_list
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


def data_fingerprint(config: Config) -> str | None:
    """A short hash of the names and bytes of all images and label maps that the config trains and validates on.

    None if they are not there.

    Raises:
        ExperimentError: a part of them is not there.
    """
    files: set[Path] = set()
    roots = {Path(part["data_root"]) for part in datasets(config)}
    if not all(root.is_dir() for root in roots):
        return None
    try:
        for part in datasets(config):
            files |= _files(part)
        return files_fingerprint(min(roots, key=str), files)
    except OSError as error:
        raise ExperimentError(
            f"the data set in {min(roots, key=str)} cannot be read ({error.filename}: {error.strerror})"
        ) from None


def _files(part: dict[str, Any]) -> set[Path]:
    """The images and label maps of one data set's config."""
    root = Path(part["data_root"])
    prefixes = [root / prefix for prefix in part.get("data_prefix", {}).values()]
    if not part.get("ann_file"):
        return {path for prefix in prefixes for path in prefix.rglob("*") if path.is_file()}
    names = set(read_list(root / part["ann_file"]))
    return {path for prefix in prefixes for path in prefix.iterdir() if path.stem in names}
