"""All files of a report, written together."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiment import ExperimentError, fingerprint
from experiment.files import part_of

LIST = ".files.json"  # in a report's folder: hashes of its files, by name


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


def write_report(output: Path, files: Mapping[Path, bytes]) -> None:
    """Write the files of a report as `write_all` does, and remove those of the one before that it has not any more.

    A file that was changed since it was written is nobody's but the user's, and stays.

    Args:
        output: the report's folder.
        files: all of them, below it.

    Raises:
        ExperimentError: see `write_all`.
    """
    now = {path.relative_to(output).as_posix(): [fingerprint([content])] for path, content in files.items()}
    before = _listed(output / LIST)
    # Until all of it is done, so that a report that is killed leaves nothing that the next one does not know.
    both = {name: [*before.get(name, ()), *now.get(name, ())] for name in before.keys() | now.keys()}
    write_all({output / LIST: _as_list(both), **files})
    for name in before.keys() - now.keys():
        _remove(output, name, before[name])
    write_all({output / LIST: _as_list(now)})


def _as_list(hashes: Mapping[str, Sequence[object]]) -> bytes:
    return (json.dumps(hashes, indent=0, sort_keys=True) + "\n").encode()


def _listed(path: Path) -> dict[str, list[object]]:
    """What the report before has written, or was writing, by name below its folder; nothing where that is not known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    listed = content if isinstance(content, dict) else {}
    return {name: hashes if isinstance(hashes, list) else [hashes] for name, hashes in listed.items()}


def _remove(output: Path, name: str, written: Sequence[object]) -> None:
    """Remove a file that holds what was written, and folders that are empty then."""
    path = output / name
    with contextlib.suppress(OSError, ValueError):
        inside = ".." not in path.parts and path.resolve().is_relative_to(output.resolve())
        if inside and fingerprint([path.read_bytes()]) in written:
            path.unlink()
            for folder in itertools.takewhile(lambda folder: folder != output, path.parents):
                folder.rmdir()  # ends at the first that is not empty


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
