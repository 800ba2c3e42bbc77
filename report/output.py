"""All files of a report, written together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from experiment import ExperimentError
from experiment.files import part_of


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write files and the folders they need; none is replaced before all are on the disk in full.

    Raises:
        ExperimentError: a file or folder cannot be written; nothing was replaced.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            make_folder(path.parent)
            if path.is_dir():
                raise ExperimentError(f"{path} cannot be written: it is a folder; remove it or give another --output")
            parts[path] = part_of(path)
            with parts[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written: {error.strerror}; give another --output") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        ExperimentError: it cannot be made, or nothing can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written: {error.strerror}; give another --output") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ExperimentError(f"{path} cannot be written: no permission; give another --output")
