"""Folders and archives: made whole or not at all, unpacked without trust, counted before they are used."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiment import ExperimentError, archives
from experiment.contents import content_hashes, require_uncut
from experiment.files import PART

MOST_BYTES = 64 * 2**30  # of an archive when unpacked; the largest, Cityscapes' images, has 11 GB


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `target` at the end, or is gone if anything fails.

    Raises:
        ExperimentError: `target` is there already, or cannot be written.
    """
    if target.exists():
        raise ExperimentError(f"{target} is there already; delete it to make it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART))
    except OSError as error:
        raise ExperimentError(f"{target} cannot be written ({error.strerror}); give another --data-dir") from None
    with _in_work(part):
        try:
            yield part
            part.chmod(0o755)
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _remove_left(target: Path) -> None:
    """Remove what killed processes left of a folder that they were making."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):
        with _in_work(part) as own:
            if own:
                shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _in_work(folder: Path) -> Iterator[bool]:
    """Tell other processes of this machine that a folder is being made; gives whether it is known that none has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:  # or the file system has no locks
            alone = False
        yield alone
    finally:
        os.close(handle)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of a data set into a folder; see `experiment.archives.unpack`.

    Raises:
        ExperimentError: the archive is missing or damaged, or holds what it must not hold.
    """
    if not archive.is_file():
        raise ExperimentError(f"there is no archive {archive}; see python -m segmentation prepare --help")
    archives.unpack(archive, folder, MOST_BYTES)


def expect_count(found: int, expected: int, what: str) -> None:
    """Raise `ExperimentError` unless as many things were found as the data set has."""
    if found != expected:
        raise ExperimentError(f"{found} {what} found, {expected} expected; the archive is not whole, fetch it again")


def read_list(path: Path) -> list[str]:
    """Names in a split's list, one a line.

    Raises:
        ExperimentError: the list cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read ({error.strerror}); prepare the data set first") from None
    return [line.strip() for line in lines if line.strip()]


def file_hashes(root: Path, files: Iterable[Path]) -> dict[Path, bytes]:
    """A hash of the bytes of each file of a data set in `root`.

    Every file is read once, and then known by its size and times; see `experiment.contents`.

    Raises:
        ExperimentError: an image was cut.
    """
    paths, store = sorted(files), root.parent / f".{root.name}.contents.npz"
    return dict(zip(paths, content_hashes(paths, store, require_uncut), strict=True))


def fingerprint_of(hashes: Iterable[tuple[str, bytes]]) -> str:
    """A short hash of files' names and bytes, whatever their order."""
    lines = (f"{name} {digest.hex()}" for name, digest in hashes)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
