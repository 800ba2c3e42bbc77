"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from experiment.signals import held

PART = ".part"  # how the names of files end that are being written


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write and read, which takes its place at the end of the block, whole, or leaves no trace.

    It is written in the folder of its target, so that it is renamed there and not copied from another disk.
    """
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except BaseException as error:
        Path(part).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, part):
            error.filename = str(path)
        raise
    _flush_names(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that no reader, and no crash, ever meets half of it."""
    with held(), whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing in a folder and in those right below it."""
    for pattern in (f".*{PART}", f"*/.*{PART}"):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is made if it is not there; waits until no other process holds it."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flush_names(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
